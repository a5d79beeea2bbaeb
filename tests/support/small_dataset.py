"""A small retrieval dataset, and what an exact ranking of it must be by plain numpy."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from umarvel_ray.data.dataset import Dataset, item_of
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.inference.embed import EmbedderGroup
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.recipe import Cluster, Data, Recipe, load_recipe

DOCUMENT = [("id", pa.string()), ("text", pa.string()), ("image", pa.binary()), ("modality", pa.string()),
            ("source", pa.string()), ("concept", pa.string())]  # fmt: skip
QUERY = [*DOCUMENT, ("instruction", pa.string()), ("positive_ids", pa.list_(pa.string())), ("task", pa.string())]
COLORS = ["red", "green", "blue", "white", "black", "yellow"]
THINGS = ["boat", "house", "tree", "fox", "bird", "flag", "pier"]


def noise_picture(seed: int, width: int = 64, height: int = 64) -> bytes:
    """A PNG of seeded noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_dataset(folder: Path) -> Dataset:
    """42 texts and 42 pictures; tasks text → text and picture → picture, with the query's own picture in the pool."""
    folder.mkdir(parents=True, exist_ok=True)
    documents, names = [], [f"{color} {thing}" for color in COLORS for thing in THINGS]
    for number, name in enumerate(names):
        common = {"source": "test", "concept": name}
        picture = noise_picture(number)
        documents.append(common | {"id": f"t{number}", "text": f"A {name}.", "image": None, "modality": "text"})
        documents.append(common | {"id": f"p{number}", "text": None, "image": picture, "modality": "image"})
    # The same content twice: the twin of a positive must not become a negative.
    documents.append(documents[0] | {"id": "twin"})
    queries = {"train": [], "validation": [], "test": []}
    for number, name in enumerate(names):
        split = ["train", "train", "validation", "test", "test"][number % 5]
        row = {"source": "test", "concept": name, "text": None, "image": None}
        queries[split].append(
            row | {"id": f"q{number}", "text": f"One {name} at dusk", "modality": "text", "task": "words_task1",
                   "instruction": "Find a text.", "positive_ids": [f"t{number}"]})  # fmt: skip
        queries[split].append(
            row | {"id": f"s{number}", "image": noise_picture(number), "modality": "image", "task": "pictures_task4",
                   "instruction": "Find another picture.", "positive_ids": [f"p{(number + 7) % 42}"]})  # fmt: skip
    texts = [row["id"] for row in documents if row["modality"] == "text"]
    pictures = [row["id"] for row in documents if row["modality"] == "image"]
    pools = [
        {"task": task, "split": split, "document_ids": ids}
        for split in queries
        for task, ids in (("words_task1", texts), ("pictures_task4", pictures))
    ]
    for name, rows in queries.items():
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(QUERY)), folder / f"{name}.parquet")
    pq.write_table(pa.Table.from_pylist(documents, pa.schema(DOCUMENT)), folder / "documents.parquet")
    pq.write_table(pa.Table.from_pylist(pools), folder / "pools.parquet")
    return open_dataset(Data(root=str(folder)), folder / "tables")


def document_rows(dataset: Dataset) -> list[dict]:
    """All documents."""
    return dataset.documents.rows(range(dataset.documents.num_rows))


def query_rows(dataset: Dataset, split: str) -> list[dict]:
    """All queries of a split, with the ids of their positives."""
    queries, ids = dataset.queries(split), dataset.document_ids.to_pylist()
    positives = [[ids[row] for row in own] for own in queries.positives.lists()]
    rows = queries.table.rows(queries.rows)
    return [row | {"positive_ids": own} for row, own in zip(rows, positives, strict=True)]


def make_recipe() -> Recipe:
    return load_recipe("demo", ["stage2.mining.depth=20", "evaluate.k=3", "evaluate.k_of={pictures_task4: 5}"])


def two_embedders(recipe: Recipe) -> EmbedderGroup:
    return EmbedderGroup(Cluster(embedders=2, cpus_per_embedder=0.5, gpus_per_embedder=0), recipe.compute)


def embed_all(dataset: Dataset, base: Path, recipe: Recipe) -> dict[str, np.ndarray]:
    """id → vector (d,) of every document and query, by the library's embedder."""
    embedder = Embedder.from_pretrained(base, settings=recipe.model)
    documents = document_rows(dataset)
    queries = [row for split in ("train", "validation", "test") for row in query_rows(dataset, split)]
    document_vectors = embedder.encode_document([item_of(row) for row in documents])
    query_vectors = embedder.encode_query([item_of(row) for row in queries])
    found = dict(zip([row["id"] for row in documents], document_vectors, strict=True))
    return found | dict(zip([row["id"] for row in queries], query_vectors, strict=True))


def expected_ranking(dataset: Dataset, vectors: Mapping[str, np.ndarray], query: dict, ids: Sequence[str]) -> list[str]:
    """Documents sorted by cosine in numpy, without the query's own picture."""
    images = {row["id"]: row["image"] for row in document_rows(dataset)}
    ids = [
        id_ for id_ in ids if query["image"] is None or images[id_] != query["image"] or id_ in query["positive_ids"]
    ]
    return sorted(ids, key=lambda id_: -float(vectors[query["id"]] @ vectors[id_]))


def assert_same_ranking(
    found: Sequence[str], expected: Sequence[str], vectors: Mapping[str, np.ndarray], query: dict
) -> None:
    """The rankings agree, except where cosines differ by less than fp32 resolves."""
    for found_id, expected_id in zip(found, expected, strict=False):
        assert abs(float(vectors[query["id"]] @ (vectors[found_id] - vectors[expected_id]))) < 1e-5
