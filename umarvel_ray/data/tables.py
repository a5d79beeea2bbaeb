"""Open the dataset that a recipe names: convert its tables on first use, and find them converted afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from umarvel_ray import demo
from umarvel_ray.data.content import digest_of
from umarvel_ray.data.dataset import Dataset, Pools, Queries
from umarvel_ray.data.mbeir import MbeirFolder
from umarvel_ray.data.parquet import ParquetFolder
from umarvel_ray.data.stored import StoredTable, is_stored, remove_stored
from umarvel_ray.errors import UserError
from umarvel_ray.files import user_cache
from umarvel_ray.ragged import Ragged
from umarvel_ray.recipe import Data

LAYOUT = "4"  # raise it when conversion writes something else


class Reader(Protocol):
    """A folder in one format; `write_…` converts a table to the file `path`.

    Attributes:
        key: of whatever else the query tables depend on; "" if it is only the files.
    """

    key: str

    def files(self, name: str) -> list[Path]:
        """The files behind "documents", "pools", or the query table `name`."""

    def write_documents(self, path: Path) -> StoredTable: ...

    def write_pools(self, path: Path, documents: StoredTable) -> StoredTable: ...

    def write_queries(self, path: Path, name: str, documents: StoredTable) -> StoredTable: ...


def folder_of(data: Data) -> Path:
    """The folder that `data.root` names."""
    return demo.DATA if data.root == demo.NAME else Path(data.root)


def open_dataset(data: Data, cache: str | Path | None = None) -> Dataset:
    """Open the dataset that a recipe's `data` section names.

    Args:
        cache: where converted tables are kept if `data.cache` does not say; None for `user_cache`.

    Raises:
        UserError: the folder does not exist; a file, a column or an id is missing or unreadable; an id occurs twice; a
            pool names an unknown document. Query tables are checked when they are opened: a query without positives, or
            with an unknown one, is an error. The message names the first fault with file and row.
    """
    root = folder_of(data)
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist; set data.root=DIR")
    reader: Reader = MbeirFolder(root) if data.format == "mbeir" else ParquetFolder(root)
    return open_folder(reader, root, Path(data.cache or cache or user_cache()))


def open_folder(reader: Reader, root: Path, folder: Path) -> Dataset:
    """Open the dataset that a reader reads.

    Args:
        root: the folder that it reads from.
        folder: where the converted tables are kept.

    Raises: see `open_dataset`.
    """

    def stored(name: str, write: Callable[[Path], StoredTable], *inputs: str) -> StoredTable:
        """The converted table; it is converted now unless that has been done from the same files."""
        files = reader.files(name)
        fingerprint = _fingerprint(root, files, *inputs)
        path = folder / f"{name}-{fingerprint}.arrow"
        if is_stored(path):
            return StoredTable(path)
        table = write(path)
        if _fingerprint(root, files, *inputs) != fingerprint:
            remove_stored(path)
            raise UserError(f"{files[0]} or a file beside it changed while '{name}' was read; run the command again")
        return table

    documents = stored("documents", reader.write_documents)
    pools = stored("pools", lambda path: reader.write_pools(path, documents), documents.digest)

    def queries(name: str) -> Queries:
        inputs = filter(None, (documents.digest, reader.key))
        return Queries.of(stored(name, lambda path: reader.write_queries(path, name, documents), *inputs))

    return Dataset(root, documents, _pools_of(pools), queries)


def _fingerprint(root: Path, files: list[Path], *inputs: str) -> str:
    """Changes when a file does: of names, sizes and times, because reading a large file would take minutes.

    The time of a file's last change of status is one of them: unlike that of its content, no tool can set it back.
    """
    facts = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file in files]
    return digest_of(LAYOUT, str(root.absolute()), repr(facts), *inputs)[:16]


def _pools_of(table: StoredTable) -> Pools:
    members = Ragged.of_arrow(table.column("rows"))
    names = zip(table.column("task").to_pylist(), table.column("split").to_pylist(), strict=True)
    return dict(zip(names, members.lists(), strict=True))
