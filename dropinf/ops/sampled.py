"""The ops: check the arguments, pick the backend, call. Tensors in, tensors out.

No op has a derivative: while grad mode is on, as it is not in a backward pass, an input that
requires grad is refused with a ValueError.

An index out of range is an IndexError, and a sign that is not -1, 0 or 1 a ValueError. The kernels
of a GPU cannot raise without a wait: there the entry is NaN.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from dropinf.ops import reference
from dropinf.ops.bank_schedule import StagedOrder
from dropinf.ops.dispatch import kernel

# Bounds the temporaries of score_topk: this many scores at a time, or as many as it keeps.
_MAX_SCORES = 1 << 22

# The kernels keep k scores in registers; the reference takes any k.
_MERGE_MAX_K = 1024

_dtype_of, _device_of = attrgetter("dtype"), attrgetter("device")


def sampled_outer(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    *,
    sign: Tensor | None = None,
    bias: bool = False,
    scale: float = 1.0,
    order: StagedOrder | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sampled entries of each example's weight gradient.

    out[b, k] = scale * sum_t dy[b, t, o_idx[k]] * x[b, t, i_idx[k]]

    Equal to einsum("bto,bti->boi", dy, x)[:, o_idx, i_idx] * scale, without the [B, O, I] tensor.

    Args:
        x: [B, T, I] layer input, float32, bfloat16 or float16 (float64 on `reference`).
        dy: [B, T, O] gradient of the summed loss at the layer's output, dtype of x.
        o_idx, i_idx: [r] int32, fastest when sorted by (o, i); or [r, s] with `sign`.
        sign: [r, s] int8 of +1 and -1: entry k is the signed sum of its s coordinates. 0 leaves a
            coordinate out, for entries of fewer than s; its index must still be in range.
        bias: let i_idx = I name the layer's bias, a virtual input column of ones.
        scale: factor of every entry.
        order: of these coordinates, from `bank_schedule.staged_order`. Backends other than cuda
            ignore it; it changes rounding nowhere but on cuda.
        out: [B, r] floating point to write into; any strides, so a slice of a packed row will do.
        backend: a name from `dropinf.backends()`; None takes the first available.

    Returns:
        [B, r] float32 (float64 for float64 inputs): `out`, if it was given.

    Raises:
        ValueError: shapes, dtypes or devices disagree, a sign is none, or an input requires grad.
        IndexError: an index is out of range.
        BackendError: the named backend cannot take this call.
    """
    op = "sampled_outer"
    if x.dim() != 3:
        raise ValueError(f"{op}: x must be [B, T, I], got {tuple(x.shape)}")
    B, T = x.shape[:2]
    if dy.dim() != 3 or dy.shape[:2] != x.shape[:2]:
        raise ValueError(f"{op}: dy must be [B={B}, T={T}, O], got {tuple(dy.shape)}")
    _floating(op, "x", x)
    _same(op, "dy", dy, x.dtype, x.device)
    coordinates = 1 if sign is None else 2
    for name, index in (("o_idx", o_idx), ("i_idx", i_idx)):
        _same(op, name, index, torch.int32, x.device)
        if index.dim() != coordinates or index.shape != o_idx.shape:
            wanted = "[r] without sign" if sign is None else "[r, s] with sign"
            raise ValueError(
                f"{op}: o_idx and i_idx must both be {wanted}, "
                f"got {tuple(o_idx.shape)} and {tuple(i_idx.shape)}"
            )
    if sign is not None:
        _same(op, "sign", sign, torch.int8, x.device)
        if sign.shape != o_idx.shape:
            raise ValueError(
                f"{op}: sign must have o_idx's shape {tuple(o_idx.shape)}, got {tuple(sign.shape)}"
            )
        sign = sign.contiguous()
    if order is not None:
        _check_order(op, order, o_idx.shape[0], x)
    out = _output(op, out, (B, o_idx.shape[0]), x.dtype, x.device)
    call = kernel(op, backend, x.device, (x.dtype,), out.dtype)
    call(
        _unit_stride(x),
        _unit_stride(dy),
        o_idx.contiguous(),
        i_idx.contiguous(),
        sign,
        bias,
        scale,
        () if order is None else order[:3],
        out,
    )
    return out


