"""One JSON line per request on stderr, and one per unforeseen error. Nothing that a client wrote is in them."""

from __future__ import annotations

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Any

logger = logging.getLogger("umarvel.access")
_STDERR = logging.StreamHandler()


def start_log() -> None:
    """Write to stderr, whatever the process does with other logs."""
    logger.addHandler(_STDERR)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def log(request_id: str | None, **fields: Any) -> None:
    """Write one line."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    logger.info(json.dumps({"time": now, "request_id": request_id, **fields}))


def location(error: BaseException) -> dict[str, Any]:
    """An exception's type and frames, without its message, which may quote the payload."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__name__,
        "traceback": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
