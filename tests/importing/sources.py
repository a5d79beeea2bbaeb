"""Sources of every kind, written by hand as their documentation shows, and what is found in an imported folder."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

N = 12
CAPTIONS = [f"thing number {number}, it's “nice”" for number in range(N)]
SPLITS = ("train", "validation", "test")

Key = tuple[str | None, tuple[tuple[int, int, int], ...]]  # an item: its text and the colors of its pictures


def color(number: int) -> tuple[int, int, int]:
    return (number * 17 % 256, number * 59 % 256, number // 256)


def picture(number: int, kind: str = "PNG") -> bytes:
    """A picture of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), color(number)).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def write_pictures(folder: Path, count: int = N, start: int = 0) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        (folder / f"{number}.png").write_bytes(picture(number))
    return [f"{number}.png" for number in range(start, start + count)]


def write_csv(file: Path, rows: Iterable[Iterable[Any]], delimiter: str = ",", encoding: str = "utf-8") -> None:
    with file.open("w", newline="", encoding=encoding) as handle:
        csv.writer(handle, delimiter=delimiter).writerows(rows)


def write_jsonl(file: Path, rows: Iterable[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def write_tar(file: Path, members: Iterable[tuple[str, bytes]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz" if file.suffix == ".gz" else "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_saved(folder: Path, table: pa.Table, shards: int = 2) -> None:
    """As `Dataset.save_to_disk` leaves it: Arrow streams, and what they are in state.json."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{shards:05}.arrow" for number in range(shards)]
    rows = -(-table.num_rows // shards)
    for number, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table.slice(number * rows, rows), max_chunksize=5)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"image": {"_type": "Image"}}}))


def image_feature(numbers: Iterable[int]) -> pa.Array:
    """A column of `datasets`' Image feature."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": picture(number), "path": f"{number}.png"} for number in numbers], kind)


def captioned_table() -> pa.Table:
    return pa.table({"image": image_feature(range(N)), "text": pa.array(CAPTIONS)})


def colors_of(image: bytes | list[bytes] | None) -> tuple[tuple[int, int, int], ...]:
    images = image if isinstance(image, list) else [image] if image else []
    return tuple(Image.open(io.BytesIO(content)).convert("RGB").getpixel((0, 0)) for content in images)


def key_of(row: dict[str, Any]) -> Key:
    return row["text"], colors_of(row["image"])


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def found(folder: Path) -> dict[tuple[int, Key], set[Key]]:
    """The positives of each query, by the number of its task, over all splits; read with pyarrow and PIL alone."""
    documents = {row["id"]: key_of(row) for row in rows(folder, "documents")}
    return {
        (int(row["task"][-1]), key_of(row)): {documents[id_] for id_ in row["positive_ids"]}
        for split in SPLITS
        for row in rows(folder, split)
    }


def pooled(folder: Path) -> dict[tuple[int, str], set[Key]]:
    """The documents of each pool."""
    documents = {row["id"]: key_of(row) for row in rows(folder, "documents")}
    return {
        (int(row["task"][-1]), row["split"]): {documents[id_] for id_ in row["document_ids"]}
        for row in rows(folder, "pools")
    }


def reasons(folder: Path) -> list[tuple[str, int, str]]:
    """File, row and reason of everything that was set aside."""
    table = pq.read_table(folder / "quarantine" / "import.parquet").to_pylist()
    return [(row["table"], row["row"], row["reason"]) for row in table]


def said(text: str) -> Key:
    return text, ()


def shown(*numbers: int) -> Key:
    return None, tuple(color(number) for number in numbers)


Write = Callable[[Path], Path]  # writes a source below a folder, and returns it
