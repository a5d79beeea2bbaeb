"""Captions and pictures, both ways: ShareGPT4V, Urban1K, Flickr30K, COCO; and dialogs: VisDial."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from umarvel_ray.suites.files import pictures_in, read_json, read_lines
from umarvel_ray.suites.suite import EVERY_TASK, Content, Document, Query, Suite

TO_IMAGE, TO_TEXT = "t→i", "i→t"
BOTH_WAYS = {
    TO_IMAGE: "Find me an everyday image that matches the given caption.",
    TO_TEXT: "Find an image caption describing the following everyday image.",
}
RECALLS = ("R@1", "R@5", "R@10")


class Captioned(NamedTuple):
    """A picture and its captions."""

    image: str
    captions: list[str]


def both_ways(rows: Iterable[Captioned]) -> Content:
    """Each caption finds its picture among all pictures, and each picture one of its captions among all captions."""
    documents, queries = [], []
    pools: dict[str, list[str]] = {TO_IMAGE: [], TO_TEXT: []}
    for number, (image, captions) in enumerate(rows):
        texts = [f"t{number}.{which}" for which in range(len(captions))]
        documents += [Document(f"i{number}", image=image)]
        documents += [Document(id_, text=text) for id_, text in zip(texts, captions, strict=True)]
        queries += [
            Query(f"{id_} {TO_IMAGE}", TO_IMAGE, [f"i{number}"], text=text)
            for id_, text in zip(texts, captions, strict=True)
        ]
        queries += [Query(f"i{number} {TO_TEXT}", TO_TEXT, texts, image=image)]
        pools[TO_IMAGE].append(f"i{number}")
        pools[TO_TEXT] += texts
    return Content(documents, queries, pools)


def _sharegpt4v(root: Path) -> Content:
    rows = read_json(root / "datas_for_validation.json")
    return both_ways(Captioned(f"val_data/{row['image_name']}", [row["caption"]]) for row in rows)


SHAREGPT4V = Suite(
    name="sharegpt4v",
    title="ShareGPT4V",
    files=("datas_for_validation.json", "val_data/"),
    source="the U-MARVEL or LamRA repository's data (1,000 validation pairs of ShareGPT4V)",
    read=_sharegpt4v,
    metrics=RECALLS,
    instructions=BOTH_WAYS,
)


def _urban1k(root: Path) -> Content:
    pictures = pictures_in(root, "image")
    texts = {path.stem: path for path in sorted((root / "caption").glob("*.txt"))}
    named = [name for name in texts if name in pictures]
    return both_ways(Captioned(pictures[name], read_lines(texts[name])[:1]) for name in named)


URBAN1K = Suite(
    name="urban1k",
    title="Urban1K",
    files=("image/", "caption/"),
    source="https://huggingface.co/datasets/BeichenZhang/Urban1k",
    read=_urban1k,
    annotations=("caption/*.txt", "image/*"),
    metrics=RECALLS,
    instructions=BOTH_WAYS,
)


def _karpathy(root: Path, file: str, folder: str) -> Content:
    """Karpathy's test split."""
    images = read_json(root / file)["images"]
    return both_ways(
        Captioned(f"{folder}/{row['filename']}", [sentence["raw"] for sentence in row["sentences"]])
        for row in images
        if row["split"] == "test"
    )


FLICKR30K = Suite(
    name="flickr30k",
    title="Flickr30K",
    files=("dataset_flickr30k.json", "flickr30k-images/"),
    source="https://shannon.cs.illinois.edu/DenotationGraph, and Karpathy's split (caption_datasets.zip)",
    read=partial(_karpathy, file="dataset_flickr30k.json", folder="flickr30k-images"),
    metrics=RECALLS,
    instructions=BOTH_WAYS,
)
COCO = Suite(
    name="coco",
    title="MSCOCO",
    files=("dataset_coco.json", "val2014/"),
    source="https://cocodataset.org (2014 validation images), and Karpathy's split (caption_datasets.zip)",
    read=partial(_karpathy, file="dataset_coco.json", folder="val2014"),
    metrics=RECALLS,
    instructions=BOTH_WAYS,
)


def _visdial(root: Path) -> Content:
    data = read_json(root / "visdial_1.0_val.json")["data"]
    documents, queries = [], []
    for dialog in data["dialogs"]:
        id_ = str(dialog["image_id"])
        documents.append(Document(id_, image=f"VisualDialog_val2018/VisualDialog_val2018_{id_.zfill(12)}.jpg"))
        turns = [
            f"Q: {data['questions'][turn['question']]}? A: {data['answers'][turn['answer']]}."
            for turn in dialog["dialog"]
        ]
        queries.append(Query(f"q{id_}", "visdial", [id_], text=" ".join(turns)))
    return Content(documents, queries, {"visdial": [document.id for document in documents]})


VISDIAL = Suite(
    name="visdial",
    title="VisDial",
    files=("visdial_1.0_val.json", "VisualDialog_val2018/"),
    source="https://visualdialog.org/data (version 1.0, validation)",
    read=_visdial,
    metrics=RECALLS,
    instructions={EVERY_TASK: "Find me an everyday image that matches the given dialog."},
)
