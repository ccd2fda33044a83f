"""Rules of functions that take, put or move positions; see `owner_rules` for what a rule is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropinf.capturing.owner_rules import Call, dim_of, signed
from dropinf.capturing.owners import Array, Owners, broadcast, merged, mixed, parts, read

# In the metadata of a write into a part of a tensor: the index.
WRITTEN = "dropinf: written"
# In that of a cat: the shapes of its parts, of which some may have no gradient.
JOINED = "dropinf: joined"


def as_index(t: Tensor) -> Array:
    """A tensor of indices or a mask as numpy takes it, to which bytes are no mask."""
    return (t.bool() if t.dtype == torch.uint8 else t).cpu().numpy()


def cat(call: Call, out: Array) -> list[Owners]:
    d = dim_of(call.saved("dim"), out.ndim)
    if out.shape[d] == 1:
        return [out for _ in call.shapes]
    shapes = call.noted(JOINED, call.shapes)
    sizes = [None if s is None else s[d] if len(s) == out.ndim else 0 for s in shapes]
    rest = call.shape[d] - sum(size or 0 for size in sizes)
    if sizes.count(None) == 1:
        sizes = [rest if size is None else size for size in sizes]
    elif rest:
        return [f"{call.function} of parts whose length is not known" for _ in call.shapes]
    return [np.take(out, range(p.start, p.stop), d) for p in parts(sizes)]


def stack(call: Call, out: Array) -> list[Owners]:
    d = dim_of(call.saved("dim"), out.ndim)
    whole = out.shape[d] == 1
    return [np.take(out, 0 if whole else i, d) for i in range(len(call.shapes))]


def slice_of(call: Call, out: Array) -> Owners:
    d = dim_of(call.saved("dim"), out.ndim)
    if out.shape[d] == 1 and out.size > 1:
        return out
    start, end, step = (call.saved(n) for n in ("start", "end", "step"))
    at = tuple(slice(None) for _ in range(d))
    start, end = (None if i is None else signed(i) for i in (start, end))
    return read(
        lambda x: x[(*at, slice(start, end, step))], out, call.shapes[0], (d,), call.function
    )


def select(call: Call, out: Array) -> Owners:
    d = dim_of(call.saved("dim"), len(call.shapes[0]))
    return _one_of(call, out, dim_of(call.saved("index"), call.shapes[0][d]), d)


def index(call: Call, out: Array) -> Owners:
    """x[i, j, ...] with tensors among the indices."""
    indices = call.saved("indices")
    if indices is None:
        return call.function
    at, dims, d = [], [], 0
    for index in indices:
        if index is None:
            at.append(slice(None))
            d += 1
            continue
        at.append(as_index(index))
        n = index.dim() if index.dtype in (torch.bool, torch.uint8) else 1
        dims += range(d, d + n)
        d += n
    return read(lambda x: x[tuple(at)], out, call.shapes[0], dims, call.function)


def index_select(call: Call, out: Array) -> Owners:
    d = dim_of(call.saved("dim"), out.ndim)
    if out.shape[d] == 1 and out.size > 1:
        return out
    index = as_index(call.saved("index")).reshape(-1)
    return read(lambda x: x.take(index, d), out, call.shapes[0], (d,), call.function)


def gather(call: Call, out: Array) -> Owners:
    d = dim_of(call.saved("dim"), out.ndim)
    if out.shape[d] == 1 and out.size > 1 and whole_but(call.shape, call.shapes[0], d):
        return out
    index = as_index(call.saved("index"))
    shape = call.shapes[0]
    lead = tuple(slice(None) if k == d else slice(n) for k, n in enumerate(index.shape))
    return read(
        lambda x: np.take_along_axis(x[lead], index, d),
        out,
        shape,
        range(len(shape)),
        call.function,
    )


def whole_but(one: Sequence[int], other: Sequence[int], d: int) -> bool:
    return all(a == b or k == d for k, (a, b) in enumerate(zip(one, other, strict=True)))


def flip(call: Call, out: Array) -> Owners:
    if not call.saved("dims"):
        return out
    return np.flip(out, [d for d in call.dims("dims", out.ndim) if out.shape[d] > 1])


def roll(call: Call, out: Array) -> Owners:
    dims = call.saved("dims")
    if not dims:
        return mixed(out, range(out.ndim), call.T, call.function)
    back = [-signed(s) for s in call.saved("shifts")]
    return np.roll(out, back, [dim_of(d, out.ndim) for d in dims])


def repeat(call: Call, out: Array) -> Owners:
    repeats = call.saved("repeats")
    shape = (1,) * (len(repeats) - len(call.shapes[0])) + tuple(call.shapes[0])
    found = read(lambda x: np.tile(x, repeats), out, shape, range(len(shape)), call.function)
    return found if isinstance(found, str) else found.reshape(found.shape[-len(call.shapes[0]) :])


def pad(call: Call, out: Array) -> Owners:
    pad = [signed(p) for p in call.saved("pad")]
    for k in range(len(pad) // 2):
        d = out.ndim - 1 - k
        if out.shape[d] > 1:
            before, after = pad[2 * k : 2 * k + 2]
            if before < 0 or after < 0:
                return call.function
            out = np.take(out, range(before, out.shape[d] - after), d)
    return out


def written(call: Call, out: Array) -> list[Owners]:
    """index_add, scatter: of what is written into, and of what is written."""
    d = dim_of(call.saved("dim"), out.ndim)
    if len(call.shapes) < 2 or call.shapes[1] is None or out.shape[d] == 1:
        return [out for _ in call.shapes]
    index = as_index(call.saved("index"))
    if call.function.startswith("Scatter"):
        lead = tuple(slice(None) if k == d else slice(n) for k, n in enumerate(index.shape))
        return [out, np.take_along_axis(out[lead], index, d)]
    return [out, out.take(index.reshape(-1), d)]


def index_put(call: Call, out: Array) -> list[Owners]:
    indices = call.saved("indices")
    if indices is None:
        return [call.function for _ in call.shapes]
    at: list[Any] = [slice(None) if i is None else as_index(i) for i in indices]
    needed, d = list(out.shape), 0
    for index in indices:
        n = 1 if index is None or index.dtype not in (torch.bool, torch.uint8) else index.dim()
        if index is not None:
            needed[d : d + n] = call.shape[d : d + n]
        d += n
    source: Owners = np.broadcast_to(out, needed)[tuple(at)]
    if call.shapes[1] is not None:
        source = broadcast(source, call.shapes[1], call.function)
    return [out, source]


def masked_scatter(call: Call, out: Array) -> list[Owners]:
    """The source's elements go to the mask's places in turn."""
    mask = call.saved("mask")
    if mask is None or call.shapes[1] is None:
        return [out, call.function]
    mask = as_index(mask)
    full = np.broadcast_to(out, call.shape)[np.broadcast_to(mask, call.shape)]
    source = np.full(int(np.prod(call.shapes[1])), -1)
    source[: full.size] = full[: source.size]
    return [out, source.reshape(call.shapes[1])]


def diagonal(call: Call, out: Array) -> Owners:
    shape = call.shapes[0]
    d0, d1 = (dim_of(call.saved(n), len(shape)) for n in ("dim1", "dim2"))
    offset = signed(call.saved("offset"))
    return read(lambda x: np.diagonal(x, offset, d0, d1), out, shape, (d0, d1), call.function)


def unfold(call: Call, out: Array) -> Owners:
    d = dim_of(call.saved("dimension"), len(call.shapes[0]))
    size, step = call.saved("size"), call.saved("step")

    def windows(x: Array) -> Array:
        at = (slice(None),) * d + (slice(None, None, step),)
        return np.lib.stride_tricks.sliding_window_view(x, size, d)[at]

    return read(windows, out, call.shapes[0], (d,), call.function)


def copied(call: Call, out: Array) -> list[Owners]:
    """A write into a part of a tensor; the mode notes which."""
    index = call.noted(WRITTEN)
    if index is None:
        return [call.function for _ in call.shapes]
    found: list[Owners] = [out]
    part = np.broadcast_to(out, call.shape)[index]
    slim = part[tuple(slice(1) if s == 0 else slice(None) for s in part.strides)]
    found += ["" if s is None else broadcast(slim, s, call.function) for s in call.shapes[1:]]
    return found


def split(call: Call, out: Array) -> Owners:
    d = dim_of(call.saved("dim"), len(call.shapes[0]))

    def taken(part: slice) -> Callable[[Array], Array]:
        return lambda x: x[(slice(None),) * d + (part,)]

    found: Owners | None = None
    for part, out in zip(parts([s[d] for s in call.out_shapes]), call.outs, strict=True):
        if out is None:
            continue
        if not isinstance(out, str) and (out.size == 1 or out.shape[d] > 1):
            out = read(taken(part), out, call.shapes[0], (d,), call.function)
        found = out if found is None else merged(found, out, call.T)
    return call.function if found is None else found


def unbind(call: Call, out: Array) -> Owners:
    d = dim_of(call.saved("dim"), len(call.shapes[0]))
    found: Owners | None = None
    for i, out in enumerate(call.outs):
        if out is None:
            continue
        if not isinstance(out, str):
            out = _one_of(call, out, i, d)
        found = out if found is None else merged(found, out, call.T)
    return call.function if found is None else found


def _one_of(call: Call, out: Array, i: int, d: int) -> Owners:
    """Of a tensor of which index i along d was taken."""
    if out.size > 1 and call.T is None:
        return np.expand_dims(out, d)  # says more than is known, of what reaches no loss this way
    return read(
        lambda x: x.take([i], d)[(slice(None),) * d + (0,)],
        out,
        call.shapes[0],
        (d,),
        call.function,
    )
