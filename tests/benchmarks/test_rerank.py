"""The reranking benchmark runs, and its sides agree: the shared prefix against transformers on whole pairs."""

from __future__ import annotations

import json

import pytest

from benchmarks import rerank
from benchmarks.common import results


@pytest.mark.slow
def test_sharing_the_query_changes_no_score(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    rerank.main(queries=1, documents=6, rounds=1)
    figures = json.loads((tmp_path / "rerank.json").read_text())
    assert figures["work"] == {"pairs": 6}
    assert figures["differences"]["scores"] < 1e-4
    assert set(figures["rates"]) == {rerank.OURS, rerank.WHOLE}
