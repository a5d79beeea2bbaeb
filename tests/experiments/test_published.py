"""docs/ablations.md shows the published records: every table of the paper, word for word, and the count of verdicts."""

from __future__ import annotations

import json

import pytest

from experiments.ablate import PUBLISHED
from experiments.ablation.record import count_verdicts, markdown
from experiments.ablation.tables import NUMBERS
from tests.conftest import REPO

PAGE = (REPO / "docs" / "ablations.md").read_text()


def record_of(number: int) -> dict:
    return json.loads((PUBLISHED / f"table-{number}.json").read_text())


@pytest.mark.parametrize("number", NUMBERS)
def test_the_page_has_the_table(number):
    record = record_of(number)
    assert record["complete"]
    assert markdown(record) in PAGE
    section = PAGE.split(f"## Table {number}")[1].split("\n## ")[0]
    for change in record["row_changes"]:
        assert f"`{change}`" in section


def test_the_page_has_the_count_of_verdicts():
    counts = count_verdicts([record_of(number) for number in NUMBERS])
    assert (
        f"{counts['agrees']} agree, {counts['disagrees']} disagree, {counts['inconclusive']} are inconclusive" in PAGE
    )
