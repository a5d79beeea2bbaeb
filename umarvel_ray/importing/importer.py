"""`umarvel import`: read a source, split it by content, write a data folder with a recipe, and say what was done."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heappush, heapreplace
from pathlib import Path

import numpy as np

from umarvel_ray.errors import UserError
from umarvel_ray.files import atomic_folder
from umarvel_ray.importing.detect import detect
from umarvel_ray.importing.prepare import Prepared, Ready, prepared_ahead
from umarvel_ray.importing.read import read
from umarvel_ray.importing.recipe_file import Size, on_gpus, recipe_tree, size_of, write_recipe
from umarvel_ray.importing.record import Fault, Item, Picture, Place, Record, Row
from umarvel_ray.importing.split import SPLITS, TRAIN, VALIDATION, split_queries
from umarvel_ray.importing.store import Links, Store
from umarvel_ray.importing.tasks import MODALITIES, instructions_of, words_of
from umarvel_ray.importing.write import Pools, Quarantine, pools_of, task_name, write_tables
from umarvel_ray.items.item import readable

SHOWN = 10  # rows to look at
WIDTH = 56  # characters of a text that are shown


@dataclass
class Tally:
    """What became of the rows.

    Attributes:
        faults: how often each reason was given, for rows and for parts of rows.
        first: the first fault and where it was.
        looked_at: rows to look at as (rank, text, query); the same whatever the order of rows.
    """

    rows: int = 0
    kept: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    first: str = ""
    looked_at: list[tuple[int, str, int]] = field(default_factory=list)


def import_dataset(
    path: Path,
    to: Path,
    kind: str | None = None,
    instructions: Sequence[str] = (),
    holdout: str | None = None,
    seed: int = 42,
    caption: str | None = None,
) -> None:
    """Make a data folder of what a user has, and print what was done. The folder appears whole or not at all.

    Args:
        path: a folder or a file.
        to: the folder to create, which does not exist or is empty.
        kind: what the source is; None to find out.
        instructions: see `instructions_of`.
        holdout: see `held_out_count`.
        seed: of the draw of groups for validation and test.
        caption: the key of captions in a picture's JSON; None to find out.

    Raises:
        UserError: the source is nothing that is known, has no usable row or cannot be split; the folder is not empty or
            cannot be written.
    """
    to = to.absolute()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} exists and is not an empty folder; give --to another one")
    if to.is_relative_to(path.absolute()) and path.is_dir():
        raise UserError(f"{to} is inside {path}, which would then be imported too; give --to another folder")
    given = instructions_of(instructions)
    source = detect(path, kind, caption)
    print(f"kind: {source.kind}{f' ({source.use})' if source.use else ''}")
    for note in source.notes:
        print(note)
    name = re.sub(r"\W+", "-", to.name).strip("-") or "data"
    try:
        with _written(to) as folder:
            items = folder / ".items.arrow"
            tally = Tally()
            with Store(items, given) as store, Quarantine(folder) as quarantine:
                for row, record in prepared_ahead(read(source)):
                    _take(row, record, store, quarantine, tally)
                if not tally.rows:
                    raise UserError(f"{path}: no rows; add some")
                if not tally.kept:
                    raise UserError(f"{path}: none of {tally.rows:,} rows can be used; {tally.first}")
                links = store.links()
            with _told_of_faults(path, tally):
                query_split, item_split = split_queries(links, holdout, seed)
                size = _training_size(links, query_split)
                recipe = recipe_tree(name, to, size)
            pools = pools_of(links, query_split, item_split)
            write_tables(folder, items, links, query_split, item_split, pools, name)
            items.unlink()
            write_recipe(folder / "recipe.yaml", recipe)
    except BrokenPipeError:  # of the output, not of a file
        raise
    except OSError as error:
        raise UserError(f"{to}: cannot be written ({error.strerror or error}); give --to another folder") from None
    for line in [*_rows(tally, to), *_made(links, query_split, pools, name), *_look(tally, query_split)]:
        print(line)
    print("next:")
    for command in _next(name, to, size):
        print(f"  {command}")


@contextmanager
def _written(to: Path) -> Iterator[Path]:
    """An empty folder that becomes `to` when the block ends, and is removed if it fails."""
    with atomic_folder(to) as folder:
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _told_of_faults(path: Path, tally: Tally) -> Iterator[None]:
    """What is said of too few rows also says how many were set aside."""
    try:
        yield
    except UserError as error:
        aside = tally.rows - tally.kept
        lost = f" ({aside:,} of {tally.rows:,} rows were set aside, the first: {tally.first})" if aside else ""
        raise UserError(f"{path}: {error}{lost}") from None


def _take(row: Row, record: Prepared | Fault, store: Store, quarantine: Quarantine, tally: Tally) -> None:
    """Store a row, or set it or what is wrong with it aside."""
    place, found = row
    place = Place(readable(place.file), place.row, readable(place.id))
    tally.rows += 1
    queries, faults = ([], [record]) if isinstance(record, Fault) else store.add(record)
    tally.kept += bool(queries)
    for fault in faults:
        quarantine.add(place, fault)
        tally.faults[fault.reason] += 1
        tally.first = tally.first or readable(f"{place.file}, row {place.row}: {fault}")
    if queries and isinstance(found, Record) and isinstance(record, Prepared):
        sides = ((found.queries, record.queries), (found.positives, record.positives))
        labels = (
            _label(items[[isinstance(item, Ready) for item in ready].index(True)], place) for items, ready in sides
        )
        _show(" → ".join(labels), queries[0], tally)


def _show(line: str, query: int, tally: Tally) -> None:
    """Keep the row if its rank is among the lowest: a sample that does not depend on the order of rows."""
    rank = -int.from_bytes(hashlib.blake2b(line.encode("utf-8", "replace"), digest_size=8).digest(), "big")
    entry = (rank, line, query)
    if any(rank == shown for shown, _, _ in tally.looked_at):
        return
    if len(tally.looked_at) < SHOWN:
        heappush(tally.looked_at, entry)
    elif entry > tally.looked_at[0]:
        heapreplace(tally.looked_at, entry)


def _label(item: Item, place: Place) -> str:
    """An item in a few words."""
    words = " ".join(item.text.split())
    text = [f"“{words[:WIDTH]}{'…' if len(words) > WIDTH else ''}”"] if words else []
    names = [_name(picture, place) for picture in item.pictures]
    return " + ".join([*names, *text]) or "nothing"


def _name(picture: Picture, place: Place) -> str:
    if isinstance(picture, Path):
        return f"[{readable(picture.name)}]"
    return f"[picture of {place.id or f'{place.file}, row {place.row}'}]"


def _rows(tally: Tally, to: Path) -> Iterator[str]:
    aside = tally.rows - tally.kept
    yield f"rows: {tally.rows:,} read, {tally.kept:,} kept, {aside:,} set aside"
    for reason, count in tally.faults.most_common():
        yield f"  {count:,} × {reason}"
    if tally.faults:
        yield f"  what was set aside, rows or single items of them: {to / 'quarantine' / 'import.parquet'}"


def _made(links: Links, query_split: np.ndarray, pools: Pools, name: str) -> Iterator[str]:
    modalities = np.bincount(links.modality[np.unique(pools.item)], minlength=len(MODALITIES)).tolist()
    kinds = (
        f"{count:,} {kind.replace(',', ' + ')}" for kind, count in zip(MODALITIES, modalities, strict=True) if count
    )
    yield f"documents: {', '.join(kinds)}"
    for shape in np.unique(links.shape).tolist():
        counts = np.bincount(query_split[links.shape == shape], minlength=len(SPLITS)).tolist()
        split = ", ".join(f"{count:,} {word}" for count, word in zip(counts, SPLITS, strict=True))
        said = Counter(links.instruction[links.shape == shape].tolist()).most_common(1)[0][0]
        text = links.instructions[said]
        instruction = f": {text}" if text else ""
        yield f"queries of {task_name(name, shape)} ({words_of(shape)}{instruction}): {split}"


def _look(tally: Tally, query_split: np.ndarray) -> Iterator[str]:
    yield "rows to look at:"
    for _, line, query in sorted(tally.looked_at, reverse=True):
        yield f"  {SPLITS[query_split[query]]:<10}  {line}"


def _training_size(links: Links, query_split: np.ndarray) -> Size:
    training = query_split == TRAIN
    number = np.cumsum(training) - 1  # of each query among those of the split
    pairs = links.positives[training[links.positives[:, 0]]]
    positives = np.stack([number[pairs[:, 0]], pairs[:, 1]], axis=1)
    return size_of(links.shape[training], positives, links.shape[query_split == VALIDATION])


def _next(name: str, to: Path, size: Size) -> Iterator[str]:
    folder, run = _short(to), shlex.quote(f"runs/{name}")
    recipe = f"{shlex.quote(folder)}/recipe.yaml"
    yield f"umarvel train {recipe}     # the demo's tiny model on two CPU cores; report in {run}/report"
    yield f"umarvel search 'a few words' --run {run}"
    yield f"{on_gpus(name, folder, size)}     # on a GPU"


def _short(path: Path) -> str:
    """Relative to the working folder where it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
