"""The recipe as a story: three stages, mined negatives, a reranker, distillation, evaluation (paper section 3).

Each function is one job: it starts from what the run folder holds, skips what is finished, resumes what is half done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from umarvel_ray.data.plan import (
    PlanStep,
    QueryRows,
    continue_hard_plan,
    contrastive_plan,
    distil_plan,
    rerank_plan,
    write_plan,
)
from umarvel_ray.data.quarantine import without_unusable
from umarvel_ray.data.sample import sample_queries, with_sampled_pools
from umarvel_ray.data.tables import Dataset, open_dataset
from umarvel_ray.evaluate.report import write_report
from umarvel_ray.evaluate.rerank import VALIDATION, evaluate_reranked
from umarvel_ray.evaluate.retrieve import evaluate_base, evaluate_checkpoint
from umarvel_ray.mine.embed import EmbedderPool, embed_table
from umarvel_ray.mine.mine import mine as mine_negatives
from umarvel_ray.mine.rank import embed_split, rank
from umarvel_ray.mine.teacher import RerankerPool, score_table
from umarvel_ray.model.checkpoint import RERANKER
from umarvel_ray.model.distill import fuse
from umarvel_ray.recipe import ModelSettings
from umarvel_ray.runs import LADDER, STAGE1, STAGE2, STAGE3, Run
from umarvel_ray.train.jobs import TrainJob, train_job
from umarvel_ray.train.launch import run_jobs


class Work(NamedTuple):
    """A job and the queries it trains on."""

    job: TrainJob
    queries: pa.Table


class Prepared(NamedTuple):
    """A stage's work, in order, and the data whose documents it is fulfilled from."""

    work: list[Work]
    data: Dataset


class Pools(NamedTuple):
    """Actors that outlive a stage: started at first use, kept for every checkpoint after it."""

    embedders: EmbedderPool
    rerankers: RerankerPool


@contextmanager
def open_pools(run: Run, given: Pools | None = None) -> Iterator[Pools]:
    """The pools of the caller, or fresh ones for a job that runs alone."""
    if given:
        yield given
        return
    with ExitStack() as stack:
        pools = (EmbedderPool, RerankerPool)
        yield Pools(*(stack.enter_context(pool(run.recipe.cluster, run.recipe.engine)) for pool in pools))


def pipeline(run: Run) -> None:
    """Everything, with an evaluation after each stage."""
    with open_pools(run) as pools:
        stage1(run)
        evaluate(run, pools)
        stage2_and_reranker(run, pools)
        stage3(run, pools)
        evaluate(run, pools)


def stage1(run: Run) -> None:
    """Progressive transition: text pairs → image-caption pairs → instructions, adapters merged in between."""
    _train(run, "stage1", prepare_stage1(run))


def prepare_stage1(run: Run, pools: Pools | None = None) -> Prepared:
    """Plan every step of stage 1 that the recipe has; a step that it leaves out hands its parent on."""
    data = open_dataset(run.recipe.data)
    run.parent("base", "stage 1")
    steps = [run.recipe.stage1.text, run.recipe.stage1.image_text, run.recipe.stage1.instruction]
    work, parent = [], "base"
    for name, step in zip(STAGE1, steps, strict=True):
        if step is None:
            continue
        queries = _training_data(run, data, step.queries).queries(step.queries)
        job = train_job(run, name, "contrastive", step, parent, step.temperature, step.two_way)
        _plan_once(job, partial(contrastive_plan, QueryRows.of(queries), step, run.recipe.seed))
        work.append(Work(job, queries))
        parent = name
    return Prepared(work, data)


def mine(run: Run, pools: Pools | None = None) -> tuple[pa.Table, Dataset]:
    """Embed the training split with stage 1's model, exact top-k, filters: what stage 2 and the reranker train on.

    Returns:
        The mined table, and the training data it was mined in.
    """
    with open_pools(run, pools) as pools, run.timed("mining"):
        data = _mining_data(run)
        mined = mine_negatives(
            pools.embedders,
            data,
            run.recipe,
            run.parent(STAGE1[-1], "mining"),
            run.dir / "embeddings" / STAGE1[-1],
            run.dir / "mined",
        )
    return mined, data


