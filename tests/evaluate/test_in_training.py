"""Recall beside training: that of the evaluation afterwards, for every saved state, on the sample that is asked for."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.mini_data import make_mini_data
from umarvel_ray.cli import open_run
from umarvel_ray.data.dataset import item_of
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.checkpoints import evaluate_checkpoint
from umarvel_ray.evaluate.in_training import recall_by_task, sample_of
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.pipeline import open_actors, train_stage1
from umarvel_ray.preflight import check_job
from umarvel_ray.recipe import Data, load_recipe
from umarvel_ray.runs import Run, read_step_log

STEPS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_mini_data(tmp_path_factory.mktemp("mini"))


def recipe_of(folder, base, output, *changes):
    return load_recipe("demo", [
        f"base={base}", f"data.root={folder}", f"output={output}", "stage1.text=null", "stage1.image_text=null",
        "stage1.instruction.batch_size=4", f"stage1.instruction.max_steps={STEPS}",
        "stage1.instruction.checkpoint_every=2", "stage1.instruction.homogeneous=0", *changes,
    ])  # fmt: skip


def test_each_saved_state_is_measured_as_the_evaluation_would(ray_cluster, tiny_base, data, tmp_path):
    whole = "evaluate.in_training={queries: 10000, max_pool: 10000}"
    recipe = recipe_of(data, tiny_base, tmp_path / "run", whole, "evaluate.k=3")
    with open_run(recipe) as run:
        train_stage1(run)
        folder = run.dir / "train" / "instruction"
        with open_actors(run) as actors:
            ref = CheckpointRef.of(run.checkpoint("instruction"))
            result = evaluate_checkpoint(
                actors.embedders, run.open_dataset(), recipe, ref, "instruction", tmp_path / "after", "validation"
            )
    measured = read_step_log(folder / "in-training.jsonl")
    assert [line["step"] for line in measured] == [1, 3, STEPS - 1]
    after = {task: value for task, value in result.local.items() if task != "average"}
    assert measured[-1]["tasks"] == pytest.approx(after, abs=1e-9)
    assert measured[-1]["recall"] == pytest.approx(result.local["average"], abs=1e-9)
    assert len(read_step_log(folder / "log.jsonl")) == STEPS
    events = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("recall")
    assert {event.step: event.value for event in events} == {
        line["step"]: pytest.approx(line["recall"]) for line in measured
    }


def test_a_sample_has_the_positives_and_no_more_documents_than_asked_for(tiny_base, data, tmp_path):
    recipe = recipe_of(data, tiny_base, tmp_path, "evaluate.in_training={queries: 9, max_pool: 4}")
    dataset = open_dataset(Data(root=str(data), cache=str(tmp_path / "cache")))
    sample = sample_of(dataset, recipe)
    assert sum(task.queries.n for task in sample.tasks) == 9
    queries = dataset.queries("validation")
    for task in sample.tasks:
        at = np.searchsorted(queries.rows, task.queries.rows)
        positives = {sample.documents.rows[place] for place in task.positives.values}
        assert positives == set(queries.positives.take(at).values)
        assert set(task.positives.values) <= set(task.pool)
        assert len(task.pool) <= 4 + len(positives)
    again = sample_of(dataset, recipe)
    assert [task.queries.rows.tolist() for task in again.tasks] == [task.queries.rows.tolist() for task in sample.tasks]


def test_recall_is_brute_force_and_unreadable_items_are_not_found(tiny_base, data, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.glob("*.parquet"):
        pq.write_table(pq.read_table(path), folder / path.name)
    documents = pq.read_table(folder / "documents.parquet").to_pylist()
    shown = [row for row in documents if row["image"]]
    for row in shown[::3]:
        row["image"] = b"not a picture"
    pq.write_table(pa.Table.from_pylist(documents, pq.read_schema(folder / "documents.parquet")),
                   folder / "documents.parquet")  # fmt: skip
    recipe = recipe_of(folder, tiny_base, tmp_path, "evaluate.in_training={queries: 1000}", "evaluate.k=2")
    dataset = open_dataset(Data(root=str(folder), cache=str(tmp_path / "cache")))
    sample = sample_of(dataset, recipe)
    embedder = Embedder.from_pretrained(tiny_base, "cpu", settings=recipe.model)
    found = recall_by_task(embedder, sample)

    def vector(row, side):
        try:
            return embedder.encoder.encode(item_of(row), side, "item")
        except UserError:
            return None

    queries = pq.read_table(folder / "validation.parquet").to_pylist()
    pools = {(p["task"], p["split"]): p["document_ids"] for p in pq.read_table(folder / "pools.parquet").to_pylist()}
    by_id = {row["id"]: row for row in documents}
    vectors = {}
    for side, rows in (("query", queries), ("document", documents)):
        readable = [(row["id"], encoded) for row in rows if (encoded := vector(row, side)) is not None]
        found_vectors = embedder.embed_encoded([one for _, one in readable])
        vectors[side] = dict(zip([id_ for id_, _ in readable], found_vectors, strict=True))
    surely, perhaps = {}, {}  # the same picture twice has the same score but for rounding
    for query in queries:
        scores = {}
        for id_ in pools[query["task"], "validation"]:
            own = query["image"] and by_id[id_]["image"] == query["image"] and id_ not in query["positive_ids"]
            if id_ in vectors["document"] and not own:
                scores[id_] = float(vectors["query"][query["id"]] @ vectors["document"][id_])
        best = max([scores[id_] for id_ in query["positive_ids"] if id_ in scores], default=-np.inf)
        others = np.array([score for id_, score in scores.items() if id_ not in query["positive_ids"]])
        k = recipe.evaluate.k_of.get(query["task"], 2)
        surely.setdefault(query["task"], []).append(best > -np.inf and (others > best - 1e-5).sum() < k)
        perhaps.setdefault(query["task"], []).append(best > -np.inf and (others > best + 1e-5).sum() < k)
    for task, recall in found.items():
        assert np.mean(surely[task]) - 1e-9 <= recall <= np.mean(perhaps[task]) + 1e-9
    assert 0 < np.mean(list(found.values())) < 1
    assert sum(map(sum, perhaps.values())) - sum(map(sum, surely.values())) <= 3


def test_missing_validation_queries_are_missed_before_training(tiny_base, data, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.glob("*.parquet"):
        if path.stem != "validation":
            pq.write_table(pq.read_table(path), folder / path.name)
    check_job(Run.open(recipe_of(folder, tiny_base, tmp_path / "a")), "stage1")
    with pytest.raises(UserError, match=r"validation\.parquet: not found"):
        check_job(Run.open(recipe_of(folder, tiny_base, tmp_path / "b", "evaluate.in_training={}")), "stage1")


def test_the_report_shows_the_curve(tmp_path):
    from umarvel_ray.evaluate.report import _curves

    folder = tmp_path / "train" / "text"
    folder.mkdir(parents=True)
    step = {"loss": 1.0, "seconds": 1.0, "wait_share": 0.0, "samples_per_s": 1.0}
    (folder / "log.jsonl").write_text("".join(json.dumps(step | {"step": n}) + "\n" for n in range(4)))
    lines = [{"step": 1, "recall": 0.25, "tasks": {}}, {"step": 3, "recall": 0.5, "tasks": {}}]
    (folder / "in-training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = type("Run", (), {"dir": tmp_path})()
    [curve] = _curves(run)
    names = [name for name, _ in curve["charts"]]
    assert names == ["loss", "recall, validation"]
    assert ">2<" in curve["charts"][1][1]
    assert ">4<" in curve["charts"][1][1]
