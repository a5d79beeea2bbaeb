"""What goes wrong in a training step: found on every rank alike, told in one line, logged with the step's items.

A step that fails ends its worker group, which Ray Train starts again from the last checkpoint, `cluster.max_failures`
times. That mends a flipped bit or a lost machine. What fails every time ends the run with the last failure's line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from umarvel_ray.data.plan import PlanStep, read_plan
from umarvel_ray.model.batch import token_buckets
from umarvel_ray.runs import read_step_log
from umarvel_ray.train.phases import PhaseSpec


class StepError(RuntimeError):
    """A step that may be tried again. Its message is one line: job, step, what happened, what to do."""


def check_finite(name: str, plan: PlanStep, loss: float, grad_norm: float) -> None:
    """Both numbers are of the whole group, so all ranks raise or none does.

    Raises:
        StepError: one is NaN or infinite.
    """
    for what, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            shown = ", ".join(plan.query_ids[:3])
            raise StepError(
                f"{name}: {what} is {value} at step {plan.step} (queries {shown}, …); "
                f"lower learning_rate or check those rows"
            )


@contextmanager
def memory_watched(spec: PhaseSpec, step: int, rank: int, lengths: Sequence[int], packed: bool) -> Iterator[None]:
    """Turn an allocation that failed into a line that says what to lower.

    Args:
        lengths: tokens of each of this rank's items; packed: whether a chunk holds them without padding.

    Raises:
        StepError: this rank is out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        budget = spec.compute.token_budget
        chunks = [[lengths[index] for index in bucket] for bucket in token_buckets(lengths, budget, packed)]
        tokens = max(sum(chunk) if packed else len(chunk) * max(chunk) for chunk in chunks)
        how = "packed" if packed else "padded"
        raise StepError(
            f"{spec.name}: rank {rank} is out of memory at step {step}, with up to {tokens} {how} tokens in a chunk "
            f"and {max(lengths)} in an item; lower compute.token_budget ({budget}), or model.max_pixels where an item "
            f"is larger than that; compute.gradient_cache and compute.activation_checkpointing save memory too"
        ) from error


def out_of_memory(error: BaseException) -> bool:
    """True for Python's, CUDA's and the CPU allocator's way of saying it."""
    signs = ("out of memory", "DefaultCPUAllocator")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def describe(errors: Mapping[int, Exception]) -> str:
    """The line of a failed worker group that says most, from the exceptions by rank.

    A step's own line goes first; a rank that only noticed that another is gone speaks last.
    """
    for _, error in sorted(errors.items()):
        # Ray Train hands over the worker's exception as an argument of its own.
        for cause in (error, *error.args):
            if isinstance(cause, StepError):
                return str(cause)
    lines = {rank: [line.strip() for line in str(error).splitlines() if line.strip()] for rank, error in errors.items()}
    last = {rank: said[-1] if said else repr(errors[rank]) for rank, said in lines.items()}
    rank = min(last, key=lambda rank: ("Connection" in last[rank], rank))
    return f"rank {rank}: {last[rank]}"


def under_way(specs: Sequence[PhaseSpec]) -> PhaseSpec:
    """The first that is not done; the last one where only its last report was left."""
    return next((spec for spec in specs if not spec.done), specs[-1])


def record_failure(specs: Sequence[PhaseSpec], errors: Mapping[int, Exception]) -> None:
    """Append a failed worker group to the `failures.jsonl` of the job that was under way, with its step and items."""
    spec = under_way(specs)
    done = read_step_log(spec.log_path)
    number = done[-1]["step"] + 1 if done else 0
    plan = read_plan(spec.plan_path)
    items = plan[number] if number < len(plan) else None  # None: all steps were done, the checkpoint was not
    line = {
        "step": number,
        "ranks": sorted(errors),
        "error": describe(errors),
        "query_ids": items.query_ids if items else [],
        "document_ids": items.document_ids if items else [],
    }
    with spec.failures_path.open("a") as file:
        file.write(json.dumps(line) + "\n")
