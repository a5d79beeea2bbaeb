"""Ray Data's execution callbacks, which are not public."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from ray.data import DataContext

from umarvel_ray.compat.private import private

_ray = partial(private, "ray", ">=2.55,<2.61")
ExecutionCallback: Any = _ray("ray.data._internal.execution.execution_callback", "ExecutionCallback")
_ray("ray.data", "DataContext.custom_execution_callback_classes")


class Pause(ExecutionCallback):
    """Sleeps in each iteration of Ray Data's scheduling loop.

    The loop runs in a thread of the trainer and spins under backpressure, so that the trainer's operations wait for
    the interpreter lock (without the sleep, training steps of the demo take three times as long).
    """

    def on_execution_step(self, executor: object) -> None:
        time.sleep(0.05)


def pause_scheduling(context: DataContext) -> None:
    """Add a `Pause` to the executions of a `DataContext`."""
    context.custom_execution_callback_classes = [Pause]
