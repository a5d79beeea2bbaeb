"""A second type of device, for machines without a GPU: it computes on the CPU and refuses tensors that are there.

`with second_device():` makes `device="second"` usable. A tensor on it wraps one on the CPU, so that values are real and
whole steps run, `.item()` and collectives included. As on a GPU, an operation on tensors of both devices raises, except
copies, numbers (CPU tensors without dimensions), and a CPU tensor as an index.

It occupies PyTorch's slot for other people's devices, which libraries look at: use it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

SECOND = "second"
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default, aten.to.other}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}

_setup_privateuseone_for_python_backend(SECOND, _DummyBackendModule())


class SecondTensor(torch.Tensor):
    """A tensor on the second device; `inner` holds its values on the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Self:
        like = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        device = torch.device(SECOND, 0)
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **like, device=device)
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"SecondTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(operation, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[None]:
    """In this block, PyTorch has the device "second": in this thread and in those of thread pools."""
    submit = ThreadPoolExecutor.submit

    def submit_there(pool: ThreadPoolExecutor, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        def work_there() -> Any:
            with _Shortcuts(), _Operations():
                return work(*args, **kwargs)

        return submit(pool, work_there)

    ThreadPoolExecutor.submit = submit_there
    try:
        with _Shortcuts(), _Operations():
            yield
    finally:
        ThreadPoolExecutor.submit = submit


class _Operations(TorchDispatchMode):
    """Operations that no tensor of the second device takes part in, but that may make one."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(operation, args, kwargs or {})


class _Shortcuts(TorchFunctionMode):
    """What PyTorch does in C++ without asking the dispatcher."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") is not None and _is_second(kwargs["device"]):
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if args and isinstance(args[0], SecondTensor):
            if function is torch.Tensor.tolist:
                return args[0].inner.tolist()
            if function is torch.Tensor.__getitem__ and isinstance(args[1], list):
                return function(args[0], torch.tensor(args[1]).to(SECOND))
            if function is torch.Tensor.__setitem__ and isinstance(args[2], int | float):
                return function(*args[:2], torch.tensor(args[2], dtype=args[0].dtype).to(SECOND))
        return function(*args, **kwargs)


def _run(operation: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operation on the tensors inside, if it may see them together; its result is on the device it should be."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    inside = [tensor for tensor in tensors if isinstance(tensor, SecondTensor)]
    if inside and operation not in COPIES:
        _check(operation, args, tensors)
    target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    if operation in (aten.copy_.default, aten.to.other):
        is_second = isinstance(args[operation is aten.to.other], SecondTensor)
    else:
        is_second = bool(inside) if target is None else _is_second(target)
    result = operation(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    if not is_second:
        return result
    wrapped = tree_map(lambda value: SecondTensor(value) if isinstance(value, torch.Tensor) else value, result)
    if not inside or operation.namespace == "c10d":
        return wrapped
    return return_and_correct_aliasing(operation, args, kwargs, wrapped)


def _check(operation: Any, args: tuple, tensors: list[torch.Tensor]) -> None:
    strangers = [tensor for tensor in tensors if not isinstance(tensor, SecondTensor) and tensor.dim()]
    if operation in INDEXING and isinstance(args[0], SecondTensor):
        indices = {id(index) for index in args[1]}
        strangers = [tensor for tensor in strangers if id(tensor) not in indices]
    if strangers:
        raise RuntimeError(f"{operation}: expected all tensors on one device, found some on {SECOND} and some on cpu")


def _unwrap(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if _is_second(value) else value
    return value.inner if isinstance(value, SecondTensor) else value


def _is_second(device: torch.device | str) -> bool:
    return torch.device(device).type == SECOND
