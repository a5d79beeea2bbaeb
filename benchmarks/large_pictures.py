"""Train and mine on a Parquet folder whose pictures are larger than memory, and watch how much memory that takes.

    python -m benchmarks.large_pictures DIR gigabytes=30        → benchmarks/results/large-pictures.json

Each document shows a picture of one megabyte; 200 different ones, so that Parquet's dictionaries keep the file small
while every reader gets all the bytes. With the demo's base: four steps of the instruction phase with 64 queries each,
and mining in the pool of all documents. DIR needs as many gigabytes for the converted table.
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.common.memory import memory_of
from benchmarks.common.results import text_arguments, write_result
from umarvel_ray.ray_session import OBJECT_STORE_BYTES

DISTINCT, SIDE = 200, 584  # pictures; pixels of a side, three bytes each
GROUP = 2000  # rows of a Parquet row group, which has one dictionary
QUERIES = 2000
INTERVAL_S = 2.0
PHASE = "{queries: train, batch_size: 64, max_steps: 4, learning_rate: 1.0e-3, lora: {r: 16, alpha: 32}}"


def write_folder(folder: Path, documents: int) -> None:
    """One task, picture to picture; the positive of query i is document i + 1."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [_picture(number) for number in range(DISTINCT)]
    schema = pa.schema([("id", pa.string()), ("text", pa.string()), ("image", pa.binary()), ("modality", pa.string()),
                        ("source", pa.string())])  # fmt: skip
    with pq.ParquetWriter(
        folder / "documents.parquet", schema, use_dictionary=["image"], dictionary_pagesize_limit=2**30
    ) as writer:
        for start in range(0, documents, GROUP):
            rows = [_row(f"d{i}", pictures[i % DISTINCT]) for i in range(start, min(start + GROUP, documents))]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    queries = [
        _row(f"q{i}", pictures[i % DISTINCT])
        | {"instruction": "Find another.", "positive_ids": [f"d{i + 1}"], "task": "noise_task4"}
        for i in range(min(QUERIES, documents - 1))
    ]
    pq.write_table(pa.Table.from_pylist(queries), folder / "train.parquet")
    pools = [{"task": "noise_task4", "split": "train", "document_ids": [f"d{i}" for i in range(documents)]}]
    pq.write_table(pa.Table.from_pylist(pools), folder / "pools.parquet")


def watch(command: list[str]) -> dict[str, float]:
    """Run a command; the peak of what its processes allocate, together and in one, and of Ray's shared memory."""
    begin, process = time.monotonic(), psutil.Popen(command)
    total, single, shared = 0, 0, 0
    while process.poll() is None:
        members = [memory_of(pid) for pid in _with_children(process)]
        total = max(total, sum(own["RssAnon"] for own in members))
        single = max(single, max((own["RssAnon"] for own in members), default=0))
        shared = max(shared, max((own["RssShmem"] for own in members), default=0))
        time.sleep(INTERVAL_S)
    if process.returncode:
        sys.exit(process.returncode)
    sizes = {"all processes": total, "largest process": single, "object store": shared}
    return {"seconds": time.monotonic() - begin, **{name: size / 2**30 for name, size in sizes.items()}}


def _with_children(process: psutil.Process) -> list[int]:
    with suppress(psutil.NoSuchProcess):
        return [process.pid, *(child.pid for child in process.children(recursive=True))]
    return []


def main(folder: Path, gigabytes: str = "30", out: str | None = None) -> None:
    documents = round(float(gigabytes) * 1e9 / (3 * SIDE**2))
    data, run = folder / f"data-{gigabytes}", folder / f"run-{gigabytes}"
    if not (data / "pools.parquet").exists():
        write_folder(data, documents)
    shutil.rmtree(run, ignore_errors=True)
    recipe = [
        "demo", f"data.root={data}", f"output={run}", "stage1.text=null", "stage1.image_text=null",
        f"stage1.instruction={PHASE}", "stage2.mining={pool: global, depth: 50, max_similarity: 0.999}",
    ]  # fmt: skip
    steps: dict[str, Any] = {}
    for verb in ("train-stage1", "mine"):
        steps[verb] = watch([sys.executable, "-m", "umarvel_ray.cli", verb, *recipe])
        print(verb, steps[verb], flush=True)
    [table] = (run / "tables").glob("documents-*.arrow")
    figures = {
        "documents": documents,
        "picture_gib": documents * 3 * SIDE**2 / 2**30,
        "table_gib": table.stat().st_size / 2**30,
        "parquet_gib": (data / "documents.parquet").stat().st_size / 2**30,
        "memory_gib": psutil.virtual_memory().total / 2**30,
        "object_store_gib": OBJECT_STORE_BYTES / 2**30,
        "steps": steps,
    }
    write_result("large-pictures", figures, Path(out) if out else None)


def _picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _row(id_: str, image: bytes) -> dict[str, Any]:
    return {"id": id_, "text": None, "image": image, "modality": "image", "source": "noise"}


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m benchmarks.large_pictures DIR [gigabytes=30] [out=FILE]")
    main(Path(sys.argv[1]), **text_arguments(sys.argv[2:]))
