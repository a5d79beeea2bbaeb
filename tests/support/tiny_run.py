"""A finished run folder in seconds: tiny random checkpoints, a small corpus and its embeddings."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from umarvel_ray.inference.embeddings import embedding_table
from umarvel_ray.inference.shards import close_output, open_output, write_shard
from umarvel_ray.model.checkpoint import CheckpointRef, save_checkpoint
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.recipe import ModelSettings, dump_recipe, load_recipe

SETTINGS = ModelSettings(min_pixels=4096, max_pixels=4096, max_text_tokens=96)
TEXTS = [
    "a red fox in the snow",
    "harbor lights at dusk",
    "two boats near a pier",
    "a small blue bird",
    "a green tree",
]
FIND_A_TEXT, FIND_A_PICTURE = "Find the same words.", "Find an image that matches the caption."


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """A PNG of seeded noise in large squares, which stay distinct when resized."""
    blocks = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.NEAREST).save(file, "PNG")
    return file.getvalue()


def make_corpus(folder: Path) -> Path:
    """Fifteen documents, five of each modality, and ten queries, as a Parquet data folder."""
    folder.mkdir(parents=True)
    rows = []
    for number, text in enumerate(TEXTS):
        rows.append({"id": f"t{number}", "text": text, "image": None, "modality": "text"})
        rows.append({"id": f"i{number}", "text": None, "image": picture(number), "modality": "image"})
        rows.append({"id": f"b{number}", "text": text, "image": picture(90 + number), "modality": "image,text"})
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    documents = pa.table(columns | {"source": ["tiny"] * len(rows)})
    pq.write_table(documents.set_column(2, "image", documents["image"].cast(pa.binary())), folder / "documents.parquet")
    pools = pa.table({"task": ["tiny_task0"], "split": ["test"], "document_ids": [columns["id"]]})
    pq.write_table(pools, folder / "pools.parquet")
    asked = [
        *({"text": text, "instruction": FIND_A_TEXT, "positive_ids": [f"t{n}"]} for n, text in enumerate(TEXTS)),
        *({"text": text, "instruction": FIND_A_PICTURE, "positive_ids": [f"i{n}"]} for n, text in enumerate(TEXTS)),
    ]
    queries = [
        {"id": f"q{n}", "image": None, "modality": "text", "source": "tiny", "task": "tiny_task0"} | row
        for n, row in enumerate(asked)
    ]
    table = pa.Table.from_pylist(queries)
    pq.write_table(table.set_column(1, "image", table["image"].cast(pa.binary())), folder / "test.parquet")
    return folder


def make_run(base: Path, folder: Path, phase: str = "distillation") -> Path:
    """Write checkpoints of `phase` and of the reranker, a corpus in data/, its embeddings, and the recipe."""
    model = EmbeddingModel.from_pretrained(base, SETTINGS)
    save_checkpoint(model, folder / "checkpoints" / phase, SETTINGS, {"phase": phase})
    save_checkpoint(model, folder / "checkpoints" / "reranker", SETTINGS.for_reranker(64), {"phase": "reranker"})
    data = make_corpus(folder / "data")
    documents = pq.read_table(data / "documents.parquet").select(["id", "text", "image"]).to_pylist()
    items = [{key: value for key, value in row.items() if key != "id" and value is not None} for row in documents]
    vectors = Embedder.from_pretrained(folder / "checkpoints" / phase).encode_document(items)
    embeddings = folder / "evaluation" / phase / "test-documents"
    identity = CheckpointRef.of(folder / "checkpoints" / phase).identity
    [shard] = open_output(embeddings, {"checkpoint": identity}, 1)
    write_shard(
        embeddings, shard, embedding_table(list(range(len(documents))), [row["id"] for row in documents], vectors), []
    )
    close_output(embeddings, len(documents))
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe("demo", [f"data.root={data}", f"output={folder}"])))
    return folder
