"""One row of a table of each kind, as a record. Formats are those that the tools' own documentation describes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from umarvel_ray.importing.columns import (
    CAPTION,
    CAPTIONS,
    FLAGEMBEDDING,
    INSTRUCTION,
    PAIRS,
    PICTURE,
    SCORE,
    SWIFT,
    TEVATRON,
    VLM2VEC,
    asked_picture_of,
    first,
    negatives_of,
    sides_of,
)
from umarvel_ray.importing.record import BadRow, BadTable, Item, Picture, Record
from umarvel_ray.importing.tables import Row
from umarvel_ray.items.item import readable

Locate = Callable[[str], str | Path]  # from a path as it is written to the file

MARK = re.compile(r"<image>|<\|image_\d+\|>|<\|image_pad\|>")
MATCH = 0.5  # a pair with a label counts as one above it


def record_of(kind: str, row: Row, locate: Locate) -> Record:
    """Understand a row.

    Args:
        row: with column names in one spelling.
        locate: finds the file of a picture's path.

    Raises:
        BadRow: a value is missing or of a wrong type, or the row says that its pair does not match.
        BadTable: a label that is not from 0 to 1, so that the labels of other rows mean something else too.
    """
    try:
        return READ[kind]({name: _readable(value) for name, value in row.items()}, locate)
    except RecursionError:
        raise BadRow("wrong type", "a value is nested too deeply") from None


def _captions(row: Row, locate: Locate) -> Record:
    shown, said = first(row, PICTURE), first(row, CAPTION)
    if shown is None or said is None:
        raise BadRow("no picture" if shown is None else "no caption", f"columns {', '.join(row)}")
    pictures = _pictures(_list(row[shown]), locate)
    if not pictures:
        raise BadRow("no picture", f"column '{shown}' is empty")
    captions = tuple(Item(text) for text in _texts(row[said], said))
    named = Item(pictures=pictures, name=_name(_list(row[shown])[0]) if len(pictures) == 1 else "")
    return Record(captions, (named,), instruction=_own(row), both_ways=True)


def _pairs(row: Row, locate: Locate) -> Record:
    anchor, positive = sides_of(row)
    if anchor is None or positive is None:
        raise BadRow("no positive" if anchor else "no query", f"columns {', '.join(row)}")
    _check_score(row)
    negatives = [item for name in negatives_of(row) for item in _side(row[name], name, locate)]
    queries = _side(row[anchor], anchor, locate)
    if asked := asked_picture_of(row):
        pictures = _pictures(_list(row[asked]), locate)
        queries = tuple(query._replace(pictures=query.pictures + pictures) for query in queries)
    return Record(queries, _side(row[positive], positive, locate), tuple(negatives), _own(row))


def _flagembedding(row: Row, locate: Locate) -> Record:
    query, positives, negatives = (_side(row.get(name), name, locate) for name in ("query", "pos", "neg"))
    return Record(query, positives, negatives, _own(row))


def _tevatron(row: Row, locate: Locate) -> Record:
    def passages(name: str) -> tuple[Item, ...]:
        return tuple(_passage(value, name, locate) for value in _list(row.get(name)))

    texts = _texts(row.get("query_text") or row.get("query"), "query")
    query = Item(" ".join(texts), _pictures([row.get("query_image")], locate))
    return Record((query,), passages("positive_passages"), passages("negative_passages"), _own(row))


def _passage(value: Any, name: str, locate: Locate) -> Item:
    if not isinstance(value, dict):
        raise BadRow("wrong type", f"'{name}' holds {type(value).__name__}, not objects with a text")
    texts = (_text(value.get(part) or "", name).strip() for part in ("title", "text"))
    return Item(" ".join(filter(None, texts)), _pictures([value.get("image")], locate))


def _vlm2vec(row: Row, locate: Locate) -> Record:
    def items(text: str, image: str) -> tuple[Item, ...]:
        texts, images = _list(row.get(text)), _list(row.get(image))
        count = max(len(texts), len(images))
        if not {len(texts), len(images)} <= {0, count}:
            raise BadRow("wrong number of pictures", f"{len(texts)} in '{text}', {len(images)} in '{image}'")
        pairs = zip(texts or [""] * count, images or [""] * count, strict=True)
        made = [Item(_unmarked(_text(said or "", text)), _pictures([shown], locate)) for said, shown in pairs]
        return tuple(item for item in made if item.text or item.pictures)

    query, positives = items("qry", "qry_image_path"), items("pos_text", "pos_image_path")
    return Record(query, positives, items("neg_text", "neg_image_path"), instruction="")  # it is part of `qry`


def _swift(row: Row, locate: Locate) -> Record:
    _check_score(row)
    messages = row.get("messages")
    if messages is None:
        return _swift_answers(row, locate)
    system, asked, answers = _by_role(messages, "messages")
    if "positive_messages" not in row:  # the conversation's own answer
        rejected = row.get("rejected_response")
        return _swift_answers(row | {"query": asked, "response": answers, "rejected_response": rejected}, locate)

    def items(side: str) -> tuple[Item, ...]:
        conversations = _list(row.get(f"{side}_messages"))
        pictures = row.get(f"{side}_images") or [[]] * len(conversations)
        if len(pictures) != len(conversations):
            raise BadRow("wrong number of pictures", f"'{side}_images' and '{side}_messages' differ in length")
        said = ("\n".join(filter(None, _by_role(c, f"{side}_messages")[1:])) for c in conversations)
        return tuple(_marked(text, list(own or ()), locate) for text, own in zip(said, pictures, strict=True))

    query = _marked(asked, _list(row.get("images")), locate)
    return Record((query,), items("positive"), items("negative"), system or None)


def _swift_answers(row: Row, locate: Locate) -> Record:
    """`query`, `response` and `rejected_response`, whose placeholders share one list of images in this order."""
    parts = [_texts(row.get(name), name) for name in ("query", "response", "rejected_response")]
    images = _list(row.get("images"))
    marks = sum(len(MARK.findall(text)) for texts in parts for text in texts)
    if marks != len(images):
        raise BadRow("wrong number of pictures", f"{marks} placeholders, {len(images)} images")
    left = iter(images)
    sides = [
        tuple(_marked(text, [next(left) for _ in MARK.findall(text)], locate) for text in texts) for texts in parts
    ]
    return Record(sides[0], sides[1], sides[2], _text(row.get("system") or "", "system") or None)


def _by_role(messages: Any, name: str) -> tuple[str, str, str]:
    """What the system, the user and the assistant say in a conversation."""
    said: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    for message in _list(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in said:
            raise BadRow("wrong type", f"'{name}' must hold messages by system, user or assistant")
        said[role].append(_text(message.get("content"), name))
    system, user, assistant = ("\n".join(texts) for texts in said.values())
    return system, user, assistant


def _marked(text: str, images: list[Any], locate: Locate) -> Item:
    """A text with a placeholder for each of its pictures."""
    if len(MARK.findall(text)) != len(images):
        raise BadRow("wrong number of pictures", f"{len(MARK.findall(text))} placeholders, {len(images)} images")
    return Item(_unmarked(text), _pictures(images, locate))


def _unmarked(text: str) -> str:
    return MARK.sub("", text).strip()


def _side(value: Any, name: str, locate: Locate) -> tuple[Item, ...]:
    """The items in a cell: texts, pictures, or lists of these."""
    if name in PICTURE or isinstance(value, dict | bytes):
        return tuple(Item(pictures=(picture,)) for picture in _pictures(_list(value), locate))
    if isinstance(value, list):
        return tuple(item for part in value for item in _side(part, name, locate))
    return tuple(Item(text) for text in _texts(value, name))


def _pictures(values: Iterable[Any], locate: Locate) -> tuple[Picture, ...]:
    """Pictures as paths, encoded bytes, or `datasets`' {bytes, path}; empty values are left out."""
    found: list[Picture] = []
    for value in values:
        shown = value
        if isinstance(value, dict):
            shown = value.get("bytes") or value.get("path")
        if isinstance(shown, str):
            found += [locate(shown.strip())] if shown.strip() else []
        elif isinstance(shown, bytes):
            found += [shown] if shown else []
        elif shown is not None:
            raise BadRow("wrong type", f"a picture is {type(shown).__name__}, not a path or bytes")
    return tuple(found)


