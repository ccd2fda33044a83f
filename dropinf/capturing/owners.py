"""Owners: which example each position of a tensor belongs to, as seen from the losses.

A position belongs to example b if its gradient comes from losses[b] alone. Owners are an integer
array with the tensor's dimensions, each of them 1 (the same for all of it) or of full size:

- b >= 0: of example b; with rows per token, b * T + t of token t of example b;
- NONE: it reaches no loss;
- -2 - b, with rows per token: of example b, of a token that is not known.

A string in place of an array names the function at which they were lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

NONE = -1

Array = np.ndarray
Owners = Array | str


def varying(owners: Array) -> tuple[int, ...]:
    """The dimensions along which owners differ."""
    return tuple(d for d, size in enumerate(owners.shape) if size > 1)


def compressed(owners: Array) -> Array:
    """The same with size 1 wherever all is one owner's."""
    for d in varying(owners):
        first = owners.take([0], d)
        if (owners == first).all():
            owners = first
    return owners


def coarse(owners: Array, T: int) -> Array:
    """Examples in place of tokens."""
    return compressed(np.where(owners >= 0, -2 - owners // T, owners))


def collapsed(owners: Array, dims: Sequence[int]) -> Array | None:
    """One owner for all along some dimensions, past what reaches no loss; None if they differ."""
    for d in dims:
        if not owners.shape[d]:
            owners = np.full([1 if k == d else n for k, n in enumerate(owners.shape)], NONE)
        elif owners.shape[d] > 1:
            none = owners == NONE
            most = np.where(none, np.iinfo(owners.dtype).min, owners).max(d, keepdims=True)
            if not ((owners == most) | none).all():
                return None
            owners = np.where(none.all(d, keepdims=True), NONE, most)
    return owners


def broadcast(owners: Array, shape: Sequence[int], name: str) -> Owners:
    """Of an operand of `shape` that was broadcast to what `owners` are of."""
    extra = owners.ndim - len(shape)
    if extra < 0:
        return name
    lead = tuple(range(extra))
    repeated = [d for d, size in enumerate(shape, extra) if size == 1]
    one = collapsed(owners, (*lead, *repeated))
    if one is None:
        return f"{name}, which several examples share"
    return one.reshape(one.shape[extra:])


def mixed(owners: Array, dims: Sequence[int], T: int | None, name: str) -> Owners:
    """Of what was mixed along some dimensions: one example's, or lost."""
    one = collapsed(owners, dims)
    if one is None and T is not None:
        one = collapsed(coarse(owners, T), dims)
    return f"{name}, which mixes examples" if one is None else one


def merged(one: Owners, other: Owners, T: int | None) -> Owners:
    """Of a tensor that is used twice."""
    if one is other or isinstance(one, str):
        return one
    if isinstance(other, str):
        return other
    if one.shape == other.shape and np.array_equal(one, other):
        return one
    a, b = np.broadcast_arrays(one, other)
    found = np.where(a == NONE, b, a)
    differ = (a != b) & (a != NONE) & (b != NONE)
    if differ.any() and T is not None:
        # A token that its example also reads as a whole is itself.
        example = [np.where(o >= 0, -2 - o // T, o) for o in (a, b)]
        differ &= (example[0] != example[1]) | ((a >= 0) & (b >= 0))
        found = np.where((a < NONE) & (b >= 0), b, found)
    return "a use by several examples" if differ.any() else found


def reshaped(owners: Array, old: Sequence[int], new: Sequence[int], T: int | None) -> Owners:
    """Of the tensor of shape `new` that was reshaped to `old`, which `owners` are of."""
    if tuple(old) == tuple(new):
        return owners
    if owners.size == 1:
        return owners.reshape((1,) * len(new))
    if math.prod(old) != math.prod(new) or 0 in old:
        return "a reshape"
    shape: list[int] = []  # of the owners: each group of dimensions with the same product
    sizes: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        first, start = i, j
        p = q = 1
        if i < len(old):
            p, i = old[i], i + 1
        if j < len(new):
            q, j = new[j], j + 1
        while p != q:
            if p < q:
                p, i = p * old[i], i + 1
            else:
                q, j = q * new[j], j + 1
        group = owners.shape[first:i]
        if all(size == 1 for size in group):
            sizes += [1] * (i - first)
            shape += [1] * (j - start)
        else:
            sizes += old[first:i]
            shape += new[start:j]
            if T is not None and len(group) > 1 and j - start == 1:
                owners = _tokens(owners, old, first, i, T)
    full = np.broadcast_to(owners, sizes).reshape(shape)
    return compressed(full)


def _tokens(owners: Array, old: Sequence[int], first: int, last: int, T: int) -> Array:
    """Positions [B, T] that are merged are tokens from there on."""
    rest = first + 1
    lengths = math.prod(old[rest:last])
    if lengths != T or varying(owners) != (first,) or not (owners < NONE).all():
        return owners
    step = np.arange(T).reshape([old[d] if rest <= d < last else 1 for d in range(len(old))])
    return (-2 - owners) * T + step


def read(
    pick: Callable[[Array], Array],
    owners: Array,
    shape: Sequence[int],
    dims: Sequence[int],
    name: str,
) -> Owners:
    """Of a tensor of which a function took positions along `dims`, which `owners` are of.

    `pick` does to an array of positions what the function did to the tensor.
    """
    sizes = {size for size in owners.shape if size > 1}
    grid_shape = [s if d in dims or s in sizes else 1 for d, s in enumerate(shape)]
    grid = np.arange(math.prod(grid_shape)).reshape(grid_shape)
    picked = pick(grid)
    try:
        here = np.broadcast_to(owners, np.broadcast_shapes(picked.shape, owners.shape))
        picked = np.broadcast_to(picked, here.shape)
    except ValueError:
        return name
    found = np.full(grid.size, NONE)
    real = here != NONE
    picked, here = picked[real], here[real]
    found[picked] = here
    if not np.array_equal(found[picked], here):
        return f"{name}, which several examples read"
    return compressed(found.reshape(grid_shape))


def parts(sizes: Sequence[int]) -> list[slice]:
    """Slices that follow each other."""
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
