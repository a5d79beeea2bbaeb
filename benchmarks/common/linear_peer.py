"""The peer of the demo's ladder: linear heads over frozen features, trained with InfoNCE on the demo's train split.

query = unit(text·(T + Tₜ) + picture·(P + Pₜ) + bₜ), with heads for each task t beside shared ones, and
document = unit(text·U + picture·V + c); a side without text or picture leaves that term out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common.frozen_features import LAST, Features, content_key
from benchmarks.common.protocol import Protocol
from umarvel_ray.data.dataset import Dataset
from umarvel_ray.data.stored import StoredTable
from umarvel_ray.evaluate.results import SCOPES
from umarvel_ray.recipe import Evaluate


@dataclass(frozen=True)
class Settings:
    """The defaults were chosen on validation."""

    dimension: int = 384
    stages: bool = True  # picture features of the seven stages besides those of the last map
    components: int = 384  # principal components of the picture features to keep
    whitening: float = 0.5  # 0 keeps their variances, 1 makes them equal
    pairs: bool = True  # also train on the text and image-caption pairs
    task_heads: bool = True
    homogeneous: bool = False  # each batch from a single task
    batch_size: int = 256
    extra_negatives: int = 256  # train documents drawn at random for each batch
    two_way: bool = False
    temperature: float = 0.05
    learn_temperature: bool = True
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    dropout: float = 0.2  # on the frozen features
    steps: int = 600


@dataclass(frozen=True)
class Side:
    """Queries or documents as feature rows (−1 for none) and task numbers, int64 (n,)."""

    text: torch.Tensor
    image: torch.Tensor
    task: torch.Tensor

    def __getitem__(self, rows: torch.Tensor | slice) -> Side:
        return Side(self.text[rows], self.image[rows], self.task[rows])

    def __len__(self) -> int:
        return len(self.text)


class FeatureData:
    """The demo's data as feature rows."""

    def __init__(self, dataset: Dataset, features: Features, tasks: list[str]) -> None:
        self.dataset, self.features, self.tasks = dataset, features, tasks
        self.documents = self._side(dataset.documents)

    def queries(self, name: str) -> tuple[Side, list[np.ndarray]]:
        """A query table, with the document rows of each query's positives."""
        queries = self.dataset.queries(name)
        return self._side(queries.table), list(queries.positives.lists())

    def _side(self, table: StoredTable) -> Side:
        texts, images = table.column("text").to_pylist(), table.column("image").to_pylist()
        tasks = table.column("task").to_pylist() if "task" in table.schema.names else [self.tasks[0]] * table.num_rows
        return Side(
            torch.tensor([self.features.text_row[text] if text else -1 for text in texts]),
            torch.tensor([self.features.image_row[content_key(image)] if image else -1 for image in images]),
            torch.tensor([self.tasks.index(task) for task in tasks]),
        )


class Heads(nn.Module):
    """Linear heads over frozen features. Both sides start from the same orthogonal maps, so they agree initially."""

    def __init__(self, features: Features, tasks: int, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        texts = torch.from_numpy(features.texts)
        images = principal_components(features, settings)
        self.register_buffer("texts", texts)
        self.register_buffer("images", images)
        text = nn.init.orthogonal_(torch.empty(texts.shape[1], settings.dimension))
        image = nn.init.orthogonal_(torch.empty(images.shape[1], settings.dimension))
        self.shared = nn.ParameterDict({"T": text.clone(), "P": image.clone(), "U": text.clone(), "V": image.clone()})
        heads = tasks if settings.task_heads else 1
        self.own = nn.ParameterDict({"T": torch.zeros(heads, *text.shape), "P": torch.zeros(heads, *image.shape)})
        self.biases = nn.ParameterDict(
            {"b": torch.zeros(tasks, settings.dimension), "c": torch.zeros(settings.dimension)}
        )
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(settings.temperature)), requires_grad=settings.learn_temperature
        )

    def encode_queries(self, side: Side) -> torch.Tensor:
        """Unit vectors (n, dimension)."""
        result = self.biases["b"][side.task]
        for rows, features, name in self._features(side):
            result = result.index_add(0, rows, features @ self.shared[name[0]])
            if self.settings.task_heads:
                for task in side.task[rows].unique():
                    own = torch.nonzero(side.task[rows] == task)[:, 0]
                    result = result.index_add(0, rows[own], features[own] @ self.own[name[0]][task])
        return F.normalize(result, dim=1)

    def encode_documents(self, side: Side) -> torch.Tensor:
        """Unit vectors (n, dimension)."""
        result = self.biases["c"].expand(len(side), -1)
        for rows, features, name in self._features(side):
            result = result.index_add(0, rows, features @ self.shared[name[1]])
        return F.normalize(result, dim=1)

    def _features(self, side: Side) -> Iterator[tuple[torch.Tensor, torch.Tensor, str]]:
        """The rows with a text and their features, then those with a picture; each with the names of its two heads."""
        for feature_rows, table, name in ((side.text, self.texts, "TU"), (side.image, self.images, "PV")):
            rows = torch.nonzero(feature_rows >= 0)[:, 0]
            yield rows, F.dropout(table[feature_rows[rows]], self.settings.dropout, self.training), name


