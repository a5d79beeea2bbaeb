"""Time and memory of every step around the model at M-BEIR's published size, or at a share of it.

    python -m benchmarks.mbeir_size DIR --scale 1         → benchmarks/results/mbeir-size.json
    python -m benchmarks.mbeir_size DIR --scale 0.01 --only load,plan --out FILE

The folder is generated (benchmarks/common/mbeir_folder.py); vectors are random, of 64 dimensions, because the model's
own time is not what is measured. Each step runs in a process of its own, which is the driver of a run; its peak memory
is what it allocates itself (RssAnon); the resident size (RSS) includes pages of mapped files, which the system takes
back when it needs them.

- load: convert the folder, open all query tables, validate pools;
- reopen: the same again, from the converted tables;
- plan: the batches of the instruction phase, written and read back by a rank;
- embed: the driver's part of bulk embedding, with given vectors;
- rank: rankings in the global pool of some shards of queries, beside the bare product on the same vectors;
- filters: judge 100 candidates for every training query and choose its negatives;
- stage2: read the negatives, plan stage 2 and the reranker;
- evaluate: metrics, fusion, calibration and confidence interval of all test queries with 50 candidates.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa

from benchmarks.common.mbeir_folder import write_mbeir_folder
from benchmarks.common.memory import memory_of
from benchmarks.common.results import print_table, write_result
from umarvel_ray.data.dataset import Dataset, Queries, Selection
from umarvel_ray.data.plan import contrastive_plan, read_plan, rerank_plan, write_plan
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.evaluate.bootstrap import paired_interval
from umarvel_ray.inference.embed import EmbedderGroup, embed_table
from umarvel_ray.inference.embeddings import embedding_table, vectors_of
from umarvel_ray.inference.score import SCORED
from umarvel_ray.inference.shards import close_output, open_output, read_manifest, read_shard, write_shard
from umarvel_ray.mining.mine import CandidateJudge, easy_of, kept_of, negatives_of
from umarvel_ray.ragged import Ragged, flat
from umarvel_ray.ray_session import prepare_environment, start_ray
from umarvel_ray.recipe import Data, Recipe, load_recipe
from umarvel_ray.retrieve.exact import ExactSearch
from umarvel_ray.retrieve.fusion import answers_of, calibrate_weight, candidates_to_score, fuse_rankings
from umarvel_ray.retrieve.metrics import score_ranking
from umarvel_ray.retrieve.rank import RANKING, Embedded, rank_shards
from umarvel_ray.retrieve.topk import topk

STEPS = ("load", "reopen", "plan", "embed", "rank", "filters", "stage2", "evaluate")
BOUNDS = {"load": 180, "plan": 120, "filters": 600}  # seconds at scale 1 on two cores
DRIVER_GIB = 2.0
DIMENSION = 64
RANKED_SHARDS = 4
RERANKED = 50
TRAIN, TEST = "train", "test"


class Ref(NamedTuple):
    """Stands for a checkpoint."""

    identity: str = "random vectors"


class GivenVectors:
    """Stands for the embedding actors: writes random unit vectors."""

    def run(self, calls: Sequence[int], submit: Callable[[Any, int], int]) -> Iterator[int]:
        return (submit(self, call) for call in calls)

    @property
    def embed_shard(self) -> GivenVectors:
        return self

    def remote(self, ref: Ref, _: object, rows: Selection, side: str, folder: Path, index: int) -> int:
        vectors = np.random.default_rng([index, side == "query"]).standard_normal((rows.n, DIMENSION), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        write_shard(folder, index, embedding_table(rows.rows.tolist(), rows.table.ids(rows.rows), vectors), [])
        return rows.n


class Size:
    """One folder, and what the steps leave for the next ones in `work`."""

    def __init__(self, root: Path, scale: float) -> None:
        self.data, self.work = root / f"data-{scale:g}", root / f"work-{scale:g}"
        self.recipe = _recipe(scale)
        self.phase = self.recipe.stage1.instruction

    def open(self) -> Dataset:
        return open_dataset(Data(root=str(self.data), format="mbeir"), self.work / "tables")

    def load(self) -> dict[str, Any]:
        shutil.rmtree(self.work, ignore_errors=True)
        return self.reopen()

    def reopen(self) -> dict[str, Any]:
        dataset = self.open()
        for split in (TRAIN, "validation", TEST):
            dataset.validate(split)
        return {
            "documents": dataset.documents.num_rows,
            "train queries": dataset.queries(TRAIN).n,
            "test queries": dataset.queries(TEST).n,
        }

    def plan(self) -> dict[str, Any]:
        path = self.work / "plan.parquet"
        dataset = self.open()
        write_plan(contrastive_plan(dataset.queries(TRAIN), self.phase, self.recipe.seed, dataset.content()), path)
        return {"steps": len(read_plan(path))}

    def embed(self) -> dict[str, Any]:
        for old in self.work.glob("*-query"), self.work.glob("*-document"):
            for folder in old:
                shutil.rmtree(folder)
        dataset, embedders = self.open(), GivenVectors()
        shards = 0
        for split in (TRAIN, TEST):
            pool = Selection(dataset.documents, dataset.global_pool(split))
            for rows, side in ((dataset.queries(split).by_task(), "query"), (pool, "document")):
                folder = self._vectors(split, side)
                embed_table(embedders, rows, side, folder, Ref(), f"{split} {side}")
                shards += read_manifest(folder)["shards"]
        return {"shards": shards}

    def rank(self) -> dict[str, Any]:
        dataset, depth = self.open(), self.recipe.stage2.mining.depth
        with start_ray(cpus=2), EmbedderGroup(self.recipe.cluster, self.recipe.compute) as embedders:
            folder = self._vectors(TRAIN, "query")
            embedded = Embedded(ExactSearch(embedders, self._vectors(TRAIN, "document")), folder)
            shards = range(min(RANKED_SHARDS, read_manifest(folder)["shards"]))
            warm = shards[:1]
            list(rank_shards(embedded, dataset, TRAIN, "global", depth, warm))
            begin = time.perf_counter()
            ranked = rank_shards(embedded, dataset, TRAIN, "global", depth, shards)
            queries_ranked = sum(table.num_rows for _, table, _ in ranked)
            seconds = time.perf_counter() - begin
            actors = max(memory_of(process.pid)["RssAnon"] for process in psutil.process_iter() if _is_actor(process))
        documents = np.concatenate([vectors_of(part) for part in _shards(self._vectors(TRAIN, "document"))])
        queries = [vectors_of(read_shard(folder, shard)) for shard in shards]
        topk(queries[0], documents, depth)
        begin = time.perf_counter()
        for part in queries:
            topk(part, documents, depth)
        product = time.perf_counter() - begin
        return {
            "queries": queries_ranked,
            "ranking": seconds,
            "bare product": product,
            "overhead": seconds / product - 1,
            "actor_gib": actors / 2**30,
            "slice_gib": documents.nbytes / self.recipe.cluster.embedders / 2**30,
        }

    def filters(self) -> dict[str, Any]:
        dataset, recipe = self.open(), self.recipe
        queries = dataset.queries(TRAIN)
        embedded = Embedded(ExactSearch(_NoActors(), self._vectors(TRAIN, "document")), self._vectors(TRAIN, "query"))
        judge = CandidateJudge(embedded, dataset, recipe, dict.fromkeys(dataset.tasks(TRAIN), 0.7))
        shards = read_manifest(embedded.queries)["shards"]
        out = self.work / "mined"
        shutil.rmtree(out, ignore_errors=True)
        for index in open_output(out, {"shards": shards}, shards):
            rows = read_shard(embedded.queries, index, ["row"])["row"].to_numpy()
            ranking = _random_ranking(queries, rows, embedded.documents.rows, recipe.stage2.mining.depth, index)
            mined, counts = judge(index, ranking)
            write_shard(out, index, mined, [], counts)
        close_output(out, queries.n)
        return {"candidates": queries.n * recipe.stage2.mining.depth}

    def stage2(self) -> dict[str, Any]:
        dataset, recipe = self.open(), self.recipe
        queries = dataset.queries(TRAIN)
        phase = recipe.stage2.train
        negatives = negatives_of(self.work / "mined", queries)
        steps = len(contrastive_plan(queries, phase, recipe.seed, dataset.content(), negatives, phase.hard_negatives))
        kept = kept_of(self.work / "mined", queries, 0, recipe.reranker.negatives_top)
        easy = easy_of(self.work / "mined", queries)
        return {"steps": steps, "reranker": len(rerank_plan(queries, kept, easy, recipe.reranker.train, recipe.seed))}

    def evaluate(self) -> dict[str, Any]:
        dataset, settings = self.open(), self.recipe.evaluate
        queries, pool = dataset.queries(TEST), dataset.global_pool(TEST)
        rankings = [_random_ranking(queries, queries.rows, pool, RERANKED, seed) for seed in (1, 2)]
        scores = [score_ranking(ranking, queries, settings) for ranking in rankings]
        candidates = candidates_to_score(rankings, RERANKED)
        answers = np.random.default_rng(3).random(len(flat(candidates["scores"])), np.float32)
        lists = Ragged.of_arrow(candidates["documents"]).like(answers)
        known = answers_of(candidates.append_column(SCORED.field("rerank_scores"), lists), rankings[0])
        weight = calibrate_weight(rankings[0], known, queries, settings, RERANKED)
        fused = fuse_rankings(rankings[0], known, weight, RERANKED)
        both = [{task: np.random.default_rng(seed).random(int(own["queries"])) for task, own in scores[0].items()}
                for seed in (4, 5)]  # fmt: skip
        paired_interval(*both)
        return {"queries": fused.num_rows, "candidates": len(answers)}

    def _vectors(self, split: str, side: str) -> Path:
        return self.work / f"{split}-{side}"


class _NoActors:
    count, actors = 2, ()


def _recipe(scale: float) -> Recipe:
    """The 7B recipe on two actors without GPUs, with batches that shrink with the data."""
    batch = max(16, round(3840 * scale))
    return load_recipe(
        "qwen2vl-7b",
        [
            "cluster.workers=1", "cluster.embedders=2", "cluster.gpus_per_embedder=0", "cluster.cpus_per_embedder=1",
            f"stage1.instruction.batch_size={batch}", "stage1.instruction.lr_scaling=none",
            f"stage2.train.batch_size={max(16, round(1088 * scale))}", "stage2.train.lr_scaling=none",
            "reranker.train.max_steps=null",
        ],
    )  # fmt: skip


def _random_ranking(queries: Queries, rows: np.ndarray, pool: np.ndarray, depth: int, seed: int) -> pa.Table:
    """`depth` random documents per query, its first positive among them at a random rank, with descending cosines."""
    rng = np.random.default_rng(seed)
    at = np.searchsorted(queries.rows, rows)
    documents = pool[rng.integers(0, len(pool), (len(rows), depth))]
    first = queries.positives.values[queries.positives.offsets[at]]
    documents[np.arange(len(rows)), rng.integers(0, depth, len(rows))] = first
    scores = -np.sort(-rng.uniform(0.3, 0.8, documents.shape).astype(np.float32), axis=1)
    lists = Ragged.of_counts(np.full(len(rows), depth), documents.reshape(-1))
    columns = [
        pa.array(rows),
        pa.array(np.array(queries.tasks)[queries.task[at]], pa.string()),
        lists.to_arrow(),
        lists.like(scores.reshape(-1)),
        pa.array(np.full(len(rows), len(pool))),
    ]
    return pa.table(columns, schema=RANKING)


def _shards(folder: Path) -> Iterator[pa.Table]:
    return (read_shard(folder, shard, ["embedding"]) for shard in range(read_manifest(folder)["shards"]))


def _is_actor(process: psutil.Process) -> bool:
    try:
        return any("EmbedderActor" in word for word in process.cmdline())
    except psutil.Error:
        return False


class _Peak:
    """Watches this process from a thread."""

    def __init__(self) -> None:
        self._own, self.anonymous, self.resident = psutil.Process(), 0, 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, memory_of(self._own.pid)["RssAnon"])
            self.resident = max(self.resident, self._own.memory_info().rss)
            time.sleep(0.05)


def run_step(step: str, root: Path, scale: float) -> dict[str, Any]:
    """Run a step in this process."""
    peak, before = _Peak(), memory_of(os.getpid())["RssAnon"]
    begin = time.perf_counter()
    figures = getattr(Size(root, scale), step)()
    seconds = time.perf_counter() - begin
    gib = {"start_gib": before, "peak_gib": peak.anonymous, "rss_gib": peak.resident}
    return {"seconds": seconds, **{name: size / 2**30 for name, size in gib.items()}, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--only", default=",".join(STEPS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(run_step(args.step, args.dir, args.scale)))
        return
    prepare_environment()  # Ray reads it when it is imported, so it is for the processes of the steps
    write_mbeir_folder(args.dir / f"data-{args.scale:g}", args.scale)
    figures: dict[str, Any] = {}
    for step in args.only.split(","):
        command = [sys.executable, "-m", "benchmarks.mbeir_size", str(args.dir), "--scale", str(args.scale)]
        output = subprocess.run([*command, "--step", step], stdout=subprocess.PIPE, text=True, check=True).stdout
        figures[step] = json.loads(output.splitlines()[-1])
        print(step, figures[step], flush=True)
    bounds = {"seconds": BOUNDS, "driver_gib": DRIVER_GIB}
    write_result("mbeir-size", {"scale": args.scale, "bounds": bounds, "steps": figures}, args.out)
    print_table(
        ("step", "seconds", "bound", "driver GiB", "resident GiB"),
        [
            (
                step,
                f"{own['seconds']:.1f}",
                f"{BOUNDS[step] * args.scale:.0f}" if step in BOUNDS else "",
                f"{own['peak_gib']:.2f}",
                f"{own['rss_gib']:.2f}",
            )
            for step, own in figures.items()
        ],
    )


if __name__ == "__main__":
    main()
