"""`umarvel evaluate --benchmark NAME --data FOLDER --model CHECKPOINT`: one benchmark's folder, anyone's checkpoints.

Every result is kept under `OUTPUT/BENCHMARK/MODEL`, and the report shows all that is below OUTPUT.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.benchmark_report import compared, write_benchmark_report
from umarvel_ray.evaluate.measured import Measured, read_measured
from umarvel_ray.evaluate.suites import Model, Protocol, measure_mbeir, measure_suite, open_mbeir, rerank_suite
from umarvel_ray.inference.embed import EmbedderGroup
from umarvel_ray.inference.gpus import Gpus
from umarvel_ray.inference.score import RerankerGroup
from umarvel_ray.model.checkpoint import PROVENANCE, CheckpointRef, check_files, load_settings
from umarvel_ray.model.hub import model_folder
from umarvel_ray.presets import preset_settings
from umarvel_ray.recipe import Recipe
from umarvel_ray.retrieve.rank import read_ranking
from umarvel_ray.suites.registry import SUITES, check_name
from umarvel_ray.suites.suite import SPLIT, open_suite

TABLES = "tables"


class Job(NamedTuple):
    """What to measure.

    Attributes:
        models: directories or Hub ids.
        reranker: the same, or None.
        preset, reranker_preset: the systems that released the models and the reranker, if these have no settings of
            their own.
        own_settings: whether a checkpoint without settings gets those of the recipe.
    """

    benchmark: str
    data: Path
    models: Sequence[str]
    reranker: str | None
    protocol: Protocol
    preset: str | None
    reranker_preset: str | None
    own_settings: bool
    output: Path


def local_resources() -> list[str]:
    """Changes to a recipe for this machine: all its GPUs, or its CPUs."""
    import torch  # asked for the GPUs only

    if gpus := torch.cuda.device_count():
        return [f"cluster.embedders={gpus}", "cluster.gpus_per_embedder=1", "compute.dtype=bfloat16",
                "compute.token_budget=16384"]  # fmt: skip
    return ["cluster.embedders=1", f"cluster.cpus_per_embedder={os.cpu_count() or 1}"]


def check_benchmark(job: Job) -> str:
    """Open the benchmark's tables and say what they hold.

    Raises:
        UserError: an unknown benchmark; see `open_suite`.
    """
    check_name(job.benchmark)
    if not job.data.is_dir():
        raise UserError(f"data folder {job.data} does not exist; give --data DIR")
    cache = job.output / TABLES
    if suite := SUITES.get(job.benchmark):
        data = open_suite(suite, job.data, cache, job.protocol.reference)
    else:
        data = open_mbeir(job.data, cache, job.benchmark)
    queries = data.queries(SPLIT)
    return f"{job.benchmark}: {queries.n:,} queries, {data.documents.num_rows:,} documents, {len(queries.tasks)} tasks"


def evaluate_benchmark(job: Job, recipe: Recipe) -> list[Measured]:
    """Measure all models and write the report.

    Args:
        recipe: its `cluster`, `compute` and `evaluate.calibrate_on` are used, and its `model` where the job says so.

    Raises:
        UserError: see `check_benchmark`; an unreadable checkpoint, or a full disk.
    """
    print(check_benchmark(job))
    suite = SUITES.get(job.benchmark)
    changes = dict(suite.settings) if suite else {}
    models = [_model(name, job, recipe, changes) for name in job.models]
    reranker = _reranker(job.reranker, job.reranker_preset, changes) if job.reranker else None
    gpus, rows = Gpus(), []
    with (
        EmbedderGroup(recipe.cluster, recipe.compute, gpus) as embedders,
        RerankerGroup(recipe.cluster, recipe.compute, gpus) as rerankers,
    ):
        for model in models:
            folder = job.output / job.benchmark / _folder_of(model, job.protocol)
            rows += _measure(job, recipe, embedders, rerankers, model, reranker, folder)
    page = write_benchmark_report(job.output / "report", read_measured(job.output))
    print(_summary(rows), f"report: {page}", sep="\n")
    return rows


def _measure(
    job: Job,
    recipe: Recipe,
    embedders: EmbedderGroup,
    rerankers: RerankerGroup,
    model: Model,
    reranker: Model | None,
    folder: Path,
) -> list[Measured]:
    cache, suite = job.output / TABLES, SUITES.get(job.benchmark)
    if not suite:
        return measure_mbeir(
            embedders, rerankers, job.data, cache, job.benchmark, model, reranker, folder, job.protocol, recipe
        )
    dataset = open_suite(suite, job.data, cache, job.protocol.reference)
    rows = [measure_suite(embedders, suite, dataset, model, folder, job.protocol)]
    if reranker:
        ranking, place = read_ranking(folder / "ranking-local"), folder / f"with-{reranker.ref.identity[:8]}"
        rows.append(rerank_suite(rerankers, suite, dataset, rows[0], ranking, reranker, place, job.protocol))
    return rows


def _model(name: str, job: Job, recipe: Recipe, changes: dict[str, Any]) -> Model:
    """A model by directory or Hub id; `changes` are settings that the benchmark prescribes."""
    folder = _checked(name)
    if job.preset:
        settings = preset_settings(job.preset, "embedder", folder)
    elif (folder / PROVENANCE).is_file():
        settings = load_settings(folder)
    elif job.own_settings:
        settings = recipe.model
    else:
        raise UserError(
            f"{folder} has no {PROVENANCE}, which says how to embed with it; give the --preset of the system that "
            f"released it, such as reference, or settings of your own such as model.pooling=last"
        )
    return Model(_short(name), CheckpointRef.of(folder, settings.model_copy(update=changes)))


def _reranker(name: str, preset: str | None, changes: dict[str, Any]) -> Model:
    folder = _checked(name)
    settings = preset_settings(preset, "reranker", folder) if preset else load_settings(folder)
    return Model(_short(name), CheckpointRef.of(folder, settings.model_copy(update=changes)))


def _checked(name: str) -> Path:
    folder = model_folder(name)
    check_files(folder)
    return folder


def _short(name: str) -> str:
    return Path(name.rstrip("/").partition("@")[0]).name


def _folder_of(model: Model, protocol: Protocol) -> str:
    how = "".join(f"-{value}" for value in protocol.notes.values())
    return f"{model.name}-{model.ref.identity[:8]}{how}"


def _summary(rows: Sequence[Measured]) -> str:
    """The numbers that the paper reports too; of a benchmark that it does not report, all."""
    lines = [
        f"{row.model}: {column.label} {value:.1f}"
        for table, found in compared(rows)
        for row in found
        for column, value in zip(table.columns, row.values, strict=True)
        if row.origin == "measured" and value is not None
    ]
    return "\n".join(lines or [f"{row.model}: {row.scores}" for row in rows])
