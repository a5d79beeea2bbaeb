"""The instructions of a dataset are those of its queries."""

from collections import Counter, defaultdict

import pytest

from umarvel_ray import demo
from umarvel_ray.data.instructions import instructions_of
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.recipe import Data


@pytest.mark.parametrize("split", ["validation", "train"])
def test_the_most_frequent_one_of_each_kind_of_query_and_document(split):
    dataset = open_dataset(Data(root=demo.NAME))
    queries = dataset.queries(split)
    counts = defaultdict(Counter)
    for row, query in enumerate(queries.table.rows(range(queries.n), ["modality", "instruction", "task"])):
        [target] = dataset.documents.rows(queries.positives.values[queries.positives.offsets[row]][None], ["modality"])
        counts[query["task"], query["modality"], target["modality"]][query["instruction"]] += 1
    found = {(one.task, one.query, one.finds): one.text for one in instructions_of(dataset, split)}
    assert found.keys() == counts.keys()
    for kind, text in found.items():
        assert counts[kind][text] == max(counts[kind].values())