def _name(value: Any) -> str:
    """The path that a picture has, beside its bytes or alone."""
    path = value.get("path") if isinstance(value, dict) else value
    return path.strip() if isinstance(path, str) and not path.startswith("data:") else ""


def _readable(value: Any) -> Any:
    """The value with all text in it made readable: JSON can spell what UTF-8 cannot hold."""
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, list):
        return [_readable(part) for part in value]
    return {key: _readable(part) for key, part in value.items()} if isinstance(value, dict) else value


def _texts(value: Any, name: str) -> tuple[str, ...]:
    return tuple(_text(part, name) for part in _list(value))


def _text(value: Any, name: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise BadRow("wrong type", f"'{name}' holds {type(value).__name__}, not text")


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _own(row: Row) -> str | None:
    name = first(row, INSTRUCTION)
    return _text(row[name], name).strip() or None if name else None


def _check_score(row: Row) -> None:
    """A pair with a label from 0 to 1 matches above MATCH."""
    name = first(row, SCORE)
    if name is None or row[name] is None:
        return
    if isinstance(row[name], str) and not row[name].strip():
        raise BadRow("no label", f"'{name}' is empty")
    try:
        score = float(row[name])
    except (TypeError, ValueError):
        score = math.inf
    if math.isnan(score):
        raise BadRow("no label", f"'{name}' is not a number")
    if not 0 <= score <= 1:
        raise BadTable(f"'{name}' is {row[name]!r}, not a number from 0 (no match) to 1; scale or drop the column")
    if score <= MATCH:
        raise BadRow("labelled as no match", f"'{name}' is {score:g}")


READ: dict[str, Callable[[Row, Locate], Record]] = {
    CAPTIONS: _captions,
    PAIRS: _pairs,
    FLAGEMBEDDING: _flagembedding,
    TEVATRON: _tevatron,
    VLM2VEC: _vlm2vec,
    SWIFT: _swift,
}
