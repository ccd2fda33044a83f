"""What a capture goes by when it chooses between ways that are all exact, and cost differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


class Constants:
    """The parameters and buffers of a model."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    @cached_property
    def memory(self) -> frozenset[int | None]:
        """Theirs, looked up when it is first asked for."""
        return frozenset(map(memory, self._tensors))


@dataclass(frozen=True)
class Hints:
    """What is known of one forward pass. Wrong answers cost time, not rows.

    Attributes:
        examples: how many the model was given, as far as its first argument shows; None: not known.
        batch_dim: where they are in data of two dimensions and more.
        per_token: rows are those of tokens.
        inputs: the memory of what the model was given.
        constants: its parameters and buffers.
        shared: functions and parameters whose results turned out to be shared by examples, so that
            they are left to autograd.
    """

    examples: int | None = None
    batch_dim: int = 0
    per_token: bool = False
    inputs: frozenset[int | None] = frozenset()
    constants: Constants | None = None
    shared: frozenset[tuple] = frozenset()

    def given(self, inputs: list[Tensor]) -> tuple[Hints, torch.Size | None]:
        """Those of a model that was called with `inputs`, and the shape of the first of them."""
        batch = next((t.shape for t in inputs if t.dim()), None)
        if batch is None:
            return self, None
        examples = batch[self.batch_dim if len(batch) > 1 else 0]
        return replace(self, examples=examples, inputs=frozenset(map(memory, inputs))), batch

    def holds_batch(self, t: Tensor) -> bool:
        """Whether data without a gradient look like the batch, by their first dimension."""
        if self.examples in (None, 1) or not t.dim() or t.requires_grad:
            return False
        dim = self.batch_dim if t.dim() > 1 else 0
        return t.shape[dim] == self.examples and self.plausible(t)

    def plausible(self, x: Tensor, flat: bool = True) -> bool:
        """Whether data without a gradient may hold the batch; `flat` if flattened as well."""
        mine = memory(x)
        if not x.dim() or (self.constants is not None and mine in self.constants.memory):
            return False
        if not flat and x.dim() == 1 and self.per_token:
            return mine in self.inputs  # and not the positions of a text
        if self.examples in (None, 1):
            return flat or x.dim() > 1 or self.examples == 1
        size = x.shape[self.batch_dim if x.dim() > 1 else 0]
        if size == self.examples or (mine in self.inputs and size != 1):
            return True
        return flat and (size != 1 or x.shape[0] != 1)


def memory(t: Tensor) -> int | None:
    """What tells a tensor's memory from others; None of one that has none of its own."""
    try:
        return t.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None
