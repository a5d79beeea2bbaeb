"""Recall of a phase's saved states on a sample of the validation queries, while the phase trains.

Ray Train runs `measure` in a task of its own for each state that is reported; the ranks go on meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ray.train
from ray.train import ValidationConfig
from torch.utils.tensorboard import SummaryWriter

from umarvel_ray.data.dataset import Dataset, Selection, item_of
from umarvel_ray.data.sample import sample_queries, with_sampled_pools
from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.reranked import VALIDATION
from umarvel_ray.files import write_text
from umarvel_ray.items.encoder import ItemEncoder
from umarvel_ray.model.cpu import prepare_cpu
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.ragged import Ragged, find
from umarvel_ray.recipe import Cluster, Recipe
from umarvel_ray.retrieve.metrics import mean
from umarvel_ray.retrieve.rank import OwnPictures
from umarvel_ray.retrieve.topk import topk_of_rows
from umarvel_ray.runs import IN_TRAINING, read_step_log
from umarvel_ray.train.build import build_module, model_of
from umarvel_ray.train.engine import load_trainable
from umarvel_ray.train.phases import PhaseSpec
from umarvel_ray.train.state import open_state, phase_of
from umarvel_ray.waiting import require_room, resources

ROWS = 256  # encoded at a time


class TaskSample(NamedTuple):
    """Queries of one task, and what they are searched in: positions in the sample's documents.

    Attributes:
        positives, exclude: per query.
        pool: ascending.
        k: documents among which a positive counts as found.
    """

    task: str
    queries: Selection
    positives: Ragged
    exclude: Ragged
    pool: np.ndarray
    k: int


class Sample(NamedTuple):
    """What every state of a run is measured on."""

    documents: Selection
    tasks: list[TaskSample]


def sample_of(dataset: Dataset, recipe: Recipe) -> Sample:
    """A sample of the validation queries and of their pools, as `evaluate.in_training` says.

    Raises:
        UserError: no validation queries, a task without a pool, or an empty pool.
    """
    settings, seed = recipe.evaluate, recipe.seed
    assert settings.in_training is not None  # the caller's choice
    sampled = sample_queries(dataset.queries(VALIDATION), settings.in_training.queries, seed)
    dataset = with_sampled_pools(
        dataset.with_queries(VALIDATION, sampled), VALIDATION, settings.in_training.max_pool, seed
    )
    dataset.check_pools(VALIDATION)
    rows = dataset.global_pool(VALIDATION)
    shown = rows if settings.drop_query_image else rows[:0]
    own = OwnPictures(dataset, sampled, shown)
    tasks = []
    for code in np.unique(sampled.task):
        task, at = sampled.tasks[code], np.flatnonzero(sampled.task == code)
        pool = np.searchsorted(rows, np.sort(dataset.pool(task, VALIDATION)))
        k = settings.k_of.get(task, settings.k)
        tasks.append(
            TaskSample(
                task, sampled.take(at).selection, _places(rows, sampled.positives.take(at)),
                _places(rows, own.of(at)), pool, k,
            )
        )  # fmt: skip
    return Sample(Selection(dataset.documents, rows), tasks)


def in_training(specs: Sequence[PhaseSpec], sample: Sample, cluster: Cluster) -> ValidationConfig:
    """Ray Train's validation of the states of phases, with the resources of one embedder.

    Raises:
        UserError: a local Ray has no room for it.
    """
    needs = resources(cluster.cpus_per_embedder, cluster.gpus_per_embedder)
    require_room("evaluation in training", 1, "task", needs, "cluster.cpus_per_embedder")
    threads = max(1, int(cluster.cpus_per_embedder))
    device = "cuda" if cluster.gpus_per_embedder else "cpu"
    by_name = {spec.name: spec for spec in specs}
    return ValidationConfig(
        fn=partial(measure, specs=by_name, sample=sample, device=device, threads=threads),
        ray_remote_kwargs={
            "num_cpus": needs.get("CPU", 0), "num_gpus": needs.get("GPU", 0), "max_retries": cluster.max_failures,
        },
    )  # fmt: skip


def measure(
    checkpoint: ray.train.Checkpoint, specs: Mapping[str, PhaseSpec], sample: Sample, device: str, threads: int
) -> dict[str, float]:
    """Average recall of a reported state; also appended to the phase's `in-training.jsonl` and its TensorBoard."""
    prepare_cpu(threads)
    spec = specs[str(phase_of(checkpoint))]
    with open_state(checkpoint) as state:
        step, module = state.steps - 1, build_module(spec)
        load_trainable(module, state.tensors)
    model = model_of(module)
    assert isinstance(model, EmbeddingModel)  # a reranker's states are not reported for this
    embedder = Embedder(model, ItemEncoder.from_pretrained(spec.parent, spec.settings), device)
    recall = recall_by_task(embedder, sample)
    average = mean(list(recall.values()))
    _record(Path(spec.folder), {"step": step, "recall": average, "tasks": recall})
    return {"recall": average}


def recall_by_task(embedder: Embedder, sample: Sample) -> dict[str, float]:
    """Recall@k in local pools, as in the evaluation after training; an item that cannot be embedded is not found."""
    documents = _vectors(embedder, sample.documents, "document")
    recall = {}
    for task in sample.tasks:
        queries = _vectors(embedder, task.queries, "query")
        _, found = topk_of_rows(queries, documents, 0, task.k, task.pool, task.exclude)
        valid = found >= 0
        hits = Ragged.of_counts(valid.sum(1), found[valid])
        right = task.positives.contains_pairs(hits.owners, hits.values)
        recall[task.task] = len(np.unique(hits.owners[right])) / task.queries.n
    return recall


def _vectors(embedder: Embedder, items: Selection, side: str) -> np.ndarray:
    """Unit vectors (n, d); NaN for an item that cannot be read."""
    vectors = np.full((items.n, embedder.dimension), np.nan, np.float32)
    for start in range(0, items.n, ROWS):
        readable, encoded = [], []
        for place, row in enumerate(items.part(start, start + ROWS).items(), start):
            try:
                encoded.append(embedder.encoder.encode(item_of(row), side, row["id"]))
            except UserError:
                continue
            readable.append(place)
        if readable:
            vectors[readable] = embedder.embed_encoded(encoded)
    return vectors


def _places(rows: np.ndarray, lists: Ragged) -> Ragged:
    """Lists of rows as positions in ascending `rows`, without those that are not in it."""
    places, known = find(rows, lists.values)
    return Ragged(lists.offsets, places).keep(known)


def _record(folder: Path, found: dict[str, object]) -> None:
    path = folder / IN_TRAINING
    kept = [line for line in read_step_log(path) if line["step"] != found["step"]]
    lines = sorted([*kept, found], key=lambda line: line["step"])
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    with SummaryWriter(str(folder / "tensorboard")) as board:
        board.add_scalar("recall", found["recall"], found["step"])
