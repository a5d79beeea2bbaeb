"""What a published benchmark is made of, and its folder as a reader of tables.

A benchmark is declared as a `Suite`: which files it needs and where people get them, what its queries are told, how it
is scored, and a function that turns the files into documents and queries. `SuiteFolder` does the rest as for any data.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image

from umarvel_ray.data.dataset import Dataset
from umarvel_ray.data.stored import StoredTable
from umarvel_ray.data.tables import open_folder
from umarvel_ray.data.writing import document_rows, store_documents, store_pools, store_queries
from umarvel_ray.errors import UserError
from umarvel_ray.ragged import Ragged

SPLIT = "test"  # what the queries of every benchmark are called here
EVERY_TASK = ""  # in a mapping by task: what holds for the tasks that are not named
STRING, STRINGS = pa.string(), pa.list_(pa.string())
ROWS = 256  # documents that are in memory at once, with their pictures

T = TypeVar("T")


@dataclass(frozen=True)
class Crop:
    """A picture that is cut out of another one: a box (left, top, width, height), dilated and padded to a square."""

    path: Path
    box: tuple[float, float, float, float] | None = None
    dilate: float = 0.0


class Document(NamedTuple):
    """A candidate. Paths are relative to the benchmark's folder."""

    id: str
    text: str | None = None
    image: str | Crop | None = None
    video: str | None = None


class Query(NamedTuple):
    """A query, the ids of the documents that answer it, and of the only ones that it is ranked against, if any."""

    id: str
    task: str
    positives: Sequence[str]
    text: str | None = None
    image: str | Crop | Sequence[str] | None = None
    gallery: Sequence[str] | None = None
    instruction: str | None = None  # instead of the benchmark's


class Content(NamedTuple):
    """What a benchmark's files say; `pools` holds ids by task, and none for a task whose queries have galleries."""

    documents: Iterable[Document]
    queries: Sequence[Query]
    pools: Mapping[str, Sequence[str]]


class Rerank(NamedTuple):
    """The reference's recall-then-rerank: how many candidates, and w in cosine + w · P(yes) by task."""

    top: int = 10
    weights: Mapping[str, float] = {EVERY_TASK: 0.1}


USUAL = Rerank()