def stage2(run: Run, pools: Pools | None = None) -> None:
    """Continue with InfoNCE on in-batch and mined, filtered negatives."""
    _train(run, "stage2", prepare_stage2(run, pools))


def prepare_stage2(run: Run, pools: Pools | None = None) -> Prepared:
    """Mine, and plan each query beside its negatives."""
    run.parent(STAGE1[-1], "stage 2")
    mined, data = mine(run, pools)
    return Prepared([_hard_negatives(run, mined, data)], data)


def reranker(run: Run, pools: Pools | None = None) -> None:
    """Train the Yes/No reranker on positives and mined negatives."""
    run.parent(_reranker_parent(run), "the reranker")
    mined, data = mine(run, pools)
    _train(run, "reranker", Prepared([_reranker(run, mined, data)], data))


def stage2_and_reranker(run: Run, pools: Pools | None = None) -> None:
    """Both, one after the other in one worker group: on a laptop another would take longer to start than to train."""
    mined, data = mine(run, pools)
    work = [_hard_negatives(run, mined, data), _reranker(run, mined, data)]
    _train(run, "stage2+reranker", Prepared(work, data))


def stage3(run: Run, pools: Pools | None = None) -> None:
    """Score a query sample's candidates with the reranker, fuse with recall, distil into the embedder."""
    _train(run, "stage3", prepare_stage3(run, pools))


def prepare_stage3(run: Run, pools: Pools | None = None) -> Prepared:
    """Recall and score the sample's candidates; plan them as a teacher's, or as the negatives of its control."""
    settings, checkpoint = run.recipe.stage3, run.parent(STAGE2, "stage 3")
    teacher = run.parent(RERANKER, "stage 3")
    name = settings.train.queries
    whole = _training_data(run, open_dataset(run.recipe.data), name)
    sampled = sample_queries(
        whole.queries(name), round(settings.sample * whole.queries(name).num_rows), run.recipe.seed
    )
    pool = run.recipe.stage2.mining.max_pool
    data = with_sampled_pools(whole.with_queries(name, sampled), name, pool, run.recipe.seed)
    kind = "distil" if settings.objective == "distil" else "contrastive"
    job = train_job(run, STAGE3, kind, settings.train, STAGE2, settings.temperature)
    with open_pools(run, pools) as pools, run.timed("teacher"):
        embedded = embed_split(pools.embedders, data, name, checkpoint, run.dir / "embeddings" / STAGE2)
        recalled = rank(embedded, data, name, "local", settings.top_k)
        scored = score_table(
            pools.rerankers, recalled, sampled, data.documents, run.dir / "scores", teacher, "sampled queries"
        )
    ids, candidates = scored["query_id"].to_pylist(), scored["document_ids"].to_pylist()
    if kind == "contrastive":
        own = dict(zip(ids, candidates, strict=True))
        _plan_once(job, partial(continue_hard_plan, QueryRows.of(sampled), own, settings.train, run.recipe.seed))
        return Prepared([Work(job, sampled)], data)
    cosines, answers = scored["scores"].to_pylist(), scored["rerank_scores"].to_pylist()
    fused = [
        [fuse(cosine, p, settings.alpha) for cosine, p in zip(*row, strict=True)]
        for row in zip(cosines, answers, strict=True)
    ]
    _plan_once(job, partial(distil_plan, ids, candidates, fused, settings.train, run.recipe.seed))
    return Prepared([Work(job, sampled)], data)


def embed(run: Run, pools: Pools | None = None) -> None:
    """Embed every document with the final model, or another one: what an index is built from."""
    wanted = run.recipe.embed
    checkpoint = Path(wanted.checkpoint) if wanted.checkpoint else run.parent(STAGE3, "embedding")
    settings = ModelSettings.reference() if wanted.preset else None
    with open_pools(run, pools) as pools, run.timed("embed"):
        documents = open_dataset(run.recipe.data).documents
        embed_table(
            pools.embedders,
            documents,
            "document",
            run.dir / "embeddings" / "documents",
            checkpoint,
            "documents",
            settings,
            truncate_dim=wanted.truncate_dim,
        )


