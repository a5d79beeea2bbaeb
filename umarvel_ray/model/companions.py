"""Files for other libraries in a checkpoint: what sentence-transformers reads, and the model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from umarvel_ray.model.card import follows_umarvel, model_card
from umarvel_ray.recipe import RERANKER

MODULE = Path(__file__).with_name("umarvel_embedding.py")
MODULES = (  # folder, class
    ("", f"{MODULE.stem}.UMarvelEmbedding"),
    ("1_Pooling", "sentence_transformers.sentence_transformer.modules.Pooling"),
    ("2_Normalize", "sentence_transformers.base.modules.Normalize"),
)


def write_companions(folder: Path, record: dict[str, Any]) -> None:
    """Write the model card and, for an embedder with U-MARVEL's messages, the files of sentence-transformers.

    Args:
        record: the contents of `umarvel.json`.
    """
    _write_card(folder, record)
    if record.get("phase") != RERANKER and follows_umarvel(record["settings"]):
        _write_sentence_transformers(folder)


def _write_card(folder: Path, record: dict[str, Any]) -> None:
    """Write the checkpoint's `README.md`."""
    (folder / "README.md").write_text(model_card(record), encoding="utf-8")


def _write_sentence_transformers(folder: Path) -> None:
    """Write what `SentenceTransformer(folder, trust_remote_code=True)` reads besides the weights.

    Pooling is always a mean; `umarvel_embedding.py` decides which tokens enter it.
    """
    config = json.loads((folder / "config.json").read_text())
    dimension = config["text_config"]["hidden_size"]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": kind} for index, (path, kind) in enumerate(MODULES)
    ]
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", {"embedding_dimension": dimension, "pooling_mode": "mean"})
    _write(folder / "2_Normalize" / "config.json", {})
    _write(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "similarity_fn_name": "cosine",
            "requirements": {"sentence-transformers": ">=6", "transformers": ">=5.17"},
        },
    )
    shutil.copyfile(MODULE, folder / MODULE.name)


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")
