"""A recipe from start to finish: three stages, mining, a reranker, distillation and evaluation (paper section 3).

Each function in `JOBS` is one job: it starts from what the run folder holds, skips finished work and resumes what was
interrupted. A stage is first planned (`plan_stage…`: which phases, on which queries, in which batches), then trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from ray.train import ValidationConfig

from umarvel_ray.data.content import digest_of
from umarvel_ray.data.dataset import Dataset, Queries, Selection
from umarvel_ray.data.plan import (
    PlanStep,
    continue_hard_plan,
    contrastive_plan,
    distillation_plan,
    plan_identity,
    rerank_plan,
    write_plan,
)
from umarvel_ray.data.sample import sample_queries, with_sampled_pools
from umarvel_ray.data.stored import StoredTable
from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.checkpoints import evaluate_base, evaluate_checkpoint
from umarvel_ray.evaluate.report import write_report
from umarvel_ray.evaluate.reranked import VALIDATION, Calibration, evaluate_reranked
from umarvel_ray.evaluate.results import LadderResult
from umarvel_ray.evaluate.separation import separation
from umarvel_ray.files import write_json
from umarvel_ray.inference.embed import EmbedderGroup, embed_table
from umarvel_ray.inference.gpus import Gpus
from umarvel_ray.inference.score import RerankerGroup, score_table
from umarvel_ray.inference.shards import read_manifest
from umarvel_ray.mining.mine import candidates_of, easy_of, kept_of, negatives_of
from umarvel_ray.mining.mine import mine as mine_negatives
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.model.distillation import teacher_scores
from umarvel_ray.model.hub import model_ref
from umarvel_ray.preflight import sampled_count
from umarvel_ray.ragged import Ragged, flat
from umarvel_ray.recipe import (
    DISTILLATION,
    HARD_NEGATIVES,
    INSTRUCTION,
    LADDER,
    RERANKER,
    STAGE1,
    ContrastivePhase,
)
from umarvel_ray.retrieve.rank import embed_split, rank
from umarvel_ray.runs import Run
from umarvel_ray.train.launch import train_phases
from umarvel_ray.train.phases import PhaseSpec, phase_spec
from umarvel_ray.train.quarantine import without_unusable


class PlannedPhase(NamedTuple):
    """A phase, and the table of the queries that it trains on."""

    spec: PhaseSpec
    queries: StoredTable


class PlannedStage(NamedTuple):
    """Phases in order, and the documents that their batch plans refer to."""

    phases: list[PlannedPhase]
    documents: StoredTable


class Actors(NamedTuple):
    """The actor groups of a run: started on first use, and kept for all later checkpoints unless they use GPUs."""

    embedders: EmbedderGroup
    rerankers: RerankerGroup
    gpus: Gpus


@contextmanager
def open_actors(run: Run, existing: Actors | None = None) -> Iterator[Actors]:
    """The caller's actors, or new ones for a job that runs on its own."""
    if existing:
        yield existing
        return
    cluster, compute, gpus = run.recipe.cluster, run.recipe.compute, Gpus()
    with EmbedderGroup(cluster, compute, gpus) as embedders, RerankerGroup(cluster, compute, gpus) as rerankers:
        yield Actors(embedders, rerankers, gpus)


def run_pipeline(run: Run) -> None:
    """Run all stages, with an evaluation after stage 1 and at the end."""
    with open_actors(run) as actors:
        train_stage1(run)
        evaluate(run, actors)
        if run.recipe.reranker.mined_by == INSTRUCTION:
            train_stage2_and_reranker(run, actors)
        else:
            train_stage2(run, actors)
            train_reranker(run, actors)
        train_stage3(run, actors)
        evaluate(run, actors)


def train_stage1(run: Run) -> None:
    """Progressive transition: text pairs, then image-caption pairs, then instructions; adapters merged in between."""
    _train(run, "stage1", plan_stage1(run))


def plan_stage1(run: Run, actors: Actors | None = None) -> PlannedStage:
    """Plan the phases of stage 1 that the recipe has; each starts from the phase planned before it."""
    data = run.open_dataset()
    run.parent("base", "stage 1")
    phases, parent = [], "base"
    for name, phase in run.recipe.phases().items():
        if name not in STAGE1:
            continue
        queries = _training_data(run, data, phase.queries).queries(phase.queries)
        spec = phase_spec(run, name, phase, parent)
        make = partial(contrastive_plan, queries, phase, run.recipe.seed, data.content())
        _plan_once(spec, make, data, queries)
        phases.append(PlannedPhase(spec, queries.table))
        parent = name
    return PlannedStage(phases, data.documents)


