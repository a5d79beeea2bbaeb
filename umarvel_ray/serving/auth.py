"""API keys and their rate limit. Only hashes are stored, so no key appears in a log, a config or a memory dump."""

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
MIN_KEY_LENGTH = 16  # characters; an unsalted hash protects only what cannot be guessed
_ENTRY = re.compile(r"(?:([\w.-]{1,64}):)?([\w.~+/=-]+)", re.ASCII)  # keys are RFC 6750 Bearer tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keys:
    """Who may use the service: sha256 of each key → its name. Picklable. Without keys the service is open."""

    names: Mapping[bytes, str] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, path: str | Path | None = None, environment: Mapping[str, str] = os.environ) -> Keys:
        """Load keys from a file (one per line, `#` comments) and from `UMARVEL_API_KEYS` (comma-separated).

        Each entry is `key` or `name:key`; an unnamed key is named by the first digits of its hash. Logs a warning if
        others can read the file.

        Raises:
            UserError: the file cannot be read or holds no key, or a key is too short, malformed or repeated.
        """
        entries = [] if path is None else _read(Path(path))
        if listed := environment.get(VARIABLE, "").strip():
            entries += [(f"{VARIABLE}, key {number}", key.strip()) for number, key in enumerate(listed.split(","), 1)]
        names: dict[bytes, str] = {}
        for where, entry in entries:
            digest, name = _parse(entry, where)
            if digest in names or name in names.values():
                raise UserError(f"{where}: the key or its name '{name}' appears twice; use distinct keys and names")
            names[digest] = name
        return cls(names)

    def __len__(self) -> int:
        return len(self.names)

    def name_of(self, authorization: str | None) -> str | None:
        """The name of the key in an `Authorization` header, or None if the key is unknown.

        Every hash is compared, each in constant time, so response times reveal nothing about any key.
        """
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = [name for known, name in self.names.items() if hmac.compare_digest(known, digest)]
        return found[0] if found and scheme.lower() == "bearer" else None


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


def _read(path: Path) -> list[tuple[str, str]]:
    try:
        if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            logger.warning("%s: these API keys are readable by others (mode %o); run: chmod 600 %s", path, mode, path)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: API keys cannot be read ({type(error).__name__}); give a text file") from None
    stripped = [(f"{path}, line {number}", line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    if not (entries := [(where, line) for where, line in stripped if line]):
        raise UserError(f"{path}: no API key; write one per line, as `name:key`")
    return entries


def _parse(entry: str, where: str) -> tuple[bytes, str]:
    # The messages never quote the entry: it is a key, or nearly one.
    match = _ENTRY.fullmatch(entry)
    if not match:
        raise UserError(f"{where}: not an API key; write `key` or `name:key`, a key of letters, digits and -._~+/=")
    name, key = match.groups()
    if len(key) < MIN_KEY_LENGTH:
        raise UserError(f"{where}: the API key is shorter than {MIN_KEY_LENGTH} characters; try `openssl rand -hex 24`")
    digest = hashlib.sha256(key.encode()).digest()
    return digest, name or digest.hex()[:8]
