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
    out = output_of(op, out, (R,), widest, device)
    call = kernel(op, backend, device, tuple(dtypes), out.dtype)
    try:
        call(list(grads), list(indices), list(signs or ()), list(scales), out)
    except (RuntimeError, ValueError, IndexError):
        _check_gather(grads, indices, signs, device)
        raise
    return out


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
        check_same(op, f"indices[{l}]", index, torch.int64, device)
        if index.dim() != (1 if sign is None else 2):
            wanted = "[r] without signs" if sign is None else "[r, s] with signs"
            raise ValueError(f"{op}: indices[{l}] must be {wanted}, got {tuple(index.shape)}")
        if sign is not None:
            check_same(op, f"signs[{l}]", sign, torch.int8, device)
            if sign.shape != index.shape:
                raise ValueError(
                    f"{op}: signs[{l}] must have the shape {tuple(index.shape)} of its indices, "
                    f"got {tuple(sign.shape)}"
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
    scales = [0.5, 1.0, 2.0, -1.0]
    yield (grads, indices, (), scales), (new.out(sum(map(len, indices))),)
    indices[2:] = [new.indices(size, 17, 5, dtype=torch.int64) for size in sizes[2:]]
    signs = [None, None, *(new.indices(3, 17, 5, dtype=torch.int8) - 1 for _ in range(2))]
    yield (grads, indices, signs, scales), (new.out(sum(map(len, indices))),)


add_op("gather_grads", ["cuda", "cpu"], _cases)
