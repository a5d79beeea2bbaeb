"""A checkpoint as a release: a folder of its own, with its scores in the model card and no path of this machine."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from umarvel_ray.errors import UserError
from umarvel_ray.model.checkpoint import PROVENANCE, RERANKER, read_provenance
from umarvel_ray.release.card import last_part
from umarvel_ray.release.companions import write_card, write_sentence_transformers
from umarvel_ray.runs import LADDER, Run


def export(
    run: Run, target: Path, step: str | None = None, dtype: str | None = None, license_name: str | None = None
) -> None:
    """Copy the checkpoint of a ladder step (default: the last one there) or the reranker's to `target`, atomically.

    Args:
        target: does not exist, or is empty.
        dtype: of the weights there; default: as they are.
        license_name: for the model card, such as "apache-2.0".

    Raises:
        UserError: no such step, a checkpoint that is not there or not whole, `target` is in use or cannot be written.
    """
    step = step or next((name for name in reversed(LADDER) if run.has(name)), LADDER[0])
    if step not in (*LADDER, RERANKER):
        raise UserError(f"no step '{step}'; give one of: {', '.join((*LADDER, RERANKER))}")
    source = run.parent(step, "export")
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder; give --to another one")
    record = _release_record(run, step, source) | ({"license": license_name} if license_name else {})
    fresh = target.with_name(f".{target.name}.writing")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(source, fresh, ignore=shutil.ignore_patterns("*.safetensors*") if dtype else None)
        if dtype:
            _write_weights(source, fresh, dtype)
        (fresh / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
        write_card(fresh, record)
        if step != RERANKER:  # also for a checkpoint of a version that did not write them
            write_sentence_transformers(fresh)
        os.replace(fresh, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
    print(f"exported {source} to {target}")


def _release_record(run: Run, step: str, source: Path) -> dict[str, Any]:
    """The checkpoint's provenance without paths, and the step's scores where the run was evaluated."""
    record = _without_folders(read_provenance(source))
    report = run.dir / "report" / "metrics.json"
    metrics = json.loads(report.read_text()) if report.is_file() else {"ladder": []}
    for row in metrics["ladder"]:
        if row["step"] == step:
            scores = {scope: row[scope] for scope in ("local", "global")}
            record["evaluation"] = {"k": metrics["k"], "chance": metrics["chance"], **scores}
    return record


def _without_folders(value: Any) -> Any:
    """The same tree with each path's last part in its place."""
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    return [_without_folders(part) for part in value] if isinstance(value, list) else last_part(value)


def _write_weights(source: Path, target: Path, dtype: str) -> None:
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    AutoModelForImageTextToText.from_pretrained(source, dtype=dtype).save_pretrained(target)
