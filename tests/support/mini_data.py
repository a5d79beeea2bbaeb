"""A small, self-contained subset of the shipped demo data, for tests that run whole stages."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from umarvel_ray import demo

TABLES = {"text_pairs": 40, "image_pairs": 40, "train": 8, "validation": 3, "test": 3}


def make_mini_data(folder: Path, per_task: dict[str, int] | None = None, pool: int = 24) -> Path:
    """Write the first rows of each task of every table, pools of `pool` documents, and all documents they refer to."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted: set[str] = set()
    positives: dict[tuple[str, str], list[str]] = {}
    for name, rows in (TABLES | (per_task or {})).items():
        table = pq.read_table(demo.DATA / f"{name}.parquet")
        parts = [
            table.filter(pc.equal(table["task"], task)).slice(0, rows) for task in pc.unique(table["task"]).to_pylist()
        ]
        cut = pa.concat_tables(parts)
        pq.write_table(cut, folder / f"{name}.parquet")
        for row in cut.select(["task", "positive_ids"]).to_pylist():
            positives.setdefault((row["task"], name), []).extend(row["positive_ids"])
            wanted.update(row["positive_ids"])
    pools = []
    for row in pq.read_table(demo.DATA / "pools.parquet").to_pylist():
        ids = list(dict.fromkeys(positives.get((row["task"], row["split"]), []) + row["document_ids"][:pool]))
        pools.append(row | {"document_ids": ids})
        wanted.update(ids)
    pq.write_table(pa.Table.from_pylist(pools), folder / "pools.parquet")
    documents = pq.read_table(demo.DATA / "documents.parquet")
    pq.write_table(documents.filter(pc.is_in(documents["id"], pa.array(sorted(wanted)))), folder / "documents.parquet")
    return folder
