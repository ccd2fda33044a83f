"""What is in a call of a torch function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_iter


def swap(values: Any, by_id: dict[int, Tensor]) -> Any:
    """Arguments with some tensors replaced."""
    if isinstance(values, Tensor):
        return by_id.get(id(values), values)
    if type(values) in (tuple, list):
        return type(values)([swap(v, by_id) for v in values])
    if type(values) is dict and values:
        return {key: swap(v, by_id) for key, v in values.items()}
    return values


# Functions that tell of a tensor, whatever its numbers are.
DESCRIBING: frozenset[Callable] = frozenset(
    [
        *(
            getattr(Tensor, name).__get__
            for name in (
                *("device", "dtype", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_nested"),
                *("is_quantized", "is_sparse", "layout", "ndim", "requires_grad", "shape"),
            )
        ),
        *(
            getattr(Tensor, name)
            for name in (
                *("size", "dim", "numel", "nelement", "stride", "element_size", "storage_offset"),
                *("is_floating_point", "is_complex", "is_contiguous", "get_device", "__len__"),
            )
        ),
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
    ]
)


@dataclass
class Meeting:
    """A call of a torch function that is given tracked parameters, or what was made of them.

    Attributes:
        func, args, kwargs: the call.
        tensors: among its arguments.
        sources: id of those that are made of parameters alone -> what they are made of.
        activations: those that carry another gradient.
        chosen, others: the tensors that are sources, and those that are not.
    """

    func: Callable
    args: tuple
    kwargs: dict
    tensors: list[Tensor]
    sources: dict[int, Any]

    def __post_init__(self) -> None:
        self.activations = [
            t for t in self.tensors if t.requires_grad and id(t) not in self.sources
        ]
        self.chosen = [t for t in self.tensors if id(t) in self.sources]
        self.others = [t for t in self.tensors if id(t) not in self.sources]

    def first_is_source(self) -> bool:
        """Whether the first argument is made of parameters alone."""
        return bool(self.args) and id(self.args[0]) in self.sources

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """One argument, given by its place or its name."""
        return argument(self.args, self.kwargs, place, name, default)

    def run(self, replaced: dict[int, Tensor] | None = None) -> Any:
        """Its result, some tensors replaced."""
        if not replaced:
            return self.func(*self.args, **self.kwargs)
        return self.func(*swap(self.args, replaced), **swap(self.kwargs, replaced))


def argument(args: tuple, kwargs: dict, place: int, name: str, default: Any) -> Any:
    """One argument, given by its place or its name."""
    return args[place] if len(args) > place else kwargs.get(name, default)


def name_of(func: Callable) -> str:
    """The bare name of a function."""
    return getattr(func, "__name__", "")


@lru_cache(maxsize=1024)
def named(func: Callable) -> str:
    """The name of a torch function, as torch.nn.functional.linear."""
    return resolve_name(func) or getattr(func, "__name__", repr(func))


def in_place(func: Callable) -> bool:
    """Whether a function changes its first argument."""
    name = name_of(func)
    operator = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    if name == "requires_grad_":
        return False
    return name == "__setitem__" or operator or (name.endswith("_") and name[-2:] != "__")


def tensors_of(args: Any, kwargs: dict) -> list[Tensor]:
    """The tensors among arguments, or in a tuple of results."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in tree_iter(value) if isinstance(v, Tensor)]
    return found
