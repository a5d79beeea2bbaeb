"""Search a corpus with a trained model: what `umarvel search` prints and what the HTTP service answers from.

First stage: cosine against the index; second stage, on request: the reranker's P(yes) on the best candidates, fused as
in evaluation (method section 6).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from umarvel_ray.errors import UserError
from umarvel_ray.index.corpus import Corpus, Hit
from umarvel_ray.mine.embed import describe
from umarvel_ray.mine.embeddings import embedder_of
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.recipe import Recipe, load_recipe
from umarvel_ray.runs import LADDER

RERANK_DEPTH = 50  # candidates of the first stage that are reranked


def fuse(hits: Sequence[Hit], p_yes: np.ndarray, weight: float) -> list[Hit]:
    """Reorder by cosine + weight · P(yes); equal sums keep the first stage's order."""
    fused = [
        replace(hit, score=hit.score + weight * float(p), rerank_score=float(p))
        for hit, p in zip(hits, p_yes, strict=True)
    ]
    return sorted(fused, key=lambda hit: -hit.score)


def newest(folder: Path) -> tuple[Path, Path]:
    """The run's last checkpoint of the ladder, and the document embeddings that were made with it.

    The whole corpus where the embed job has been run, else the documents that evaluation embedded.

    Raises:
        UserError: no checkpoint there, or none with embeddings.
    """
    recipe = run_recipe(folder)
    for step in reversed(LADDER):
        checkpoint = folder / "checkpoints" / step
        if not (checkpoint / "umarvel.json").is_file():
            continue
        identity = describe(checkpoint)["identity"]
        evaluated = folder / "evaluation" / step / f"{recipe.evaluate.split}-documents"
        for documents in (folder / "embeddings" / "documents", evaluated):
            if embedder_of(documents) == identity:
                return checkpoint, documents
    raise UserError(f"{folder} holds no trained model with embedded documents; run `make demo` first")


def run_recipe(folder: Path) -> Recipe:
    """The recipe a run was made by.

    Raises:
        UserError: not a run folder.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is no run folder (no recipe.yaml); run `make demo` first")
    return load_recipe(str(folder / "recipe.yaml"))


def rerank_weight(folder: Path) -> float:
    """The weight of P(yes) that evaluation chose on validation for the global pool; 1 where it has not run."""
    result = folder / "evaluation" / "rerank" / "result.json"
    return json.loads(result.read_text())["notes"]["weight global"] if result.is_file() else 1.0


def search_run(folder: Path, query: dict[str, Any], top_k: int = 10, rerank: bool = False) -> list[Hit]:
    """Search a run's own corpus with its newest model.

    Args:
        folder: a run folder, such as runs/demo.
        query: an item: text, image (path) or both, and an instruction.

    Raises:
        UserError: nothing trained there yet, an item without text and image, a bad picture.
    """
    checkpoint, documents = newest(folder)
    corpus = Corpus.open(documents, run_recipe(folder).data)
    [vector] = Embedder.from_pretrained(checkpoint).encode_query([query])
    if not rerank:
        return corpus.search(vector, top_k)
    hits = corpus.search(vector, max(top_k, RERANK_DEPTH))
    reranker = Reranker.from_pretrained(folder / "checkpoints" / "reranker")
    return fuse(hits, reranker.score(query, [hit.item for hit in hits]), rerank_weight(folder))[:top_k]


def as_lines(hits: Sequence[Hit]) -> str:
    """One line per hit: rank, score, id, source, what it holds and the beginning of its text."""
    lines = []
    for rank, hit in enumerate(hits, start=1):
        text = " ".join((hit.document["text"] or "").split())
        lines.append(
            f"{rank:3}  {hit.score:.3f}  {hit.document['id']:<12} {hit.document['source']:<10} "
            f"{hit.document['modality']:<10}  {text[:80]}{'…' if len(text) > 80 else ''}".rstrip()
        )
    return "\n".join(lines)


def write_page(path: Path, query: dict[str, Any], hits: Sequence[Hit]) -> None:
    """One self-contained HTML file with the query and its results, pictures inside.

    Raises:
        UserError: the file cannot be written.
    """
    html = _PAGE.render(query=query | {"image": picture_uri(query.get("image"))}, hits=hits, uri=picture_uri)
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another file for --html") from None


def picture_uri(image: bytes | str | None) -> str | None:
    """A picture (bytes or path) as a data URI of its own format."""
    if image is None:
        return None
    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    kind = next((kind for magic, kind in _KINDS.items() if content.startswith(magic)), "webp")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


_KINDS = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"BM": "bmp"}

_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ query.text or "picture" }} · umarvel search</title>
<style>
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
header { display: flex; gap: 1rem; align-items: center; border-bottom: 1px solid var(--line); padding-bottom: 1rem; }
h1 { font-size: 1.4rem; margin: 0; }
p { margin: .2rem 0; }
.dim { opacity: .7; font-size: .85rem; }
ol { list-style: none; padding: 0; display: grid; gap: 1rem; }
ol { grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }
li { border: 1px solid var(--line); border-radius: .6rem; padding: .7rem; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; height: 8rem; object-fit: contain; margin: 0 auto .5rem; background: #fff; }
header img { height: 5rem; margin: 0; }
.text { max-height: 9rem; overflow: auto; }
</style>
<header>
{% if query.image %}
<img src="{{ query.image }}" alt="the query's picture">
{% endif %}
<div>
<h1>{{ query.text or "Picture" }}</h1>
{% if query.instruction %}
<p class="dim">{{ query.instruction }}</p>
{% endif %}
</div>
</header>
<ol>
{% for hit in hits %}
<li>
{% set row = hit.document %}
{% if row.image %}
<img src="{{ uri(row.image) }}" alt="{{ row.text or row.id }}">
{% endif %}
{% if row.text %}
<p class="text">{{ row.text }}</p>
{% endif %}
<p class="dim">{{ loop.index }} · {{ "%.3f" | format(hit.score) }}
{% if hit.rerank_score is not none %}
· yes {{ "%.2f" | format(hit.rerank_score) }}
{% endif %}
<br>{{ row.source }} · {{ row.modality }} · {{ row.id }}</p>
</li>
{% endfor %}
</ol>
</html>
""")