def evaluate(run: Run, pools: Pools | None = None) -> None:
    """Recall of every step that has a checkpoint, and of recall-then-rerank; writes the report."""
    data, folder = open_dataset(run.recipe.data), run.dir / "evaluation"
    data.validate(run.recipe.evaluate.split)
    with open_pools(run, pools) as pools, run.timed("evaluation"):
        embedders = pools.embedders
        results = [evaluate_base(embedders, data, run.recipe, run.base, folder / "base")]
        for step in LADDER:
            if run.has(step):
                results.append(
                    evaluate_checkpoint(embedders, data, run.recipe, run.checkpoint(step), step, folder / step)
                )
        if run.has(STAGE3) and run.has(RERANKER):
            final, teacher, recipe = run.checkpoint(STAGE3), run.checkpoint(RERANKER), run.recipe
            sampled = sample_queries(data.queries(VALIDATION), recipe.evaluate.calibrate_on, recipe.seed)
            known_data = data.with_queries(VALIDATION, sampled)
            known = evaluate_checkpoint(
                embedders, known_data, recipe, final, STAGE3, folder / VALIDATION, split=VALIDATION
            )
            results.append(
                evaluate_reranked(pools.rerankers, known_data, recipe, teacher, results[-1], known, folder / "rerank")
            )
    write_report(run, data, results)


def _hard_negatives(run: Run, mined: pa.Table, data: Dataset) -> Work:
    """Stage 2's job: the plan puts each query's mined negatives beside its positive."""
    step = run.recipe.stage2.train
    negatives = dict(zip(mined["query_id"].to_pylist(), mined["negative_ids"].to_pylist(), strict=True))
    queries = data.queries(step.queries)
    job = train_job(run, STAGE2, "contrastive", step, STAGE1[-1], step.temperature, step.two_way)
    rows = QueryRows.of(queries)
    given = (rows, step, run.recipe.seed, negatives, step.hard_negatives, step.in_batch_negatives)
    _plan_once(job, partial(contrastive_plan, *given))
    return Work(job, queries)


def _reranker(run: Run, mined: pa.Table, data: Dataset) -> Work:
    """The reranker's job: each query with a positive and with one of its best candidates that passed the filters."""
    settings = run.recipe.reranker
    negatives = {
        row["query_id"]: [d for d, kept in zip(row["document_ids"], row["kept"], strict=True) if kept][
            : settings.negatives_top
        ]
        for row in mined.to_pylist()
    }
    queries = data.queries(settings.train.queries)
    job = train_job(run, RERANKER, "rerank", settings.train, _reranker_parent(run))
    job = job._replace(settings=run.recipe.model.for_reranker(settings.max_text_tokens))
    _plan_once(job, partial(rerank_plan, QueryRows.of(queries), negatives, settings.train, run.recipe.seed))
    return Work(job, queries)


def _reranker_parent(run: Run) -> str:
    """The ladder step that the reranker starts from."""
    return "base" if run.recipe.reranker.init == "base" else STAGE2


def _train(run: Run, stage: str, prepared: Prepared) -> None:
    """Run jobs in order in one worker group."""
    queries = {job.name: table for job, table in prepared.work}
    jobs = [job for job, _ in prepared.work]
    with run.timed(stage):
        run_jobs(stage, jobs, queries, prepared.data.documents, run.recipe.cluster, run.dir)


def _mining_data(run: Run) -> Dataset:
    """The training data with its queries and pools cut to what mining may spend."""
    name = run.recipe.stage2.train.queries
    data = _training_data(run, open_dataset(run.recipe.data), name)
    mining, seed = run.recipe.stage2.mining, run.recipe.seed
    sampled = sample_queries(data.queries(name), mining.max_queries, seed)
    return with_sampled_pools(data.with_queries(name, sampled), name, mining.max_pool, seed)


def _training_data(run: Run, data: Dataset, name: str) -> Dataset:
    """A query table checked against the documents, without rows that cannot be used."""
    data.validate(name)
    return without_unusable(data, name, run.dir / "quarantine")


def _plan_once(job: TrainJob, make: Callable[[], list[PlanStep]]) -> None:
    """Write a job's plan unless a killed run left it."""
    if not job.plan_path.exists():
        write_plan(make(), job.plan_path)
