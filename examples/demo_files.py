"""Files for the other examples, from the demo's tables: a folder of pictures, and a JSONL file of training rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from umarvel_ray import demo

TASKS = ("emoji_task0", "emoji_task3")  # a name → its picture, and a picture → its name


def demo_pictures(folder: Path, count: int) -> Path:
    """Write `count` pictures of the demo, from all over its corpus, to a folder, named after their documents."""
    table = pq.read_table(demo.DATA / "documents.parquet", columns=["id", "image", "modality"])
    table = table.filter(pc.equal(table["modality"], "image"))
    step = max(1, table.num_rows // count)
    for row in table.take(list(range(0, table.num_rows, step))[:count]).to_pylist():
        _write_picture(row, folder)
    return folder


def demo_jsonl(file: Path, rows: int = 160, seed: int = 0) -> Path:
    """Write rows of the demo's training data as `finetune_jsonl.py` reads them, with two random negatives each."""
    documents = {row["id"]: row for row in pq.read_table(demo.DATA / "documents.parquet").to_pylist()}
    queries, pools = (pq.read_table(demo.DATA / f"{name}.parquet") for name in ("train", "pools"))
    pool_of = {row["task"]: row["document_ids"] for row in pools.to_pylist() if row["split"] == "train"}
    choice, lines = random.Random(seed), []
    for task in TASKS:
        for query in queries.filter(pc.equal(queries["task"], task)).slice(0, rows // len(TASKS)).to_pylist():
            others = [name for name in pool_of[task] if name not in query["positive_ids"]]
            names = query["positive_ids"][:1] + choice.sample(others, 2)
            positive, *negatives = (_item(documents[name], file.parent) for name in names)
            lines.append({"query": _item(query, file.parent), "positive": positive, "negatives": negatives})
    choice.shuffle(lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def _item(row: dict[str, Any], folder: Path) -> dict[str, str]:
    item = {key: row[key] for key in ("text", "instruction") if row.get(key)}
    if row["image"]:
        item["image"] = str(_write_picture(row, folder / "pictures").relative_to(folder))
    return item


def _write_picture(row: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{row['id'].replace(':', '-')}.webp"
    path.write_bytes(row["image"])
    return path
