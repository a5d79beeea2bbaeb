"""Equality by content: of rows and of tables."""

from itertools import combinations

import numpy as np
import pyarrow as pa

from umarvel_ray.data.content import (
    NO_PICTURE,
    content_key,
    content_keys,
    digest_of,
    digest_of_table,
    keys_of_each,
    picture_key,
    picture_keys,
)

DIFFERENT = [
    {"text": "a"},
    {"text": "b"},
    {"text": "a.png"},
    {"image": "a.png"},
    {"image": b"a.png"},
    {"video": "a.png"},
    {"video": b"a.png"},
    {"image": "b.png"},
    {"text": "a", "image": "a.png"},
    {"text": "a", "image": "b.png"},
    {"text": "b", "image": "a.png"},
    {"text": "a", "video": "a.mp4"},
    {"text": "a", "video": "b.mp4"},
    {"image": "a.png", "video": "a.png"},
    {"image": ["a.png", "b.png"]},
    {"image": ["b.png", "a.png"]},
    {"image": [b"a.png", b"b.png"]},
    {"image": ["a.png", "b.png", "b.png"]},
    {"image": ["a.pngb.png"]},
    {"video": ["a.png", "b.png"]},
    {"text": "a", "image": ["a.png", "b.png"]},
]


def test_different_content_has_different_keys():
    for one, other in combinations(DIFFERENT, 2):
        assert content_key(one) != content_key(other), (one, other)
    shown = [row for row in DIFFERENT if "text" not in row]
    assert len({picture_key(row) for row in shown} | {NO_PICTURE}) == len(shown) + 1


def test_the_key_is_of_text_pictures_and_videos_together():
    for row in DIFFERENT:
        assert content_key(row) == content_key({"image": None, "video": None, "text": None, "id": "x"} | row)
        assert picture_key(row) == picture_key({**row, "text": "other"})
        assert 0 <= content_key(row) < 2**64
    assert content_key({"image": ["a.png"]}) == content_key({"image": "a.png", "text": ""})
    assert picture_key({"text": "a"}) == picture_key({"text": "a", "image": []}) == NO_PICTURE
    assert content_key({"text": "\ud800"}) != content_key({"text": "\ud801"})


def test_keys_of_columns_are_those_of_their_rows():
    for kind in (pa.large_string(), pa.large_binary(), pa.list_(pa.large_string()), pa.list_(pa.large_binary())):
        of_type = [row for row in DIFFERENT if all(fits(row.get(name), kind) for name in ("image", "video"))]
        assert len(of_type) >= 4
        rows = [*of_type, *of_type[::-1], {}]
        columns = {name: pa.array([row.get(name) for row in rows], kind) for name in ("image", "video")}
        batch = pa.record_batch({"text": pa.array([row.get("text") for row in rows], pa.string()), **columns})
        for part in (batch, batch.slice(3, 5), batch.slice(0, 0), batch.drop_columns(["video"])):
            own = part.to_pylist()
            pictures = picture_keys(part)
            assert pictures.dtype == np.uint64
            assert pictures.tolist() == [picture_key(row) for row in own]
            assert content_keys(part, pictures).tolist() == [content_key(row) for row in own]


def fits(value: object, kind: pa.DataType) -> bool:
    """Whether a column of this type may hold the value."""
    if value is None:
        return True
    if pa.types.is_list(kind) != isinstance(value, list):
        return False
    first = value[0] if isinstance(value, list) else value
    flat = kind.value_type if pa.types.is_list(kind) else kind
    return isinstance(first, bytes) == pa.types.is_large_binary(flat)


def test_a_digest_is_of_all_parts_in_their_order():
    parts = ["a", b"b", np.arange(3), {"k": [1]}]
    assert digest_of(*parts) == digest_of("a", b"b", np.arange(6)[:3], {"k": [1]})
    others = [
        [*parts[:3], {"k": [2]}],
        parts[::-1],
        parts[:3],
        ["ab", b"", *parts[2:]],
        ["a", b"b", np.arange(1, 4), parts[3]],
    ]
    assert len({digest_of(*other) for other in [parts, *others]}) == len(others) + 1


def test_digest_depends_on_values_not_chunks():
    table = pa.table({"id": [f"d{i}" for i in range(9)], "image": pa.array([b"%d" % i for i in range(9)], pa.binary())})
    pieces = pa.concat_tables([table.slice(0, 4), table.slice(4)])
    assert digest_of_table(pieces) == digest_of_table(table)
    changed = table.set_column(1, "image", pa.array([b"x", *table["image"].to_pylist()[1:]], pa.binary()))
    assert digest_of_table(changed) != digest_of_table(table)


def test_keys_of_each_picture_are_those_of_documents_that_show_it():
    """One of a query's pictures alone, or all of them in a list; a picture twice counts once."""
    lists = [["a.png", "b.png"], ["a.png", "a.png"], ["b.png"], []]
    column = pa.array(lists, pa.list_(pa.string()))
    together = picture_keys(pa.RecordBatch.from_arrays([column], ["image"]))
    found = keys_of_each(column, together)
    one = {name: picture_key({"image": name}) for name in ("a.png", "b.png")}
    expected = [
        {one["a.png"], one["b.png"], picture_key({"image": lists[0]})},
        {one["a.png"], picture_key({"image": lists[1]})},
        {one["b.png"]},
        {NO_PICTURE},
    ]
    assert [set(keys.view(np.uint64).tolist()) for keys in found.lists()] == expected
    assert found.counts.tolist() == list(map(len, expected))
