"""The ops of solvers: a symmetric matrix for every layer, packed one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dropinf.ops import reference
from dropinf.ops.checks import (
    check_no_grad,
    check_same,
    check_writable,
    checked_offsets,
    unit_stride,
)
from dropinf.ops.dispatch import add_op, kernel
from dropinf.ops.selftest import Case, Inputs


class DampedCholesky(NamedTuple):
    """What `damped_cholesky` returns.

    `info` is 0 for each layer that has a factor.

        factors, info, solved = dropinf.ops.damped_cholesky(matrices, [0, 5, 12], 0.1, rows=rows)
    """

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

        matrices = dropinf.ops.gram(rows, [0, 5, 12])  # of two layers, packed

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
    offsets, num_packed, R = checked_offsets(op, offsets)
    _packed_rows(op, "rows", rows, R)
    if accumulate and out is None:
        raise ValueError(f"{op}: accumulate=True adds to out, which was not given")
    if out is None:
        dtype = rows.dtype if dtype is None else dtype
        out = torch.empty(num_packed, dtype=dtype, device=rows.device)
    _packed(op, "out", out, num_packed, out.dtype, rows.device)
    check_writable(op, "out", out)
    call = kernel(op, backend, rows.device, (rows.dtype,), out.dtype)
    call(unit_stride(rows), offsets, scale, accumulate, out)
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

        factors, info, _ = dropinf.ops.damped_cholesky(matrices, [0, 5, 12], 0.1)

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
    offsets, num_packed, R = checked_offsets(op, offsets)
    dtype, device = matrices.dtype, matrices.device
    _packed(op, "matrices", matrices, num_packed, dtype, device)
    L = offsets.numel() - 1
    if not isinstance(shift, Tensor):
        shift = torch.full((L,), shift, dtype=dtype, device=device)
    _packed(op, "shift", shift, L, dtype, device)
    out = torch.empty_like(matrices) if out is None else out
    _packed(op, "out", out, num_packed, dtype, device)
    check_writable(op, "out", out)
    solved = None
    if rows is not None:
        _packed_rows(op, "rows", rows, R)
        check_same(op, "rows", rows, dtype, device)
        rows = unit_stride(rows)
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

        solved = dropinf.ops.cholesky_solve(factors, [0, 5, 12], rows)  # [m, R]

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
    offsets, num_packed, R = checked_offsets(op, offsets)
    _packed(op, "factors", factors, num_packed, factors.dtype, factors.device)
    _packed_rows(op, "rows", rows, R)
    check_same(op, "rows", rows, factors.dtype, factors.device)
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) if out is None else out
    _packed_rows(op, "out", out, R)
    check_same(op, "out", out, rows.dtype, rows.device)
    check_writable(op, "out", out)
    if out.shape != rows.shape or unit_stride(out) is not out:
        raise ValueError(
            f"{op}: out must be {tuple(rows.shape)} with stride 1 in R, got {tuple(out.shape)} "
            f"with strides {out.stride()}"
        )
    call = kernel(op, backend, rows.device, (rows.dtype,), out.dtype)
    call(factors, offsets, unit_stride(rows), out)
    return out


def unpack(packed: Tensor, offsets: Sequence[int] | Tensor) -> list[Tensor]:
    """Views [r_l, r_l] of the matrices of a packed tensor [Σ r_l²], as `gram` makes it.

    They share memory with the packed tensor.

        first, second = dropinf.ops.unpack(matrices, [0, 5, 12])  # [5, 5] and [7, 7]
    """
    offsets, num_packed, _ = checked_offsets("unpack", offsets)
    _packed("unpack", "packed", packed, num_packed, packed.dtype, packed.device)
    return reference.unpack(packed, offsets)


def _packed(
    op: str, name: str, tensor: Tensor, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    if dtype is not torch.float32 and dtype is not torch.float64:
        raise ValueError(f"{op}: {name} must be float32 or float64, got {dtype}")
    check_same(op, name, tensor, dtype, device)
    if tensor.dim() != 1 or tensor.numel() != size or not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous [{size}], got {tuple(tensor.shape)}")


def _packed_rows(op: str, name: str, rows: Tensor, R: int) -> None:
    if rows.dim() != 2 or rows.shape[1] != R:
        raise ValueError(f"{op}: {name} must be [m, R={R}], got {tuple(rows.shape)}")
    if rows.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: {name} must be float32 or float64, got {rows.dtype}")
    check_no_grad(op, name, rows)


def _layers(*sizes: int) -> tuple[Tensor, int, int]:
    """Column bounds of layers, on the CPU; their last, and the packed matrices' size."""
    bounds = [0, *itertools.accumulate(sizes)]
    return torch.tensor(bounds), bounds[-1], sum(r * r for r in sizes)


_NARROW = (1, 33, 0, 70)
_WIDE = (40, 330, 385)  # wider than shared memory holds: a tile or a column left over


def _gram_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = Inputs(dtype, device)
    offsets, R, num_packed = _layers(*_NARROW)
    for n in (45, 600):  # within a chunk of rows, and more
        rows = new.numbers(n, R)
        yield (rows, offsets, 0.5, False), (new.out(num_packed),)
        yield (rows, offsets, 0.5, True), (new.out(num_packed),)


def _matrices(new: Inputs, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed matrices that are positive definite with a shift, and right-hand sides."""
    offsets, R, num_packed = _layers(*sizes)
    matrices = new.out(num_packed)
    half = Inputs(new.dtype, new.device).numbers(90, R)
    reference.gram(half, offsets, 1 / 64, False, matrices)
    shift = torch.ones(len(sizes), dtype=new.dtype, device=new.device)
    return matrices, offsets, shift, new.numbers(5, R)


def _factor_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = Inputs(dtype, device)
    for sizes in (_NARROW, _WIDE):
        matrices, offsets, shift, rows = _matrices(new, sizes)
        factors, info = new.out(len(matrices)), new.out(len(shift), dtype=torch.int32)
        yield (matrices, offsets, shift, rows), (factors, info, new.out(*rows.shape))
        failing = -100 * shift
        yield (matrices, offsets, failing, None), (new.out(len(matrices)), info.clone(), None)


def _solve_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = Inputs(dtype, device)
    for sizes in (_NARROW, _WIDE):
        matrices, offsets, shift, rows = _matrices(new, sizes)
        factors, info = new.out(len(matrices)), new.out(len(shift), dtype=torch.int32)
        reference.damped_cholesky(matrices, offsets, shift, None, factors, info, None)
        yield (factors, offsets, rows), (new.out(*rows.shape),)


add_op("gram", ["cuda", "triton", "cpu"], _gram_cases, dtypes=(torch.float32,))
add_op("damped_cholesky", ["cuda", "cpu"], _factor_cases, dtypes=(torch.float32,), tolerance=1e-5)
add_op("cholesky_solve", ["cuda", "cpu"], _solve_cases, dtypes=(torch.float32,), tolerance=1e-5)
