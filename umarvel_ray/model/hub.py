"""Where a model's files are: a directory, or a snapshot of a Hugging Face Hub repository."""

from __future__ import annotations

import re
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from umarvel_ray.errors import UserError
from umarvel_ray.model.adapter import base_beside, base_name, is_adapter, linked_folder
from umarvel_ray.model.checkpoint import CheckpointRef, check_files
from umarvel_ray.presets import Kind, preset_settings

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
FILES = ["*.json", "*.jinja", "*.txt", "*.safetensors"]
SUBFOLDERS = ["*/*"]  # other formats of the weights


def model_folder(name: str | Path, revision: str | None = None, base: str | Path | None = None) -> Path:
    """The directory of a model; of an adapter, that of its base with the adapter (see `linked_folder`).

    Args:
        name: a directory, or the id of a model on the Hub, "ORG/NAME" or "ORG/NAME@REVISION". A directory that exists
            wins. A snapshot is downloaded to the Hub's own cache (`HF_HOME`) once; without a network, the cached one
            serves. What cannot be an id is returned as it is.
        revision: branch, tag or commit on the Hub.
        base: the base model of a PEFT adapter, a directory or an id; by default the one that the adapter names, as a
            path, in a directory beside its own, or on the Hub.

    Raises:
        UserError: no such directory, and the Hub has no such model, refuses it or cannot be reached; `base` for a whole
            model; see also `linked_folder`.
    """
    folder = _folder(name, revision)
    if is_adapter(folder):
        return linked_folder(folder, _base_of(folder, base))
    if base is not None:
        raise UserError(f"{folder} is a whole model, or none, and no adapter; leave out base")
    return folder


def model_ref(name: str | Path, kind: Kind, preset: str | None = None) -> CheckpointRef:
    """Reference a model with its own settings or those of a preset.

    Raises: UserError: see `model_folder`, `preset_settings` and `CheckpointRef.of`.
    """
    folder = model_folder(name)
    return CheckpointRef.of(folder, preset_settings(preset, kind, folder) if preset else None)


def _folder(name: str | Path, revision: str | None) -> Path:
    if Path(name).is_dir() or not HUB_ID.fullmatch(str(name)):
        return Path(name)
    repository, _, pinned = str(name).partition("@")
    return _snapshot(repository, revision or pinned or None)


def _base_of(adapter: Path, given: str | Path | None) -> Path:
    if given is not None:
        return model_folder(given)
    name = base_name(adapter)
    if beside := base_beside(adapter, name):
        return model_folder(beside)
    try:
        return model_folder(name)
    except UserError as error:
        raise UserError(
            f"{adapter} is an adapter of {name}: put that beside it, or give its directory as base ({error})"
        ) from None


@lru_cache
def _snapshot(repository: str, revision: str | None) -> Path:
    # Imported here: with a directory, nothing needs it.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Quiet(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})

    fetch = partial(snapshot_download, repository, revision=revision, allow_patterns=FILES, ignore_patterns=SUBFOLDERS)
    try:
        cached = Path(fetch(local_files_only=True))
        if not is_adapter(cached):
            check_files(cached)
        bar: type[tqdm] = Quiet
    except (OSError, UserError):
        print(f"{repository}: no such directory; looking on {constants.ENDPOINT}", file=sys.stderr)
        bar = tqdm
    try:
        return Path(fetch(tqdm_class=bar))
    except Exception as error:  # of the Hub, the network or the disk: they share no base class
        tried = f"{repository}: no such directory, and {constants.ENDPOINT}"
        raise UserError(f"{tried} {_reason(error, revision)}") from error


def _reason(error: Exception, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "asks to accept the model's license first: do so on its page, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "has no such model, or it is private; check the name, or run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision '{revision}' of it; check the name"
    cause = error.__cause__ or error
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return f"is not asked (HF_HUB_OFFLINE=1); nor is the model in {constants.HF_HUB_CACHE}: unset it to download"
    message = " ".join(str(cause).split()) or type(cause).__name__
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"cannot be reached ({message}), nor is the model in {constants.HF_HUB_CACHE}; give a directory"
    return f"did not deliver it ({message}); try again"
