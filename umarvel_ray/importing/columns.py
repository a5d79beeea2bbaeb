"""Which columns hold what, in the order in which they are tried, and the kinds of rows that they make."""

from __future__ import annotations

from collections.abc import Collection

PICTURE = (
    "file_name", "image", "image_path", "file", "filename", "img", "img_path", "picture", "photo", "path", "filepath",
    "jpg", "jpeg", "png", "webp",
)  # fmt: skip
CAPTION = (
    "caption", "captions", "text", "txt", "description", "title", "sentence", "sentences", "alt_text", "alt",
)  # fmt: skip
ANCHOR = ("anchor", "query", "question", "sentence1", "text1")
POSITIVE = ("positive", "positives", "answer", "sentence2", "passage", "document", "text2", "image")
NEGATIVE = ("negative", "negatives", "hard_negative", "hard_negatives")  # and negative_1, negative_2 …
SCORE = ("label", "score", "similarity")
INSTRUCTION = ("instruction", "prompt")
KNOWN = {
    *PICTURE, *CAPTION, *ANCHOR, *POSITIVE, *NEGATIVE, *SCORE, *INSTRUCTION,
    "qry", "pos", "neg", "response", "messages", "positive_passages", "pos_text",
}  # fmt: skip

FLAGEMBEDDING, TEVATRON, VLM2VEC, SWIFT = "flagembedding", "tevatron", "vlm2vec", "ms-swift"
PAIRS, CAPTIONS, SIDECARS, WEBDATASET = "pairs", "captions", "sidecars", "webdataset"
ROW_KINDS = (SWIFT, VLM2VEC, TEVATRON, FLAGEMBEDDING, PAIRS, CAPTIONS)
KINDS = (CAPTIONS, SIDECARS, WEBDATASET, FLAGEMBEDDING, TEVATRON, VLM2VEC, SWIFT, PAIRS)


def first(names: Collection[str], wanted: Collection[str]) -> str | None:
    """The first of the wanted columns that is there."""
    return next((name for name in wanted if name in names), None)


def sides_of(names: Collection[str]) -> tuple[str | None, str | None]:
    """The columns of a pair's query and of its positive."""
    anchor = first(names, ANCHOR)
    return anchor, first([name for name in names if name != anchor], POSITIVE)


def negatives_of(names: Collection[str]) -> list[str]:
    """The columns of negatives, in order."""
    return [name for name in names if name in NEGATIVE or (name.startswith("negative_") and name[9:].isdigit())]


def kind_of(names: Collection[str]) -> str | None:
    """The kind of rows that these columns make; None if they make none."""
    if "positive_messages" in names or "messages" in names or {"query", "response"} <= set(names):
        return SWIFT
    if "qry" in names and {"pos_text", "pos_image_path"} & set(names):
        return VLM2VEC
    if "positive_passages" in names:
        return TEVATRON
    if {"query", "pos"} <= set(names):
        return FLAGEMBEDDING
    if all(sides_of(names)):
        return PAIRS
    return CAPTIONS if first(names, PICTURE) and first(names, CAPTION) else None


def use_of(kind: str, names: Collection[str]) -> str:
    """In words, what is taken from these columns, for kinds whose columns are guessed; "" for the others."""
    if kind == CAPTIONS:
        return f"picture from '{first(names, PICTURE)}', caption from '{first(names, CAPTION)}'"
    if kind == PAIRS:
        anchor, positive = sides_of(names)
        negatives = "".join(f", negative from '{name}'" for name in negatives_of(names))
        return f"query from '{anchor}', positive from '{positive}'{negatives}"
    return ""
