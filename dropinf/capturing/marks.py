"""Marks: what is known of tensors while a model runs, forgotten as they are freed."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class Marks(Generic[Value]):
    """Tensor -> value, by identity. Tensors compare by value, so a plain dictionary will not do."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref, Value]] = {}

    def get(self, tensor: Tensor) -> Value | None:
        """The tensor's value, None if it has none."""
        known = self._known.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def set(self, tensor: Tensor, value: Value) -> None:
        """Mark the tensor for as long as it lives."""
        key, known = id(tensor), self._known

        def forget(reference: weakref.ref) -> None:
            if known.get(key, (None,))[0] is reference:  # its id may be another's by now
                del known[key]

        known[key] = (weakref.ref(tensor, forget), value)
