"""The live index beside its physical limits, on one thread.

- commits of 1 and of 64 documents, beside writing and syncing the same bytes to a bare file;
- replay: how fast a replica that starts reads a log, beside reading the same bytes;
- search in a base with a snapshot and a tail of commits on top, with deletions and filters, beside faiss Flat alone.

    python benchmarks/index.py [rows=100000] [rounds=5]    → benchmarks/results/index.json
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from bench_model import RESULTS, arguments, machine, median_ratio, race

from umarvel_ray.data.tables import Dataset
from umarvel_ray.index import Add, Corpus, Delete, IndexWriter, LiveIndex, make_index
from umarvel_ray.index.log import log_path

D = 384
PICTURE = os.urandom(4096)
COMMITS = 200  # in a round
QUERIES = 50
SOURCES = ("news", "notes", "shop", "wiki")


def unit_vectors(count: int) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(count, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def documents(vectors: np.ndarray, start: int = 0) -> list[Add]:
    return [
        Add(f"{row}", vector, "image,text", SOURCES[row % 4], text=f"document {row}", image=PICTURE)
        for row, vector in enumerate(vectors, start)
    ]


def bench_commits(folder: Path, batch: int, rounds: int) -> dict[str, Any]:
    """Our commits, and the same bytes written and synced to a bare file."""
    rows = documents(unit_vectors(batch))
    writer = IndexWriter.open(folder / f"commits-{batch}", "model", D, [])
    writer.commit(rows)
    frame = os.urandom(log_path(folder / f"commits-{batch}", 1).stat().st_size)

    def commits() -> None:
        for _ in range(COMMITS):
            writer.commit(rows)

    with (folder / f"bare-{batch}").open("ab", buffering=0) as bare:

        def bytes_alone() -> None:
            for _ in range(COMMITS):
                bare.write(frame)
                os.fdatasync(bare.fileno())

        sides = race({"commits": commits, "write and sync": bytes_alone}, rounds)
    return {"documents": batch, "bytes": len(frame), "commits": COMMITS, **compared(sides, COMMITS)}


def bench_replay(folder: Path, rounds: int) -> dict[str, Any]:
    """A replica that starts on the log of `bench_commits`, and `read` of the same file."""
    log = folder / "commits-64"
    size = log_path(log, 1).stat().st_size
    sides = race(
        {"replay": lambda: LiveIndex.open(log, "model", D), "read": lambda: log_path(log, 1).read_bytes()}, rounds
    )
    return {"megabytes": size / 2**20, **compared(sides, size / 2**20)}


def bench_search(folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    """All rows in faiss Flat; and 80 % of them in a Flat base, 10 % in a snapshot, 10 % in the tail."""
    vectors, queries = unit_vectors(rows), unit_vectors(rows + QUERIES)[rows:]
    flat = faiss.IndexFlatIP(D)
    flat.add(vectors)
    cuts = int(0.8 * rows), int(0.9 * rows)
    inside, first, second = documents(vectors[: cuts[0]]), documents(vectors[slice(*cuts)], cuts[0]), cuts[1]
    table = pa.Table.from_pylist([row.document for row in inside])
    base = Corpus(
        make_index([row.id for row in inside], vectors[: cuts[0]], "Flat"),
        Dataset(folder, table, table, lambda _: table),
    )
    writer = IndexWriter.open(folder / "live", "model", D, base.index.ids)
    writer.commit(first)
    writer.compact()
    writer.commit(documents(vectors[second:], second))
    live = LiveIndex.open(folder / "live", "model", D, base)
    for query in queries:
        found = [hit.document["id"] for hit in live.search(query, 10)]
        if found != [str(row) for row in flat.search(query[None], 10)[1][0]]:
            sys.exit("the live index finds other documents than faiss Flat")
    half = LiveIndex.open(folder / "live", "model", D, base)
    writer.commit([Delete(f"{row}") for row in range(0, rows, 2)])
    half.follow()
    sides = race(
        {
            "live": lambda: [live.search(query, 10) for query in queries],
            "half deleted": lambda: [half.search(query, 10) for query in queries],
            "one source of four": lambda: [live.search(query, 10, sources=["wiki"]) for query in queries],
            "faiss Flat": lambda: [flat.search(query[None], 10) for query in queries],
        },
        rounds,
    )
    return {"rows": rows, "dimension": D, **compared(sides, QUERIES)}


def compared(taken: dict[str, dict[str, list[float]]], work: float) -> dict[str, Any]:
    """Work per second of each side at its best, and the share of the last side's speed (median over rounds)."""
    limit = list(taken)[-1]
    return {
        "per_second": {side: work / min(times["seconds"]) for side, times in taken.items()},
        f"share_of_{limit.replace(' ', '_')}": {
            side: median_ratio(taken[limit]["seconds"], times["seconds"]) for side, times in taken.items()
        },
        "seconds": {side: times["seconds"] for side, times in taken.items()},
    }


def main(rows: int = 100_000, rounds: int = 5) -> None:
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=RESULTS) as name:  # a disk, where the system's own may be memory
        folder = Path(name)
        figures = {
            "machine": machine(),
            "commit of 1": bench_commits(folder, 1, rounds),
            "commit of 64": bench_commits(folder, 64, rounds),
            "replay": bench_replay(folder, rounds),
            "search": bench_search(folder, rows, rounds),
        }
    (RESULTS / "index.json").write_text(json.dumps(figures, indent=1) + "\n")
    for part in list(figures)[1:]:
        print(part, json.dumps({key: value for key, value in figures[part].items() if key != "seconds"}, indent=1))


if __name__ == "__main__":
    main(**arguments(sys.argv[1:]))
