"""The live index against its physical limits, on one thread.

- commits of 1 and of 64 documents, against writing and syncing the same bytes to a plain file;
- replay: how fast a starting replica reads a log, against reading the same bytes;
- search over a base with a snapshot and a tail of commits, with deletions and filters, against plain faiss Flat.

    python -m benchmarks.index [rows=100000] [rounds=5]    → benchmarks/results/index.json
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

from benchmarks.common.results import RESULTS, integer_arguments, write_result
from benchmarks.common.timing import Times, alternate, median_ratio
from umarvel_ray.data.stored import write_stored
from umarvel_ray.index import Add, Corpus, Delete, IndexWriter, LiveIndex, make_index
from umarvel_ray.index.log import log_path

D = 384
PICTURE = os.urandom(4096)
COMMITS = 200  # per round
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
    """Our commits, and the same bytes written and synced to a plain file."""
    rows = documents(unit_vectors(batch))
    writer = IndexWriter.open(folder / f"commits-{batch}", "model", D, [])
    writer.commit(rows)
    frame = os.urandom(log_path(folder / f"commits-{batch}", 1).stat().st_size)

    def commits() -> None:
        for _ in range(COMMITS):
            writer.commit(rows)

    with (folder / f"plain-{batch}").open("ab", buffering=0) as plain:

        def write_and_sync() -> None:
            for _ in range(COMMITS):
                plain.write(frame)
                os.fdatasync(plain.fileno())

        times = alternate({"commits": commits, "write and sync": write_and_sync}, rounds)
    return {"documents": batch, "bytes": len(frame), "commits": COMMITS, **compared(times, COMMITS)}


def bench_replay(folder: Path, rounds: int) -> dict[str, Any]:
    """A replica starting on the log of `bench_commits`, and a plain read of the same file."""
    log = folder / "commits-64"
    size = log_path(log, 1).stat().st_size
    times = alternate(
        {"replay": lambda: LiveIndex.open(log, "model", D), "read": lambda: log_path(log, 1).read_bytes()}, rounds
    )
    return {"megabytes": size / 2**20, **compared(times, size / 2**20)}


def bench_search(folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    """80 % of the rows in a Flat base, 10 % in a snapshot and 10 % in the tail, against all rows in faiss Flat."""
    vectors, queries = unit_vectors(rows), unit_vectors(rows + QUERIES)[rows:]
    flat = faiss.IndexFlatIP(D)
    flat.add(vectors)
    cuts = int(0.8 * rows), int(0.9 * rows)
    inside, snapshot = documents(vectors[: cuts[0]]), documents(vectors[slice(*cuts)], cuts[0])
    table = pa.Table.from_pylist([row.document for row in inside])
    stored = write_stored(folder / "documents.arrow", table.schema, table.to_batches())
    base = Corpus(make_index([row.id for row in inside], vectors[: cuts[0]], "Flat"), stored, np.arange(len(inside)))
    writer = IndexWriter.open(folder / "live", "model", D, base.index.ids)
    writer.commit(snapshot)
    writer.compact()
    writer.commit(documents(vectors[cuts[1] :], cuts[1]))
    live = LiveIndex.open(folder / "live", "model", D, base)
    for query in queries:
        found = [hit.document["id"] for hit in live.search(query, 10)]
        if found != [str(row) for row in flat.search(query[None], 10)[1][0]]:
            sys.exit("the live index and faiss Flat return different documents")
    half = LiveIndex.open(folder / "live", "model", D, base)
    writer.commit([Delete(f"{row}") for row in range(0, rows, 2)])
    half.follow()
    times = alternate(
        {
            "live": lambda: [live.search(query, 10) for query in queries],
            "half deleted": lambda: [half.search(query, 10) for query in queries],
            "one source of four": lambda: [live.search(query, 10, sources=["wiki"]) for query in queries],
            "faiss Flat": lambda: [flat.search(query[None], 10) for query in queries],
        },
        rounds,
    )
    return {"rows": rows, "dimension": D, **compared(times, QUERIES)}


def compared(times: Times, work: float) -> dict[str, Any]:
    """Work per second of each side's best round, and its speed as a share of the last side's (median over rounds)."""
    *_, limit = times
    shares = {
        clock: {side: median_ratio(times[limit][clock], own[clock]) for side, own in times.items()}
        for clock in ("seconds", "processor_seconds")
    }
    best = {side: work / min(own["seconds"]) for side, own in times.items()}
    return {"per_second": best, "share_of_limit": shares, "times": times}


def main(rows: int = 100_000, rounds: int = 5) -> None:
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=RESULTS) as name:  # on a disk; /tmp may be in memory
        folder = Path(name)
        figures = {
            "commit of 1": bench_commits(folder, 1, rounds),
            "commit of 64": bench_commits(folder, 64, rounds),
            "replay": bench_replay(folder, rounds),
            "search": bench_search(folder, rows, rounds),
        }
    write_result("index", figures)
    for name, part in figures.items():
        print(name, json.dumps({key: value for key, value in part.items() if key != "times"}, indent=1))


if __name__ == "__main__":
    main(**integer_arguments(sys.argv[1:]))
