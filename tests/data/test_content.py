"""Equality by content: of documents and of tables."""

import pyarrow as pa

from umarvel_ray.data.content import content_key, digest_of_table


def test_content_is_text_and_picture_together():
    assert content_key({"text": "a", "image": b"12"}) == content_key({"text": "a", "image": b"12", "id": "other"})
    assert content_key({"text": "a", "image": b"12"}) != content_key({"text": "a", "image": b"13"})
    assert content_key({"text": "a", "image": None}) != content_key({"text": "a", "image": "a.png"})


def test_digest_depends_on_values_not_chunks():
    table = pa.table({"id": [f"d{i}" for i in range(9)], "image": pa.array([b"%d" % i for i in range(9)], pa.binary())})
    pieces = pa.concat_tables([table.slice(0, 4), table.slice(4)])
    assert digest_of_table(pieces) == digest_of_table(table)
    changed = table.set_column(1, "image", pa.array([b"x", *table["image"].to_pylist()[1:]], pa.binary()))
    assert digest_of_table(changed) != digest_of_table(table)
