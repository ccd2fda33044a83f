"""Whose the arguments of a function are, given whose its results are: rules for `alignment`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dropinf.capturing.owners import Array, Owners, broadcast, mixed, reshaped


@dataclass
class Call:
    """One function of the graph.

    Attributes:
        node: autograd's node of it.
        function: its name in the graph.
        shapes: of its arguments, None for those without a gradient.
        shape: of its first result.
        T: tokens that have rows, None where rows are the examples'.
        outs: the owners of each result, None where it reaches no loss; a rule is given the first
            that does.
        out_shapes: the shape of each result.
        memo: what reshapes of this walk gave, as layers have the same ones.
        log: (node, attribute, value) of all that rules read of nodes, beside shapes.
    """

    node: Any
    function: str
    shapes: Sequence[Sequence[int] | None]
    shape: Sequence[int]
    T: int | None
    outs: Sequence[Owners | None]
    out_shapes: Sequence[Sequence[int]]
    memo: dict[tuple, Any]
    log: list[tuple[Any, str, Any]]

    def saved(self, name: str, default: Any = None) -> Any:
        """What the node keeps of its arguments."""
        return self._read(f"_saved_{name}", default)

    def noted(self, name: str, default: Any = None) -> Any:
        """What the mode noted of the call."""
        return self._read(name, default)

    def _read(self, name: str, default: Any) -> Any:
        value = read_of(self.node, name)
        self.log.append((self.node, name, value))
        return default if value is None else value

    def dims(self, name: str, rank: int) -> tuple[int, ...]:
        """Dimensions that the node keeps, counted from the front; none named are all."""
        kept = self.saved(name)
        if kept is None or kept == ():
            return tuple(range(rank))
        kept = kept if isinstance(kept, tuple) else (kept,)
        return tuple(dim_of(d, rank) for d in kept)


def signed(i: int) -> int:
    """A number that a node keeps, which has negative ones as unsigned."""
    return i - (1 << 64) if i >= 1 << 63 else i


def dim_of(d: int, rank: int) -> int:
    """A dimension counted from the front."""
    return signed(d) % max(rank, 1)


def read_of(node: Any, name: str) -> Any:
    """An attribute of a node of the graph, or a note of what a call did; None if it has none."""
    return getattr(node, name, None) if name.startswith("_saved_") else node.metadata.get(name)


Rule = Callable[[Call, Array], Sequence[Owners]]


def of_first(rule: Callable[[Call, Array], Owners]) -> Rule:
    """A rule of the first argument; others (weights, tables) would be shared."""

    def of_first(call: Call, out: Array) -> list[Owners]:
        shared = f"{call.function}, as what all examples share"
        first = "" if call.shapes[0] is None else rule(call, out)
        return [first, *(shared for _ in call.shapes[1:])]

    return of_first


def elementwise(call: Call, out: Array) -> list[Owners]:
    """Arguments that broadcast against each other."""
    same = call.shape
    return [
        "" if s is None else out if s == same else broadcast(out, s, call.function)
        for s in call.shapes
    ]


def reshape(call: Call, out: Array) -> list[Owners]:
    key = id(out), tuple(call.shape), tuple(call.shapes[0])
    if key not in call.memo:  # with `out`, so that its id stays its own
        call.memo[key] = out, reshaped(out, call.shape, call.shapes[0], call.T)
    return [call.memo[key][1]]


def permute(call: Call, out: Array) -> list[Owners]:
    dims = call.dims("dims", out.ndim)
    return [out.transpose(np.argsort(dims))]


def transpose(call: Call, out: Array) -> list[Owners]:
    if call.saved("dim0") is None:  # .t()
        return [out.T]
    return [out.swapaxes(*(dim_of(call.saved(d), out.ndim) for d in ("dim0", "dim1")))]


def reduce(call: Call, out: Array) -> list[Owners]:
    """A sum, a mean, a norm, a maximum over dimensions."""
    shape = call.shapes[0]
    if not call.shape:
        return [out.reshape((1,) * len(shape))]
    dims = call.dims("dim", len(shape))
    if len(call.shape) == len(shape):
        return [out]
    return [np.expand_dims(out, dims)]


def over(call: Call, out: Array) -> list[Owners]:
    """Softmax, cumulative sums, sorting, Fourier transforms, along some dimensions."""
    return [mixed(out, call.dims("dim", out.ndim), call.T, call.function) for _ in call.shapes]


def last(n: int) -> Rule:
    """What mixes its last n dimensions alone; the others are of every argument."""

    def of_last(call: Call, out: Array) -> list[Owners]:
        rank = out.ndim
        out = mixed(out, range(rank - n, rank), call.T, call.function)
        return [
            out
            if isinstance(out, str) or s is None
            else broadcast(out, (*s[: len(s) - n], *(1,) * n), call.function)
            for s in call.shapes
        ]

    return of_last


def layer_norm(call: Call, out: Array) -> Owners:
    n = len(call.saved("normalized_shape"))
    return mixed(out, range(out.ndim - n, out.ndim), call.T, call.function)


def first_dim(call: Call, out: Array) -> Owners:
    """Convolutions, pooling: whole examples along dimension 0, all else mixed."""
    out = mixed(out, range(1, out.ndim), call.T, call.function)
    if isinstance(out, str) or len(out) not in (1, call.shapes[0][0]):
        return out if isinstance(out, str) else call.function
    return out.reshape(-1, *(1,) * (len(call.shapes[0]) - 1))


def all_first_dim(call: Call, out: Array) -> list[Owners]:
    first = first_dim(call, out)
    fits = [
        s is not None and len(s) and (isinstance(first, str) or len(first) in (1, s[0]))
        for s in call.shapes
    ]
    return [
        first
        if isinstance(first, str)
        else first.reshape(-1, *(1,) * (len(s) - 1))
        if fit
        else call.function
        for s, fit in zip(call.shapes, fits, strict=True)
    ]


def batch_norm(call: Call, out: Array) -> Owners:
    training = call.saved("training", call.saved("train"))
    return f"{call.function} in train mode" if training else out


def product(added: int) -> Rule:
    """[n, I] @ [I, p], or of a batch of them; `added` is 1 where something is added to it first."""

    def of_product(call: Call, out: Array) -> list[Owners]:
        rank = out.ndim
        found = [mixed(out, (d,), call.T, call.function) for d in (rank - 1, rank - 2)]
        if added:
            found.insert(0, elementwise(call, out)[0])
        return found

    return of_product


def mv(call: Call, out: Array) -> list[Owners]:
    """[n, I] @ [I]."""
    return [out[:, None], mixed(out, (0,), call.T, call.function)]


def dot(call: Call, out: Array) -> list[Owners]:
    """[I] @ [I]."""
    return [out.reshape(1) for _ in call.shapes]


def addmv(call: Call, out: Array) -> list[Owners]:
    return [broadcast(out, call.shapes[0] or (1,), call.function), *mv(call, out)]


def pairs(call: Call, out: Array) -> list[Owners]:
    """Real and complex views of each other: a last dimension of two."""
    if len(call.shapes[0]) > out.ndim:
        return [out[..., None]]
    return [out[..., 0] if out.shape[-1] == 1 else call.function]


def nll(call: Call, out: Array) -> list[Owners]:
    """[B, C, ...] -> [B, ...], or all of it summed."""
    shape = call.shapes[0]
    if out.ndim == 0:
        return [out.reshape((1,) * len(shape))]
    return [out[None] if len(shape) == 1 else np.expand_dims(out, 1)]


def loss(call: Call, out: Array) -> list[Owners]:
    if out.ndim == 0:
        return [out.reshape((1,) * len(s)) if s is not None else "" for s in call.shapes]
    return elementwise(call, out)


def ctc(call: Call, out: Array) -> Owners:
    return out.reshape(1, -1, 1) if out.ndim else out.reshape(1, 1, 1)