def factored_outer(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor | None,
    i_idx: Tensor | None,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A grid of entries of each example's weight gradient, as one product of gathered columns.

    out[b, p * b' + q] = scale * sum_t dy[b, t, o_idx[p]] * x[b, t, i_idx[q]]

    Equal to (einsum("bto,bti->boi", dy, x) * scale)[:, o_idx][:, :, i_idx].flatten(1), without the
    [B, O, I] tensor. The columns are gathered by torch, and the product is its `bmm`.

    Args:
        x: [B, T, I] layer input, float32, bfloat16, float16 or float64.
        dy: [B, T, O] gradient of the summed loss at the layer's output, dtype of x.
        o_idx: [a] int64 columns of dy; None for all, which are then not copied (unless they are of
            half precision).
        i_idx: [b'] int64 columns of x, or None likewise.
        scale: factor of every entry.
        out: [B, a * b'] floating point to write into; any strides.
        backend: `reference`, or None.

    Returns:
        [B, a * b'] float32 (float64 for float64 inputs): `out`, if it was given.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an input requires grad.
        IndexError: an index is out of range.
        BackendError: the named backend cannot take this call.
    """
    op = "factored_outer"
    if x.dim() != 3:
        raise ValueError(f"{op}: x must be [B, T, I], got {tuple(x.shape)}")
    B, T = x.shape[:2]
    if dy.dim() != 3 or dy.shape[:2] != x.shape[:2]:
        raise ValueError(f"{op}: dy must be [B={B}, T={T}, O], got {tuple(dy.shape)}")
    _floating(op, "x", x)
    _same(op, "dy", dy, x.dtype, x.device)
    sides = []
    for name, index, columns in (("o_idx", o_idx, dy), ("i_idx", i_idx, x)):
        if index is None:
            sides.append(columns.shape[2])
            continue
        _same(op, name, index, torch.int64, x.device)
        if index.dim() != 1:
            raise ValueError(f"{op}: {name} must have one dimension, got {tuple(index.shape)}")
        sides.append(len(index))
    out = _output(op, out, (B, sides[0] * sides[1]), x.dtype, x.device)
    call = kernel(op, backend, x.device, (x.dtype,), out.dtype)
    call(x, dy, o_idx, i_idx, scale, out)
    return out


def sampled_embedding(
    ids: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sampled entries of each example's embedding gradient.

    out[b, k] = scale * sum over t with ids[b, t] == i_idx[k] of dy[b, t, o_idx[k]]

    Equal to sampled_outer(one_hot(ids), dy, o_idx, i_idx, scale=scale), without the one-hot
    tensor: a lookup is a linear layer without a bias whose input is one-hot.

    Args:
        ids: [B, T] int64 or int32 looked-up indices; a negative one contributes nothing.
        dy: [B, T, O] gradient of the summed loss at the lookup's output, O the embedding's width.
        o_idx: [r] int32 columns.
        i_idx: [r] int32 sorted rows of the embedding table, from 0; how many it has is not known
            here, so a row that no id names is 0 and no error.
        scale, out, backend: as in `sampled_outer`.

    Returns:
        [B, r] float32 (float64 for float64 inputs): `out`, if it was given.

    Raises:
        ValueError: shapes, dtypes or devices disagree, i_idx is not sorted, or an input requires
            grad.
        IndexError: an index is out of range.
        BackendError: the named backend cannot take this call.
    """
    op = "sampled_embedding"
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: ids must be [B, T] int64 or int32, got {_describe(ids)}")
    B, T = ids.shape
    if dy.dim() != 3 or dy.shape[:2] != ids.shape:
        raise ValueError(f"{op}: dy must be [B={B}, T={T}, O], got {tuple(dy.shape)}")
    _floating(op, "dy", dy)
    _same(op, "ids", ids, ids.dtype, dy.device)
    for name, index in (("o_idx", o_idx), ("i_idx", i_idx)):
        _same(op, name, index, torch.int32, dy.device)
        if index.dim() != 1 or index.shape != o_idx.shape:
            raise ValueError(
                f"{op}: o_idx and i_idx must both be [r], "
                f"got {tuple(o_idx.shape)} and {tuple(i_idx.shape)}"
            )
    out = _output(op, out, (B, o_idx.shape[0]), dy.dtype, dy.device)
    call = kernel(op, backend, dy.device, (dy.dtype,), out.dtype)
    call(
        ids.long().contiguous(),
        _unit_stride(dy),
        o_idx.contiguous(),
        i_idx.contiguous(),
        scale,
        out,
    )
    return out


def sampled_conv(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = False,
    scale: float = 1.0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sampled entries of each example's convolution-weight gradient.

    out[b, k] = scale * sum_p dy[b, o, p] * x[b, g * C / groups + c, p * stride + q * dilation
    - padding], where o = o_idx[k], g = o // (O / groups) is its group, (c, q) = unravel(i_idx[k])
    in (C / groups, *kernel_size), and x counts as zeros outside its sizes: times a dy that is not
    finite they are NaN.

    So o_idx * I + i_idx, with I = C / groups * prod(kernel_size), is the position in the flattened
    weight [O, C / groups, *kernel_size]. For a transposed convolution, whose weight is
    [C, O / groups, *kernel_size], exchange the two: its dy is `x` here and its x is `dy`.

    Args:
        x: [B, C, *S] layer input, 1 to 3 spatial dimensions, float32, bfloat16 or float16 (float64
            on `reference`).
        dy: [B, O, *S'] gradient of the summed loss at the layer's output, dtype of x.
        o_idx, i_idx: [r] int32, fastest when sorted by (o, i).
        kernel_size, stride, padding, dilation: one int for each spatial dimension. Padding is that
            of the low side; S' implies the high side's, and may be anything.
        groups: of the channels, as in torch.
        bias: let i_idx = I name the layer's bias, a virtual input of ones.
        scale, out, backend: as in `sampled_outer`.

    Returns:
        [B, r] float32 (float64 for float64 inputs): `out`, if it was given.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an input requires grad.
        IndexError: an index is out of range.
        BackendError: the named backend cannot take this call.
    """
    op = "sampled_conv"
    n = x.dim() - 2
    if not 1 <= n <= 3:
        raise ValueError(
            f"{op}: x must be [B, C, *S] with 1 to 3 spatial dimensions, got {tuple(x.shape)}"
        )
    B, C = x.shape[:2]
    if dy.dim() != x.dim() or dy.shape[0] != B:
        raise ValueError(
            f"{op}: dy must be [B={B}, O, *S'] with {n} spatial dimensions as x has, "
            f"got {tuple(dy.shape)}"
        )
    _floating(op, "x", x)
    _same(op, "dy", dy, x.dtype, x.device)
    for name, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        ints = isinstance(values, Sequence) and all(isinstance(v, int) for v in values)
        if not ints or len(values) != n or min(values) < least:
            raise ValueError(
                f"{op}: {name} must be {n} ints of at least {least}, one for each spatial "
                f"dimension, got {values}"
            )
    O = dy.shape[1]
    if groups < 1 or C % groups or O % groups:
        raise ValueError(f"{op}: groups must divide C={C} and O={O}, got {groups}")
    for name, index in (("o_idx", o_idx), ("i_idx", i_idx)):
        _same(op, name, index, torch.int32, x.device)
        if index.dim() != 1 or index.shape != o_idx.shape:
            raise ValueError(
                f"{op}: o_idx and i_idx must both be [r], "
                f"got {tuple(o_idx.shape)} and {tuple(i_idx.shape)}"
            )
    out = _output(op, out, (B, o_idx.shape[0]), x.dtype, x.device)
    call = kernel(op, backend, x.device, (x.dtype,), out.dtype)
    call(
        x,
        dy,
        o_idx.contiguous(),
        i_idx.contiguous(),
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        bias,
        scale,
        out,
    )
    return out


def gather_grads(
    grads: Sequence[Tensor | None],
    indices: Sequence[Tensor],
    *,
    signs: Sequence[Tensor | None] | None = None,
    scales: Sequence[float] | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sampled entries of L gradient buffers, or signed sums of them, straight into one packed row.

    Equal to cat([g.flatten()[i] * c for g, i, c in zip(grads, indices, scales)]), without the
    flattened copies and the L parts. With signs the part of layer l is
    (g.flatten()[i] * sign).sum(1) * c, summed in that order, and nothing [r_l, s_l] is made.

    Args:
        grads: L gradients of any shape and strides, dtypes may differ; None counts as zeros.
        indices: L tensors [r_l] int64, positions in the flattened gradient; [r_l, s_l] where the
            layer has signs.
        signs: L tensors [r_l, s_l] int8 of +1 and -1, or None for layers without: entry k is the
            signed sum of its s_l coordinates. 0 leaves a coordinate out, for entries of fewer than
            s_l; its index must still be in range. None is None for each.
        scales: L factors; None is 1 for each.
        out: [R] floating point to write into, R the sum of the r_l; any stride.
        backend: a name from `dropinf.backends()`; None takes the first available.

    Returns:
        [R] float32 (float64 if a gradient is float64): `out`, if it was given.

    Raises:
        ValueError: lengths, dtypes or devices disagree, a sign is none, or a gradient is sparse or
            requires grad.
        IndexError: an index is out of range.
        BackendError: the named backend cannot take this call.
    """
    op = "gather_grads"
    scales = [1.0] * len(indices) if scales is None else scales
    if not len(grads) == len(indices) == len(scales):
        raise ValueError(
            f"{op}: grads, indices and scales must be equally long, "
            f"got {len(grads)}, {len(indices)} and {len(scales)}"
        )
    if signs is not None and len(signs) != len(indices):
        raise ValueError(
            f"{op}: signs must be as long as indices, {len(indices)}, got {len(signs)}; "
            "None stands for a layer without"
        )
    device = indices[0].device if indices else torch.device("cpu")
    there = [g for g in grads if g is not None]
    # Sets first: at 200 layers a look at each tensor in turn costs more than the gathering.
    dtypes = set(map(_dtype_of, there))
    devices = {*map(_device_of, indices), *map(_device_of, there)}
    wrong = devices - {device} or set(map(_dtype_of, indices)) - {torch.int64}
    if wrong or not all(dtype.is_floating_point for dtype in dtypes):
        _check_gather(grads, indices, signs, device)
    if signs is None:
        R = sum(map(Tensor.numel, indices))
    else:
        if not all(map(_takes_signs, indices, signs)):
            _check_gather(grads, indices, signs, device)
        R = sum(map(len, indices))
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    out = _output(op, out, (R,), widest, device)
    call = kernel(op, backend, device, tuple(dtypes), out.dtype)
    try:
        call(list(grads), list(indices), list(signs or ()), list(scales), out)
    except (RuntimeError, ValueError, IndexError):
        _check_gather(grads, indices, signs, device)
        raise
    return out


class DampedCholesky(NamedTuple):
    """What `damped_cholesky` returns."""

    factors: Tensor  # [Σ r_l²]
    info: Tensor  # [L] int32
    solved: Tensor | None  # [m, R] if rows were given


def gram(
    rows: Tensor,
    offsets: Sequence[int] | Tensor,
    *,
    scale: float = 1.0,
    accumulate: bool = False,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Every layer's Gram matrix of packed rows, lower triangles only.

    F_l = scale * rows[:, offsets[l]:offsets[l + 1]].T @ rows[:, offsets[l]:offsets[l + 1]]

    Args:
        rows: [n, R] float32 or float64, stride 1 in R.
        offsets: [L + 1] rising column bounds of the layers; r_l is their difference.
        scale: factor of every entry.
        accumulate: add to `out`, so that a store can be streamed over in parts.
        out: [Σ r_l²] to write into.
        dtype: of the result and of its sums if there is no `out`; None is the rows' own. float64
            widens float32 rows before they are multiplied.
        backend: a name from `dropinf.backends()`; None takes the first available.

    Returns:
        [Σ r_l²], the r_l x r_l matrices one after the other, see `unpack`; zeros above the
        diagonals: `out`, if it was given.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an input requires grad.
        BackendError: the named backend cannot take this call.
    """
    op = "gram"
    offsets, num_packed, R = _offsets(op, offsets)
    _packed_rows(op, "rows", rows, R)
    if accumulate and out is None:
        raise ValueError(f"{op}: accumulate=True adds to out, which was not given")
    if out is None:
        dtype = rows.dtype if dtype is None else dtype
        out = torch.empty(num_packed, dtype=dtype, device=rows.device)
    _packed(op, "out", out, num_packed, out.dtype, rows.device)
    _writable(op, "out", out)
    call = kernel(op, backend, rows.device, (rows.dtype,), out.dtype)
    call(_unit_stride(rows), offsets, scale, accumulate, out)
    return out


def damped_cholesky(
    matrices: Tensor,
    offsets: Sequence[int] | Tensor,
    shift: float | Tensor = 0.0,
    *,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> DampedCholesky:
    """Cholesky factors of every layer's damped matrix, and solutions with them if asked for.

    L_l L_lᵀ = F_l + shift[l] · 1, with the shift added as the matrix is read.

    Args:
        matrices: [Σ r_l²] float32 or float64, one after the other as `gram` makes them; only the
            lower triangles are read.
        offsets: [L + 1] rising column bounds of the layers; r_l is their difference.
        shift: [L] in the matrices' dtype, or one for all layers: λ_l, absolute.
        rows: [m, R] right-hand sides to solve for at the same time, see `cholesky_solve`.
        out: [Σ r_l²] to write the factors into; may be `matrices`.
        backend: a name from `dropinf.backends()`; None takes the first available.

    Returns:
        factors [Σ r_l²] (zeros above the diagonals), info [L] int32, solved [m, R] or None.
        info[l] is 0, or the first pivot (counted from 1) that is not positive or NaN, as in LAPACK;
        factor and solutions of such a layer are NaN.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an input requires grad.
        BackendError: the named backend cannot take this call.
    """
    op = "damped_cholesky"
    offsets, num_packed, R = _offsets(op, offsets)
    dtype, device = matrices.dtype, matrices.device
    _packed(op, "matrices", matrices, num_packed, dtype, device)
    L = offsets.numel() - 1
    if not isinstance(shift, Tensor):
        shift = torch.full((L,), shift, dtype=dtype, device=device)
    _packed(op, "shift", shift, L, dtype, device)
    out = torch.empty_like(matrices) if out is None else out
    _packed(op, "out", out, num_packed, dtype, device)
    _writable(op, "out", out)
    solved = None
    if rows is not None:
        _packed_rows(op, "rows", rows, R)
        _same(op, "rows", rows, dtype, device)
        rows = _unit_stride(rows)
        solved = torch.empty(rows.shape, dtype=dtype, device=device)
    info = torch.empty(L, dtype=torch.int32, device=device)
    kernel(op, backend, device, (dtype,), dtype)(matrices, offsets, shift, rows, out, info, solved)
    return DampedCholesky(out, info, solved)


def cholesky_solve(
    factors: Tensor,
    offsets: Sequence[int] | Tensor,
    rows: Tensor,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Every layer's slice of the rows times the inverse of its factorised matrix.

    out[:, layer l] = rows[:, layer l] @ inverse(L_l L_lᵀ)

    Args:
        factors: [Σ r_l²] lower factors from `damped_cholesky`.
        offsets: [L + 1] rising column bounds of the layers; r_l is their difference.
        rows: [m, R] right-hand sides, dtype of the factors, stride 1 in R.
        out: [m, R] to write into, stride 1 in R; may be `rows`.
        backend: a name from `dropinf.backends()`; None takes the first available.

    Returns:
        [m, R]: `out`, if it was given.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an input requires grad.
        BackendError: the named backend cannot take this call.
    """
    op = "cholesky_solve"
    offsets, num_packed, R = _offsets(op, offsets)
    _packed(op, "factors", factors, num_packed, factors.dtype, factors.device)
    _packed_rows(op, "rows", rows, R)
    _same(op, "rows", rows, factors.dtype, factors.device)
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) if out is None else out
    _packed_rows(op, "out", out, R)
    _same(op, "out", out, rows.dtype, rows.device)
    _writable(op, "out", out)
    if out.shape != rows.shape or _unit_stride(out) is not out:
        raise ValueError(
            f"{op}: out must be {tuple(rows.shape)} with stride 1 in R, got {tuple(out.shape)} "
            f"with strides {out.stride()}"
        )
    call = kernel(op, backend, rows.device, (rows.dtype,), out.dtype)
    call(factors, offsets, _unit_stride(rows), out)
    return out


def score_topk(
    queries: Tensor,
    rows: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    first: int = 0,
    factors: Tensor | None = None,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge the scores of some rows into each query's largest k so far, in place.

    scores[q, i] = (queries[q] · rows[i]) * factors[i], of row number first + i

    Start with values of -inf and indices of -1, and call it for all parts of a store in any order:
    the result is that of one call. The scores are formed some rows at a time, never as [m, n].

    Args:
        queries: [m, R] float32 or float64.
        rows: [c, R], dtype of the queries.
        values: [m, k] largest scores so far, in descending order, dtype of the queries.
        indices: [m, k] int64 row numbers of the values; -1, with a value of -inf, where there is
            none yet.
        first: row number of rows[0].
        factors: [c], dtype of the queries; None is 1 for each.
        valid: [c] bool; rows with False never enter. None takes all.
        backend: a name from `dropinf.backends()`; None takes the first available.

    Returns:
        values and indices. NaN counts as largest, as in torch.topk; of equal scores the lower row
        number comes first; a score of -inf never enters.

    Raises:
        ValueError: shapes, dtypes or devices disagree, an input requires grad, or k is too large
            for the named backend.
        BackendError: the named backend cannot take this call.
    """
    op = "score_topk"
    if queries.dim() != 2 or queries.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op}: queries must be [m, R] float32 or float64, got {_describe(queries)}"
        )
    _no_grad(op, "queries", queries)
    (m, R), dtype, device = queries.shape, queries.dtype, queries.device
    _same(op, "rows", rows, dtype, device)
    if rows.dim() != 2 or rows.shape[1] != R:
        raise ValueError(f"{op}: rows must be [c, R={R}], got {tuple(rows.shape)}")
    _same(op, "values", values, dtype, device)
    _same(op, "indices", indices, torch.int64, device)
    if values.dim() != 2 or values.shape[0] != m or indices.shape != values.shape:
        raise ValueError(
            f"{op}: values and indices must both be [m={m}, k], "
            f"got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    for name, tensor in (("values", values), ("indices", indices)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name} is written in place and must be contiguous, "
                f"got strides {tensor.stride()}"
            )
        _writable(op, name, tensor)
    c, k = rows.shape[0], values.shape[1]
    for name, tensor, wanted in (("factors", factors, dtype), ("valid", valid, torch.bool)):
        if tensor is not None:
            _same(op, name, tensor, wanted, device)
            if tensor.shape != (c,):
                raise ValueError(f"{op}: {name} must be [c={c}], got {tuple(tensor.shape)}")
    if first < 0:
        raise ValueError(f"{op}: first must be at least 0, got {first}")
    if backend is None and k > _MERGE_MAX_K:
        backend = "reference"
    merge = kernel(op, backend, device, (dtype,), dtype)
    if m * k == 0:
        return values, indices
    step = max(k, _MAX_SCORES // m)
    for start in range(0, c, step):
        part = slice(start, start + step)
        scores = queries @ rows[part].T
        if factors is not None:
            scores *= factors[part]
        if valid is not None:
            scores.masked_fill_(~valid[part], -torch.inf)
        merge(scores, first + start, values, indices)
    return values, indices


def unpack(packed: Tensor, offsets: Sequence[int] | Tensor) -> list[Tensor]:
    """Views [r_l, r_l] of the matrices of a packed tensor [Σ r_l²], as `gram` makes it."""
    offsets, num_packed, _ = _offsets("unpack", offsets)
    _packed("unpack", "packed", packed, num_packed, packed.dtype, packed.device)
    return reference.unpack(packed, offsets)


def _offsets(op: str, offsets: Sequence[int] | Tensor) -> tuple[Tensor, int, int]:
    """The column bounds [L + 1] int64 on the CPU, Σ r_l², and R."""
    global _latest
    if offsets is _latest[0]:
        return _latest[1]
    if isinstance(offsets, Tensor):
        offsets = offsets.tolist()
    checked = _checked_offsets(op, tuple(offsets))
    if type(offsets) is tuple:  # cannot change
        _latest = (offsets, checked)
    return checked


# The last bounds by identity: hashing those of 200 layers takes 1 µs.
_latest: tuple[object, tuple[Tensor, int, int]] = (object(), (torch.empty(0), 0, 0))


# Of 200 layers, a tensor of the bounds costs more to make than all 8 x 8 factors.
@lru_cache(maxsize=64)
def _checked_offsets(op: str, offsets: tuple[int, ...]) -> tuple[Tensor, int, int]:
    sizes = [b - a for a, b in itertools.pairwise(offsets)]
    if not offsets or offsets[0] != 0 or any(r < 0 for r in sizes):
        raise ValueError(f"{op}: offsets must rise from 0, got {offsets}")
    return torch.tensor(offsets, dtype=torch.int64), sum(r * r for r in sizes), offsets[-1]


def _packed(
    op: str, name: str, tensor: Tensor, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    if dtype is not torch.float32 and dtype is not torch.float64:
        raise ValueError(f"{op}: {name} must be float32 or float64, got {dtype}")
    _same(op, name, tensor, dtype, device)
    if tensor.dim() != 1 or tensor.numel() != size or not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous [{size}], got {tuple(tensor.shape)}")


def _packed_rows(op: str, name: str, rows: Tensor, R: int) -> None:
    if rows.dim() != 2 or rows.shape[1] != R:
        raise ValueError(f"{op}: {name} must be [m, R={R}], got {tuple(rows.shape)}")
    if rows.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: {name} must be float32 or float64, got {rows.dtype}")
    _no_grad(op, name, rows)


def _takes_signs(index: Tensor, sign: Tensor | None) -> bool:
    if sign is None:
        return index.dim() == 1
    alike = sign.shape == index.shape and sign.device == index.device
    return alike and index.dim() == 2 and sign.dtype is torch.int8


def _check_gather(
    grads: Sequence[Tensor | None],
    indices: Sequence[Tensor],
    signs: Sequence[Tensor | None] | None,
    device: torch.device,
) -> None:
    """Name the tensor that gather_grads cannot take."""
    op = "gather_grads"
    all_signs = [None] * len(indices) if signs is None else signs
    for l, (grad, index, sign) in enumerate(zip(grads, indices, all_signs, strict=True)):
        _same(op, f"indices[{l}]", index, torch.int64, device)
        if index.dim() != (1 if sign is None else 2):
            wanted = "[r] without signs" if sign is None else "[r, s] with signs"
            raise ValueError(f"{op}: indices[{l}] must be {wanted}, got {tuple(index.shape)}")
        if sign is not None:
            _same(op, f"signs[{l}]", sign, torch.int8, device)
            if sign.shape != index.shape:
                raise ValueError(
                    f"{op}: signs[{l}] must have the shape {tuple(index.shape)} of its indices, "
                    f"got {tuple(sign.shape)}"
                )
        if grad is None:
            continue
        _floating(op, f"grads[{l}]", grad)
        _same(op, f"grads[{l}]", grad, grad.dtype, device)
        if grad.layout != torch.strided:
            raise ValueError(
                f"{op}: grads[{l}] is {grad.layout}; only dense gradients can be gathered, "
                "so build the embedding with sparse=False"
            )


def _check_order(op: str, order: StagedOrder, r: int, x: Tensor) -> None:
    wanted = (r, x.element_size(), x.device)
    given = (order.num_entries, order.element_size, order.packed.device)
    if given != wanted:
        described = ["{} entries of {}-byte elements on {}".format(*t) for t in (wanted, given)]
        raise ValueError(f"{op}: order must be for {described[0]}, got one for {described[1]}")


def _floating(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    _no_grad(op, name, tensor)


def _same(op: str, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.device != device:
        raise ValueError(f"{op}: {name} must be {dtype} on {device}, got {_describe(tensor)}")
    _no_grad(op, name, tensor)


def _no_grad(op: str, name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {name} requires grad, and the op has no derivative; call it under "
            f"torch.no_grad(), or give {name}.detach()"
        )


def _writable(op: str, name: str, out: Tensor) -> None:
    """A kernel writes to the memory of `out`, each entry on its own."""
    _no_grad(op, name, out)
    if torch.compiler.is_compiling():  # which knows no is_neg(), and writes to copies
        return
    if out.is_neg() or out._is_zerotensor() or _overlaps(out):
        raise ValueError(
            f"{op}: {name} must have memory of its own for each entry, got a view "
            f"{tuple(out.shape)} with strides {out.stride()} that is expanded, overlaps itself or "
            f"is negated; give torch.empty({tuple(out.shape)})"
        )


def _overlaps(out: Tensor) -> bool:
    """Whether two entries of a tensor of one or two dimensions are in one place."""
    if out.is_contiguous():
        return False
    (n, a), (m, b) = [(1, 0), *zip(out.shape, out.stride(), strict=True)][-2:]
    # The least i, j > 0 with i * a == j * b, where they are not both 0.
    step = math.gcd(a, b) or 1
    return (b // step < n and a // step < m) and n * m > 1


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def _output(
    op: str, out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if out is None:
        dtype = torch.promote_types(dtype, torch.float32)
        return torch.empty(shape, dtype=dtype, device=device)
    if out.shape != shape or out.device != device or not out.is_floating_point():
        raise ValueError(
            f"{op}: out must be floating point {shape} on {device}, got {_describe(out)}"
        )
    _writable(op, "out", out)
    return out


def _unit_stride(x: Tensor) -> Tensor:
    """x itself, or a copy where its last dimension is not contiguous (an expanded gradient)."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
