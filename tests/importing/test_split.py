"""Splits by content, against a brute-force search for what two splits share."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.importing.sources import SPLITS, Key, colors_of, picture, pooled, rows, write_csv, write_jsonl
from umarvel_ray.errors import UserError
from umarvel_ray.importing.importer import import_dataset
from umarvel_ray.importing.prepare import prepared
from umarvel_ray.importing.record import Item, Record
from umarvel_ray.importing.split import TEST, TRAIN, VALIDATION, groups_of, held_out, held_out_count, split_queries
from umarvel_ray.importing.store import Store

NUMBERS = st.integers(0, 120)
RECORDS = st.lists(
    st.tuples(
        st.lists(NUMBERS, min_size=1, max_size=2),  # queries
        st.lists(NUMBERS, min_size=1, max_size=2),  # positives
        st.lists(NUMBERS, max_size=2),  # negatives
    ),
    min_size=6,
    max_size=20,
)


def item(number: int) -> Item:
    """Texts, pictures and both; some share a picture, or differ only in case and spaces."""
    if number < 60:
        return Item(f"{('text', 'TEXT ')[number % 2]} {number // 2}")
    if number < 100:
        return Item(pictures=(picture(number - 60),))
    if number < 110:
        return Item("beside a picture", (picture(number - 100),))
    return Item(pictures=(picture(number - 110), picture(number - 90)))


def contents(text: str | None, image: bytes | list[bytes] | None) -> set[object]:
    """The pictures of a row, or its text where that stands alone."""
    words = " ".join(unicodedata.normalize("NFKC", text or "").casefold().split())
    return set(colors_of(image)) or {words}


def links_of(folder: Path, records: list[Record]):
    with Store(folder / "items.arrow", {}) as store:
        for record in records:
            store.add(prepared(record))
        return store.links()


@settings(max_examples=100)
@given(drawn=RECORDS, seed=st.integers(0, 3))
def test_no_content_is_in_two_splits_whatever_the_order(drawn, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    records = [Record(*(tuple(map(item, numbers)) for numbers in row)) for row in drawn]
    links = links_of(folder, records)
    try:
        query_split, item_split = split_queries(links, None, seed)
    except UserError as error:
        assert "cannot be split" in str(error)  # noqa: PT017
        event("connected")
        return
    used: dict[int, set[int]] = {}  # splits of each content, by who uses it
    members = {n: set(links.contents[links.contents[:, 0] == n, 1].tolist()) for n in range(len(links.modality))}
    for query, split in enumerate(query_split.tolist()):
        own = [links.asked[query], *links.positives[links.positives[:, 0] == query, 1]]
        for number in own:
            assert item_split[number] == split
            for content in members[number]:
                used.setdefault(content, set()).add(split)
    for number, split in enumerate(item_split.tolist()):
        if split >= 0:
            for content in members[number]:
                used.setdefault(content, set()).add(split)
    assert all(len(splits) == 1 for splits in used.values())
    assert {TRAIN, VALIDATION, TEST} == set(query_split.tolist())

    mixed = random.Random(seed).sample(records, len(records))
    again = links_of(folder, mixed)
    other_split, _ = split_queries(again, None, seed)
    assert by_content(links, query_split) == by_content(again, other_split)


def by_content(links, query_split) -> dict[tuple[int, int], int]:
    """The split of each query by the smallest digest of its contents and its task."""
    keys = {}
    for query, split in enumerate(query_split.tolist()):
        own = links.contents[links.contents[:, 0] == links.asked[query], 1]
        keys[int(links.digests[own].min()), int(links.shape[query])] = split
    return keys


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=20))
def test_groups_are_connected_components(count, pairs):
    pairs = [(a % count, b % count) for a, b in pairs]
    reached = np.eye(count, dtype=bool)
    for a, b in pairs:
        reached[a, b] = reached[b, a] = True
    for _ in range(count):
        reached = (reached.astype(int) @ reached.astype(int)) > 0
    groups = groups_of(count, np.array(pairs, np.int64).reshape(-1, 2))
    assert ((groups[:, None] == groups[None, :]) == reached).all()


@given(st.lists(st.integers(1, 30), min_size=3, max_size=40), st.randoms(use_true_random=False), st.data())
def test_every_split_has_queries_and_held_out_ones_no_more_than_asked_for(sizes, shuffle, data):
    count = data.draw(st.integers(1, max(1, (sum(sizes) - 1) // 2)))
    order = list(range(len(sizes)))
    shuffle.shuffle(order)
    split = held_out(np.array(sizes), np.array(order), count)
    assert set(split.tolist()) == {TRAIN, VALIDATION, TEST}
    for target in (VALIDATION, TEST):
        own = np.array(sizes)[split == target]
        assert own.sum() <= count or len(own) == 1  # one group, where none was small enough


@pytest.mark.parametrize(
    ("queries", "holdout", "count"),
    [
        (6, None, 1), (300, None, 30), (1500, None, 100), (10_000, None, 500), (10**6, None, 1000),
        (1000, "0.2", 200), (1000, "20%", 200), (1000, "7", 7), (1000, "0.5%", 5),
    ],
)  # fmt: skip
def test_the_number_of_held_out_queries(queries, holdout, count):
    assert held_out_count(queries, holdout) == count


@pytest.mark.parametrize("holdout", ["0", "-1", "1.5", "many", "100%", "", "nan", "inf", "500", "0.5"])
def test_an_impossible_holdout_is_refused(holdout):
    with pytest.raises(UserError, match="--holdout"):
        held_out_count(1000, holdout)


def split_contents(folder: Path) -> list[set[object]]:
    """For each split, the contents of its queries and of all documents in its pools."""
    found = []
    for split in SPLITS:
        own = [contents(row["text"], row["image"]) for row in rows(folder, split)]
        pools = [keys for (_, of), keys in pooled(folder).items() if of == split]
        own += [set(colors) or contents(text, None) for keys in pools for text, colors in keys]
        found.append(set().union(*own))
    return found


def test_nothing_written_is_in_two_splits(tmp_path):
    """1,000 rows in which pictures recur in other encodings and captions in other spellings."""
    folder = tmp_path / "in"
    folder.mkdir()
    choose = random.Random(0)
    lines = []
    for number in range(1000):
        shown, said = choose.randrange(700), choose.randrange(700)
        name = f"{number}.{choose.choice(['png', 'bmp', 'webp'])}"
        (folder / name).write_bytes(picture(shown, name.split(".")[1].upper()))
        lines.append((name, choose.choice(["a caption {}", "A  Caption {}", "ａ caption {}"]).format(said)))
    write_csv(folder / "a.csv", [("file", "caption"), *lines])
    import_dataset(folder, tmp_path / "out", holdout="60")
    train, validation, test = split_contents(tmp_path / "out")
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert 30 <= len(rows(tmp_path / "out", "test")) <= 60


def test_a_negative_that_another_split_asks_for_is_in_that_splits_pools_only(tmp_path):
    lines = [{"query": f"q{n}", "pos": [f"p{n}"], "neg": [f"p{(n + 1) % 50}", "everywhere"]} for n in range(50)]
    import_dataset(write_jsonl(tmp_path / "a.jsonl", lines), tmp_path / "out")
    of: dict[Key, set[str]] = {}
    for (_, split), keys in pooled(tmp_path / "out").items():
        for key in keys:
            of.setdefault(key, set()).add(split)
    assert all(len(splits) == 1 for splits in of.values())
    assert of["everywhere", ()] == {"train"}
    assert len(of) == 51


def test_the_order_of_rows_and_the_file_they_are_in_change_nothing(tmp_path):
    lines = [{"query": f"q{n}", "pos": [f"p{n // 2}"]} for n in range(100)]
    write_jsonl(tmp_path / "a" / "a.jsonl", lines)
    for name, part in (("z.jsonl", lines[:30]), ("b.jsonl", lines[:29:-1])):
        write_jsonl(tmp_path / "b" / name, part)
    tables = []
    for name in "ab":
        import_dataset(tmp_path / name, tmp_path / f"{name}-out" / "data")
        folder = tmp_path / f"{name}-out" / "data"
        tables.append([sorted(rows(folder, split), key=lambda row: row["id"]) for split in (*SPLITS, "documents")])
    assert tables[0] == tables[1]


def test_another_seed_holds_out_others(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"query": f"q{n}", "pos": [f"p{n}"]} for n in range(100)])
    for seed in (1, 2):
        import_dataset(file, tmp_path / str(seed), seed=seed)
    first, second = ({row["id"] for row in rows(tmp_path / seed, "test")} for seed in "12")
    assert len(first) == len(second) == 10
    assert first != second


def test_rows_that_are_all_connected_cannot_be_split(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"query": f"q{n}", "pos": ["yes"]} for n in range(100)])
    with pytest.raises(UserError, match=r"100 queries cannot be split.*found 1\)"):
        import_dataset(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