def principal_components(features: Features, settings: Settings) -> torch.Tensor:
    """Picture features (m, components), standardized, rotated, and scaled to a mean square norm of 1."""
    images = torch.from_numpy(features.images if settings.stages else features.images[:, :LAST])
    images = (images - images.mean(0)) / (images.std(0) + 1e-6)
    variances, axes = torch.linalg.eigh(images.T @ images / len(images))
    variances, axes = variances[-settings.components :], axes[:, -settings.components :]
    kept = images @ axes / variances ** (settings.whitening / 2)
    return kept / kept.square().sum(1).mean().sqrt()


def train(data: FeatureData, settings: Settings, seed: int) -> Heads:
    """InfoNCE on the train split, with a query's other positives in the batch masked."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    queries, positives = _training_queries(data, settings)
    pool = data.dataset.global_pool("train")
    heads = Heads(data.features, len(data.tasks), settings).train()
    optimizer = torch.optim.AdamW(
        [
            {"params": [*heads.shared.parameters(), *heads.own.parameters()], "weight_decay": settings.weight_decay},
            {"params": [*heads.biases.parameters(), heads.log_temperature], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        fused=True,
    )
    batches = _batches(queries.task.numpy(), settings, rng)
    for step in range(settings.steps):
        warm_up, progress = min(1.0, (step + 1) / 50), step / settings.steps
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * progress))
        rows = next(batches)
        targets = np.array([rng.choice(positives[row]) for row in rows])
        columns = np.concatenate([targets, rng.choice(pool, settings.extra_negatives, replace=False)])
        loss = _loss(heads, queries[torch.from_numpy(rows)], data.documents[torch.from_numpy(columns)],
                     _other_positives([positives[row] for row in rows], columns), settings)  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads.eval()


def _loss(heads: Heads, queries: Side, documents: Side, masked: torch.Tensor, settings: Settings) -> torch.Tensor:
    q, d = heads.encode_queries(queries), heads.encode_documents(documents)
    logits = (q @ d.T / heads.log_temperature.clamp(math.log(0.01), 0.0).exp()).masked_fill(masked, -torch.inf)
    target = torch.arange(len(q))
    loss = F.cross_entropy(logits, target)
    return loss + F.cross_entropy(logits[:, : len(q)].T, target) if settings.two_way else loss


def _other_positives(positives: list[np.ndarray], columns: np.ndarray) -> torch.Tensor:
    """(n, m) bool: column j is a positive of query i, except for its target, column i."""
    places = defaultdict(list)
    for place, document in enumerate(columns.tolist()):
        places[document].append(place)
    masked = torch.zeros(len(positives), len(columns), dtype=torch.bool)
    for row, documents in enumerate(positives):
        masked[row, [place for document in documents.tolist() for place in places.get(document, ())]] = True
        masked[row, row] = False
    return masked


def _training_queries(data: FeatureData, settings: Settings) -> tuple[Side, list[np.ndarray]]:
    names = ["train", "text_pairs", "image_pairs"] if settings.pairs else ["train"]
    sides, positives = zip(*(data.queries(name) for name in names), strict=True)
    joined = Side(*(torch.cat([getattr(side, name) for side in sides]) for name in ("text", "image", "task")))
    return joined, [rows for part in positives for rows in part]


def _batches(tasks: np.ndarray, settings: Settings, rng: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        if settings.homogeneous:
            groups = [rng.permutation(np.flatnonzero(tasks == task)) for task in np.unique(tasks)]
        else:
            groups = [rng.permutation(len(tasks))]
        cuts = [
            group[start : start + settings.batch_size]
            for group in groups
            for start in range(0, max(1, len(group) - settings.batch_size + 1), settings.batch_size)
        ]
        for index in rng.permutation(len(cuts)):
            yield cuts[index]


@torch.inference_mode()
def evaluate(data: FeatureData, heads: Heads, protocol: Protocol, split: str) -> dict[str, dict[str, float]]:
    """Recall by scope and task, with averages; `protocol` is the split's."""
    documents = data.documents[torch.from_numpy(protocol.documents)]
    queries, _ = data.queries(split)
    vectors = heads.encode_queries(queries).numpy()
    by_task = {task: vectors[positions] for task, positions in protocol.tasks.items()}
    return protocol.recalls(by_task, heads.encode_documents(documents).numpy())


def measure(data: FeatureData, settings: Evaluate, seeds: list[int]) -> dict[str, Any]:
    """Recall of the chosen settings on test and validation, mean and standard deviation over seeds."""
    chosen = Settings()
    protocols = {split: Protocol(data.dataset, settings, split) for split in ("test", "validation")}
    runs = []
    for seed in seeds:
        heads = train(data, chosen, seed)
        runs.append({split: evaluate(data, heads, protocol, split) for split, protocol in protocols.items()})

    def over_seeds(split: str, statistic: Callable[[list[float]], Any]) -> dict[str, dict[str, float]]:
        recalls = [run[split] for run in runs]
        return {
            scope: {task: float(statistic([recall[scope][task] for recall in recalls])) for task in recalls[0][scope]}
            for scope in SCOPES
        }

    return {
        "settings": asdict(chosen),
        "seeds": seeds,
        "recall": over_seeds("test", np.mean),
        "standard_deviation": over_seeds("test", np.std),
        "validation": over_seeds("validation", np.mean),
        "chance": protocols["test"].chances(),
        "k": {task: protocols["test"].k(task) for task in protocols["test"].tasks},
    }
