"""A stand-in for a device on a CPU: counts what would make the host wait for a GPU.

Tensors that live on the device are `OnDevice`; whatever is computed from one is one too, and so is what is
made with `device=` theirs. Reading one on the host (`item`, `float`, `tolist`, `cpu`, `numpy`, a blocking
copy to the host, an operation whose result's shape depends on values) is noted with its line. What the C++
side of an operation does on a real GPU is not seen: tests/gpu/test_no_sync.py asks torch itself there.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HOST = torch.device("cpu")
DEVICE = torch.device("cpu", 0)  # unequal to HOST, and torch takes it for the same memory

READS = frozenset(
    {
        Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.is_nonzero, torch.is_nonzero,
        Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__, Tensor.__complex__,
        Tensor.__array__, Tensor.__contains__, Tensor.__format__, Tensor.__repr__,
        Tensor.equal, torch.equal, Tensor.allclose, torch.allclose, Tensor.nonzero, torch.nonzero,
        Tensor.masked_select, torch.masked_select, Tensor.unique, torch.unique,
    }
)  # fmt: skip


class Reads:
    """Where the host read, one line each; only while it is watching."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.is_watching = False

    def note(self, what: str) -> None:
        if self.is_watching:
            frames = [f for f in traceback.extract_stack()[:-2] if "/torch/" not in f.filename]
            frame = [f for f in frames if f.filename != __file__][-1]
            self.seen.append(f"{what} at {frame.filename}:{frame.lineno}: {frame.line}")


_reads = Reads()


class OnDevice(Tensor):
    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in READS or _is_copy_to_host(function, args, kwargs):
            _reads.note(getattr(function, "__name__", str(function)))
        found = super().__torch_function__(function, types, args, kwargs)
        if function == Tensor.grad.__get__ and found is not None:  # type: ignore[attr-defined]
            return found if isinstance(found, OnDevice) else found.as_subclass(OnDevice)
        return found

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """So that the way of a GPU is gone, with its events and pinned memory."""
        return True


def _is_copy_to_host(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if kwargs.get("non_blocking"):
        return False
    if function is Tensor.to:
        target = kwargs.get("device", args[1] if len(args) > 1 else None)
        # A tensor as target is asked for its own device: a plain one lives on the host.
        target = torch.device(target) if isinstance(target, str) else getattr(target, "device", target)
        return isinstance(args[0], OnDevice) and isinstance(target, torch.device) and target == HOST
    if function is Tensor.copy_:
        return isinstance(args[1], OnDevice) and not isinstance(args[0], OnDevice)
    return False


class _MadeThere(TorchFunctionMode):
    """What is made with the device's name lives there."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)  # which a machine without a GPU cannot do
        made = function(*args, **kwargs)
        is_there = kwargs.get("device") == DEVICE and isinstance(made, Tensor)
        return made.as_subclass(OnDevice) if is_there and not isinstance(made, OnDevice) else made


class CopyEvent:
    """For torch.cuda.Event: a copy has arrived when the next step is over; waiting for it is noted."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._asked = 0

    def record(self, *_: Any) -> None: ...

    def query(self) -> bool:
        self._asked += 1
        return self._asked > 1

    def synchronize(self) -> None:
        if self._asked < 2:
            _reads.note("Event.synchronize")


def put_on_device(model: nn.Module) -> None:
    """In place, names and order kept; before optimizers and groups are made."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            there = parameter.detach().clone().as_subclass(OnDevice)
            module._parameters[name] = moved.setdefault(id(parameter), nn.Parameter(there))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.as_subclass(OnDevice)


@contextmanager
def device_in_use() -> Iterator[Reads]:
    """Everything that works with such tensors goes in here; `is_watching` says from when reads are noted."""
    _reads.seen, _reads.is_watching = [], False
    try:
        with _MadeThere():
            yield _reads
    finally:
        _reads.is_watching = False
