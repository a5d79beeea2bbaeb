"""Failures of a training step: detected on all ranks, reported in one line, and logged with the step's items.

A failed step ends its worker group, which Ray Train restarts from the last checkpoint up to `cluster.max_failures`
times. This recovers from transient errors and lost machines; a step that fails every time ends the run with the last
failure's line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from umarvel_ray.data.plan import PlanStep, read_plan
from umarvel_ray.model.batch import token_buckets
from umarvel_ray.runs import read_step_log
from umarvel_ray.train.phases import FAILURES, PhaseSpec
from umarvel_ray.train.stream import PhaseTables

NOT_FINITE, OUT_OF_MEMORY, OTHER = KINDS = "not finite", "out of memory", "other"


class StepError(RuntimeError):
    """A step failed and may be retried. The message is one line: phase, step, what happened, what to do.

    Attributes:
        kind: one of KINDS.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message, kind)  # both, so that it can be pickled
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])


def check_finite(name: str, plan: PlanStep, tables: PhaseTables, loss: float, grad_norm: float) -> None:
    """Check a step's loss and gradient norm. Both are global, so either all ranks raise or none does.

    Args:
        tables: what the plan's row numbers refer to.

    Raises:
        StepError: one is NaN or infinite.
    """
    for quantity, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            first_queries = ", ".join(tables.queries.ids(plan.queries[:3]))
            raise StepError(
                f"{name}: {quantity} is {value} at step {plan.step} (queries {first_queries}, …); "
                f"lower learning_rate or check those rows",
                NOT_FINITE,
            )


@contextmanager
def explain_out_of_memory(
    spec: PhaseSpec, step: int, rank: int, lengths: Sequence[int], packed: bool
) -> Iterator[None]:
    """Turn a failed allocation into a line that names the settings to lower.

    Args:
        lengths: tokens of each of this rank's items.
        packed: whether chunks are packed.

    Raises:
        StepError: this rank is out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        budget = spec.compute.token_budget
        chunks = [[lengths[index] for index in bucket] for bucket in token_buckets(lengths, budget, packed)]
        tokens = max(sum(chunk) if packed else len(chunk) * max(chunk) for chunk in chunks)
        kind = "packed" if packed else "padded"
        raise StepError(
            f"{spec.name}: rank {rank} is out of memory at step {step}, with up to {tokens} {kind} tokens in a chunk "
            f"and {max(lengths)} in an item; lower compute.token_budget ({budget}), or model.max_pixels if an item "
            f"is larger than that; compute.gradient_cache and compute.activation_checkpointing also save memory",
            OUT_OF_MEMORY,
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, CUDA or torch's CPU allocator reports a failed allocation."""
    signs = ("out of memory", "DefaultCPUAllocator")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def describe(errors: Mapping[int, Exception]) -> str:
    """The most informative line of a failed worker group, from the exceptions by rank.

    A `StepError` takes precedence; ranks that only lost the connection to another one come last.
    """
    if found := _step_error(errors):
        return str(found)
    lines = {rank: [line.strip() for line in str(error).splitlines() if line.strip()] for rank, error in errors.items()}
    last_line = {rank: own[-1] if own else repr(errors[rank]) for rank, own in lines.items()}
    rank = min(last_line, key=lambda rank: ("Connection" in last_line[rank], rank))
    return f"rank {rank}: {last_line[rank]}"


def _step_error(errors: Mapping[int, Exception]) -> StepError | None:
    # Ray Train passes the worker's exception as an argument of its own exception.
    causes = (cause for _, error in sorted(errors.items()) for cause in (error, *error.args))
    return next((cause for cause in causes if isinstance(cause, StepError)), None)


def current_phase(specs: Sequence[PhaseSpec]) -> PhaseSpec:
    """The first phase that is not done, or the last one if all are done except for its final report."""
    return next((spec for spec in specs if not spec.done), specs[-1])


def record_failure(
    specs: Sequence[PhaseSpec], tables: Mapping[str, PhaseTables], errors: Mapping[int, Exception]
) -> None:
    """Append a failed worker group to the `failures.jsonl` of the current phase, with its step and items."""
    spec = current_phase(specs)
    done = read_step_log(spec.log_path)
    step = done[-1]["step"] + 1 if done else 0
    plan = read_plan(spec.plan_path, step)[:1]  # empty: only the checkpoint was left to write
    own = tables[spec.name]
    found = _step_error(errors)
    line = {
        "kind": found.kind if found else OTHER,
        "step": step,
        "ranks": sorted(errors),
        "error": describe(errors),
        "query_ids": [id_ for items in plan for id_ in own.queries.ids(items.queries)],
        "document_ids": [id_ for items in plan for id_ in own.documents.ids(items.documents)],
    }
    with spec.failures_path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def last_failure(folder: Path) -> dict[str, Any] | None:
    """The last line of a phase's `failures.jsonl`, in the folder of the phase; None if nothing has failed."""
    path = folder / FAILURES
    return json.loads(path.read_text().splitlines()[-1]) if path.exists() else None
