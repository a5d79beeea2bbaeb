"""One owner of the GPUs at a time.

A recipe asks for the same GPUs several times: to embed, to rerank and to train. Actors hold theirs until they end, so
two owners at once would wait for each other forever on the cluster that the recipe asks for.
"""

from __future__ import annotations

from typing import Protocol


class Owner(Protocol):
    """What may hold GPUs: it gives them back in `stop` and takes them again on its next use."""

    def stop(self) -> None: ...


class Gpus:
    """The GPUs of a run.

    Ray returns a stopped actor's GPUs once its process has ended, shortly after `claim` returns; until then it holds
    back what asks for them.
    """

    def __init__(self) -> None:
        self._owner: Owner | None = None

    def claim(self, owner: Owner) -> None:
        """Make `owner` the only one that holds GPUs; the present owner, if it is another one, is stopped."""
        if self._owner is not owner:
            self.free()
            self._owner = owner

    def free(self) -> None:
        """Stop the present owner; call before training on GPUs, whose workers end with it."""
        if self._owner is not None:
            self._owner.stop()
            self._owner = None
