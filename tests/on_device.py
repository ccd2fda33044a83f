"""dropinf.ops for tests whose inputs and truths stay on the CPU, computed on another device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dropinf import ops
from dropinf.ops.bank_schedule import StagedOrder
from dropinf.ops.column_schedule import ColumnOrder


class OpsOn:
    """The ops, each of which moves its tensors to `device` and brings back what it wrote.

    Errors say that it was the CPU, as tests expect.
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Any:
        op = getattr(ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            moved = Moved(self.device)
            try:
                result = op(*moved.there(args), **moved.there(kwargs))
            except ValueError as error:
                raise ValueError(str(error).replace(self.device, "cpu")) from error
            return moved.back(result)

        return call if callable(op) else op


class Moved:
    """The tensors of one call.

    A tensor moves with all of its storage: its strides, the guards around a view and what two
    arguments share are on the device what they are on the CPU.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._bytes: dict[int, tuple[Tensor, Tensor]] = {}  # address -> here, there
        self._tensors: list[tuple[Tensor, Tensor]] = []  # here, there

    def there(self, value: Any) -> Any:
        """`value` with its tensors on the device."""
        if isinstance(value, StagedOrder | ColumnOrder):  # its passes stay on the CPU
            return type(value)(value.passes, *(self.there(part) for part in value[1:]))
        if not isinstance(value, Tensor):
            return _mapped(self.there, value)
        if value.device.type != "cpu":
            return value
        if value.layout != torch.strided:
            return value.to(self.device)
        storage = value.untyped_storage()
        if storage.data_ptr() not in self._bytes:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._bytes[storage.data_ptr()] = here, here.to(self.device, copy=True)
        there = _view(self._bytes[storage.data_ptr()][1], value)
        self._tensors.append((value, there))
        return there

    def back(self, result: Any) -> Any:
        """`result` on the CPU, after all storages: a tensor that was given is itself again."""
        for here, there in self._bytes.values():
            here.copy_(there)
        return self._here(result)

    def _here(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return _mapped(self._here, value)
        for here, there in self._tensors:
            if value is there:
                return here
        for here, there in self._bytes.values():
            if there.numel() and value.untyped_storage().data_ptr() == there.data_ptr():
                return _view(here, value)
        return value.cpu()


def _view(storage_bytes: Tensor, like: Tensor) -> Tensor:
    empty = torch.empty(0, dtype=like.dtype, device=storage_bytes.device)
    storage = storage_bytes.untyped_storage()
    view = empty.set_(storage, like.storage_offset(), like.shape, like.stride())
    return torch._neg_view(view) if like.is_neg() else view


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: change(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(change, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(change, value))
    return value
