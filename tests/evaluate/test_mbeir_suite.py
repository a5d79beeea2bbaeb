"""M-BEIR as published: all tasks, both kinds of pools, the paper's k, prompts, protocols, reranking, held-out tasks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.common.mbeir_folder import write_mbeir_folder
from tests.retrieve.test_measures import one_by_one
from tests.support.real_mbeir import make_real_mbeir
from umarvel_ray.data.mbeir import prompt_count
from umarvel_ray.evaluate.measured import mean_of, read_measured
from umarvel_ray.evaluate.published import published_tables
from umarvel_ray.evaluate.results import ranking_folder
from umarvel_ray.evaluate.suites import MBEIR_METRICS, Model, Protocol, measure_mbeir, open_mbeir
from umarvel_ray.inference.shards import read_manifest
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.retrieve.fusion import WEIGHTS
from umarvel_ray.retrieve.rank import read_ranking
from umarvel_ray.suites.registry import HELD_OUT, HELD_OUT_TASKS, MBEIR

TASKS = {column.task for column in published_tables()[0].columns[:-1]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mbeir") / "M-BEIR"
    write_mbeir_folder(folder, 0.00004, text=0.05)
    query = json.loads((folder / "query/test/mbeir_cirr_task7_test.jsonl").read_text().splitlines()[0])
    shown = {"did": "8:9000000", "txt": None, "img_path": query["query_img_path"], "modality": "image"}
    with (folder / "cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl").open("a") as pool:
        pool.write(json.dumps(shown) + "\n")
    return folder


@pytest.fixture(scope="module")
def model(tiny_base, recipe):
    return Model("tiny", CheckpointRef.of(tiny_base, recipe.model))


@pytest.fixture(scope="module")
def measure(root, embedders, rerankers, reranker_ref, recipe, model, tmp_path_factory):
    """Runs M-BEIR; folders are shared by all runs, as those of one output are."""
    out = tmp_path_factory.mktemp("out")

    def run(protocol: Protocol, reranked: bool = False, benchmark: str = MBEIR, data=root):
        judge = Model("judge", reranker_ref) if reranked else None
        folder = out / f"{benchmark}-{data.name}-{'-'.join(map(str, protocol))}"
        cache = out / "tables"
        rows = measure_mbeir(embedders, rerankers, data, cache, benchmark, model, judge, folder, protocol, recipe)
        return rows, folder

    return run


def expected(data, folder, scope: str) -> dict[str, dict[str, float]]:
    """The metrics of saved rankings, one query at a time."""
    queries, values = data.queries("test"), {}
    found = {row["query"]: row["documents"] for row in read_ranking(ranking_folder(folder, scope)).to_pylist()}
    for row, positives, code in zip(queries.rows.tolist(), queries.positives.lists(), queries.task, strict=True):
        task = queries.tasks[code]
        k = 10 if task in ("fashion200k_task0", "fashion200k_task3", "fashioniq_task7") else 5
        own = values.setdefault(task, {name: [] for name in ("recall", *MBEIR_METRICS)})
        for name in own:
            metric = f"R@{k}" if name == "recall" else name
            own[name].append(one_by_one(metric, found[row], set(positives.tolist())))
    return {task: {name: float(np.mean(rows)) for name, rows in own.items()} for task, own in values.items()}


def test_all_tasks_in_both_kinds_of_pools(measure, root, tmp_path):
    [row], folder = measure(Protocol())
    data = open_mbeir(root, tmp_path)
    for scope in ("local", "global"):
        wanted = expected(data, folder, scope)
        assert wanted.keys() == TASKS
        for task, numbers in wanted.items():
            assert {name: row.scores[scope][task][name] for name in numbers} == pytest.approx(numbers)
    assert [row.origin for row in published_tables()[0].beside([row])][-1] == "measured"
    assert row.value("local", "average", "recall") == pytest.approx(
        np.mean([numbers["recall"] for numbers in row.scores["local"].values()])
    )
    assert read_measured(folder) == [row]


def test_the_reference_keeps_the_querys_picture_and_its_weight(measure):
    """A document shows the picture of CIRR's query."""
    (_, ours), ([reference, reranked], theirs) = measure(Protocol()), measure(Protocol(reference=True), reranked=True)
    assert reference.notes == {"protocol": "reference"}
    assert reranked.notes["weight local"] == reranked.notes["weight global"] == 0.1
    sizes = [
        {row["task"]: row["pool_size"] for row in read_ranking(ranking_folder(folder, "local")).to_pylist()}
        for folder in (ours, theirs)
    ]
    assert sizes[1]["cirr_task7"] == sizes[0]["cirr_task7"] + 1
    assert sizes[1]["webqa_task1"] == sizes[0]["webqa_task1"]


def test_the_weight_is_calibrated_on_validation(measure):
    [alone, reranked], folder = measure(Protocol(weight="calibrate"), reranked=True)
    assert {reranked.notes[f"weight {scope}"] for scope in ("local", "global")} <= set(WEIGHTS)
    assert (folder / "validation/validation-queries").is_dir()
    assert reranked.model == "tiny + judge"
    assert reranked.scores.keys() == alone.scores.keys()
    assert len(read_measured(folder)) == 2


def test_prompts_can_be_averaged(measure, root, tmp_path):
    [row], folder = measure(Protocol(prompts="average"))
    assert prompt_count(root) == 4
    assert row.notes == {"prompts": "average"}
    told = {open_mbeir(root, tmp_path, prompt=n).queries("test").table.codes("instruction")[1][0] for n in range(4)}
    assert len(told) == 4
    parts = []
    for number in range(4):
        data = open_mbeir(root, tmp_path, prompt=number)
        found = {scope: expected(data, folder / f"prompt-{number}", scope) for scope in ("local", "global")}
        parts.append(found)
    averaged = mean_of(parts)
    for scope, tasks in averaged.items():
        for task, numbers in tasks.items():
            assert {name: row.scores[scope][task][name] for name in numbers} == pytest.approx(numbers)
    assert read_manifest(folder / "test-documents")["complete"]
    assert not list(folder.glob("prompt-*/test-documents"))  # documents have no instruction: they are embedded once


def test_held_out_tasks_only(measure):
    [row, reranked], _ = measure(Protocol(weight="calibrate"), reranked=True, benchmark=HELD_OUT)
    assert set(row.scores["local"]) == set(reranked.scores["global"]) == set(HELD_OUT_TASKS)
    assert published_tables()[0].beside([row]) == []


def test_real_queries_qrels_and_prompts(measure, shared_dir, tmp_path):
    """Every published task that is at hand; the pools are generated around its relevant documents."""
    data_root = tmp_path / "real"
    tasks = make_real_mbeir(data_root, shared_dir, per_task=4)
    assert len(tasks) == 9
    data = open_mbeir(data_root, tmp_path / "tables")
    data.validate("test")
    queries = data.queries("test")
    assert queries.n == 36
    rows = queries.table.rows(queries.rows, ("id", "instruction", "task"))
    real = (data_root / "instructions/query_instructions.tsv").read_text()
    assert all(row["instruction"] in real for row in rows)
    published = [json.loads(line)["qid"] for line in (data_root / "query/test/mbeir_cirr_task7_test.jsonl").open()]
    assert [row["id"] for row in rows if row["task"] == "cirr_task7"] == published
    [row], folder = measure(Protocol(), data=data_root)
    for scope in ("local", "global"):
        for task, numbers in expected(data, folder, scope).items():
            assert {name: row.scores[scope][task][name] for name in numbers} == pytest.approx(numbers)
