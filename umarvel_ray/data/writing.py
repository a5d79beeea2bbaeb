"""What every reader does with the rows that it has read: settle their types, add keys, check ids, store them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from umarvel_ray.data.content import KEY_COLUMNS, MEDIA, content_keys, keys_of_each, picture_keys
from umarvel_ray.data.stored import StoredTable, write_stored
from umarvel_ray.errors import UserError
from umarvel_ray.ragged import Ragged

TEXTS = ("id", "text", "instruction", "modality", "source", "concept", "task")
PATH = pa.large_string()
OWN_COLUMNS = ("positive_rows", "gallery_rows", "picture_keys")  # of a stored query table
AVERAGE = "average"  # what metrics call the mean over the tasks

Pool = tuple[str, str, np.ndarray]  # task, split, rows of documents


def store_documents(path: Path, batches: Iterable[pa.RecordBatch], root: Path, where: str) -> StoredTable:
    """Store documents with the keys of their content.

    Args:
        root: the folder that paths of images and videos are relative to.
        where: names the table in errors.

    Raises:
        UserError: a column of a wrong type, an id that is missing, empty or occurs twice, a document with an
            instruction, or the table cannot be written.
    """

    def with_keys() -> Iterator[pa.RecordBatch]:
        for batch in _settled(batches, root, where):
            pictures = picture_keys(batch)
            yield _with_columns(batch, content_key=content_keys(batch, pictures), picture_key=pictures)

    def check(table: StoredTable) -> None:
        _check_ids(table, where)
        _check_instructions(table, where)

    return _store(path, with_keys(), where, check)


def store_queries(
    path: Path,
    batches: Iterable[pa.RecordBatch],
    positives: pa.ListArray,
    rows: Ragged,
    root: Path,
    where: str,
    galleries: Ragged | None = None,
) -> StoredTable:
    """Store queries with their positives as rows of the document table, column `positive_rows`.

    Queries that show lists of pictures get the keys of each of these and of all, column `picture_keys`.

    Args:
        positives: ids of each query's positives.
        rows: their rows, from `document_rows`.
        galleries: rows of the only documents that each query is ranked against, column `gallery_rows`; None if queries
            are searched in their task's pool.

    Raises:
        UserError: see `store_documents`; a query without a task or positives, or with an unknown one; see `check_task`.
    """

    def with_positives() -> Iterator[pa.RecordBatch]:
        start = 0
        for batch in _settled(batches, root, where):
            own = np.arange(start, start + batch.num_rows)
            start += batch.num_rows
            lists = {"positive_rows": rows} | ({"gallery_rows": galleries} if galleries else {})
            columns = {name: of_all.take(own).to_arrow() for name, of_all in lists.items()}
            shown = picture_keys(batch)
            if "image" in batch.schema.names and _is_list(batch["image"].type):
                columns["picture_keys"] = keys_of_each(batch["image"], shown).to_arrow()
            yield _with_columns(batch, picture_key=shown, **columns)

    def check(table: StoredTable) -> None:
        _check_ids(table, where)
        _check_tasks(table, where)
        _check_positives(table, positives, rows, where)

    return _store(path, with_positives(), where, check)


def store_pools(path: Path, pools: Sequence[Pool], where: str) -> StoredTable:
    """Store pools; columns `task`, `split` and `rows`.

    Raises:
        UserError: a task has two pools in a split, or the table cannot be written; see `check_task`.
    """
    for task in dict.fromkeys(task for task, _, _ in pools):
        check_task(task, where)
    for (task, split), count in Counter((task, split) for task, split, _ in pools).items():
        if count > 1:
            raise UserError(f"{where}: task '{task}' has {count} pools in split '{split}'; keep one")
    tasks, splits, _ = zip(*pools, strict=True) if pools else ((), (), ())
    lists = Ragged.of([_distinct(*pool, where).tolist() for pool in pools]).to_arrow()
    columns = [pa.array(tasks, pa.string()), pa.array(splits, pa.string()), lists]
    batch = pa.RecordBatch.from_arrays(columns, names=["task", "split", "rows"])
    return write_stored(path, batch.schema, [batch])


def _distinct(task: str, split: str, rows: np.ndarray, where: str) -> np.ndarray:
    """The rows of a pool, each at its first place."""
    first = np.sort(np.unique(rows, return_index=True)[1])
    if repeats := len(rows) - len(first):
        print(f"{where}, task '{task}', split '{split}': {repeats:,} repeated documents are counted once")
    return rows[first]


def check_task(task: str, where: str) -> None:
    """Make sure that a task can be reported.

    Args:
        where: names the table in errors.

    Raises:
        UserError: its name is empty, holds more than one line, or is that of the average over the tasks.
    """
    if not task.strip():
        raise UserError(f"{where}: a task's name is empty; give it one")
    if len(task.splitlines()) > 1:
        raise UserError(f"{where}: a task's name has several lines: {task!r}; write it in one")
    if task == AVERAGE:
        raise UserError(f"{where}: a task is called '{AVERAGE}', which is the average over the tasks; rename it")


def document_rows(ids: pa.ListArray, documents: StoredTable) -> Ragged:
    """Rows of the document table for lists of ids; −1 for an unknown one."""
    counts = pc.list_value_length(ids).to_numpy(zero_copy_only=False)
    return Ragged.of_counts(counts, documents.find(pc.list_flatten(ids)) if counts.any() else np.empty(0, np.int64))


def strings(column: pa.Array, where: str) -> pa.Array:
    """Text of any type as `string`; integers become their digits.

    Args:
        where: names the column in errors.

    Raises:
        UserError: something else, or text that is not UTF-8.
    """
    column = _plain(column)
    if not (_is_text(column.type) or pt.is_integer(column.type)):
        raise UserError(f"{where} holds {column.type}, not text; write it as strings")
    return _valid(column, where).cast(pa.string())


def lists_of_ids(column: pa.ChunkedArray, where: str) -> pa.ListArray:
    """Lists of ids of any type as list<string>; a null is an empty list. Args, raises: see `strings`."""
    if not (_is_list(column.type) or pt.is_null(column.type)):
        raise UserError(f"{where} holds {column.type}, not lists of ids; write it as lists of strings")
    settled = [_like(chunk, strings(_flat(chunk), where)) for chunk in column.chunks]
    return pa.chunked_array(settled, pa.list_(pa.string())).combine_chunks()


def _store(
    path: Path, batches: Iterator[pa.RecordBatch], where: str, check: Callable[[StoredTable], None]
) -> StoredTable:
    first = next(batches, None)
    if first is None:
        raise UserError(f"{where}: the table has no rows; add some")

    def all_batches() -> Iterator[pa.RecordBatch]:
        yield first
        yield from batches

    return write_stored(path, first.schema, all_batches(), check)


def _settled(batches: Iterable[pa.RecordBatch], root: Path, where: str) -> Iterator[pa.RecordBatch]:
    """Columns with the same types whatever the file's: text is `string`; for media see `_media`; others stay.

    A missing modality is told from what the row has; a missing source is the empty one.
    """

    def settled(name: str, column: pa.Array) -> pa.Array:
        if name in MEDIA:
            return _media(column, root, f"{where}: column '{name}'")
        return strings(column, f"{where}: column '{name}'") if name in TEXTS else _plain(column)

    for batch in batches:
        names = [name for name in batch.schema.names if name not in (*KEY_COLUMNS, *OWN_COLUMNS)]
        columns = {name: settled(name, batch[name]) for name in names}
        columns["modality"] = pc.coalesce(columns["modality"], _modality(columns))
        columns["source"] = columns["source"].fill_null("")
        yield pa.RecordBatch.from_arrays(list(columns.values()), names=names)


def _modality(columns: Mapping[str, pa.Array]) -> pa.Array:
    """What each row has, such as "image,text"."""
    names = [name for name in ("image", "video", "text") if name in columns]
    has = [pc.not_equal(columns[name], "") if name == "text" else columns[name].is_valid() for name in names]
    codes = sum(flags.fill_null(False).to_numpy(zero_copy_only=False) << n for n, flags in enumerate(has))
    words = [",".join(name for n, name in enumerate(names) if code >> n & 1) for code in range(2 ** len(names))]
    return pa.array(words).take(pa.array(codes))


def _media(column: pa.Array, root: Path, where: str) -> pa.Array:
    """Encoded bytes as `large_binary`, paths as whole paths in `large_string`, or lists of these; none is null."""
    column = _plain(column)
    if _is_list(column.type):
        lists = _without_nulls(_like(column, _media(_flat(column), root, where)))
        return pc.if_else(pc.equal(pc.list_value_length(lists), 0), None, lists)
    if _is_binary(column.type):
        content = column.cast(pa.large_binary())
        return pc.if_else(pc.equal(pc.binary_length(content), 0), None, content)
    if not _is_text(column.type):
        raise UserError(f"{where} holds {column.type}, not encoded bytes, paths, or lists of these; write it as bytes")
    paths = _valid(column, where).cast(PATH)
    paths = pc.if_else(pc.equal(paths, ""), None, paths)
    joined = pc.binary_join_element_wise(pa.scalar(str(root.absolute()), PATH), paths, pa.scalar("/", PATH))
    whole = pc.fill_null(pc.match_substring_regex(paths, "^(/|(data|file|https?):)"), True)
    return pc.if_else(whole, paths, joined)


def _plain(column: pa.Array) -> pa.Array:
    """Without dictionaries and views, for which Arrow lacks functions."""
    if pt.is_dictionary(column.type):
        return column.dictionary_decode()
    views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return column.cast(views[column.type]) if column.type in views else column


def _valid(column: pa.Array, where: str) -> pa.Array:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        raise UserError(f"{where} holds text that is not UTF-8; convert it") from None
    return column


def _is_text(kind: pa.DataType) -> bool:
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind) or pt.is_null(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind) or pt.is_fixed_size_binary(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind))


def _flat(lists: pa.Array) -> pa.Array:
    return pa.nulls(0) if pt.is_null(lists.type) else pc.list_flatten(lists)


def _like(lists: pa.Array, values: pa.Array) -> pa.ListArray:
    """Lists as long as these, of other values; a null becomes an empty list."""
    null = pt.is_null(lists.type)
    counts = np.zeros(len(lists), np.int64) if null else pc.list_value_length(lists).fill_null(0).to_numpy()
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32()), values)


def _without_nulls(lists: pa.ListArray) -> pa.ListArray:
    """The lists without the nulls in them."""
    kept = lists.flatten().is_valid().to_numpy(zero_copy_only=False)
    bounds = np.concatenate([[0], np.cumsum(kept)])[lists.offsets.to_numpy()]
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), lists.flatten().filter(pa.array(kept)))


def _with_columns(batch: pa.RecordBatch, **columns: np.ndarray | pa.Array) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [*batch.columns, *map(pa.array, columns.values())], names=[*batch.schema.names, *columns]
    )


def _check_instructions(table: StoredTable, where: str) -> None:
    if "instruction" in table.schema.names:
        given = pc.greater(pc.utf8_length(table.column("instruction")), 0).fill_null(False)
        if pc.any(given).as_py():
            raise UserError(
                f"{where}: row {_first(given)} has an instruction, which only queries carry; drop the column"
            )


def _check_ids(table: StoredTable, where: str) -> None:
    ids = table.column("id")
    if ids.null_count:
        raise UserError(f"{where}: row {_first(ids.is_null())} has no id; give it one")
    if pc.any(empty := pc.equal(pc.utf8_trim_whitespace(ids), "")).as_py():
        raise UserError(f"{where}: the id of row {_first(empty)} is empty; give it one")
    if pc.count_distinct(ids).as_py() < len(ids):
        values, found = ids.value_counts().flatten()
        twice = values.filter(pc.greater(found, 1))[0].as_py()
        raise UserError(f"{where}: id '{twice}' occurs twice; ids must be unique")


def _check_tasks(table: StoredTable, where: str) -> None:
    tasks = table.column("task")
    if tasks.null_count:
        raise UserError(f"{where}: row {_first(tasks.is_null())} has no task; give it one")
    for task in pc.unique(tasks).to_pylist():
        check_task(task, where)


def _check_positives(table: StoredTable, positives: pa.ListArray, rows: Ragged, where: str) -> None:
    if (lonely := np.flatnonzero(rows.counts == 0)).size:
        [query] = table.ids(lonely[:1])
        raise UserError(f"{where}, row {lonely[0]}: query '{query}' has no positive; add one or drop the row")
    if (unknown := np.flatnonzero(rows.values < 0)).size:
        row = int(rows.owners[unknown[0]])
        [query] = table.ids([row])
        document = pc.list_flatten(positives)[int(unknown[0])].as_py()
        raise UserError(
            f"{where}, row {row}: query '{query}' names the unknown document '{document}' as positive; "
            "add it to the documents or drop it"
        )


def _first(mask: pa.ChunkedArray) -> int:
    return int(pc.index(mask, True).as_py())
