"""What a batch is made of: tensors and lists in tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor


def moved_to(device: torch.device, batch: Any) -> Any:
    """A batch with its tensors on a device; itself where they are there."""
    away: list[Tensor] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.device != device:
            away.append(leaf)
        return leaf

    def moved(leaf: Any) -> Any:
        return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    _mapped(batch, note)
    return _mapped(batch, moved) if away else batch


def one_example(batch: Any, b: int, B: int, batch_dim: int, inputs: int = 1) -> Any:
    """Example b of a batch, as a batch; None where there is nothing to cut.

    With more inputs than one, all first ones stand before all second ones.
    """
    places = places_of(batch, B, batch_dim)
    several = places_of(batch, inputs * B, batch_dim) if inputs > 1 else []
    if not places and not several:
        return None
    number = iter(range(1 << 62))

    def cut(leaf: Any) -> Any:
        if next(number) not in several or not isinstance(leaf, Tensor):
            return leaf
        return leaf.unflatten(0, (inputs, B))[:, b]

    return example_at(_mapped(batch, cut), b, places, batch_dim)


def places_of(batch: Any, B: int, batch_dim: int) -> list[int]:
    """Which leaves of a batch, in their order, hold B examples."""
    return [i for i, size in enumerate(_sizes(batch, batch_dim)) if size == B]


def size_at(batch: Any, places: Sequence[int], batch_dim: int) -> int | None:
    """How many examples these leaves hold, if they agree."""
    sizes = _sizes(batch, batch_dim)
    found = {sizes[i] if i < len(sizes) else None for i in places}
    return found.pop() if len(found) == 1 else None


def example_at(batch: Any, b: int, places: Sequence[int], batch_dim: int) -> Any:
    """Example b of these leaves of a batch, all else as it is."""
    number = iter(range(1 << 62))

    def cut(leaf: Any) -> Any:
        if next(number) not in places:
            return leaf
        if isinstance(leaf, Tensor):
            return leaf.narrow(batch_dim if leaf.dim() > batch_dim else 0, b, 1)
        return leaf[b : b + 1]

    return _mapped(batch, cut)


def _sizes(batch: Any, batch_dim: int) -> list[int | None]:
    sizes: list[int | None] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            dim = batch_dim if leaf.dim() > batch_dim else 0
            sizes.append(leaf.shape[dim] if leaf.dim() else None)
        else:
            sizes.append(len(leaf) if isinstance(leaf, (list, tuple)) else None)
        return leaf

    _mapped(batch, note)
    return sizes


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same structure with its leaves changed: tensors, lists of what is neither, all else."""
    if isinstance(value, Mapping):
        parts = {key: _mapped(v, change) for key, v in value.items()}
        if type(value) is dict:
            return parts
        if not isinstance(value, MutableMapping):
            return type(value)(parts)
        made = copy.copy(value)  # which keeps what else a class of its own knows
        for key, part in parts.items():
            made[key] = part
        return made
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(v, change) for v in value))
    if isinstance(value, (list, tuple)) and any(
        isinstance(v, (Tensor, Mapping, tuple, list)) for v in value
    ):
        return type(value)(_mapped(v, change) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in dataclasses.fields(value):  # some may be frozen, or not be of __init__
            part = _mapped(getattr(value, field.name), change)
            object.__setattr__(made, field.name, part)
        return made
    return change(value)
