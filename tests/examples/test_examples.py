"""The example scripts, run as their docstrings say, on the data that is shipped."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from ray import serve

from tests.conftest import REPO
from tests.support.served import service_of
from umarvel_ray.model.checkpoint import read_provenance
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.serving.app import build

EXAMPLES = REPO / "examples"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Imports an example by its name; it runs in a folder of its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_every_example_says_how_to_run_it():
    for file in EXAMPLES.glob("*.py"):
        text = file.read_text()
        if "__main__" in text:
            assert f"    python examples/{file.name}" in text.split('"""')[1], file.name


def test_pictures_of_the_demo_are_found_by_a_text(script, capsys):
    script("search_pictures").main(["a dog"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    scores = [float(re.fullmatch(r"(-?\d\.\d{3})  runs/pictures/\S+\.webp", line)[1]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert len(list(Path("runs/pictures").iterdir())) == 300


def test_a_folder_and_a_checkpoint_can_be_named(script, capsys, run, tmp_path):
    folder = script("demo_files").demo_pictures(tmp_path / "mine", 4)
    first = sorted(folder.iterdir())[0]
    model = str(run / "checkpoints" / "distillation")
    script("search_pictures").main(["", "--image", str(first), "--folder", str(folder), "--model", model, "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    [score] = Embedder.from_pretrained(model).similarity(
        *(
            Embedder.from_pretrained(model).encode_query({"image": str(first), "instruction": instruction})
            for instruction in ("Find a picture that matches the description.", None)
        )
    )[0]
    assert f"{score:.3f}  {first}" in lines


def test_fine_tuning_on_a_jsonl_file(script, capsys, ray_cluster, tmp_path):
    rows = script("demo_files").demo_jsonl(tmp_path / "rows.jsonl", rows=40)
    parsed = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(parsed) == 40
    assert any("image" in row["query"] for row in parsed)
    assert any("image" in row["positive"] for row in parsed)
    script("finetune_jsonl").main([str(rows), "--steps", "2", "--batch-size", "8", "--output", "out"])
    before, after, where = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"recall@1 of the base on 8 held-out rows: [01]\.\d\d", before)
    assert re.fullmatch(r"recall@1 after 2 steps on 32 rows: [01]\.\d\d", after)
    checkpoint = Path(where.removeprefix("the checkpoint: "))
    assert read_provenance(checkpoint)["phase"] == "hard-negatives"
    with pytest.raises(SystemExit):
        script("finetune_jsonl").main([str(rows), "--output", "out"])


def test_every_row_keeps_its_own_negatives(script, tmp_path):
    example = script("finetune_jsonl")
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"query": "boats", "positive": {"image": "boat.png"}, "negatives": ["snow", {"image": "fox.png", "text": "a"}]},
        {
            "query": {"text": "snow", "instruction": "Find it."},
            "positive": "snow",
            "negatives": [{"image": "boat.png"}],
        },
        {"query": "a tree", "positive": "a tree"},
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    negatives = example.write_tables(example.read_rows(rows), tmp_path / "data")
    assert [rows.tolist() for rows in negatives.lists()] == [[1, 2], [0], []]
    documents = example.pq.read_table(tmp_path / "data/documents.parquet").to_pylist()
    assert [row["modality"] for row in documents] == ["image", "text", "image,text", "text"]
    assert documents[0]["image"] == str(tmp_path / "boat.png")
    queries = example.pq.read_table(tmp_path / "data/train.parquet")
    assert queries["positive_ids"].to_pylist() == [["d0"], ["d1"], ["d3"]]
    assert queries["instruction"].to_pylist() == [None, "Find it.", None]


def test_contexts_that_hold_the_answer_are_counted(script, capsys, run, tmp_path):
    example = script("rag")
    model, reranker = (str(run / "checkpoints" / name) for name in ("distillation", "reranker"))
    words = ["--model", model, "--reranker", reranker, "--questions", "6", "--out", str(tmp_path / "found.json")]
    example.main(words)
    lines = capsys.readouterr().out.splitlines()
    documents, asked = example.demo_questions(False)
    assert lines[0] == f"6 questions, {len(documents)} documents, 0 with a picture"
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == ["BM25", "embedder", "embedder, reranked"]
    assert found["BM25"]["10"] > 0.5  # descriptions share words with their paragraphs

    answerable = [one for one in asked if any(example.holds(one, document["text"]) for document in documents)]
    chosen = sorted(np.random.default_rng(0).permutation(len(answerable))[:6])
    embedder = Embedder.from_pretrained(model)
    vectors = embedder.encode_document(documents)
    for depth in (1, 5, 10):
        held = []
        for question in (answerable[number] for number in chosen):
            query = embedder.encode_query({"text": question.text, "instruction": example.INSTRUCTION})
            best = np.argsort(-(vectors @ query), kind="stable")[:depth]
            held.append(any(question.answer.lower() in documents[number]["text"].lower() for number in best))
        assert found["embedder"][str(depth)] == pytest.approx(np.mean(held), abs=1 / 6 + 1e-9)


def test_an_answer_is_a_whole_word_in_any_case(script):
    example = script("rag")
    question = example.Question("largest species of deer", "moose")
    assert example.holds(question, "The Moose is a deer.")
    assert not example.holds(question, "Moosehead Lake")
    assert not example.holds(question, None)


def test_the_service_is_called(script, capsys, run, address):
    serve.run(build(service_of(run)), name="umarvel", route_prefix="/")
    script("call_service").main(["--url", address, "--query", "a red fox"])
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"embedding by 'distillation': \d+ dimensions, \d+ tokens", lines[0])
    assert lines[1] == "documents by relevance:"
    assert lines[5] == "found in the index:"
    assert len(lines) == 12
    assert re.fullmatch(r"OpenAI's client: 3 embeddings of \d+ dimensions", lines[-1])
