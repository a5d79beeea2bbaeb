"""`umarvel search`: rankings equal a computation by hand with the newest model, and are printed and written."""

from __future__ import annotations

import base64
import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.support.tiny_run import TEXTS, make_run, picture
from umarvel_ray import search
from umarvel_ray.errors import UserError
from umarvel_ray.index.faiss_index import build_index
from umarvel_ray.index.hits import Hit
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.recipe import load_recipe

QUERY = {"text": "a bird on a boat", "instruction": "Find an image that matches the caption."}


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory):
    return make_run(tiny_base, tmp_path_factory.mktemp("runs") / "tiny")


def by_hand(run):
    """Every document's cosine to the query, from the model alone."""
    rows = pq.read_table(run / "data" / "documents.parquet").to_pylist()
    items = [{key: row[key] for key in ("text", "image") if row[key] is not None} for row in rows]
    model = Embedder.from_pretrained(run / "checkpoints" / "distillation")
    cosines = model.encode_document(items) @ model.encode_query([QUERY])[0]
    return {row["id"]: (cosine, item) for row, cosine, item in zip(rows, cosines, items, strict=True)}


def test_ranks_by_cosine(run):
    expected = sorted(((float(cosine), id_) for id_, (cosine, _) in by_hand(run).items()), reverse=True)[:4]
    hits = search.search_run(run, QUERY, top_k=4)
    assert [hit.document["id"] for hit in hits] == [id_ for _, id_ in expected]
    np.testing.assert_allclose([hit.score for hit in hits], [cosine for cosine, _ in expected], atol=1e-5)


def test_reranks_by_cosine_plus_yes(run):
    found = by_hand(run)
    yes = Reranker.from_pretrained(run / "checkpoints" / "reranker").score(QUERY, [item for _, item in found.values()])
    fused = {id_: cosine + p for (id_, (cosine, _)), p in zip(found.items(), yes, strict=True)}
    hits = search.search_run(run, QUERY, top_k=5, rerank=True)
    assert [hit.document["id"] for hit in hits] == sorted(fused, key=fused.get, reverse=True)[:5]
    np.testing.assert_allclose([hit.score for hit in hits], sorted(fused.values(), reverse=True)[:5], atol=1e-5)
    assert len({round(hit.rerank_score, 6) for hit in hits}) > 1


def test_a_document_finds_itself(run):
    [best, *_] = search.search_run(run, {"image": picture(3)}, top_k=3)
    assert best.document["id"] == "i3"
    assert best.score == pytest.approx(1.0, abs=1e-5)


def test_a_saved_index_answers_the_same(run, tmp_path):
    data = load_recipe(str(run / "recipe.yaml")).data
    build_index(run / "evaluation" / "distillation" / "test-documents", tmp_path / "index")
    vector = np.eye(32, dtype=np.float32)[0]
    saved, fresh = (
        search.Corpus.open(f, data)
        for f in (tmp_path / "index", run / "evaluation" / "distillation" / "test-documents")
    )
    assert saved.search(vector, 5) == fresh.search(vector, 5)


def test_more_than_there_is(run):
    assert len(search.search_run(run, QUERY, top_k=100)) == 3 * len(TEXTS)


def test_the_newest_phase_with_its_own_embeddings_is_used(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "checkpoints" / "distillation").rename(folder / "checkpoints" / "instruction")
    (folder / "evaluation" / "distillation").rename(folder / "evaluation" / "instruction")
    instruction = (folder / "checkpoints" / "instruction", folder / "evaluation" / "instruction" / "test-documents")
    assert search.newest(folder) == instruction

    newer = folder / "checkpoints" / "hard-negatives"
    shutil.copytree(instruction[0], newer)
    assert search.newest(folder) == instruction  # nothing is embedded with the newer one yet
    whole = folder / "embeddings" / "documents"
    shutil.copytree(instruction[1], whole)
    assert search.newest(folder) == (newer, whole)

    config = json.loads((newer / "config.json").read_text())
    (newer / "config.json").write_text(json.dumps(config, indent=7))
    assert search.newest(folder) == (instruction[0], whole)  # the embeddings are of another model


def test_the_weight_that_evaluation_calibrated_is_used(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "evaluation" / "rerank").mkdir()
    notes = {"notes": {"weight local": 9.0, "weight global": 0.0}}
    (tmp_path / "run" / "evaluation" / "rerank" / "result.json").write_text(json.dumps(notes))
    plain, weightless = (search.search_run(tmp_path / "run", QUERY, 5, rerank) for rerank in (False, True))
    assert [hit.document for hit in weightless] == [hit.document for hit in plain]


def test_without_a_trained_model(tmp_path):
    with pytest.raises(UserError, match="make demo"):
        search.search_run(tmp_path, QUERY)


def test_embeddings_of_another_corpus(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    table = pq.read_table(tmp_path / "run" / "data" / "documents.parquet")
    pq.write_table(table.slice(1), tmp_path / "run" / "data" / "documents.parquet")
    recipe = (tmp_path / "run" / "recipe.yaml").read_text().replace(str(run), str(tmp_path / "run"))
    (tmp_path / "run" / "recipe.yaml").write_text(recipe)
    with pytest.raises(UserError, match="'t0'"):
        search.search_run(tmp_path / "run", QUERY)


def test_lines_name_each_hit(run):
    hits = search.search_run(run, QUERY, top_k=6)
    lines = search.as_lines(hits).splitlines()
    assert [line.split()[2] for line in lines] == [hit.document["id"] for hit in hits]
    assert all(f"{hit.score:.3f}" in line for hit, line in zip(hits, lines, strict=True))


def test_the_page_holds_its_pictures(run, tmp_path):
    hits = search.search_run(run, {"image": picture(3)}, top_k=15)
    query = {"text": '<b>bold & "quoted"</b>', "image": picture(7)}
    search.write_page(tmp_path / "page.html", query, hits)
    page = (tmp_path / "page.html").read_text()
    shown = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert shown == [picture(7), *[hit.document["image"] for hit in hits if hit.document["image"]]]
    assert "<b>" not in page
    assert "http" not in page


def test_the_page_shows_all_pictures_of_a_document(tmp_path):
    document = {"id": "d", "text": None, "image": [picture(1), picture(2)], "modality": "image", "source": "s"}
    search.write_page(tmp_path / "page.html", {"text": "a"}, [Hit(document, 0.5)])
    shown = re.findall(r'src="data:image/png;base64,([^"]+)"', (tmp_path / "page.html").read_text())
    assert [base64.b64decode(data) for data in shown] == [picture(1), picture(2)]


def test_a_page_that_cannot_be_written(run, tmp_path):
    with pytest.raises(UserError, match="--html"):
        search.write_page(tmp_path / "missing" / "page.html", QUERY, [])