def mine(run: Run, actors: Actors | None = None, phase: str = INSTRUCTION) -> Dataset:
    """Mine the candidates that stage 2 and the reranker train on, with the embedder of a phase.

    Returns:
        The training data that was mined from; `mining.mine` reads back what was found.
    """
    with open_actors(run, actors) as actors, run.timed("mining"):
        data = _mining_data(run)
        mine_negatives(
            actors.embedders,
            data,
            run.recipe,
            CheckpointRef.of(run.parent(phase, "mining")),
            run.dir / "embeddings" / phase,
            run.mined(phase),
        )
    return data


def train_stage2(run: Run, actors: Actors | None = None) -> None:
    """Continue InfoNCE with in-batch negatives and mined, filtered hard negatives."""
    _train(run, "stage2", plan_stage2(run, actors), actors)


def plan_stage2(run: Run, actors: Actors | None = None) -> PlannedStage:
    """Mine, and plan each query together with its hard negatives."""
    run.parent(INSTRUCTION, "stage 2")
    data = mine(run, actors)
    return PlannedStage([_plan_hard_negatives(run, data)], data.documents)


def train_reranker(run: Run, actors: Actors | None = None) -> None:
    """Train the Yes/No reranker on positives and mined negatives."""
    run.parent(_reranker_parent(run), "the reranker")
    data = mine(run, actors, run.recipe.reranker.mined_by)
    _train(run, "reranker", PlannedStage([_plan_reranker(run, data)], data.documents), actors)
    examine_reranker(run, data, actors)


def train_stage2_and_reranker(run: Run, actors: Actors | None = None) -> None:
    """Train both phases in one worker group: on a laptop, starting a second group takes longer than training."""
    data = mine(run, actors)
    phases = [_plan_hard_negatives(run, data), _plan_reranker(run, data)]
    _train(run, "stage2+reranker", PlannedStage(phases, data.documents), actors)
    examine_reranker(run, data, actors)


def examine_reranker(run: Run, data: Dataset, actors: Actors | None = None) -> None:
    """Score the candidates of the queries that were held out, and say aloud if the reranker may be guessing.

    Args:
        data: what `mine` returned.
    """
    settings, top = run.recipe.reranker, run.recipe.stage3.top_k
    queries = data.queries(settings.train.queries)
    held = _held_out(run, queries)
    candidates = candidates_of(run.mined(settings.mined_by), queries.rows[held], top)
    if not candidates.num_rows:
        return
    folder, ref = run.dir / "train" / RERANKER, CheckpointRef.of(run.checkpoint(RERANKER))
    with open_actors(run, actors) as actors, run.timed("reranker's examination"):
        scored = score_table(
            actors.rerankers, candidates, queries, data.documents, folder / "held-out", ref, "held-out queries"
        )
    found = separation(scored, queries, run.recipe.stage3.alpha)
    write_json(folder / "separation.json", asdict(found))
    print(f"reranker: {found}")
    if found.at_chance:
        loss = "" if settings.train.loss == "yes_no" else "with reranker.train.loss: yes_no, "
        print(
            f"WARNING: the reranker may be guessing (AUC {found.reranker:.3f}, 95 % interval from {found.lowest:.3f}); "
            f"distillation and reranking would gain nothing from it. Train it for longer, {loss}or with easier "
            f"negatives (reranker.train.easy_steps, reranker.min_rank)"
        )


def train_stage3(run: Run, actors: Actors | None = None) -> None:
    """Score the candidates of a query sample with the reranker, fuse with the cosines, distill into the embedder."""
    _train(run, "stage3", plan_stage3(run, actors), actors)


def plan_stage3(run: Run, actors: Actors | None = None) -> PlannedStage:
    """Retrieve and score the candidates of a query sample, then plan distillation or its contrastive control."""
    recipe, settings = run.recipe, run.recipe.stage3
    embedder, reranker = (CheckpointRef.of(run.parent(phase, "stage 3")) for phase in (HARD_NEGATIVES, RERANKER))
    phase, name = settings.train, settings.train.queries
    whole = _training_data(run, run.open_dataset(), name)
    count = sampled_count(recipe, whole.queries(name).n, f"{whole.root}: '{name}'")
    sampled = sample_queries(whole.queries(name), count, recipe.seed)
    data = with_sampled_pools(whole.with_queries(name, sampled), name, recipe.stage2.mining.max_pool, recipe.seed)
    spec = phase_spec(run, DISTILLATION, phase, HARD_NEGATIVES)
    with open_actors(run, actors) as actors, run.timed("teacher"):
        folder = run.dir / "embeddings" / "teacher"
        embedded = embed_split(actors.embedders, data, name, embedder, folder)
        recalled = rank(embedded, data, name, "local", settings.top_k, folder / f"{name}-ranking")
        scored = score_table(
            actors.rerankers, recalled, sampled, data.documents, run.dir / "scores", reranker, "sampled queries"
        )
    scored = scored.filter(pc.greater(pc.list_value_length(scored["documents"]), 0))
    if not scored.num_rows:
        raise UserError(
            f"stage 3: no query of the sample has a candidate; see {folder}/{name}-documents/quarantine.parquet"
        )
    rows, candidates = scored["query"].to_numpy(), Ragged.of_arrow(scored["documents"])
    inputs = read_manifest(run.dir / "scores")["inputs"]
    if isinstance(phase, ContrastivePhase):
        own = candidates.placed(np.searchsorted(sampled.rows, rows), sampled.n)
        make = partial(continue_hard_plan, sampled, own, phase, recipe.seed, data.content())
    else:
        cosines, answers = (flat(scored[column]).astype(np.float64) for column in ("scores", "rerank_scores"))
        teacher = teacher_scores(cosines, answers, settings.alpha)
        make = partial(distillation_plan, rows, candidates, teacher, phase, recipe.seed)
    _plan_once(spec, make, data, sampled, inputs)
    return PlannedStage([PlannedPhase(spec, sampled.table)], data.documents)


