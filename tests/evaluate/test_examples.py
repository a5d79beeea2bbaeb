"""The report's example queries and their pictures."""

from umarvel_ray.data.tables import open_dataset
from umarvel_ray.evaluate.examples import Pictures, choose
from umarvel_ray.recipe import load_recipe


def test_examples_are_chosen_by_rule():
    first = {"a": 0.0, "b": 1.0, "c": 0.0, "d": 0.0}
    last = {"a": 0.0, "b": 1.0, "c": 1.0, "d": 0.0}
    assert choose(first, last) == [("Found after training", "c"), ("Found all along", "b"), ("Still missed", "a")]
    assert choose({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}) == [("Found all along", "a"), ("Found", "b")]


def test_a_picture_is_stored_once_and_a_bad_one_not_at_all():
    dataset = open_dataset(load_recipe("demo").data)
    images = [image for image in dataset.documents["image"].slice(0, 50).to_pylist() if image]
    pictures = Pictures()
    assert pictures.add(images[0]) == pictures.add(images[0]) == 0
    assert pictures.add(images[1]) == 1
    assert pictures.add(b"no picture") is None
    assert pictures.add(None) is None
    assert len(pictures.uris) == 2
    assert all(uri.startswith("data:image/") for uri in pictures.uris)