@dataclass(frozen=True)
class Suite:
    """A published benchmark.

    Attributes:
        name: on the command line and in the table of published results.
        title: in reports.
        files: what `read` needs, relative to the folder; a name that ends in "/" is a folder of pictures or videos.
        source: where people get them.
        read: turns the files into content.
        metrics: names that `retrieve.metrics.measures` knows, the one that is reported first.
        instructions: by task.
        reference: instructions of the reference where they differ from these; None is no instruction.
        image: the type of the column of pictures: paths, lists of paths, or bytes for pictures that are cut out.
        settings: `ModelSettings` that the protocol prescribes.
        rerank: of the reference.
        hide_seen: whether the protocol itself leaves a query's own pictures out of its pool.
        annotations: patterns of the files that the tables are made of, if these are not those of `files`.
        groups: further averages over tasks, by name.
    """

    name: str
    title: str
    files: tuple[str, ...]
    source: str
    read: Callable[[Path], Content]
    metrics: tuple[str, ...]
    instructions: Mapping[str, str | None]
    reference: Mapping[str, str | None] = field(default_factory=dict)
    image: pa.DataType = STRING
    settings: Mapping[str, Any] = field(default_factory=dict)
    rerank: Rerank = USUAL
    hide_seen: bool = False
    annotations: tuple[str, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def check(self, root: Path) -> None:
        """Make sure that the folder is the benchmark's.

        Raises:
            UserError: names the first file that is missing, the layout, and where people get it.
        """
        for name in self.files:
            path = root / name
            if not (path.is_dir() if name.endswith("/") else path.is_file()):
                layout = ", ".join(self.files)
                raise UserError(
                    f"{path}: not found; {self.title} is read from a folder with {layout} (get them from {self.source})"
                )

    def instruction(self, task: str, reference: bool) -> str | None:
        """What the queries of a task are told."""
        if reference and task in self.reference:
            return self.reference[task]
        return by_task(self.instructions, task)


class SuiteFolder:
    """A benchmark's folder as a `data.tables.Reader`.

    Args:
        reference: whether queries are told what the reference tells them.
    """

    def __init__(self, suite: Suite, root: Path, reference: bool = False) -> None:
        self.suite, self.root, self.reference = suite, root, reference
        self.key = "reference" if reference else ""

    @cached_property
    def _content(self) -> Content:
        return self.suite.read(self.root)

    @property
    def _where(self) -> str:
        return f"{self.root} ({self.suite.title})"

    def files(self, name: str) -> list[Path]:
        """The annotation files: every table is made of all of them.

        Raises:
            UserError: the benchmark has no such queries.
        """
        if name not in ("documents", "pools", SPLIT):
            raise UserError(f"{self._where} has no queries '{name}'")
        patterns = self.suite.annotations or [file for file in self.suite.files if not file.endswith("/")]
        return sorted(chain.from_iterable(map(self.root.glob, patterns)))

    def write_documents(self, path: Path) -> StoredTable:
        """Convert the documents."""
        schema = pa.schema([("id", STRING), ("text", STRING), ("image", self.suite.image), ("video", STRING)])
        rows = ([item.id, item.text, _media(item.image), item.video] for item in self._content.documents)
        return store_documents(path, _batches(rows, schema), self.root, f"{self._where}: documents")

    def write_pools(self, path: Path, documents: StoredTable) -> StoredTable:
        """Convert the pools; of a task whose queries have galleries, it is their union."""
        of_task: dict[str, list[Sequence[str]]] = {task: [ids] for task, ids in self._content.pools.items()}
        for query in self._content.queries:
            if query.gallery is not None:
                of_task.setdefault(query.task, []).append(query.gallery)
        pools = []
        for task, parts in of_task.items():
            ids = list(dict.fromkeys(chain.from_iterable(parts)))
            pools.append((task, SPLIT, self._rows(documents, [ids]).values))
        return store_pools(path, pools, f"{self._where}: pools")

    def write_queries(self, path: Path, name: str, documents: StoredTable) -> StoredTable:
        """Convert the queries.

        Raises:
            UserError: see `store_queries`; a gallery with an unknown document.
        """
        queries = self._content.queries
        kind = STRINGS if any(isinstance(query.image, list | tuple) for query in queries) else self.suite.image
        fields = [("id", STRING), ("task", STRING), ("text", STRING), ("image", kind), ("instruction", STRING)]
        told = ((query, query.instruction or self.suite.instruction(query.task, self.reference)) for query in queries)
        rows = ([query.id, query.task, query.text, _media(query.image), text] for query, text in told)
        positives = pa.array([list(query.positives) for query in queries], STRINGS)
        galleries = None
        if queries and queries[0].gallery is not None:
            galleries = self._rows(documents, [query.gallery or () for query in queries])
        return store_queries(
            path,
            _batches(rows, pa.schema(fields)),
            positives,
            document_rows(positives, documents),
            self.root,
            f"{self._where}: queries",
            galleries,
        )

    def _rows(self, documents: StoredTable, lists: Sequence[Sequence[str]]) -> Ragged:
        """Rows of documents; a query may have a thousand candidates, the same as others."""
        row_of = {id_: row for row, id_ in enumerate(documents.column("id").to_pylist())}
        counts = np.fromiter(map(len, lists), np.int64, len(lists))
        rows = np.fromiter((row_of.get(id_, -1) for ids in lists for id_ in ids), np.int64, counts.sum())
        if (unknown := np.flatnonzero(rows < 0)).size:
            id_ = next(islice(chain.from_iterable(lists), int(unknown[0]), None))
            raise UserError(f"{self._where}: document '{id_}' is not there")
        return Ragged.of_counts(counts, rows)


def open_suite(suite: Suite, root: Path, cache: Path, reference: bool = False) -> Dataset:
    """Open a benchmark's folder; its only query table is called "test".

    Args:
        cache: where the converted tables are kept.
        reference: see `SuiteFolder`.

    Raises:
        UserError: see `Suite.check` and `open_dataset`.
    """
    suite.check(root)
    return open_folder(SuiteFolder(suite, root, reference), root, cache / suite.name)


def by_task(values: Mapping[str, T], task: str) -> T:
    """A task's value, or that of every other task."""
    return values[task] if task in values else values[EVERY_TASK]


def _batches(rows: Iterable[list[Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Record batches with the columns that every table has."""
    source = iter(rows)
    while part := list(islice(source, ROWS)):
        columns = [pa.array(values, kind) for values, kind in zip(zip(*part, strict=True), schema.types, strict=True)]
        nothing = pa.nulls(len(part), STRING)
        names = [*schema.names, "modality", "source"]
        yield pa.RecordBatch.from_arrays([*columns, nothing, nothing], names=names)


def _media(image: Any) -> Any:
    """A picture as it is stored: a path, a list of paths, or bytes."""
    return _bytes_of(image) if isinstance(image, Crop) else list(image) if isinstance(image, list | tuple) else image


def _bytes_of(crop: Crop) -> bytes:
    """The bytes of a picture; of one that is not there, bytes that no picture has, so that it is set aside later."""
    try:
        data = crop.path.read_bytes()
    except OSError as error:
        return f"{crop.path}: {error.strerror}".encode()
    return _cut(data, crop) if crop.box else data


def _cut(data: bytes, crop: Crop) -> bytes:
    assert crop.box is not None
    left, top, width, height = crop.box
    try:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return data
    left, top = max(0.0, left - crop.dilate * width), max(0.0, top - crop.dilate * height)
    right = min(picture.width, left + (1 + crop.dilate) * width)
    bottom = min(picture.height, top + (1 + crop.dilate) * height)
    cut = picture.crop((round(left), round(top), round(right), round(bottom)))
    side = max(cut.size)
    square = Image.new("RGB", (side, side))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    stream = io.BytesIO()
    square.save(stream, "PNG")
    return stream.getvalue()
