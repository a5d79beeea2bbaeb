"""Measure a checkpoint on a published benchmark, alone and with a reranker.

    measured = measure_suite(embedders, suite, dataset, model, folder, protocol)
    reranked = rerank_suite(rerankers, suite, dataset, model, reranker, folder, protocol)

Embeddings, rankings and scores are resumable shards in `folder`, as in every evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from umarvel_ray.data.content import digest_of
from umarvel_ray.data.dataset import Dataset, Queries
from umarvel_ray.data.mbeir import MbeirFolder, prompt_count
from umarvel_ray.data.sample import sample_queries
from umarvel_ray.data.tables import open_folder
from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.checkpoints import evaluate_checkpoint
from umarvel_ray.evaluate.measured import Measured, Scores, mean_of, saved_in
from umarvel_ray.evaluate.reranked import VALIDATION, Calibration, evaluate_reranked
from umarvel_ray.evaluate.results import SCOPES, LadderResult
from umarvel_ray.inference.embed import EmbedderGroup
from umarvel_ray.inference.score import RerankerGroup, score_table
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.recipe import Recipe
from umarvel_ray.retrieve.fusion import answers_of, candidates_to_score, fuse_rankings
from umarvel_ray.retrieve.metrics import depth_of, measures
from umarvel_ray.retrieve.rank import embed_split, rank
from umarvel_ray.suites.registry import HELD_OUT, HELD_OUT_TASKS, MBEIR
from umarvel_ray.suites.suite import SPLIT, Suite, by_task

MBEIR_K = {"fashion200k_task0": 10, "fashion200k_task3": 10, "fashioniq_task7": 10}  # 5 elsewhere
MBEIR_METRICS = ("R@1", "R@5", "R@10", "nDCG@10", "MRR@10")
MBEIR_TOP = 50
REFERENCE_WEIGHT = 0.1  # of U-MARVEL+ on M-BEIR


class Model(NamedTuple):
    """A checkpoint and what it is called in reports."""

    name: str
    ref: CheckpointRef


class Protocol(NamedTuple):
    """How a benchmark is run.

    Attributes:
        reference: repeat the reference's choices: its instructions, and the query's own picture stays in the pool.
        prompts: of M-BEIR: one by a hash of the query's id, or the mean over all.
        weight: w in cosine + w · P(yes), or "calibrate" on validation queries; None: the reference's.
    """

    reference: bool = False
    prompts: Literal["hash", "average"] = "hash"
    weight: float | Literal["calibrate"] | None = None

    @property
    def notes(self) -> dict[str, str]:
        named = {"protocol": "reference" if self.reference else "", "prompts": self.prompts}
        return {name: value for name, value in named.items() if value and value != "hash"}


def measure_suite(
    embedders: EmbedderGroup, suite: Suite, dataset: Dataset, model: Model, folder: Path, protocol: Protocol
) -> Measured:
    """Embed the benchmark, rank each query's pool or gallery, and score the rankings.

    Raises:
        UserError: an unreadable checkpoint, or a full disk.
    """
    queries, drop = dataset.queries(SPLIT), suite.hide_seen or not protocol.reference
    identity = digest_of(
        model.ref.identity, dataset.documents.digest, queries.digest, dataset.digest_of_pools(SPLIT), str(drop)
    )
    if saved := saved_in(folder, identity):
        return saved
    embedded = embed_split(embedders, dataset, SPLIT, model.ref, folder)
    depth = max(depth_of(suite.metrics), suite.rerank.top)
    ranking = rank(embedded, dataset, SPLIT, "local", depth, folder / "ranking-local", drop)
    scores = {"local": measures(ranking, queries, suite.metrics)}
    measured = Measured(suite.name, model.name, scores, identity, dict(protocol.notes))
    measured.save(folder)
    return measured


def rerank_suite(
    rerankers: RerankerGroup,
    suite: Suite,
    dataset: Dataset,
    measured: Measured,
    ranking: pa.Table,
    reranker: Model,
    folder: Path,
    protocol: Protocol,
) -> Measured:
    """Reorder the first candidates of a ranking by cosine + w · P(yes).

    Args:
        measured, ranking: of the embedder alone.

    Raises:
        UserError: see `score_table`; "calibrate", for which these benchmarks have no queries.
    """
    if protocol.weight == "calibrate":
        raise UserError(f"{suite.title} has no validation queries to calibrate on; give --rerank-weight a number")
    queries, given, top = dataset.queries(SPLIT), protocol.weight, suite.rerank.top
    identity = digest_of(measured.identity, reranker.ref.identity, str(given))
    if saved := saved_in(folder, identity):
        return saved
    scored = score_table(
        rerankers,
        candidates_to_score([ranking], top),
        queries,
        dataset.documents,
        folder / "scores",
        reranker.ref,
        f"{suite.title} queries",
    )
    weights = {task: by_task(suite.rerank.weights, task) if given is None else given for task in queries.tasks}
    fused = []
    for task, weight in weights.items():
        own = ranking.filter(pc.equal(ranking["task"], task))
        fused.append(fuse_rankings(own, answers_of(scored, own), weight, top))
    scores = {"local": measures(pa.concat_tables(fused), queries, suite.metrics)}
    notes = measured.notes | {"reranker": reranker.name, "weights": weights}
    reranked = Measured(suite.name, f"{measured.model} + {reranker.name}", scores, identity, notes)
    reranked.save(folder)
    return reranked


def open_mbeir(root: Path, cache: Path, benchmark: str = MBEIR, prompt: int | None = None) -> Dataset:
    """Open an M-BEIR folder, or only its tasks that are held out of training.

    Args:
        prompt: see `MbeirFolder`.

    Raises: see `open_dataset`.
    """
    data = open_folder(MbeirFolder(root, prompt), root, cache / MBEIR)
    if benchmark != HELD_OUT:
        return data
    pools = {(task, split): rows for (task, split), rows in data.pools.items() if task in HELD_OUT_TASKS}

    def held_out(name: str) -> Queries:
        queries = data.queries(name)
        at = np.flatnonzero(
            np.isin(queries.task, [n for n, task in enumerate(queries.tasks) if task in HELD_OUT_TASKS])
        )
        if not len(at):
            raise UserError(f"{root}: no {name} queries of the tasks {', '.join(HELD_OUT_TASKS)}; put them there")
        return queries.take(at)

    return Dataset(data.root, data.documents, pools, held_out)


def measure_mbeir(
    embedders: EmbedderGroup,
    rerankers: RerankerGroup,
    root: Path,
    cache: Path,
    benchmark: str,
    model: Model,
    reranker: Model | None,
    folder: Path,
    protocol: Protocol,
    recipe: Recipe,
) -> list[Measured]:
    """M-BEIR in local and global pools with the paper's k; alone, and with a reranker if there is one.

    Args:
        recipe: `evaluate.calibrate_on` limits the queries that a weight is calibrated on.
    """
    weight = REFERENCE_WEIGHT if protocol.weight is None else protocol.weight
    changes = {
        "k": 5,
        "k_of": MBEIR_K,
        "split": SPLIT,
        "drop_query_image": not protocol.reference,
        "rerank_top": MBEIR_TOP,
        "rerank_weight": weight,
    }
    recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=changes)})
    prompts = range(prompt_count(root)) if protocol.prompts == "average" else (None,)
    alone: list[LadderResult] = []
    reranked: list[LadderResult] = []
    scores: list[Scores] = []
    scores_reranked: list[Scores] = []
    for prompt in prompts:
        data = open_mbeir(root, cache, benchmark, prompt)
        data.validate(SPLIT)
        place = folder if prompt is None else folder / f"prompt-{prompt}"
        alone.append(evaluate_checkpoint(embedders, data, recipe, model.ref, model.name, place, embedded_in=folder))
        scores.append(_mbeir_scores(alone[-1], data))
        if reranker:
            known = None
            if weight == "calibrate":
                known = _calibration(embedders, data, recipe, model, folder / VALIDATION)
            found = evaluate_reranked(
                rerankers, data, recipe, reranker.ref, alone[-1], known, place / f"with-{reranker.ref.identity[:8]}"
            )
            reranked.append(found)
            scores_reranked.append(_mbeir_scores(found, data))
    rows = [
        Measured(
            benchmark, model.name, mean_of(scores), digest_of(*(row.identity for row in alone)), dict(protocol.notes)
        )
    ]
    rows[0].save(folder)
    if reranker:
        name, identity = f"{model.name} + {reranker.name}", digest_of(*(row.identity for row in reranked))
        notes = protocol.notes | {"reranker": reranker.name} | reranked[-1].notes
        rows.append(Measured(benchmark, name, mean_of(scores_reranked), identity, notes))
        rows[1].save(folder / f"with-{reranker.ref.identity[:8]}")
    return rows


def _calibration(embedders: EmbedderGroup, data: Dataset, recipe: Recipe, model: Model, folder: Path) -> Calibration:
    sampled = sample_queries(data.queries(VALIDATION), recipe.evaluate.calibrate_on, recipe.seed)
    some = data.with_queries(VALIDATION, sampled)
    return Calibration(some, evaluate_checkpoint(embedders, some, recipe, model.ref, model.name, folder, VALIDATION))


def _mbeir_scores(result: LadderResult, data: Dataset) -> Scores:
    """Recall at the task's own k, which the paper reports, and further metrics of the same rankings."""
    queries, scores = data.queries(SPLIT), {}
    for scope in SCOPES:
        found = measures(result.ranking(scope), queries, MBEIR_METRICS)
        kept = ("recall", "chance", "k")
        scores[scope] = {
            task: {name: numbers[name] for name in kept} | found[task] for task, numbers in result.scores[scope].items()
        }
    return scores
