"""Forms: one call of a torch function, as a linear form in its parameters.

The gradient of a parameter comes out of the call's input x and the gradient dy of its output as
`dW[b, o, i] = sum_t dy[b, t, o] * x[b, t, i]`, so that a sampled coordinate is one (o, i), which an
op computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dropinf import ops


@dataclass(frozen=True)
class Weight:
    """(o, i) of positions in a flattened weight [O, width], or where i comes first [I, width]."""

    width: int
    i_first: bool = False

    def __call__(self, at: Tensor) -> tuple[Tensor, Tensor]:
        row, column = at // self.width, at % self.width
        return (column, row) if self.i_first else (row, column)


@dataclass(frozen=True)
class Bias:
    """(o, i) of positions in a vector [O] that one input i, as of ones, goes to."""

    i: int

    def __call__(self, at: Tensor) -> tuple[Tensor, Tensor]:
        return at, torch.full_like(at, self.i)


@dataclass(frozen=True)
class Shift(Bias):
    """(o, i) of positions in a vector [i] whose sums an op numbers behind those of a scale."""

    def __call__(self, at: Tensor) -> tuple[Tensor, Tensor]:
        return at + self.i, at + self.i


@dataclass(frozen=True)
class Scale:
    """(o, i) of positions in a vector whose element k takes input k to output k."""

    def __call__(self, at: Tensor) -> tuple[Tensor, Tensor]:
        return at, at


@dataclass(frozen=True)
class ExpertWeight:
    """(o, i) of positions in a flattened weight [E, I, O], the o and i of each expert in turn."""

    I: int
    O: int

    def __call__(self, at: Tensor) -> tuple[Tensor, Tensor]:
        e = at // (self.I * self.O)
        return e * self.O + at % self.O, e * self.I + at // self.O % self.I


Coordinates = Weight | Bias | Scale | ExpertWeight


class RefusedError(Exception):
    """A call that cannot give exact rows; the message says why."""


@dataclass(frozen=True)
class Role:
    """One parameter of a call.

    Attributes:
        tensor: the parameter.
        coordinates: flattened positions -> (o, i).
        op: computes the entries: op(x, dy, o_idx, i_idx, weights=, out=, backend=).
    """

    tensor: Tensor
    coordinates: Coordinates
    op: Callable[..., Tensor]


@dataclass
class Form:
    """One call of a torch function, as a linear form in its parameters.

    Attributes:
        x: the input to save for the backward pass; None once autograd alone holds it.
        roles: its parameters.
        features: how many trailing dimensions of x, and of dy, are not positions; the op then takes
            [b, T, features]. None: the op takes x and dy as they are, the example first.
        prepare: makes of x and dy what the op takes.
        flat: x may come as [B * T, features], the positions of example 0 first.
        experts: the third dimension from the end, of experts, is one of features, for each of which
            x and dy have features of their own.
        native: what a node in C++ does in place of `prepare` and the op, by its name there, and its
            options; None if that takes Python.
    """

    x: Tensor | None
    roles: Sequence[Role]
    features: tuple[int, int] | None = (1, 1)
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda x, dy: (x, dy)
    flat: bool = True
    experts: bool = False
    native: tuple[str, dict[str, Any]] | None = None

    @property
    def num_lead(self) -> int:
        """Leading dimensions of x that are positions."""
        return 1 if self.features is None else self.x.dim() - self.features[0]


def outer(x: Tensor, dy: Tensor, o_idx: Tensor, i_idx: Tensor, **options: Any) -> Tensor:
    return ops.sampled_outer(x, dy, o_idx, i_idx, bias=True, **options)


def roles_of(op: Callable[..., Tensor], *roles: tuple[Tensor | None, Coordinates]) -> list[Role]:
    return [Role(tensor, at, op) for tensor, at in roles if tensor is not None]


OUTER: tuple[str, dict[str, Any]] = ("outer", {})  # of `affine` and `outer`


def affine(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return x.to(dy.dtype), dy  # autocast hands the function a wider x than it multiplies
