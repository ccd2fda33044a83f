"""What is in a call of a torch function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
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


def argument(args: tuple, kwargs: dict, place: int, name: str, default: Any) -> Any:
    """One argument, given by its place or its name."""
    return args[place] if len(args) > place else kwargs.get(name, default)


def name_of(func: Callable) -> str:
    """The bare name of a function."""
    return getattr(func, "__name__", "")


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
