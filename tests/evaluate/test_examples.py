"""The report's example queries and their pictures."""

import numpy as np

from tests.support.random_result import random_result
from tests.support.tiny_run import picture
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.evaluate.examples import Pictures, _card, choose, examples
from umarvel_ray.evaluate.results import ranking_folder
from umarvel_ray.recipe import load_recipe
from umarvel_ray.retrieve.rank import read_ranking, write_ranking


def chosen(first: str, last: str) -> list[tuple[str, int]]:
    """`choose`, with a letter for each query: x if it was found."""
    return choose(*(np.array([letter == "x" for letter in found], bool) for found in (first, last)))


def test_examples_are_chosen_by_rule():
    assert chosen("-x--", "-xx-") == [("Found after training", 2), ("Found all along", 1), ("Still missed", 0)]
    assert chosen("xx", "xx") == [("Found all along", 0), ("Found", 1)]
    assert chosen("-----", "-----") == [("Still missed", 0), ("Missed", 1), ("Missed", 2)]
    assert chosen("xxxx-", "xxxxx") == [("Found after training", 4), ("Found all along", 0), ("Found", 1)]
    assert chosen("", "") == []


def test_a_picture_is_stored_once_and_a_bad_one_not_at_all():
    documents = open_dataset(load_recipe("demo").data).documents
    images = [row["image"] for row in documents.rows(range(50), ("image",)) if row["image"]]
    pictures = Pictures()
    assert pictures.add(images[0]) == pictures.add(images[0]) == 0
    assert pictures.add(images[1]) == 1
    assert pictures.add(b"no picture") is None
    assert len(pictures.uris) == 2
    assert all(uri.startswith("data:image/") for uri in pictures.uris)


def test_a_card_has_all_pictures_of_its_row():
    first, second = picture(1), picture(2)
    pictures = Pictures()
    assert _card({"text": None, "image": [second, first, b"no picture"]}, pictures).pictures == [0, 1, None]
    assert _card({"text": "a", "image": first}, pictures).pictures == [1]
    assert _card({"text": "a", "image": None}, pictures).pictures == []


def test_an_example_shows_the_first_documents_of_every_checkpoint(tmp_path):
    """Of the queries that could be embedded: the first query of the table could not."""
    recipe = load_recipe("demo")
    dataset = open_dataset(recipe.data)
    results = [random_result(dataset, recipe, name, 0.5, tmp_path / name) for name in ("base", "instruction")]
    final = ranking_folder(results[-1].folder, "local")
    write_ranking(final, read_ranking(final).slice(1))
    shown = examples(dataset, "test", results, results[-1], Pictures())
    assert {task: len(found) for task, found in shown.items()} == dict.fromkeys(dataset.tasks("test"), 3)
    queries, seen = dataset.queries("test"), set()
    rankings = {result.name: result.ranking("local").to_pylist() for result in results}
    by_scores = {name: {tuple(row["scores"][:5]): row for row in rows} for name, rows in rankings.items()}
    for task, of_task in shown.items():
        for example in of_task:
            rows = [by_scores[name][tuple(card.score for card in cards)] for name, cards in example.found.items()]
            [row] = {row["query"] for row in rows}  # the same query everywhere
            [query] = queries.table.rows([row])
            assert (query["task"], query["text"], query["instruction"]) == (
                task,
                example.query.text,
                example.query.instruction,
            )
            for ranked, cards in zip(rows, example.found.values(), strict=True):
                documents = dataset.documents.rows(ranked["documents"][:5])
                assert [card.text for card in cards] == [document["text"] for document in documents]
                assert [bool(card.pictures) for card in cards] == [
                    document["image"] is not None for document in documents
                ]
                positives = queries.positives.at(row)
                assert [card.hit for card in cards] == [number in positives for number in ranked["documents"][:5]]
            seen.add(row)
    assert 0 not in seen
