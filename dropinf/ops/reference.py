"""What every op means, in plain torch: the specification, and the backend that runs anywhere.

Sums are float32, or float64 where the inputs are float64; weights are promoted. A weight of 0
leaves its coordinate out, also where that is not finite.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Bounds the temporaries of sampled_outer (two of this many elements), not its result.
_MAX_ELEMENTS = 1 << 22


def sampled_outer(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    weights: Tensor | None = None,
    bias: bool = False,
    order: Sequence[Tensor] = (),
    out: Tensor | None = None,
) -> Tensor:
    """out[b, k] = sum_j weights[k, j] * sum_t dy[b, t, o_idx[k, j]] * x[b, t, i_idx[k, j]].

    Indices and weights are [r, s], or [r], which is s = 1.
    """
    B, T, _ = x.shape
    if out is None:
        out = x.new_empty(B, o_idx.shape[0], dtype=_sum_dtype(x.dtype))
    if bias:
        x = F.pad(x, (0, 1), value=1.0)
    _check_range("sampled_outer: o_idx", o_idx, dy.shape[2])
    _check_range("sampled_outer: i_idx", i_idx, x.shape[2])
    step = max(1, _MAX_ELEMENTS // max(1, B * T * o_idx.shape[1:].numel()))
    for start in range(0, o_idx.shape[0], step):
        part = slice(start, start + step)
        terms = _columns(x, i_idx[part]) * _columns(dy, o_idx[part])  # [B, T, r] or [B, T, r, s]
        entries = _weighted(terms.sum(1), weights, part)
        out[:, part] = entries if entries.dim() == 2 else entries.sum(2)
    return out


def factored_outer(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor | None,
    i_idx: Tensor | None,
    weights: Tensor | None,
    out: Tensor,
) -> Tensor:
    """out[b, p n + q] = weights[p n + q] * sum_t dy[b, t, o_idx[p]] * x[b, t, i_idx[q]],

    n = len(i_idx). An index of None takes all columns, in place.
    """
    B, T = dy.shape[:2]
    dtype = _sum_dtype(x.dtype)
    num_columns = sum(
        t.shape[2] if index is None else len(index) for t, index in ((dy, o_idx), (x, i_idx))
    )
    any_zeros = weights is not None
    if any_zeros and _readable(weights):
        any_zeros = int(weights.count_nonzero()) < weights.numel()  # the cheapest test
    step = max(1, _MAX_ELEMENTS // max(1, T * num_columns))
    for start in range(0, B, step):
        part = slice(start, start + step)
        left, right = (
            (t[part] if index is None else t[part].index_select(2, index)).to(dtype)
            for t, index in ((dy, o_idx), (x, i_idx))
        )
        entries = torch.bmm(left.mT, right).flatten(1)
        if weights is None:
            out[part] = entries
            continue
        torch.mul(entries, weights, out=out[part])
        if any_zeros:
            out[part].masked_fill_(weights == 0, 0.0)
    return out


def sampled_embedding(
    ids: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    weights: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """out[b, k] = weights[k] * sum over t with ids[b, t] == i_idx[k] of dy[b, t, o_idx[k]].

    `i_idx` is sorted, so that the coordinates of one token are a range of k.
    """
    (B, T), r = ids.shape, o_idx.shape[0]
    if out is None:
        out = dy.new_empty(B, r, dtype=_sum_dtype(dy.dtype))
    _check_range("sampled_embedding: o_idx", o_idx, dy.shape[2])
    _check_range("sampled_embedding: i_idx", i_idx, 1 << 31)
    if _readable(i_idx) and (i_idx.diff() < 0).any():
        raise ValueError("sampled_embedding: i_idx must be sorted")
    token_ids, i_idx = ids.reshape(-1).long(), i_idx.long()
    first = torch.searchsorted(i_idx, token_ids)
    count = torch.searchsorted(i_idx, token_ids, right=True) - first
    position = torch.repeat_interleave(count)  # of every (position, coordinate) that meet
    nth = torch.arange(len(position), device=ids.device) - (count.cumsum(0) - count)[position]
    k = first[position] + nth
    terms = dy.flatten(0, 1)[position, o_idx[k]]
    # float64: torch adds float32 with atomics, in an order that differs from run to run.
    sums = torch.zeros(B * r, dtype=torch.float64, device=dy.device)
    sums.index_put_((position // max(T, 1) * r + k,), terms.double(), accumulate=True)
    return out.copy_(_weighted(sums.reshape(B, r).to(_sum_dtype(dy.dtype)), weights))


def sampled_conv(
    x: Tensor,
    dy: Tensor,
    o_idx: Tensor,
    i_idx: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = False,
    weights: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """out[b, k] = weights[k] * sum_p dy[b, o, p] * x[b, g * C / groups + c, p s + q d - padding],

    where o = o_idx[k], g is its group, (c, q) = unravel(i_idx[k]), and x is 0 outside its sizes.
    """
    B, C, *sizes = x.shape
    O, *sizes_out = dy.shape[1:]
    n, taps = len(sizes), math.prod(kernel_size)
    I = C // groups * taps
    if out is None:
        out = x.new_empty(B, o_idx.shape[0], dtype=_sum_dtype(x.dtype))
    _check_range("sampled_conv: o_idx", o_idx, O)
    _check_range("sampled_conv: i_idx", i_idx, I + bias)
    # index_select refuses what is out of range on a GPU too; x[...] would take negative indices.
    o_idx = torch.arange(O, device=x.device).index_select(0, o_idx)
    i_idx = torch.arange(I + bias, device=x.device).index_select(0, i_idx)
    channel = torch.where(i_idx < I, o_idx * groups // max(O, 1) * (C // groups) + i_idx // taps, C)
    pads: list[int] = []  # from the last dimension to the first
    positions: list[Tensor] = []  # [r, *sizes_out] in the padded x, broadcast
    for j in reversed(range(n)):
        reach = (sizes_out[j] - 1) * stride[j] + (kernel_size[j] - 1) * dilation[j] + 1
        pads += [padding[j], max(0, reach - padding[j] - sizes[j])]
        q, i_idx = i_idx % kernel_size[j], i_idx // kernel_size[j]
        p = torch.arange(sizes_out[j], device=x.device).reshape(-1, *[1] * (n - 1 - j))
        positions.insert(0, p * stride[j] + q.reshape(-1, *[1] * n) * dilation[j])
    x = F.pad(x, pads)
    if bias:
        x = F.pad(x, [0] * (2 * n + 1) + [1], value=1.0)  # channel C
    step = max(1, _MAX_ELEMENTS // max(1, B * math.prod(sizes_out)))
    for start in range(0, o_idx.shape[0], step):
        part = slice(start, start + step)
        where = (channel[part].reshape(-1, *[1] * n), *(p[part] for p in positions))
        dtype = _sum_dtype(x.dtype)
        terms = x[(slice(None), *where)].to(dtype) * dy.index_select(1, o_idx[part]).to(dtype)
        out[:, part] = _weighted(terms.flatten(2).sum(2), weights, part)
    return out


def sampled_norm(
    x: Tensor,
    dy: Tensor,
    index: Tensor,
    weights: Tensor | None,
    rms: bool,
    eps: float,
    out: Tensor,
) -> Tensor:
    """out[b, k] = sum_j weights[k, j] * sums[b, index[k, j]], index and weights [r, s] or [r].

    sums[b] is sum_t dy[b, t] * n[b, t], then sum_t dy[b, t], where n is x normalised.
    """
    (B, T, I), dtype = x.shape, _sum_dtype(x.dtype)
    _check_range("sampled_norm: index", index, 2 * I)
    normalise = F.rms_norm if rms else F.layer_norm
    step = max(1, _MAX_ELEMENTS // max(1, T * I))
    for start in range(0, B if index.numel() else 0, step):
        part = slice(start, start + step)
        wide = dy[part].to(dtype)
        products = wide * normalise(x[part].to(dtype), (I,), eps=eps)
        sums = torch.cat([products.sum(1), wide.sum(1)], 1)
        entries = sums.index_select(1, index.reshape(-1)).reshape(-1, *index.shape)
        entries = _weighted(entries, weights)
        out[part] = entries if entries.dim() == 2 else entries.sum(2)
    return out


def gather_grads(
    grads: Sequence[Tensor | None],
    indices: Sequence[Tensor],
    weights: Tensor | None,
    out: Tensor,
) -> Tensor:
    """out = cat of sum_j weights_l[k, j] * grads[l].flatten()[indices[l][k, j]], in order of j.

    Indices are [r_l, s_l], or [r_l], which is s_l = 1. A gradient of None is zeros. `weights` are
    the weights_l of those shapes, flattened, in one.
    """
    start = 0
    sizes = [index.numel() for index in indices]
    all_weights = [None] * len(sizes) if weights is None else weights.split(sizes)
    for grad, index, weight in zip(grads, indices, all_weights, strict=True):
        if index.dtype != torch.int64 or index.dim() not in (1, 2):
            raise ValueError("gather_grads: indices must be int64 [r] or [r, s]")
        if grad is not None and grad.requires_grad and torch.is_grad_enabled():
            raise ValueError("gather_grads: a gradient requires grad")
        entries = out[start : start + len(index)]
        if grad is None:
            entries.zero_()
        else:
            flat, dtype = grad.reshape(-1), _sum_dtype(grad.dtype)
            sums = grad.new_zeros(len(index), dtype=dtype)
            shape = len(index), index.shape[1:].numel()
            ones = [None] * shape[1]
            of_columns = ones if weight is None else weight.reshape(shape).unbind(1)
            for column, weight_j in zip(index.reshape(shape).unbind(1), of_columns, strict=True):
                sums += _weighted(flat.index_select(0, column).to(dtype), weight_j)
            entries.copy_(sums)
        start += len(index)
    return out


def gram(rows: Tensor, offsets: Tensor, scale: float, accumulate: bool, out: Tensor) -> Tensor:
    """out's matrix l (+)= scale * rows_lᵀ rows_l, lower triangle; zeros above, in out's dtype."""
    for matrix, block in zip(unpack(out, offsets), _slices(offsets), strict=True):
        if not accumulate:
            matrix.zero_()
        step = max(1, _MAX_ELEMENTS // max(1, matrix.shape[0]))
        for start in range(0, rows.shape[0], step):
            G = rows[start : start + step, block].to(out.dtype)
            matrix.add_((G.T @ G).tril_(), alpha=scale)
    return out


def damped_cholesky(
    matrices: Tensor,
    offsets: Tensor,
    shift: Tensor,
    rows: Tensor | None,
    out: Tensor,
    info: Tensor,
    solved: Tensor | None,
) -> Tensor:
    """out's L_l with L_l L_lᵀ = matrix l + shift[l], from its lower triangle; zeros above.

    info[l] is 0, or the first pivot (from 1) that is not positive: then L_l is NaN.
    """
    for l, (matrix, factor) in enumerate(
        zip(unpack(matrices, offsets), unpack(out, offsets), strict=True)
    ):
        damped = matrix.tril()
        damped.diagonal().add_(shift[l])
        lower, failed = torch.linalg.cholesky_ex(damped)
        # LAPACK stops at the first NaN pivot as at a negative one.
        factor.copy_(lower if not failed else lower.new_full((), math.nan))
        info[l] = failed
    if rows is not None:
        cholesky_solve(out, offsets, rows, solved)
    return out


def cholesky_solve(factors: Tensor, offsets: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """out[:, layer l] = rows[:, layer l] (L_l L_lᵀ)⁻¹."""
    for L, block in zip(unpack(factors, offsets), _slices(offsets), strict=True):
        out[:, block] = torch.cholesky_solve(rows[:, block].T, L).T
    return out


def row_products(
    queries: Tensor, rows: Tensor, scales: Tensor | None, offsets: Tensor | None, out: Tensor
) -> Tensor:
    """out[q, i] = Σ_l scales[i, l] * (queries[q, layer l] · rows[i, layer l]), in out's dtype."""
    if scales is None and rows.dtype == out.dtype:
        return torch.mm(queries, rows.T, out=out)
    step = max(1, _MAX_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        G = rows[part].to(out.dtype)
        if scales is not None:
            sizes = offsets.diff().to(scales.device)
            G = G * scales[part].repeat_interleave(sizes, 1, output_size=rows.shape[1])
        torch.mm(queries, G.T, out=out[:, part])
    return out


def score_topk(scores: Tensor, first: int, values: Tensor, indices: Tensor) -> None:
    """Merge scores [m, c] of rows first .. first + c - 1 into values and indices [m, k], in place.

    NaN counts as largest; of equal scores the lower index comes first; -inf never enters.
    """
    (c, k), floor = (scores.shape[1], values.shape[1]), values[:, -1:]
    if c >= k:
        floor = torch.maximum(floor, scores.topk(k).values[:, -1:])
    kept = torch.arange(c, device=scores.device)
    # Sorting everything would cost several times as much: only rows that some query may keep. How
    # many those are torch.compile could not know.
    if not torch.compiler.is_compiling():
        kept = kept[(~(scores < floor) & (scores != -math.inf)).any(0)]
    both = torch.cat([values, scores[:, kept]], 1)
    where = torch.cat([indices, (kept + first).expand(len(values), -1)], 1)
    where.masked_fill_(both == -math.inf, -1)
    where, by_index = where.sort(1)
    both, by_value = both.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    values.copy_(both[:, :k])
    indices.copy_(where.gather(1, by_value[:, :k]))


def unpack(packed: Tensor, offsets: Tensor) -> list[Tensor]:
    """Views [r_l, r_l] of matrices that lie one after the other, row-major."""
    sizes = offsets.diff().tolist()
    parts = packed.split([r * r for r in sizes])
    return [part.view(r, r) for part, r in zip(parts, sizes, strict=True)]


def _slices(offsets: Tensor) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(offsets.tolist())]


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _readable(tensor: Tensor) -> bool:
    """Whether its numbers are here, and at hand without a wait."""
    plain = type(tensor) is Tensor and not torch.compiler.is_compiling()
    return plain and tensor.device.type == "cpu"


def _check_range(name: str, index: Tensor, size: int) -> None:
    if _readable(index) and index.numel():
        least, largest = map(int, index.aminmax())
        if least < 0 or largest >= size:
            raise IndexError(f"{name} is out of range for {size}, got {least} to {largest}")


def _weighted(sums: Tensor, weights: Tensor | None, part: slice = slice(None)) -> Tensor:
    """sums * weights[part], and 0 where the weight is, whatever the sum."""
    if weights is None:
        return sums
    weights = weights[part]
    return (sums * weights).masked_fill_(weights == 0, 0.0)


def _columns(x: Tensor, index: Tensor) -> Tensor:
    picked = x.index_select(2, index.reshape(-1)).to(_sum_dtype(x.dtype))
    return picked.reshape(*x.shape[:2], *index.shape)
