"""TREC run files."""

from urllib.parse import unquote

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.rankings import make_ranking
from umarvel_ray.evaluate import trec
from umarvel_ray.evaluate.trec import write_run

RANKING = make_ranking([(3, "t", [(2, 0.75), (1, 0.5)], 9), (0, "t", [(1, 1.0)], 9), (1, "t", [], 9)])
QUERIES, DOCUMENTS = pa.array(["q2", "q3", "q4", "q1"]), pa.array(["d0", "d1", "d2"])


@pytest.mark.parametrize("at_once", [1, 2, 1024])
def test_a_run_file_has_the_trec_format(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(trec, "QUERIES", at_once)
    path = tmp_path / "run.trec"
    write_run(path, RANKING, QUERIES, DOCUMENTS, "umarvel")
    assert path.read_text().splitlines() == [
        "q1 Q0 d2 1 0.750000 umarvel",
        "q1 Q0 d1 2 0.500000 umarvel",
        "q2 Q0 d1 1 1.000000 umarvel",
    ]


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1), st.text("a %\t\n\u00a0\u2028é2/", min_size=1))
def test_ids_with_white_space_are_escaped_and_can_be_read_back(tmp_path_factory, query, document):
    path = tmp_path_factory.mktemp("trec") / "run.trec"
    write_run(path, RANKING, pa.array(["q2", "q3", "q4", query]), pa.array(["d0", "d1", document]), "umarvel")
    first = path.read_text(encoding="utf-8").split("\n")[0].split()
    assert [unquote(part) for part in first] == [query, "Q0", document, "1", "0.750000", "umarvel"]
