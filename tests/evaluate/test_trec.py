"""TREC run files."""

import pytest

from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.trec import write_run


def test_a_run_file_has_the_trec_format(tmp_path):
    path = tmp_path / "run.trec"
    write_run(path, [("q1", ["d2", "d1"], [0.75, 0.5]), ("q2", ["d1"], [1.0])], "umarvel")
    assert path.read_text().splitlines() == [
        "q1 Q0 d2 1 0.750000 umarvel",
        "q1 Q0 d1 2 0.500000 umarvel",
        "q2 Q0 d1 1 1.000000 umarvel",
    ]


def test_an_id_with_white_space_is_refused(tmp_path):
    with pytest.raises(UserError, match="white space"):
        write_run(tmp_path / "run.trec", [("q 1", ["d"], [1.0])], "umarvel")
