"""Which columns hold what, in the order in which they are tried, and the kinds of rows that they make."""

from __future__ import annotations

from collections.abc import Collection

PICTURE = (
    "file_name", "image", "image_path", "file", "filename", "img", "img_path", "picture", "photo", "path", "filepath",
    "jpg", "jpeg", "png", "webp", "images",
)  # fmt: skip
CAPTION = (
    "caption", "captions", "text", "txt", "description", "title", "sentence", "sentences", "alt_text", "alt",
)  # fmt: skip
CLEAR = ("caption", "captions")  # what stands under these can be nothing else
ANCHOR = ("anchor", "query", "question", "sentence1", "text1")
POSITIVE = ("positive", "positives", "answer", "sentence2", "passage", "document", "text2", "image")
NEGATIVE = ("negative", "negatives", "hard_negative", "hard_negatives")  # and negative_1, negative_2 …
SCORE = ("label", "score", "similarity")
INSTRUCTION = ("instruction", "prompt")
NAMES = ("id", "_id", "query_id", "qid", "docid", "key", "__key__")
ASKED = ("image", "images", "image_path", "img", "img_path", "picture", "photo")  # that a question may be about
PICTURE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm",
)  # fmt: skip

FLAGEMBEDDING, TEVATRON, VLM2VEC, SWIFT = "flagembedding", "tevatron", "vlm2vec", "ms-swift"
PAIRS, CAPTIONS, SIDECARS, WEBDATASET = "pairs", "captions", "sidecars", "webdataset"
ROW_KINDS = (SWIFT, VLM2VEC, TEVATRON, FLAGEMBEDDING, PAIRS, CAPTIONS)
KINDS = (CAPTIONS, SIDECARS, WEBDATASET, FLAGEMBEDDING, TEVATRON, VLM2VEC, SWIFT, PAIRS)


# What is read of the kinds whose columns have fixed names.
FIXED = {
    FLAGEMBEDDING: {"query", "pos", "neg"},
    TEVATRON: {"query", "query_text", "query_image", "positive_passages", "negative_passages"},
    VLM2VEC: {"qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"},
    SWIFT: {
        "messages", "positive_messages", "negative_messages", "images", "positive_images", "negative_images",
        "query", "response", "rejected_response", "system",
    },
}  # fmt: skip
KNOWN = {
    *PICTURE, *CAPTION, *ANCHOR, *POSITIVE, *NEGATIVE, *SCORE, *INSTRUCTION, *NAMES, *set.union(*FIXED.values()),
}  # fmt: skip


def is_known(name: str) -> bool:
    """Whether any kind of row takes something from this column; others are never looked at."""
    return name in KNOWN or _is_negative(name)


def first(names: Collection[str], wanted: Collection[str]) -> str | None:
    """The first of the wanted columns that is there."""
    return next((name for name in wanted if name in names), None)


def sides_of(names: Collection[str]) -> tuple[str | None, str | None]:
    """The columns of a pair's query and of its positive."""
    anchor = first(names, ANCHOR)
    return anchor, first([name for name in names if name != anchor], POSITIVE)


def negatives_of(names: Collection[str]) -> list[str]:
    """The columns of negatives, in order."""
    return [name for name in names if _is_negative(name)]


def asked_picture_of(names: Collection[str]) -> str | None:
    """The column of the picture that a pair's query is about, beside its text."""
    anchor, positive = sides_of(names)
    return first([name for name in names if name not in (anchor, positive)], ASKED) if positive not in ASKED else None


def makes(kind: str, names: Collection[str]) -> bool:
    """Whether these columns make rows of a kind."""
    if kind == SWIFT:
        return bool({"positive_messages", "messages"} & set(names)) or {"query", "response"} <= set(names)
    if kind == VLM2VEC:
        return "qry" in names and bool({"pos_text", "pos_image_path"} & set(names))
    if kind == TEVATRON:
        return "positive_passages" in names
    if kind == FLAGEMBEDDING:
        return {"query", "pos"} <= set(names)
    if kind == PAIRS:
        return all(sides_of(names))
    return bool(first(names, PICTURE) and first(names, CAPTION))


def kind_of(names: Collection[str]) -> str | None:
    """The kind of rows that these columns make; None if they make none."""
    return next((kind for kind in ROW_KINDS if makes(kind, names)), None)


def unused(kind: str, names: Collection[str]) -> list[str]:
    """The columns from which rows of a kind take nothing."""
    used: set[str | None] = {first(names, INSTRUCTION), first(names, NAMES)}
    if kind == CAPTIONS:
        used |= {first(names, PICTURE), first(names, CAPTION)}
    elif kind == PAIRS:
        used |= {*sides_of(names), asked_picture_of(names), first(names, SCORE), *negatives_of(names)}
    else:
        used |= FIXED[kind] | ({first(names, SCORE)} if kind == SWIFT else set())
    return [name for name in names if name and name not in used]


def use_of(kind: str, names: Collection[str]) -> str:
    """In words, what is taken from these columns, for kinds whose columns are guessed; "" for the others."""
    if kind == CAPTIONS:
        return f"picture from '{first(names, PICTURE)}', caption from '{first(names, CAPTION)}'"
    if kind == PAIRS:
        anchor, positive = sides_of(names)
        negatives = "".join(f", negative from '{name}'" for name in negatives_of(names))
        shown = f" with the picture in '{asked}'" if (asked := asked_picture_of(names)) else ""
        return f"query from '{anchor}'{shown}, positive from '{positive}'{negatives}"
    return ""


def _is_negative(name: str) -> bool:
    return name in NEGATIVE or (name.startswith("negative_") and name[9:].isdigit())
