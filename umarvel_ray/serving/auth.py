"""API keys and their rate limit. Only hashes are kept: a key stands in no log, no config and no memory dump."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from umarvel_ray.errors import UserError

VARIABLE = "UMARVEL_API_KEYS"
ANONYMOUS = "anonymous"
LEAST_KEY = 16  # characters: an unsalted hash protects only what cannot be guessed
_WRITTEN = re.compile(r"(?:([\w.-]{1,64}):)?([\w.~+/=-]+)", re.ASCII)  # a key is what RFC 6750 allows as Bearer token

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keys:
    """Who may use the service: sha256 of each key → its name. Picklable; without keys the service is open."""

    names: Mapping[bytes, str] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, path: str | Path | None = None, environment: Mapping[str, str] = os.environ) -> Keys:
        """Keys of a file (one a line, `#` comments) and of `UMARVEL_API_KEYS` (commas between), each `key` or
        `name:key`. A key without a name is called by the beginning of its hash. Warns of a file others may read.

        Raises:
            UserError: the file cannot be read or holds no key; a key is short, malformed or there twice.
        """
        given = [] if path is None else _read(Path(path))
        if listed := environment.get(VARIABLE, "").strip():
            given += [(f"{VARIABLE}, key {number}", key.strip()) for number, key in enumerate(listed.split(","), 1)]
        names: dict[bytes, str] = {}
        for where, written in given:
            digest, name = _parse(written, where)
            if digest in names or name in names.values():
                raise UserError(f"{where}: the key or its name '{name}' is there twice; name each key apart")
            names[digest] = name
        return cls(names)

    def __len__(self) -> int:
        return len(self.names)

    def name_of(self, authorization: str | None) -> str | None:
        """The name of the key in an `Authorization` header, None if it is not one of ours.

        Every hash is compared, each in constant time, so an answer's time says nothing about any key.
        """
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = [name for known, name in self.names.items() if hmac.compare_digest(known, digest)]
        return found[0] if found and scheme.lower() == "bearer" else None


class RateLimit:
    """A token bucket per name: a minute's requests at once, then one every 60 / `per_minute` seconds.

    It lives in one process, so each replica of the ingress counts for itself.
    """

    def __init__(self, per_minute: float) -> None:
        self._most = max(per_minute, 1.0)
        self._per_second = per_minute / 60
        self._buckets: dict[str, tuple[float, float]] = {}  # name → tokens, when

    def allow(self, name: str, now: float) -> float:
        """Take a token at second `now` of any steady clock. Returns 0, or the seconds until there is one."""
        tokens, when = self._buckets.get(name, (self._most, now))
        tokens = min(tokens + (now - when) * self._per_second, self._most)
        allowed = tokens >= 1
        self._buckets[name] = (tokens - allowed, now)
        return 0.0 if allowed else (1 - tokens) / self._per_second


def _read(path: Path) -> list[tuple[str, str]]:
    try:
        if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            logger.warning("%s: others may read these API keys (mode %o); run: chmod 600 %s", path, mode, path)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: API keys cannot be read ({type(error).__name__}); give a text file") from None
    stripped = [(f"{path}, line {number}", line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    if not (given := [(where, line) for where, line in stripped if line]):
        raise UserError(f"{path}: no API key; write one a line, as `name:key`")
    return given


def _parse(written: str, where: str) -> tuple[bytes, str]:
    # No message shows what was written: it is a key, or close to one.
    match = _WRITTEN.fullmatch(written)
    if not match:
        raise UserError(f"{where}: not an API key; write `key` or `name:key`, a key of letters, digits and -._~+/=")
    name, key = match.groups()
    if len(key) < LEAST_KEY:
        raise UserError(f"{where}: the API key is shorter than {LEAST_KEY} characters; try `openssl rand -hex 24`")
    digest = hashlib.sha256(key.encode()).digest()
    return digest, name or digest.hex()[:8]
