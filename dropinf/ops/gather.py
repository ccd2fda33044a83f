"""Sampled entries of gradients that are in buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from dropinf.ops.checks import check_floating, check_same, output_of
from dropinf.ops.dispatch import add_op, kernel
from dropinf.ops.selftest import Case, Inputs

_dtype_of, _device_of = attrgetter("dtype"), attrgetter("device")
_kind_of = attrgetter("dtype", "device", "requires_grad")


def gather_grads(
    grads: Sequence[Tensor | None],
    indices: Sequence[Tensor],
    *,
    weights: Sequence[Tensor | None] | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sampled entries of L gradient buffers, or weighted sums of them, straight into a packed row.

    Equal to cat([g.flatten()[i] * w for g, i, w in zip(grads, indices, weights)]), without the
    flattened copies and the L parts. With [r_l, s_l] indices the part of layer l is
    (g.flatten()[i] * w).sum(1), summed in that order, and nothing [r_l, s_l] is made.

    Args:
        grads: L gradients of any shape and strides, dtypes may differ; None counts as zeros.
        indices: L tensors [r_l] or [r_l, s_l] int64, positions in the flattened gradient.
        weights: L tensors float32 of the shapes of the indices (or float64 where the gradient is
            float64), or None for a layer of ones; None is None for each. A weight of exactly 0
            leaves its coordinate out, also where that is not finite, as for entries of fewer than
            s_l; its index must still be in range.
        out: [R] floating point to write into, R the sum of the r_l; any stride.
        backend: a name from `dropinf.backends()`; None takes the first available.

    Returns:
        [R] float32 (float64 if a gradient is float64): `out`, if it was given.

    Raises:
        ValueError: lengths, dtypes or devices disagree, or a gradient is sparse or requires grad.
        IndexError: an index is out of range.
        BackendError: the named backend cannot take this call.
    """
    op = "gather_grads"
    for name, other in (("grads", grads), ("weights", indices if weights is None else weights)):
        if len(other) != len(indices):
            raise ValueError(
                f"{op}: {name} must be as long as indices, {len(indices)}, got {len(other)}; "
                "None stands for a layer without"
            )
    device = indices[0].device if indices else torch.device("cpu")
    there = [g for g in grads if g is not None]
    factors = [w for w in weights or () if w is not None]
    # Sets first: at 200 layers a look at each tensor in turn costs more than the gathering.
    dtypes = set(map(_dtype_of, there))
    devices = {*map(_device_of, indices), *map(_device_of, there)}
    wrong = devices - {device} or set(map(_dtype_of, indices)) - {torch.int64}
    wrong = wrong or set(map(_kind_of, factors)) - {(torch.float32, device, False)}
    if wrong or not all(dtype.is_floating_point for dtype in dtypes):
        _check_gather(grads, indices, weights, device)
    # len() takes 0.6 µs.
    R = sum(index.numel() if index.dim() == 1 else len(index) for index in indices)
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    out = output_of(op, out, (R,), widest, device)
    call = kernel(op, backend, device, tuple(dtypes), out.dtype)
    try:
        call(list(grads), list(indices), list(weights or ()), out)
    except (RuntimeError, ValueError, IndexError):
        _check_gather(grads, indices, weights, device)
        raise
    return out


def _check_gather(
    grads: Sequence[Tensor | None],
    indices: Sequence[Tensor],
    weights: Sequence[Tensor | None] | None,
    device: torch.device,
) -> None:
    """Name the tensor that gather_grads cannot take."""
    op = "gather_grads"
    all_weights = [None] * len(indices) if weights is None else weights
    for l, (grad, index, weight) in enumerate(zip(grads, indices, all_weights, strict=True)):
        check_same(op, f"indices[{l}]", index, torch.int64, device)
        if index.dim() not in (1, 2):
            raise ValueError(f"{op}: indices[{l}] must be [r] or [r, s], got {tuple(index.shape)}")
        if weight is not None:
            wide = grad is not None and grad.dtype == torch.float64 == weight.dtype
            wanted = torch.float64 if wide else torch.float32
            check_same(op, f"weights[{l}]", weight, wanted, device)
            if weight.shape != index.shape:
                raise ValueError(
                    f"{op}: weights[{l}] must have the shape {tuple(index.shape)} of its indices, "
                    f"got {tuple(weight.shape)}"
                )
        if grad is None:
            continue
        check_floating(op, f"grads[{l}]", grad)
        check_same(op, f"grads[{l}]", grad, grad.dtype, device)
        if grad.layout != torch.strided:
            raise ValueError(
                f"{op}: grads[{l}] is {grad.layout}; only dense gradients can be gathered, "
                "so build the embedding with sparse=False"
            )


def _cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = Inputs(dtype, device)
    grads = [new.numbers(13, 5), None, new.numbers(7, 3).T, new.numbers(300)]
    sizes = [65, 9, 21, 300]
    indices = [new.indices(size, size // 2, dtype=torch.int64) for size in sizes]
    weights = [None, None, *(new.weights(len(index)) for index in indices[2:])]
    R = sum(map(len, indices))
    yield (grads, indices, ()), (new.out(R),)
    yield (grads, indices, weights), (new.out(R),)
    indices[2:] = [new.indices(size, 17, 5, dtype=torch.int64) for size in sizes[2:]]
    R = sum(map(len, indices))
    weights[2:] = [new.weights(17, 5), None]
    yield (grads, indices, weights), (new.out(R),)


add_op("gather_grads", ["cuda", "cpu"], _cases)
