"""MMEB: 36 sets, each query with candidates of its own, the first of which is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from umarvel_ray.errors import UserError
from umarvel_ray.suites.files import read_json, read_jsonl
from umarvel_ray.suites.suite import EVERY_TASK, Content, Document, Query, Suite

GROUPS = {
    "Classification": (
        *("VOC2007", "N24News", "SUN397", "ImageNet-1K", "HatefulMemes"),
        *("ObjectNet", "Country211", "Place365", "ImageNet-A", "ImageNet-R"),
    ),
    "VQA": (
        *("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W"),
        *("ScienceQA", "GQA", "TextVQA", "VizWiz"),
    ),
    "Retrieval": (
        *("MSCOCO_i2t", "MSCOCO_t2i", "VisDial", "CIRR", "VisualNews_i2t", "VisualNews_t2i", "NIGHTS", "WebQA"),
        *("Wiki-SS-NQ", "FashionIQ", "OVEN", "EDIS"),
    ),
    "Grounding": ("MSCOCO", "RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing"),
}
OUT_OF_DOMAIN = (
    *("ObjectNet", "Country211", "Place365", "ImageNet-A", "ImageNet-R", "ScienceQA", "GQA", "TextVQA", "VizWiz"),
    *("Wiki-SS-NQ", "FashionIQ", "OVEN", "EDIS", "RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing"),
)
SETS = tuple(name for names in GROUPS.values() for name in names)
PICTURE = "<|image_1|>"  # the placeholder in MMEB's texts


def _mmeb(root: Path) -> Content:
    path = root / "data_instruction.json"
    instructions = read_json(path) if path.is_file() else {}
    documents: dict[tuple[str, str, str | None], Document] = {}
    queries = []
    for name in SETS:
        told = instructions.get(name, {})
        for number, row in enumerate(_rows(root, name)):
            gallery = []
            for text, image in _candidates(row, told.get("tgt_instruction", "")):
                fresh = Document(f"{name} {len(documents)}", text or None, image and f"images/{image}")
                gallery.append(documents.setdefault((name, text, image), fresh).id)
            asked, image = told.get("qry_instruction", ""), row["qry_img_path"] or None
            queries.append(
                Query(
                    id=f"{name} query {number}",
                    task=name,
                    positives=gallery[:1],
                    text=_plain(row["qry_text"], asked) or None,
                    image=image and f"images/{image}",
                    gallery=list(dict.fromkeys(gallery)),
                    instruction=asked or None,
                )
            )
    return Content(documents.values(), queries, {})


def _rows(root: Path, name: str) -> list[dict[str, Any]]:
    """A set, in the form of its hub repository or as JSON lines."""
    lines = root / name / f"{name}_test.jsonl"
    if lines.is_file():
        return read_jsonl(lines)
    tables = sorted((root / name).glob("test-*.parquet"))
    if not tables:
        raise UserError(
            f"{lines}: not found, nor {root / name}/test-*.parquet; MMEB has the sets {', '.join(SETS)} (get them from "
            f"{MMEB.source})"
        )
    rows: list[dict[str, Any]] = [row for table in tables for row in pq.read_table(table).to_pylist()]
    return rows


def _candidates(row: dict[str, Any], told: str) -> list[tuple[str, str | None]]:
    """Texts and pictures of a query's candidates. One side may be a single value for all."""
    texts, paths = row["tgt_text"], row["tgt_img_path"]
    count = max(len(side) for side in (texts, paths) if isinstance(side, list))
    texts, paths = (side if isinstance(side, list) else [side] * count for side in (texts, paths))
    return [(_plain(text, told), path or None) for text, path in zip(texts, paths, strict=True)]


def _plain(text: str | None, told: str) -> str:
    """A text without MMEB's placeholder and without the instruction, which queries carry apart and candidates not."""
    text = (text or "").replace(PICTURE, "")
    return (text.replace(told, "") if told else text).strip()


MMEB = Suite(
    name="mmeb",
    title="MMEB",
    files=("images/",),
    annotations=("data_instruction.json", "*/*_test.jsonl", "*/test-*.parquet"),
    source="https://huggingface.co/datasets/TIGER-Lab/MMEB-eval, with its images.zip unpacked into images/",
    read=_mmeb,
    metrics=("accuracy",),
    instructions={EVERY_TASK: None},
    groups=GROUPS
    | {"in-domain": tuple(name for name in SETS if name not in OUT_OF_DOMAIN), "out-of-domain": OUT_OF_DOMAIN},
)
