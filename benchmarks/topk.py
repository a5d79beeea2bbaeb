"""Exact top-k on CPUs against faiss Flat, side by side in one run, over sizes of query batch, corpus and vector.

Memory is what a search adds to the process at its peak, looked at every few milliseconds: the corpus is not copied.

    python -m benchmarks.topk [rounds=5] [k=100]    → benchmarks/results/topk.json
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch

from benchmarks.common.memory import memory_of
from benchmarks.common.results import integer_arguments, print_table, write_result
from benchmarks.common.timing import alternate, median_ratio
from umarvel_ray.retrieve.topk import topk

CORPORA = (100_000, 256), (500_000, 256), (1_000_000, 256), (100_000, 64), (100_000, 896)  # documents, dimension
QUERIES = 64, 256, 1024, 4096


def unit_vectors(count: int, d: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, d), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def added_megabytes(search: Callable[[], object]) -> float:
    """How much more the process has allocated at the peak of a search than before it."""
    own = os.getpid()
    before, peak, done = memory_of(own)["RssAnon"], 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, memory_of(own)["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    search()
    done.set()
    watcher.join()
    return max(0, peak - before) / 2**20


def bench(documents: np.ndarray, flat: faiss.Index, queries: np.ndarray, k: int, rounds: int) -> dict[str, Any]:
    """One batch of queries, ours and by faiss."""
    added = added_megabytes(lambda: topk(queries, documents, k))
    scores, found = topk(queries, documents, k)
    expected_scores, expected = flat.search(queries, k)
    agreement = float((found == expected).mean())
    if agreement < 0.999 or np.abs(scores - expected_scores).max() > 1e-5:
        sys.exit(f"ours and faiss Flat return different documents: {agreement:.2%} agree")
    times = alternate({"ours": lambda: topk(queries, documents, k), "faiss": lambda: flat.search(queries, k)}, rounds)
    ratio = {clock: median_ratio(times["faiss"][clock], times["ours"][clock]) for clock in times["ours"]}
    return {
        "documents": len(documents), "dimension": documents.shape[1], "queries": len(queries), "speedup": ratio,
        "agreement": agreement, "added_megabytes": added, "times": times,
    }  # fmt: skip


def main(rounds: int = 5, k: int = 100) -> None:
    faiss.omp_set_num_threads(torch.get_num_threads())
    figures = []
    for count, d in CORPORA:
        documents, queries = unit_vectors(count, d, 0), unit_vectors(max(QUERIES), d, 1)
        flat = faiss.IndexFlatIP(d)
        flat.add(documents)
        figures += [bench(documents, flat, queries[:n], k, rounds) for n in QUERIES]
        write_result("topk", {"k": k, "searches": figures})
    print_table(
        ("documents x dimension", "queries", "speedup of ours", "by CPU time", "added MB"),
        [
            (
                f"{one['documents']:,} x {one['dimension']}",
                str(one["queries"]),
                *(f"{ratio:.2f}" for ratio in one["speedup"].values()),
                f"{one['added_megabytes']:.0f}",
            )
            for one in figures
        ],
    )


if __name__ == "__main__":
    main(**integer_arguments(sys.argv[1:]))
