"""Marks: what is known of tensors while a model runs, forgotten as they are freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")
Reference = Callable[[], Tensor | None]


class Marks(Generic[Value]):
    """Tensor -> value, by identity. Tensors compare by value, so a plain dictionary will not do.

    Attributes:
        known: id of each tensor that has one -> a reference to it, and the value.
    """

    def __init__(self, known: Mapping[int, tuple[Reference, Value]] | None = None) -> None:
        """From what is known elsewhere of tensors that outlive this."""
        self.known: dict[int, tuple[Reference, Value]] = dict(known or {})

    def get(self, tensor: Tensor) -> Value | None:
        """The tensor's value, None if it has none."""
        known = self.known.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def forget(self, tensor: Tensor) -> None:
        """Leave the tensor without a value."""
        self.known.pop(id(tensor), None)

    def set(self, tensor: Tensor, value: Value) -> None:
        """Mark the tensor for as long as it lives."""
        key, known = id(tensor), self.known

        def forget(reference: weakref.ref) -> None:
            if known.get(key, (None,))[0] is reference:  # its id may be another's by now
                del known[key]

        known[key] = (weakref.ref(tensor, forget), value)
