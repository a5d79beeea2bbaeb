"""Resumable sharded output: each shard is one Parquet file, written once; a rerun computes only the missing shards.

A folder holds `shard-00000.parquet` …, `quarantine.parquet` (id, reason) and `manifest.json`, which records the inputs
and, once complete, the counts: rows = written + quarantined. A shard stores its quarantined rows in its own schema
metadata, so that both appear in one atomic rename. A folder written from different inputs is emptied first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from umarvel_ray.errors import UserError
from umarvel_ray.files import atomic_path, write_json

QUARANTINE = pa.schema([("id", pa.string()), ("reason", pa.string())])
_META, _FACTS = b"umarvel.quarantine", b"umarvel.facts"

Quarantined = list[tuple[str, str]]


def open_output(folder: Path, inputs: dict[str, Any], shards: int) -> list[int]:
    """Prepare the folder for output computed from these inputs and return the numbers of the missing shards.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _read_manifest(folder).get("inputs") != inputs:
            _write_manifest(folder, {"complete": False})  # holds for what is left if this is interrupted
            for old in (*folder.glob("*.parquet"), *folder.glob(".*.partial")):
                old.unlink()
            _write_manifest(folder, {"inputs": inputs, "shards": shards, "complete": False})
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; free space or choose another output") from None
    return [index for index in range(shards) if not shard_path(folder, index).exists()]


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.parquet"


def write_shard(
    folder: Path, index: int, table: pa.Table, quarantined: Quarantined, facts: dict[str, Any] | None = None
) -> None:
    """Write one shard atomically, together with (id, reason) for each row that could not be used.

    Args:
        facts: further results, read back by `shard_facts`.

    Raises:
        UserError: the file cannot be written.
    """
    table = table.replace_schema_metadata({_META: json.dumps(quarantined), _FACTS: json.dumps(facts)})
    path = shard_path(folder, index)
    try:
        with atomic_path(path) as partial:
            pq.write_table(table, partial)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another output") from None


def close_output(folder: Path, rows: int, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write `quarantine.parquet`, reconcile the counts, add `facts` to the manifest, mark it complete and return it.

    Raises:
        UserError: written + quarantined rows do not add up to the input rows.
    """
    manifest = _read_manifest(folder)
    written, quarantined = 0, []
    for index in range(manifest["shards"]):
        file = pq.ParquetFile(shard_path(folder, index))
        written += file.metadata.num_rows
        quarantined += json.loads(file.schema_arrow.metadata[_META])
    if written + len(quarantined) != rows:
        raise UserError(
            f"{folder}: {written} written + {len(quarantined)} quarantined rows, but {rows} input rows; "
            "delete the folder and run the job again"
        )
    columns = [[row[0] for row in quarantined], [row[1] for row in quarantined]]
    with atomic_path(folder / "quarantine.parquet") as partial:
        pq.write_table(pa.table(columns, schema=QUARANTINE), partial)
    manifest |= {"complete": True, "rows": rows, "written": written, "quarantined": len(quarantined)}
    manifest |= facts or {}
    _write_manifest(folder, manifest)
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether all shards are written and reconciled."""
    return bool(_read_manifest(folder).get("complete"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete output.

    Raises:
        UserError: there is none, or the job that writes it has not finished.
    """
    if not is_complete(folder):
        raise UserError(f"{folder}: no complete manifest.json; run, or rerun, the job that writes this folder")
    return _read_manifest(folder)


def read_shard(folder: Path, index: int, columns: Sequence[str] | None = None) -> pa.Table:
    """One shard, without the quarantine in its metadata."""
    return pq.read_table(shard_path(folder, index), columns=columns, partitioning=None).replace_schema_metadata(None)


def shard_facts(folder: Path, index: int) -> dict[str, Any]:
    """The facts that a shard was written with."""
    facts: dict[str, Any] = json.loads(pq.read_schema(shard_path(folder, index)).metadata[_FACTS])
    return facts


def read_shards(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Every row of a complete output, in shard order.

    Raises:
        UserError: see `read_manifest`.
    """
    return pa.concat_tables([read_shard(folder, i, columns) for i in range(read_manifest(folder)["shards"])])


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return manifest


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_json(folder / "manifest.json", manifest)
