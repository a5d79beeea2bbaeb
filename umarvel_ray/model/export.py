"""Release a checkpoint: a folder of its own, with its scores in the model card and no paths of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from umarvel_ray.errors import UserError
from umarvel_ray.files import atomic_folder
from umarvel_ray.model.card import last_part
from umarvel_ray.model.checkpoint import PROVENANCE, read_provenance
from umarvel_ray.model.companions import write_companions


def export_checkpoint(
    source: Path,
    target: Path,
    evaluation: dict[str, Any] | None = None,
    dtype: str | None = None,
    license_name: str | None = None,
) -> None:
    """Copy a checkpoint to `target`, atomically.

    Args:
        target: a folder that does not exist or is empty.
        evaluation: scores for the model card: {"k", "chance", "local", "global"}, each by task.
        dtype: dtype of the exported weights; by default unchanged.
        license_name: for the model card, such as "apache-2.0".

    Raises:
        UserError: `source` is not a complete checkpoint, or `target` is not empty or cannot be written.
    """
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder; give --to another one")
    record = _without_folders(read_provenance(source))
    record |= {key: value for key, value in (("evaluation", evaluation), ("license", license_name)) if value}
    try:
        with atomic_folder(target) as fresh:
            ignored = shutil.ignore_patterns("*.safetensors*") if dtype else None
            shutil.copytree(source, fresh, ignore=ignored, dirs_exist_ok=True)
            if dtype:
                _write_weights(source, fresh, dtype)
            (fresh / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
            write_companions(fresh, record)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None


def _without_folders(value: Any) -> Any:
    """The same tree with every path reduced to its last part."""
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    return [_without_folders(part) for part in value] if isinstance(value, list) else last_part(value)


def _write_weights(source: Path, target: Path, dtype: str) -> None:
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    model.save_pretrained(target)
