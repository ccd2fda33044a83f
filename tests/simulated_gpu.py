"""A device "gpu:0" on a machine without one: its tensors are computed on the CPU, and who mixes
them with those of the CPU gets CUDA's error.

What CUDA takes, this takes: numbers of no dimension, and indices on the CPU into what is there.
For a process of its own, since torch has one such device, and what asks torch for devices finds it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("gpu")
DEVICE = torch.device("gpu:0")

_aten = torch.ops.aten
_COPIES = (_aten.copy_.default, _aten._to_copy.default)
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


class There(Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, numbers: Tensor) -> There:
        return Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=DEVICE,
        )

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()


class SimulatedGpu(TorchDispatchMode):
    """While it is on, tensors can be made and moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    there = any(isinstance(t, There) for t in given)
    if there:
        _refuse_mixed(func, args, given)
    here = {key: value for key, value in kwargs.items() if key != "device"}
    to = kwargs.get("device")
    if to is not None:
        there = torch.device(to).type == DEVICE.type
        here["device"] = torch.device("cpu") if there else to
    result = func(*_numbers(args), **_numbers(here))
    if func is _aten._to_copy.default and to is not None:  # never the same memory
        result = result.clone() if result is _numbers(args[0]) else result
    if not there or func is _aten.copy_.default:
        return args[0] if func is _aten.copy_.default else result
    result = tree_map(lambda t: There(t) if isinstance(t, Tensor) else t, result)
    return return_and_correct_aliasing(func, args, {**kwargs, **here}, result)


def _numbers(value: Any) -> Any:
    return tree_map(lambda t: t.numbers if isinstance(t, There) else t, value)


def _refuse_mixed(func: Any, args: Any, given: list[Tensor]) -> None:
    if func in _COPIES:
        return
    if func in _INDEXING and isinstance(args[0], There):  # indices may be anywhere
        given = [t for t in (args[0], *args[2:3]) if isinstance(t, Tensor)]
    if any(t.dim() and not isinstance(t, There) for t in given):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE} and cpu! ({func})"
        )
