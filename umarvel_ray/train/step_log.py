"""The step log: one JSON line per optimizer step; a resumed run replaces the lines from where it resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from umarvel_ray.runs import read_step_log


class StepLog:
    """JSON lines for the report, and the same numbers as TensorBoard scalars.

    Args:
        path: the JSONL file.
        start: the first step to be written; lines from this step on are removed first.
    """

    def __init__(self, path: Path, start: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_step_log(path) if line["step"] < start]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=start)

    def write(self, line: dict[str, Any]) -> None:
        """Append one step; `line` holds "step" and other numbers."""
        self._file.write(json.dumps(line) + "\n")
        for key, value in line.items():
            if key != "step":
                self._board.add_scalar(key, value, line["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()
