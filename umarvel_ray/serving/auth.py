"""API keys and their rate limit. Only hashes are stored, so no key appears in a log, a config or a memory dump."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from starlette.types import Scope

from umarvel_ray.errors import UserError

VARIABLE = "UMARVEL_API_KEYS"
OPEN_PATHS = ("/", "/health", "/favicon.ico")  # probes, and the page, which has no secrets and asks for a key itself
OPEN_FOLDER = "/static/"
MIN_KEY_LENGTH = 16  # characters; an unsalted hash protects only what cannot be guessed
LOOK_EVERY_S = 1.0  # at the file, for keys that were added or removed
_ENTRY = re.compile(  # keys are RFC 6750 Bearer tokens
    r"(?:([\w.-]{1,64}):)?(?:sha256:([0-9a-f]{64})|([\w.~+/=-]+))(?:\s+(read|write))?", re.ASCII
)

logger = logging.getLogger(__name__)


class Holder(NamedTuple):
    """Whom a key belongs to, and whether it may change the index."""

    name: str
    writes: bool = True


ANONYMOUS = Holder("anonymous")


@dataclass(frozen=True)
class Keys:
    """Who may use the service: sha256 of each key → its holder. Picklable. Without keys the service is open.

    Attributes:
        fixed: the keys of the environment.
        path: the file of the others.
    """

    holders: Mapping[bytes, Holder] = field(default_factory=dict, repr=False)
    fixed: Mapping[bytes, Holder] = field(default_factory=dict, repr=False)
    path: Path | None = None

    @classmethod
    def load(cls, path: str | Path | None = None, environment: Mapping[str, str] = os.environ) -> Keys:
        """Load keys from a file (one per line, `#` comments) and from `UMARVEL_API_KEYS` (comma-separated).

        Each entry is `key` or `name:key`, with `sha256:HEX` in place of a key that is not to be written down, and may
        end in ` read` if the key may not change the index. An unnamed key is named by the first digits of its hash.
        Logs a warning if others can read the file.

        Raises:
            UserError: the file cannot be read or holds no key, or a key is too short, malformed or repeated.
        """
        fixed = _holders(_entries(environment.get(VARIABLE, "").strip()), {})
        keys = cls(fixed, fixed, None if path is None else Path(path))
        if path is not None and len(found := keys.reloaded()) == len(fixed):
            raise UserError(f"{path}: no API key; write one per line, as `name:key`")
        return keys if path is None else found

    def reloaded(self) -> Keys:
        """The keys of the environment, and those that the file holds now. Raises: see `load`; a file may be empty."""
        if self.path is None:
            return self
        return replace(self, holders=_holders(_read(self.path), self.fixed))

    def __len__(self) -> int:
        return len(self.holders)

    @property
    def are_needed(self) -> bool:
        """Whether requests need a key; true of a file that has been emptied, which lets nobody in."""
        return bool(self.fixed) or self.path is not None

    def holder_of(self, authorization: str | None) -> Holder | None:
        """Whom the key in an `Authorization` header belongs to, or None if it is unknown.

        Every hash is compared, each in constant time, so response times reveal nothing about any key.
        """
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = [holder for known, holder in self.holders.items() if hmac.compare_digest(known, digest)]
        return found[0] if found and scheme.lower() == "bearer" else None


class CurrentKeys:
    """The keys as their file says now: a key that is added or removed counts about a second later.

    A file that cannot be used, in the middle of an edit for example, changes nothing and is logged.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys, self._looked, self._seen = keys, -LOOK_EVERY_S, self._stamp(keys.path)

    def at(self, now: float) -> Keys:
        """The keys at `now` (seconds of any monotonic clock)."""
        if self._keys.path is not None and now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            if (stamp := self._stamp(self._keys.path)) != self._seen:
                self._seen = stamp
                try:
                    self._keys = self._keys.reloaded()
                except UserError as error:
                    logger.error("%s; the keys stay as they were", error)
        return self._keys

    @staticmethod
    def _stamp(path: Path | None) -> tuple[int, ...] | None:
        try:
            found = path.stat() if path else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_ino, found.st_size) if found else None


class RateLimit:
    """A token bucket per name: bursts of up to a minute's requests, then one every 60 / `per_minute` seconds.

    The buckets are local to the process, so each ingress replica counts separately.
    """

    def __init__(self, per_minute: float) -> None:
        self._capacity = max(per_minute, 1.0)
        self._per_second = per_minute / 60
        self._buckets: dict[str, tuple[float, float]] = {}  # name → (tokens, time of the last update)

    def allow(self, name: str, now: float) -> float:
        """Take a token at time `now` (seconds of any monotonic clock). Returns 0, or the seconds to wait for one."""
        tokens, updated = self._buckets.get(name, (self._capacity, now))
        tokens = min(tokens + (now - updated) * self._per_second, self._capacity)
        allowed = tokens >= 1
        self._buckets[name] = (tokens - allowed, now)
        return 0.0 if allowed else (1 - tokens) / self._per_second


def hashed(listed: str) -> str:
    """The value of `UMARVEL_API_KEYS` with the hash of each key in its place. Raises: see `Keys.load`."""
    return ",".join(
        f"{holder.name}:sha256:{digest.hex()} {'write' if holder.writes else 'read'}"
        for digest, holder in _holders(_entries(listed), {}).items()
    )


WRITING = ("/v1/index", "/v1/index/delete")


def changes_the_index(scope: Scope) -> bool:
    """Whether a request needs a key that may write."""
    return scope["method"] == "POST" and _path(scope).rstrip("/") in WRITING


def is_open(scope: Scope) -> bool:
    """Whether a request needs no key."""
    path = _path(scope)
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _entries(listed: str) -> list[tuple[str, str]]:
    """Where each key of the environment stands, and the key."""
    return [(f"{VARIABLE}, key {number}", key.strip()) for number, key in enumerate(listed.split(","), 1) if listed]


def _path(scope: Scope) -> str:
    return str(scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")))


def _read(path: Path) -> list[tuple[str, str]]:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: API keys cannot be read ({type(error).__name__}); give a text file") from None
    stripped = [(f"{path}, line {number}", line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    if mode & 0o077 and any(line and ":sha256:" not in f":{line}" for _, line in stripped):
        logger.warning("%s: these API keys are readable by others (mode %o); run: chmod 600 %s", path, mode, path)
    return [(where, line) for where, line in stripped if line]


def _holders(entries: Sequence[tuple[str, str]], others: Mapping[bytes, Holder]) -> dict[bytes, Holder]:
    """The holders of all keys, those of `others` among them."""
    holders = dict(others)
    for where, entry in entries:
        digest, holder = _parse(entry, where)
        if digest in holders or holder.name in {one.name for one in holders.values()}:
            raise UserError(f"{where}: the key or its name '{holder.name}' appears twice; use distinct keys and names")
        holders[digest] = holder
    return holders


def _parse(entry: str, where: str) -> tuple[bytes, Holder]:
    # The messages never quote the entry: it is a key, or nearly one.
    match = _ENTRY.fullmatch(entry)
    if not match:
        raise UserError(
            f"{where}: not an API key; write `name:key`, a key of letters, digits and -._~+/=, and ` read` after it if "
            "it may not change the index"
        )
    name, hashed, key, right = match.groups()
    if key is not None and len(key) < MIN_KEY_LENGTH:
        raise UserError(f"{where}: the API key is shorter than {MIN_KEY_LENGTH} characters; try `openssl rand -hex 24`")
    digest = bytes.fromhex(hashed) if key is None else hashlib.sha256(key.encode()).digest()
    return digest, Holder(name or digest.hex()[:8], right != "read")
