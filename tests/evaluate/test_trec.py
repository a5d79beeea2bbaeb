"""TREC run files."""

import pyarrow as pa
import pytest

from tests.support.rankings import make_ranking
from umarvel_ray.errors import UserError
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


@pytest.mark.parametrize("bad", ["q 1", "", "q\u00a01"])
def test_an_id_with_white_space_is_refused(tmp_path, bad):
    with pytest.raises(UserError, match=f"id '{bad}' is empty or contains white space"):
        write_run(tmp_path / "run.trec", RANKING, pa.array(["q2", "q3", "q4", bad]), DOCUMENTS, "umarvel")
    with pytest.raises(UserError, match=f"id '{bad}'"):
        write_run(tmp_path / "run.trec", RANKING, QUERIES, pa.array(["d0", "d1", bad]), "umarvel")
    assert not list(tmp_path.iterdir())
