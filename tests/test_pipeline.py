"""What a run folder does when its data changes."""

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.support.mini_data import make_mini_data
from umarvel_ray.cli import open_run
from umarvel_ray.errors import UserError
from umarvel_ray.pipeline import plan_stage1
from umarvel_ray.preflight import check_job
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


def recipe_of(folder, root, *changes):
    return load_recipe("demo", [f"data.root={root}", f"output={folder}", "stage1.text=null", "stage1.image_text=null",
                                "stage1.instruction.batch_size=4", *changes])  # fmt: skip


def test_a_table_of_a_later_stage_is_missed_before_the_first_is_trained(tmp_path):
    folder = make_mini_data(tmp_path / "data")
    (folder / "validation.parquet").unlink()
    with pytest.raises(UserError, match=r"validation\.parquet: not found"):
        check_job(Run.open(recipe_of(tmp_path / "run", folder)), "pipeline")


def test_validation_is_needed_only_to_calibrate(tmp_path):
    folder = make_mini_data(tmp_path / "data")
    (folder / "validation.parquet").unlink()
    changes = ["stage2.mining.max_similarity=0.9", "evaluate.rerank_weight=1.0", "stage3.sample=0.5"]
    fits = ["stage2.train.batch_size=4", *changes]
    check_job(Run.open(recipe_of(tmp_path / "run", folder, *fits)), "pipeline")


@pytest.mark.parametrize(("job", "split"), [("stage2", "train"), ("pipeline", "test"), ("mine", "validation")])
def test_a_task_without_a_pool_is_missed_before_the_first_is_trained(tmp_path, job, split):
    folder = make_mini_data(tmp_path / "data")
    pools = pq.read_table(folder / "pools.parquet")
    [task, *_] = pc.unique(pq.read_table(folder / f"{split}.parquet")["task"]).to_pylist()
    kept = pc.invert(pc.and_(pc.equal(pools["split"], split), pc.equal(pools["task"], task)))
    pq.write_table(pools.filter(kept), folder / "pools.parquet")
    with pytest.raises(UserError, match=rf"no pool for task '{task}' in split '{split}'"):
        check_job(Run.open(recipe_of(tmp_path / "run", folder)), job)


@pytest.mark.parametrize(
    ("job", "key", "table"),
    [("stage1", "model", "train"), ("pipeline", "model", "train"), ("stage2", "model", "train"),
     ("reranker", "reranker", "train"), ("stage3", "reranker", "train"), ("pipeline", "reranker", "train")],
)  # fmt: skip
def test_an_instruction_that_leaves_no_room_for_a_text_is_missed_before_the_first_step(tmp_path, job, key, table):
    folder = make_mini_data(tmp_path / "data")
    recipe = recipe_of(tmp_path / "run", folder, f"{key}.max_text_tokens=6")
    message = rf"data: {table}: {key}\.max_text_tokens 6 leaves no room for a text after the instruction '\w"
    with pytest.raises(UserError, match=message):
        check_job(Run.open(recipe), job)


def test_the_rerankers_limit_is_none_of_stage_1_and_an_instruction_beside_a_picture_alone_may_be_of_any_length(
    tmp_path,
):
    folder = make_mini_data(tmp_path / "data")
    check_job(Run.open(recipe_of(tmp_path / "run", folder, "reranker.max_text_tokens=6")), "stage1")
    train = pq.read_table(folder / "train.parquet")
    alone = train.filter(pc.and_(pc.is_null(train["text"]), pc.is_valid(train["image"])))
    pq.write_table(alone, folder / "train.parquet")
    check_job(Run.open(recipe_of(tmp_path / "other", folder, "model.max_text_tokens=6")), "stage1")


@pytest.mark.parametrize(
    ("job", "changes", "message"),
    [
        ("stage1", ["stage1.instruction.batch_size=500"],
         r"'train' has \d+ queries .* one batch, fewer than stage1\.instruction\.batch_size \(500\); add rows"),
        ("stage2", ["stage2.mining.max_queries=5", "stage2.train.batch_size=8"],
         r"'train' has 5 queries .* fewer than stage2\.train\.batch_size \(8\)"),
        ("pipeline", ["stage3.sample=0.001"], r"'train': stage3\.sample is 0\.001, none of its 96 queries; raise it"),
        ("stage3",
         ["stage3.sample=0.1", "stage3.train={kind: contrastive, queries: train, batch_size: 32, learning_rate: 1}"],
         r"'train' has 10 queries .* fewer than stage3\.train\.batch_size \(32\)"),
    ],
)  # fmt: skip
def test_too_few_queries_are_said_before_ray_starts_and_leave_no_recipe_behind(tmp_path, job, changes, message):
    folder, run = make_mini_data(tmp_path / "data"), tmp_path / "run"
    with pytest.raises(UserError, match=message), open_run(recipe_of(run, folder, *changes), job=job):
        pytest.fail("Ray was started")
    assert Run.open(recipe_of(run, folder, "seed=7")).dir == run


def test_pools_of_nothing_but_positives_have_no_negatives_for_the_reranker(tmp_path):
    folder = make_mini_data(tmp_path / "data", {"train": 1}, pool=0)
    with pytest.raises(UserError, match=r"'train': no query has another document in its pool than its positives"):
        check_job(Run.open(recipe_of(tmp_path / "run", folder)), "reranker")
