"""Sampled entries of gradients that are in buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter, methodcaller

import torch
from torch import Tensor

from dropinf.ops.checks import check_floating, check_same, checked_weights, output_of
from dropinf.ops.dispatch import add_op, kernel
from dropinf.ops.selftest import Case, Inputs

_dtype_of, _rows_of = attrgetter("dtype"), methodcaller("size", 0)


def gather_grads(
    grads: Sequence[Tensor | None],
    indices: Sequence[Tensor],
    *,
    weights: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sampled entries of L gradient buffers, or weighted sums of them, straight into a packed row.

    Equal to cat([g.flatten()[i] for g, i in zip(grads, indices)]) * weights, without the flattened
    copies and the L parts. With [r_l, s_l] indices the part of layer l is
    (g.flatten()[i] * w).sum(1), summed in that order, and nothing [r_l, s_l] is made.

        loss.backward()
        grads = [p.grad for p in model.parameters()]
        indices = [torch.arange(2) for _ in grads]  # the first two of each
        row = dropinf.ops.gather_grads(grads, indices)  # [R]

    Args:
        grads: L gradients of any shape and strides, dtypes may differ; None counts as zeros.
        indices: L tensors [r_l] or [r_l, s_l] int64, positions in the flattened gradient.
        weights: [N] float32 (or float64 if a gradient is float64), one for each of the N indices,
            layer after layer: cat([w.flatten() for w in ...]); None is ones. A weight of exactly 0
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
    if len(grads) != len(indices):
        raise ValueError(
            f"{op}: grads must be as long as indices, {len(indices)}, got {len(grads)}; "
            "None stands for a layer without"
        )
    given = indices[0] if indices else out
    device = torch.device("cpu") if given is None else given.device
    # Sets, and what kernels refuse is named after that: at 200 layers a look at each tensor in turn
    # costs more than the gathering.
    dtypes = set(map(_dtype_of, [g for g in grads if g is not None]))
    dims = set(map(Tensor.dim, indices))
    good = dims <= {1, 2} and all(dtype.is_floating_point for dtype in dtypes)
    if not good or device.type == "meta":  # where no kernel runs
        _check_gather(grads, indices, device)
    N = R = sum(map(Tensor.numel, indices))
    if 2 in dims:
        R = sum(map(_rows_of, indices))
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    weights = checked_weights(op, weights, (N,), widest, device)
    out = output_of(op, out, (R,), widest, device)
    try:
        call = kernel(op, backend, device, tuple(dtypes), out.dtype)
        call(list(grads), list(indices), weights, out)
    except (RuntimeError, ValueError, IndexError):
        _check_gather(grads, indices, device)
        raise
    return out


def _check_gather(
    grads: Sequence[Tensor | None], indices: Sequence[Tensor], device: torch.device
) -> None:
    """Name the tensor that gather_grads cannot take."""
    op = "gather_grads"
    for l, (grad, index) in enumerate(zip(grads, indices, strict=True)):
        check_same(op, f"indices[{l}]", index, torch.int64, device)
        if index.dim() not in (1, 2):
            raise ValueError(f"{op}: indices[{l}] must be [r] or [r, s], got {tuple(index.shape)}")
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
    R = sum(map(len, indices))
    yield (grads, indices, None), (new.out(R),)
    yield (grads, indices, new.weights(R)), (new.out(R),)
    indices[2:] = [new.indices(size, 17, 5, dtype=torch.int64) for size in sizes[2:]]
    N, R = sum(map(Tensor.numel, indices)), sum(map(len, indices))
    yield (grads, indices, None), (new.out(R),)
    yield (grads, indices, new.weights(N)), (new.out(R),)


add_op("gather_grads", ["cuda", "cpu"], _cases)
