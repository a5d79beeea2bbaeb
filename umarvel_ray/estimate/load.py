"""The work in each phase of a recipe: optimizer steps, and items and tokens per worker.

Row counts come from the data if it is available, otherwise from the published datasets
(docs/method.md#hyperparameters); the printed table says which. Token counts are estimates, since nothing is tokenized.
The assumptions are the constants below.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from umarvel_ray.data.mbeir import query_files
from umarvel_ray.data.parquet import open_parquet
from umarvel_ray.data.tables import folder_of
from umarvel_ray.estimate.shape import Shape
from umarvel_ray.recipe import (
    DISTILLATION,
    HARD_NEGATIVES,
    KEYS,
    RERANKER,
    Data,
    Recipe,
    RerankPhase,
    TrainingPhase,
    count_steps,
)
from umarvel_ray.runs import base_folder

CHARACTERS_PER_TOKEN = 4  # English, byte-level vocabulary of 150,000
TURN_TOKENS = 12  # template: the user turn and the answer `<emb>.`
SYSTEM, SYSTEM_TOKENS = "You are a helpful assistant.", 11  # in Qwen2-VL's template, not in Qwen3-VL's
PAIR_TOKENS = 48  # the reranker's question and headings
TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
PICTURE_FRAME_TOKENS = 2


class Side(NamedTuple):
    """The mean query or document: pictures per item, and text tokens per item, including the instruction."""

    pictures: float
    text: float


@dataclass(frozen=True)
class Source:
    """A query table: its rows by task, the mean query, the mean positive, and the origin of these numbers."""

    rows: Counter[str] | None
    query: Side
    document: Side
    origin: str

    def in_epoch(self, per_task: int | None) -> int | None:
        """Rows of an epoch that takes at most `per_task` rows of each task; None if unknown."""
        if self.rows is None:
            return None
        return sum(min(count, per_task or count) for count in self.rows.values())


# Rows: SimCSE's NLI pairs, LLaVA's CC3M subset, M-BEIR's upsampled training union (docs/method.md#hyperparameters).
# M-BEIR's pictures per item follow from its queries per task (UniIR, arXiv 2311.17136, Table 1); texts are assumed.
PUBLISHED = {
    "nli": Source(Counter({"": 275_601}), Side(0, 20), Side(0, 12), "published"),
    "cc3m": Source(Counter({"": 595_000}), Side(0, 15), Side(1, 0), "published"),
    "train": Source(Counter({"": 1_332_790}), Side(0.76, 40), Side(0.53, 75), "published"),
}
UNION_DOCUMENTS = 1_930_000  # M-BEIR's training union, as the U-MARVEL paper counts it


@dataclass(frozen=True)
class Load:
    """One worker's share of one optimizer step in a phase, and the number of steps.

    Lengths are mean tokens per item; a pair for the reranker counts as one query. `rows`, the queries of an epoch, and
    `steps` are None if unknown.
    """

    name: str
    phase: TrainingPhase
    rows: int | None
    origin: str
    steps: int | None
    queries: int
    documents: int
    query_length: float
    document_length: float
    pictures: float
    pairs: bool = False

    @property
    def items(self) -> int:
        return self.queries + self.documents

    @property
    def tokens(self) -> float:
        return self.queries * self.query_length + self.documents * self.document_length

    @property
    def length(self) -> float:
        """Tokens of the mean item."""
        return self.tokens / self.items

    def chunks(self, budget: int) -> int:
        """Forward passes under a token budget, not counting padding, which can only add to them."""
        return math.ceil(self.tokens / budget)


def loads(recipe: Recipe, shape: Shape) -> list[Load]:
    """The load of each phase of a recipe, in order, named by its recipe key."""
    workers, mining, stage3 = recipe.cluster.workers, recipe.stage2.mining, recipe.stage3

    def load(
        name: str, phase: TrainingPhase, documents: int = 1, share: float = 1, max_rows: int | None = None
    ) -> Load:
        source = read_source(recipe.data, phase.queries)
        rows = source.in_epoch(phase.max_per_task)
        rows = rows and min(round(rows * share), max_rows or rows)
        queries = math.ceil(phase.batch_size / workers)
        return Load(
            name=KEYS[name],
            phase=phase,
            rows=rows,
            origin=source.origin,
            steps=phase.max_steps if rows is None else count_steps(phase, rows),
            queries=queries,
            documents=queries * documents,
            query_length=item_tokens(source.query, recipe, shape),
            document_length=item_tokens(source.document, recipe, shape),
            pictures=queries * (source.query.pictures + documents * source.document.pictures),
        )

    options: dict[str, dict[str, Any]] = {
        HARD_NEGATIVES: {"documents": 1 + recipe.stage2.train.hard_negatives, "max_rows": mining.max_queries},
        RERANKER: {"max_rows": mining.max_queries},
        DISTILLATION: {"documents": stage3.top_k, "share": stage3.sample},
    }
    found = [load(name, phase, **options.get(name, {})) for name, phase in recipe.phases().items()]
    template = template_tokens(recipe.base, shape)
    return [_as_pairs(item, template) if isinstance(item.phase, RerankPhase) else item for item in found]


def item_tokens(side: Side, recipe: Recipe, shape: Shape) -> float:
    """Tokens of the mean item of one side."""
    picture = shape.vision.tokens(recipe.model.max_pixels) + PICTURE_FRAME_TOKENS
    text = min(side.text, recipe.model.max_text_tokens)
    return template_tokens(recipe.base, shape) + text + side.pictures * picture


def template_tokens(base: str, shape: Shape) -> int:
    """Tokens that the base's chat template adds to an item."""
    texts = [file.read_text() for name in TEMPLATES if (file := base_folder(base) / name).is_file()]
    system = any(SYSTEM in text for text in texts) if texts else shape.vision.form != "qwen3_vl"
    return TURN_TOKENS + system * SYSTEM_TOKENS


