"""Checks of arguments that ops share; their errors are for people."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    check_no_grad(op, name, tensor)


def check_same(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.dtype != dtype or tensor.device != device:
        raise ValueError(f"{op}: {name} must be {dtype} on {device}, got {describe(tensor)}")
    check_no_grad(op, name, tensor)


def check_coordinates(
    op: str, o_idx: Tensor, i_idx: Tensor, device: torch.device, summed: bool = False
) -> None:
    """Both int32 [r], or where entries may be `summed` both [r, s]."""
    for name, index in (("o_idx", o_idx), ("i_idx", i_idx)):
        check_same(op, name, index, torch.int32, device)
        if not 1 <= index.dim() <= 1 + summed or index.shape != o_idx.shape:
            raise ValueError(
                f"{op}: o_idx and i_idx must both be {'[r] or both [r, s]' if summed else '[r]'}, "
                f"got {tuple(o_idx.shape)} and {tuple(i_idx.shape)}"
            )


def checked_weights(
    op: str,
    weights: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """The weights, contiguous: float32 of this shape, or float64 for inputs of that `dtype`."""
    if weights is None:
        return None
    wide = dtype == torch.float64 == weights.dtype
    check_same(op, "weights", weights, torch.float64 if wide else torch.float32, device)
    if weights.shape != shape:
        raise ValueError(f"{op}: weights must be {tuple(shape)}, got {tuple(weights.shape)}")
    return weights.contiguous()


def checked_offsets(op: str, offsets: Sequence[int] | Tensor) -> tuple[Tensor, int, int]:
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


def check_no_grad(op: str, name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {name} requires grad, and the op has no derivative; call it under "
            f"torch.no_grad(), or give {name}.detach()"
        )


def check_writable(op: str, name: str, out: Tensor) -> None:
    """A kernel writes to the memory of `out`, each entry on its own."""
    check_no_grad(op, name, out)
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


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def output_of(
    op: str, out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if out is None:
        dtype = torch.promote_types(dtype, torch.float32)
        return torch.empty(shape, dtype=dtype, device=device)
    if out.shape != shape or out.device != device or not out.is_floating_point():
        raise ValueError(
            f"{op}: out must be floating point {shape} on {device}, got {describe(out)}"
        )
    check_writable(op, "out", out)
    return out


def unit_stride(x: Tensor) -> Tensor:
    """x itself, or a copy where its last dimension is not contiguous (an expanded gradient)."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def check_activations(op: str, x: Tensor, dy: Tensor) -> None:
    """Raise unless x is [B, T, I] and dy [B, T, O], of one floating dtype and device."""
    if x.dim() != 3:
        raise ValueError(f"{op}: x must be [B, T, I], got {tuple(x.shape)}")
    B, T = x.shape[:2]
    if dy.dim() != 3 or dy.shape[:2] != x.shape[:2]:
        raise ValueError(f"{op}: dy must be [B={B}, T={T}, O], got {tuple(dy.shape)}")
    check_floating(op, "x", x)
    check_same(op, "dy", dy, x.dtype, x.device)
