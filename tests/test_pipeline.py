"""What a run folder does when its data changes."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.mini_data import make_mini_data
from umarvel_ray.errors import UserError
from umarvel_ray.pipeline import plan_stage1, run_pipeline
from umarvel_ray.preflight import check_tables
from umarvel_ray.recipe import load_recipe
from umarvel_ray.runs import Run


def test_a_plan_is_used_again_only_for_the_data_it_was_made_from(ray_cluster, tmp_path):
    folder = make_mini_data(tmp_path / "data")
    recipe = load_recipe("demo", [f"data.root={folder}", f"output={tmp_path / 'run'}", "stage1.text=null",
                                  "stage1.image_text=null", "stage1.instruction.batch_size=4"])  # fmt: skip
    [phase] = plan_stage1(Run.open(recipe)).phases
    written = phase.spec.plan_path.stat().st_mtime_ns
    plan_stage1(Run.open(recipe))
    assert phase.spec.plan_path.stat().st_mtime_ns == written
    documents = pq.read_table(folder / "documents.parquet")
    pq.write_table(pa.concat_tables([documents.slice(1), documents.slice(0, 1)]), folder / "documents.parquet")
    with pytest.raises(UserError, match=r"plan\.parquet: 'instruction' was planned on other data"):
        plan_stage1(Run.open(recipe))


def test_a_table_of_a_later_stage_is_missed_before_the_first_is_trained(tmp_path):
    folder = make_mini_data(tmp_path / "data")
    (folder / "validation.parquet").unlink()
    changes = [f"data.root={folder}", f"output={tmp_path / 'run'}", "stage1.text=null", "stage1.image_text=null"]
    with pytest.raises(UserError, match=r"validation\.parquet: not found"):
        run_pipeline(Run.open(load_recipe("demo", changes)))
    assert not (tmp_path / "run" / "train").exists()


def test_an_instruction_that_leaves_no_room_for_a_text_is_missed_before_the_first_step(tmp_path):
    folder = make_mini_data(tmp_path / "data")
    changes = [f"data.root={folder}", f"output={tmp_path / 'run'}", "model.max_text_tokens=6"]
    with pytest.raises(UserError, match=r"max_text_tokens 6 leaves no room for a text after the instruction '\w"):
        check_tables(Run.open(load_recipe("demo", changes)))
