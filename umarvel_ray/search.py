"""Search a run's own documents with its newest model: what `umarvel search` prints.

Candidates are ranked by cosine; on request the reranker scores the best ones, and both scores are fused as in
evaluation (docs/method.md#score-fusion).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from umarvel_ray.errors import UserError
from umarvel_ray.index.corpus import Corpus
from umarvel_ray.index.hits import RERANK_DEPTH, Hit, fuse_hits
from umarvel_ray.inference.embeddings import embedder_of
from umarvel_ray.items.images import picture_uris
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.recipe import LADDER
from umarvel_ray.runs import read_run_recipe


def newest(folder: Path) -> tuple[Path, Path]:
    """The last checkpoint of a run's ladder whose document embeddings exist, and those embeddings.

    These are the whole corpus if the embed job has run, or the documents that evaluation embedded.

    Raises:
        UserError: no checkpoint, or none with embeddings.
    """
    recipe = read_run_recipe(folder)
    for phase in reversed(LADDER):
        checkpoint = folder / "checkpoints" / phase
        if not (checkpoint / "umarvel.json").is_file():
            continue
        identity = CheckpointRef.of(checkpoint).identity
        evaluated = folder / "evaluation" / phase / f"{recipe.evaluate.split}-documents"
        for documents in (folder / "embeddings" / "documents", evaluated):
            if embedder_of(documents) == identity:
                return checkpoint, documents
    raise UserError(f"{folder} holds no trained model with embedded documents; run `make demo` first")


def rerank_weight(folder: Path) -> float:
    """The weight of P(yes) that evaluation calibrated for the global pool; 1 if it has not run."""
    result = folder / "evaluation" / "rerank" / "result.json"
    return json.loads(result.read_text())["notes"]["weight global"] if result.is_file() else 1.0


def search_run(folder: Path, query: dict[str, Any], top_k: int = 10, rerank: bool = False) -> list[Hit]:
    """Search a run's own corpus with its newest model.

    Args:
        folder: a run folder, such as runs/demo.
        query: an item: text, image (path) or both, and an instruction.

    Raises:
        UserError: no trained model, an item without text and image, a bad picture.
    """
    checkpoint, documents = newest(folder)
    corpus = Corpus.open(documents, read_run_recipe(folder).data, folder / "tables")
    [vector] = Embedder.from_pretrained(checkpoint, "cpu").encode_query([query])
    if not rerank:
        return corpus.search(vector, top_k)
    hits = corpus.search(vector, max(top_k, RERANK_DEPTH))
    reranker = Reranker.from_pretrained(folder / "checkpoints" / "reranker", "cpu")
    return fuse_hits(hits, reranker.score(query, [hit.item for hit in hits]), rerank_weight(folder))[:top_k]


def as_lines(hits: Sequence[Hit]) -> str:
    """One line per hit: rank, score, id, source, modality and the start of its text."""
    lines = []
    for rank, hit in enumerate(hits, start=1):
        text = " ".join((hit.document["text"] or "").split())
        lines.append(
            f"{rank:3}  {hit.score:.3f}  {hit.document['id']:<12} {hit.document['source']:<10} "
            f"{hit.document['modality']:<10}  {text[:80]}{'…' if len(text) > 80 else ''}".rstrip()
        )
    return "\n".join(lines)


def write_page(path: Path, query: dict[str, Any], hits: Sequence[Hit]) -> None:
    """Write one self-contained HTML file with the query, its results and their pictures.

    Raises:
        UserError: the file cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("umarvel_ray", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    embedded = query | {"images": picture_uris(query.get("image"), "the query's picture")}
    html = environment.get_template("search.html").render(query=embedded, hits=hits, uris=picture_uris)
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another file for --html") from None
