"""The samples of a tar file: members whose names begin alike, wherever in the file they stand."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

from umarvel_ray.errors import UserError
from umarvel_ray.importing.columns import PICTURE_SUFFIXES
from umarvel_ray.importing.record import Fault
from umarvel_ray.importing.tables import PEEKED

CAPTION_PARTS = ("txt", "caption", "text", "json")
CHUNK = 1 << 20

Parts = dict[str, bytes]  # of a sample, by what follows its name; empty where nothing is taken from it
Split = Callable[[str], tuple[str, str]]  # of a member's name without its folder: the sample's, and what follows it
Members = list[tuple[str, tarfile.TarInfo]]  # of a sample: what follows its name, and the member


def samples(file: Path) -> Iterator[tuple[str, Parts | Fault]]:
    """The samples in the order in which they begin.

    Members of one sample may stand apart, which a first pass over the names finds out. In a compressed file, where
    there is no way back, they may not. Samples of one name that are whole, each for itself, are not joined.

    Raises:
        tarfile.TarError, EOFError, OSError: the file is damaged, after the samples before that.
        UserError: it is compressed, and members of a sample stand apart.
    """
    split = _split_first if _is_split_first(file) else _split_last
    return _in_any_order(file, split) if _is_plain(file) else _in_order(file, split)


def is_picture(part: str) -> bool:
    """Whether a part of a sample is a picture, by its name."""
    return f".{part}" in PICTURE_SUFFIXES


def _in_any_order(file: Path, split: Split) -> Iterator[tuple[str, Parts | Fault]]:
    apart = _apart(file, split)
    with tarfile.open(file, "r:") as archive:
        for key, group in groupby(_members(archive, split), itemgetter(0)):
            members = [(part, member) for _, part, member in group]
            if key in apart:
                members, apart[key] = apart[key], []
            if members:
                yield key, _sample([(part, _content(archive, part, member)) for part, member in members])
        _require_end(archive)


def _apart(file: Path, split: Split) -> dict[str, Members]:
    """All members of each sample whose members stand apart; what is damaged is said when the samples are read."""
    whole: dict[str, bool] = {}
    apart: dict[str, Members] = {}
    with suppress(tarfile.TarError, EOFError), tarfile.open(file, "r:") as archive:
        for key, group in groupby(_members(archive, split), itemgetter(0)):
            if _stands_apart(key, [part for _, part, _ in group], whole):
                apart[key] = []
    if apart:
        with suppress(tarfile.TarError, EOFError), tarfile.open(file, "r:") as archive:
            for key, part, member in _members(archive, split):
                if key in apart:
                    apart[key].append((part, member))
    return apart


def _in_order(file: Path, split: Split) -> Iterator[tuple[str, Parts | Fault]]:
    whole: dict[str, bool] = {}
    with tarfile.open(file, "r|*") as archive:
        contents = ((key, part, _content(archive, part, member)) for key, part, member in _members(archive, split))
        for key, group in groupby(contents, itemgetter(0)):
            parts = [(part, content) for _, part, content in group]
            if _stands_apart(key, [part for part, _ in parts], whole):
                raise UserError(
                    f"{file}: the files of '{key}' are not next to each other; unpack it with gzip -d, or write it "
                    f"again with tar --sort=name"
                )
            yield key, _sample(parts)
        _require_end(archive)


def _stands_apart(key: str, parts: Collection[str], whole: dict[str, bool]) -> bool:
    """Whether these members belong to earlier ones of the same sample, since not all of them are whole samples.

    Args:
        whole: whether all members of each sample so far are; these are added.
    """
    earlier, is_whole = whole.get(key), _is_whole(parts)
    whole[key] = is_whole and earlier is not False
    return earlier is not None and not whole[key]


def _members(archive: tarfile.TarFile, split: Split) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """The files: the sample's name with its folder, what follows it, and the member."""
    while member := archive.next():
        archive.members = []  # type: ignore[attr-defined]  # it would keep them all
        folder, slash, name = member.name.rpartition("/")
        stem, part = split(name)
        if member.isfile() and stem:
            yield folder + slash + stem, part.lower(), member


def _require_end(archive: tarfile.TarFile) -> None:
    """After all files. Raises: tarfile.ReadError: others follow, after the end or after a damaged part."""
    while rest := archive.fileobj.read(CHUNK):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("more follows after its end, as if several were joined; import each of them")


def _content(archive: tarfile.TarFile, part: str, member: tarfile.TarInfo) -> bytes:
    """A member's bytes, if anything is taken from it."""
    content = archive.extractfile(member) if is_picture(part) or part in CAPTION_PARTS else None
    return content.read() if content else b""


def _sample(parts: list[tuple[str, bytes]]) -> Parts | Fault:
    names = [part for part, _ in parts]
    if twice := next((part for part in names if names.count(part) > 1), None):
        return Fault("two files of one name", f"part {twice}")
    return dict(parts)


def _is_whole(parts: Collection[str]) -> bool:
    """Whether there is a picture and its caption."""
    return any(map(is_picture, parts)) and any(part in CAPTION_PARTS for part in parts)


def _is_plain(file: Path) -> bool:
    """Whether a file is not compressed."""
    with suppress(tarfile.ReadError), tarfile.open(file, "r:"):
        return True
    return False


def _is_split_first(file: Path) -> bool:
    """Whether what follows the first dot of a name is a picture or a text, in one of the first members."""
    parts: list[str] = []
    with suppress(tarfile.TarError, EOFError), tarfile.open(file, "r|*") as archive:
        for member in islice(archive, PEEKED):
            if member.isfile():
                parts.append(member.name.rpartition("/")[2].partition(".")[2].lower())
    return not parts or any(part in CAPTION_PARTS or is_picture(part) for part in parts)


def _split_first(name: str) -> tuple[str, str]:
    stem, _, part = name.partition(".")
    return stem, part


def _split_last(name: str) -> tuple[str, str]:
    """Where no name is complete at its first dot, as in `photo.1.png`, it is at the last one."""
    stem, dot, part = name.rpartition(".")
    return (stem, part) if dot else (part, "")