def embed(run: Run, actors: Actors | None = None) -> None:
    """Embed every document with the final embedder, or with `embed.checkpoint`; an index is built from the result."""
    settings = run.recipe.embed
    checkpoint = settings.checkpoint or run.parent(DISTILLATION, "embedding")
    ref = model_ref(checkpoint, "embedder", settings.preset)
    with open_actors(run, actors) as actors, run.timed("embed"):
        documents = Selection.whole(run.open_dataset().documents)
        folder = run.dir / "embeddings" / "documents"
        embed_table(
            actors.embedders, documents, "document", folder, ref, "documents", truncate_dim=settings.truncate_dim
        )


def evaluate(run: Run, actors: Actors | None = None) -> None:
    """Evaluate every checkpoint of the ladder that exists, and recall-then-rerank, or `evaluate.checkpoint` alone;
    write the report."""
    recipe, data, folder = run.recipe, run.open_dataset(), run.dir / "evaluation"
    data.validate(recipe.evaluate.split)
    if recipe.evaluate.checkpoint:
        _evaluate_given(run, data, recipe.evaluate.checkpoint, actors)
        return
    with open_actors(run, actors) as actors, run.timed("evaluation"):
        results = [evaluate_base(actors.embedders, data, recipe, run.base, folder / "base")]
        refs = {phase: CheckpointRef.of(run.checkpoint(phase)) for phase in LADDER if run.has(phase)}
        for phase, ref in refs.items():
            results.append(evaluate_checkpoint(actors.embedders, data, recipe, ref, phase, folder / phase))
        if DISTILLATION in refs and run.has(RERANKER):
            reranker = CheckpointRef.of(run.checkpoint(RERANKER))
            results.append(_rerank(run, data, actors, refs[DISTILLATION], reranker, results[-1], folder))
    write_report(run, data, results)


def _evaluate_given(run: Run, data: Dataset, checkpoint: str, actors: Actors | None) -> None:
    """Evaluate a model from elsewhere, and recall-then-rerank with `evaluate.reranker`; write a report of its own."""
    settings = run.recipe.evaluate
    name = settings.preset or Path(checkpoint).name
    folder = run.dir / "evaluation" / "given" / name
    ref = model_ref(checkpoint, "embedder", settings.preset)
    reranker = model_ref(settings.reranker, "reranker", settings.reranker_preset) if settings.reranker else None
    with open_actors(run, actors) as actors, run.timed("evaluation"):
        results = [evaluate_checkpoint(actors.embedders, data, run.recipe, ref, name, folder / "embedder")]
        if reranker:
            results.append(_rerank(run, data, actors, ref, reranker, results[0], folder))
    write_report(run, data, results, f"report-{name}")


def _rerank(
    run: Run,
    data: Dataset,
    actors: Actors,
    embedder: CheckpointRef,
    reranker: CheckpointRef,
    test: LadderResult,
    folder: Path,
) -> LadderResult:
    """Recall-then-rerank of an embedder's results; the weight is calibrated if the recipe says so."""
    recipe, calibration = run.recipe, None
    if recipe.evaluate.rerank_weight == "calibrate":
        sampled = sample_queries(data.queries(VALIDATION), recipe.evaluate.calibrate_on, recipe.seed)
        some, place = data.with_queries(VALIDATION, sampled), folder / VALIDATION
        found = evaluate_checkpoint(actors.embedders, some, recipe, embedder, test.name, place, split=VALIDATION)
        calibration = Calibration(some, found)
    return evaluate_reranked(actors.rerankers, data, recipe, reranker, test, calibration, folder / "rerank")


# The jobs behind `jobs/*.py` and the verbs of the command line.
JOBS: dict[str, Callable[[Run], object]] = {
    "pipeline": run_pipeline,
    "stage1": train_stage1,
    "mine": mine,
    "stage2": train_stage2,
    "reranker": train_reranker,
    "stage3": train_stage3,
    "embed": embed,
    "evaluate": evaluate,
}