def corpus(recipe: Recipe) -> tuple[int, int, Source] | None:
    """The number of queries and documents that mining embeds, and their source; None if the data is unknown.

    With `max_pool` the documents are those of the sampled pools; positives outside the pools are not counted.
    """
    mining, name = recipe.stage2.mining, recipe.stage2.train.queries
    source, root = read_source(recipe.data, name), folder_of(recipe.data)
    if source.rows is None:
        return None
    queries = min(source.rows.total(), mining.max_queries or source.rows.total())
    if recipe.data.format == "parquet" and (root / "pools.parquet").is_file():
        pools = _columns(root / "pools.parquet", ["split", "document_ids"])
        lists = pools.filter(pc.equal(pools["split"], name))["document_ids"]
        distinct = len(pc.unique(pc.list_flatten(lists)))
        sampled = sum(min(n, mining.max_pool or n) for n in pc.list_value_length(lists).to_pylist())
        return queries, min(distinct, sampled), source
    return (queries, UNION_DOCUMENTS, source) if name == "train" else None


def read_source(data: Data, name: str) -> Source:
    """A query table: measured in Parquet, counted in M-BEIR's files, otherwise as published or unknown."""
    root = folder_of(data)
    known = PUBLISHED.get(name) if data.format == "mbeir" else None
    if data.format == "mbeir" and (files := query_files(root, name)):
        rows = Counter({"": sum(_lines(file) for file in files)})
        ends = (known or PUBLISHED["train"]).query, (known or PUBLISHED["train"]).document
        return Source(rows, *ends, "counted")
    if data.format == "parquet" and (root / f"{name}.parquet").is_file():
        queries, documents = root / f"{name}.parquet", root / "documents.parquet"
        own = _columns(queries, ["task", "positive_ids"])
        ids = _columns(documents, ["id"])["id"]
        positives = pc.index_in(pc.list_flatten(own["positive_ids"]), ids).drop_null().to_numpy()
        rows = Counter({entry["values"]: entry["counts"] for entry in own["task"].value_counts().to_pylist()})
        return Source(rows, _side(_content(queries)), _side(_content(documents)[positives]), "measured")
    return known or Source(None, Side(1, 32), Side(1, 32), "unknown")


def _content(file: Path) -> np.ndarray:
    """Whether each row has a picture, and the characters of its texts: float64 (n, 2)."""
    parts = [np.empty((0, 2))]
    with open_parquet(file, ["modality", "text"]) as parquet:
        texts = [name for name in ("text", "instruction") if name in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(columns=["modality", *texts]):
            shown = pc.match_substring(batch["modality"], "image").fill_null(False)
            characters = [pc.utf8_length(batch[name]).fill_null(0).to_numpy() for name in texts]
            parts.append(np.stack([shown.to_numpy(zero_copy_only=False), sum(characters)], axis=1))
    return np.concatenate(parts)


def _columns(file: Path, names: list[str]) -> pa.Table:
    with open_parquet(file, names) as parquet:
        return parquet.read(names)


def _side(content: np.ndarray) -> Side:
    pictures, characters = content.mean(axis=0).tolist()
    return Side(pictures, characters / CHARACTERS_PER_TOKEN)


def _as_pairs(load: Load, template: int) -> Load:
    """The same load as pairs, one sequence each: every query with a positive and with its negatives."""
    pairs = 1 + load.phase.negatives if isinstance(load.phase, RerankPhase) else 0
    length = load.query_length + load.document_length - template + PAIR_TOKENS
    return replace(
        load, queries=pairs * load.queries, documents=0, query_length=length, pictures=pairs * load.pictures, pairs=True
    )


def _lines(file: Path) -> int:
    with file.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
