"""The model card of a checkpoint, written from its `umarvel.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from umarvel_ray.recipe import RERANKER

USE_EMBEDDER = """\
With umarvel-ray:

```python
from umarvel_ray import Embedder

embedder = Embedder.from_pretrained(path)  # this directory
query = {"text": "a red car", "instruction": "Find an image that matches the caption."}
q = embedder.encode_query([query])  # float32 (1, d), unit norm
d = embedder.encode_document([{"image": "car.png"}, {"image": "boat.png", "text": "a boat"}, "a text"])
print(q @ d.T)
```
"""
USE_SENTENCE_TRANSFORMERS = """\

With sentence-transformers 6, which gives the same vectors and does not need umarvel-ray (`trust_remote_code` runs the
directory's `umarvel_embedding.py`, which renders the messages and masks the instruction):

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(path, trust_remote_code=True)
q = model.encode_query([query])
q = model.encode_query(["a red car", "a boat"], prompt="Find an image that matches the caption.")
d = model.encode_document([{"image": "car.png"}, {"image": "boat.png", "text": "a boat"}, "a text"])
print(model.similarity(q, d))
```
"""

USE_RERANKER = """\
```python
from umarvel_ray import Reranker

reranker = Reranker.from_pretrained(path)  # this directory
query = {"text": "a red car", "instruction": "Find an image that matches the caption."}
documents = [{"image": "car.png"}, {"image": "boat.png", "text": "a boat"}, "a text"]
print(reranker.score(query, documents))  # P(yes) for each document
```
"""


def model_card(record: Mapping[str, Any]) -> str:
    """Markdown with YAML front matter, as the Hugging Face Hub reads it.

    Args:
        record: the contents of `umarvel.json`. Only "settings" is required; "phase", "parent", "recipe", "data",
            "metrics" and "versions", and for a release "license" and "evaluation" ({"k", "chance", "local", "global"},
            each by task), add to the card.
    """
    use = USE_EMBEDDER + (USE_SENTENCE_TRANSFORMERS if follows_umarvel(record["settings"]) else "")
    sections = [
        ("Use", USE_RERANKER if record.get("phase") == RERANKER else use),
        ("Settings", _settings(record)),
        ("Evaluation", _evaluation(record.get("evaluation") or {})),
        ("Last training step", _table(["", "value"], list((record.get("metrics") or {}).items()))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())),
    ]
    matter = yaml.safe_dump(_front_matter(record), sort_keys=False)
    head = f"---\n{matter}---\n\n# {_title(record)}\n\n{_description(record)}\n"
    return head + "".join(f"\n## {title}\n\n{text.strip()}\n" for title, text in sections if text)


def follows_umarvel(settings: Mapping[str, Any]) -> bool:
    """Whether settings are within what `umarvel_embedding.py` knows: no message of another system."""
    return settings["pooling"] != "end" and not settings.get("message") and not settings.get("preparation")


def last_part(value: Any) -> Any:
    """The last part of a path, which means nothing on another machine; any other value unchanged."""
    return PurePath(value).name if isinstance(value, str) and value.startswith(("/", ".")) else value


def _front_matter(record: Mapping[str, Any]) -> dict[str, Any]:
    reranker = record.get("phase") == RERANKER
    opens = not reranker and follows_umarvel(record["settings"])
    library = "sentence-transformers" if opens else "transformers"
    task = "text-ranking" if reranker else "feature-extraction"
    base = _recipe(record).get("base")
    known = {
        "library_name": library,
        "pipeline_tag": task,
        "license": record.get("license"),
        "base_model": base if base and not base.startswith(("builtin:", "/", ".")) else None,
        "tags": [library, "umarvel-ray", "multimodal", "retrieval", "reranker" if reranker else "embedding"],
    }
    return {key: value for key, value in known.items() if value is not None}


def _title(record: Mapping[str, Any]) -> str:
    return " · ".join(part for part in (_recipe(record).get("name"), record.get("phase")) if part) or "umarvel-ray"


def _description(record: Mapping[str, Any]) -> str:
    kind = (
        "A pointwise reranker of a universal multimodal retriever: the probability that a document answers a query"
        if record.get("phase") == RERANKER
        else "An embedder for universal multimodal retrieval: one unit vector for a text, a picture, or both"
    )
    text = f"{kind}, guided by a natural-language instruction ([U-MARVEL](https://arxiv.org/abs/2507.14902)). "
    origin = {
        "phase": record.get("phase"),
        "parent": last_part(record.get("parent")),
        "base model": last_part(_recipe(record).get("base")),
        "data": last_part(record.get("data")),
        "recipe": _recipe(record).get("name"),
        "seed": _recipe(record).get("seed"),
    }
    details = "; ".join(f"{key}: `{value}`" for key, value in origin.items() if value is not None)
    if not details:
        return f"{text}Made with umarvel-ray."
    return f"{text}Trained with umarvel-ray. {details[0].upper()}{details[1:]}."


def _settings(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    pooled = {
        "last": "the hidden state before `<emb>`",
        "end": "the hidden state of the last token",
        "mean": "the mean over all tokens",
    }[settings["pooling"]]
    if settings["pooling"] == "mean" and settings["instruction_mask"] and not settings.get("message"):
        pooled += " except the instruction's"
    lines = [f"attention: {settings['attention']}"]
    if record.get("phase") != RERANKER:
        lines.append(f"embedding: {pooled}, scaled to unit norm")
    lines += [
        f"positions: {'M-RoPE' if settings['positions'] == 'mrope' else 'sequential (0, 1, 2 …), pictures too'}",
        f"pictures: {settings['min_pixels']:,} to {settings['max_pixels']:,} pixels; texts: up to "
        f"{settings['max_text_tokens']} tokens",
    ]
    for key in ("message", "pair", "preparation"):
        if settings.get(key):
            lines.append(f"{key}: of another system, as `umarvel.json` says")
    if not settings["deepstack"]:
        lines.append("DeepStack: off")
    prompts = [key.replace("_", " ") for key in ("compression_prompt", "generation_prompt") if settings[key]]
    if prompts:
        lines.append(f"the message ends with the {' and the '.join(prompts)}")
    return "\n".join(f"- {line}" for line in lines)


def _evaluation(scores: Mapping[str, Any]) -> str:
    """Recall@k by task, next to chance."""
    scopes = [scope for scope in ("local", "global") if scope in scores]
    header = ["recall", "k", *(name for scope in scopes for name in (f"{scope} pool", "chance"))]
    rows = [
        [
            task,
            scores["k"].get(task, ""),
            *(value for scope in scopes for value in (scores[scope][task], scores["chance"][scope][task])),
        ]
        for task in scores.get("local", {})
    ]
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _recipe(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record.get("recipe") or {}