def _plan_hard_negatives(run: Run, data: Dataset) -> PlannedPhase:
    """The phase of stage 2: its plan puts each query's mined negatives next to its positive."""
    phase = run.recipe.stage2.train
    queries = data.queries(phase.queries)
    spec = phase_spec(run, HARD_NEGATIVES, phase, INSTRUCTION)

    def make() -> list[PlanStep]:
        negatives = negatives_of(run.mined(INSTRUCTION), queries)
        return contrastive_plan(
            queries, phase, run.recipe.seed, data.content(), negatives, phase.hard_negatives, phase.in_batch_negatives
        )

    _plan_once(spec, make, data, queries, read_manifest(run.mined(INSTRUCTION))["inputs"])
    return PlannedPhase(spec, queries.table)


def _plan_reranker(run: Run, data: Dataset) -> PlannedPhase:
    """The reranker's phase: each query with a positive, with candidates that passed the filters, and with easy ones."""
    settings = run.recipe.reranker
    queries = data.queries(settings.train.queries)
    causal = run.recipe.model.for_reranker(settings.max_text_tokens)
    spec = phase_spec(run, RERANKER, settings.train, _reranker_parent(run), causal)

    def make() -> list[PlanStep]:
        folder, first = run.mined(settings.mined_by), settings.min_rank
        mined = kept_of(folder, queries, first, first + settings.negatives_top)
        mined = mined.keep(~np.isin(mined.owners, _held_out(run, queries)))
        return rerank_plan(queries, mined, easy_of(folder, queries), settings.train, run.recipe.seed)

    _plan_once(spec, make, data, queries, read_manifest(run.mined(settings.mined_by))["inputs"])
    return PlannedPhase(spec, queries.table)


def _held_out(run: Run, queries: Queries) -> np.ndarray:
    """Positions of the queries that the reranker does not train on: at most a tenth of all."""
    count = min(run.recipe.reranker.hold_out, queries.n // 10)
    return np.sort(np.random.default_rng([run.recipe.seed, count]).choice(queries.n, count, replace=False))


def _reranker_parent(run: Run) -> str:
    """The checkpoint that the reranker starts from."""
    return "base" if run.recipe.reranker.init == "base" else HARD_NEGATIVES


def _train(run: Run, stage: str, planned: PlannedStage, actors: Actors | None = None) -> None:
    """Train phases in order in one worker group; actors that hold GPUs make room for it."""
    queries = {spec.name: table for spec, table in planned.phases}
    specs = [spec for spec, _ in planned.phases]
    if actors and run.recipe.cluster.gpus_per_worker:
        actors.gpus.free()
    validation = _validation(run, specs) if run.recipe.evaluate.in_training else None
    with run.timed(stage):
        train_phases(stage, specs, queries, planned.documents, run.recipe.cluster, run.dir, validation)


def _validation(run: Run, specs: list[PhaseSpec]) -> ValidationConfig:
    from umarvel_ray.evaluate.in_training import in_training, sample_of  # imports the model, which no driver needs

    return in_training(specs, sample_of(run.open_dataset(), run.recipe), run.recipe.cluster)


def _mining_data(run: Run) -> Dataset:
    """The training data, with queries and pools sampled down to the limits of mining."""
    name = run.recipe.stage2.train.queries
    data = _training_data(run, run.open_dataset(), name)
    mining, seed = run.recipe.stage2.mining, run.recipe.seed
    sampled = sample_queries(data.queries(name), mining.max_queries, seed)
    return with_sampled_pools(data.with_queries(name, sampled), name, mining.max_pool, seed)


def _training_data(run: Run, data: Dataset, name: str) -> Dataset:
    """The data with a query table validated and its unusable rows quarantined."""
    data.validate(name)
    return without_unusable(data, name, run.dir / "quarantine")


def _plan_once(
    spec: PhaseSpec,
    make: Callable[[], list[PlanStep]],
    data: Dataset,
    queries: Queries,
    found: Mapping[str, Any] | None = None,
) -> None:
    """Write a phase's batch plan unless an earlier attempt has written it.

    Args:
        found: the inputs of what the plan takes from mining or from the teacher.

    Raises:
        UserError: it was made from other data, of whose tables its row numbers are.
    """
    identity = digest_of(data.documents.digest, queries.digest, found or {})
    if not spec.plan_path.exists():
        write_plan(make(), spec.plan_path, identity)
    elif plan_identity(spec.plan_path) != identity:
        raise UserError(
            f"{spec.plan_path}: '{spec.name}' was planned on other data, which has changed since; set output=DIR for a "
            f"new run, or remove {spec.folder} and the phase's checkpoint"
        )
