"""Small inputs that show whether a backend computes what `reference` says.

The truth is `reference` in float64 on the CPU. Inputs are multiples of 1/8 with few bits, so that
every product and sum is exact in float32 and each dtype, and the results must be equal; those of
the Cholesky ops must agree to 1e-5 of the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dropinf.ops import bank_schedule, reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mismatch(op: str, kernel: Callable, device: torch.device) -> str | None:
    """What `kernel` got wrong on `device`, or None.

    Args:
        op: name of the op.
        kernel: with the signature of its function in `reference`.
        device: where its tensors are.
    """
    make, dtypes, tolerance = _CASES[op]
    for dtype in dtypes:
        cases = zip(make(torch.float64, torch.device("cpu")), make(dtype, device), strict=True)
        for (args, exact), (args_here, outs) in cases:
            getattr(reference, op)(*args, *exact)
            kernel(*args_here, *outs)
            for truth, out in zip(exact, outs, strict=True):
                if truth is None:
                    continue
                truth, out = truth.double(), out.cpu().double()
                largest = truth.nan_to_num(0.0).abs().max().item()
                atol = tolerance * largest
                if not torch.isclose(out, truth, rtol=0, atol=atol, equal_nan=True).all():
                    error = (out - truth).abs().max().item()
                    return f"with {dtype}, off by {error:.3g} where the largest is {largest:.3g}"
    return None


Case = tuple[Sequence[Any], Sequence[Tensor | None]]  # arguments, and what to write into


class _Inputs:
    """Tensors that are the same numbers for every dtype and device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(1)

    def numbers(self, *shape: int) -> Tensor:
        eighths = torch.randint(-8, 9, shape, generator=self.generator)
        return (eighths / 8).to(self.device, self.dtype)

    def indices(self, size: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(size, shape, generator=self.generator).to(self.device, dtype)

    def out(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32) if dtype is None else dtype
        # Numbers that nothing here gives, as an integer has no NaN.
        return torch.full(shape, 12345, dtype=wide, device=self.device)


def _sampled_outer(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = _Inputs(dtype, device)
    B, T, I, O, r, s = 2, 37, 41, 19, 67, 3
    x, dy = new.numbers(B, T, I), new.numbers(B, T, O)
    o_idx, i_idx = new.indices(O, r), new.indices(I + 1, r)
    yield (x, dy, o_idx, i_idx, None, True, 0.5, ()), (new.out(B, r),)
    o_idx, i_idx = new.indices(O, r, s), new.indices(I, r, s)
    sign = new.indices(3, r, s, dtype=torch.int8) - 1
    yield (x, dy, o_idx, i_idx, sign, False, 0.5, ()), (new.out(B, r),)
    # What the staged kernels turn on: chunks of several buffers; few coordinates a thread, more (of
    # float32) and most (of the others); passes, a bias and rows that are not aligned; signs.
    for B, T, I, O, r, bias, limits in (
        (1, 150, 96, 64, 150, False, {}),
        (1, 20, 8, 80, 640, False, {}),  # of 4 or 8 banks, so that most lanes repeat another
        (2, 90, 41, 64, 150, True, {"max_slots": 256}),
    ):
        x, dy = new.numbers(B, T, I), new.numbers(B, T, O)
        at = new.indices(O * (I + bias), r).sort().values
        o_idx, i_idx = at // (I + bias), at % (I + bias)
        order = _order(x, dy, o_idx, i_idx, bias=bias, **limits)
        yield (x, dy, o_idx, i_idx, None, bias, 0.5, order), (new.out(B, r),)
    o_idx, i_idx = new.indices(O, r, s), new.indices(I, r, s)
    sign = new.indices(3, r, s, dtype=torch.int8) - 1
    x, dy = x[:, :40], dy[:, :40]
    order = _order(x, dy, o_idx, i_idx)
    yield (x, dy, o_idx, i_idx, sign, False, 0.5, order), (new.out(B, r),)


def _order(x: Tensor, dy: Tensor, o_idx: Tensor, i_idx: Tensor, **options: Any) -> Sequence[Tensor]:
    """The order that backend cuda takes and others ignore; none where it cannot be made."""
    if not bank_schedule.AVAILABLE or x.dtype == torch.float64:
        return ()
    I, O = x.shape[2], dy.shape[2]
    order = bank_schedule.staged_order(o_idx, i_idx, I, O, x.element_size(), **options)
    assert order is not None
    return order[:3]


def _factored_outer(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = _Inputs(dtype, device)
    x, dy = new.numbers(2, 37, 41), new.numbers(2, 37, 19)
    o_idx, i_idx = (new.indices(n, 7, dtype=torch.int64) for n in (19, 41))
    yield (x, dy, o_idx, i_idx, 0.5), (new.out(2, 49),)
    yield (x, dy, None, i_idx, 0.5), (new.out(2, 19 * 7),)


def _sampled_embedding(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = _Inputs(dtype, device)
    B, T, vocabulary, O, r = 2, 37, 11, 19, 67
    ids = new.indices(vocabulary, B, T, dtype=torch.int64)
    o_idx, i_idx = new.indices(O, r), new.indices(vocabulary, r).sort().values
    yield (ids, new.numbers(B, T, O), o_idx, i_idx, 0.5), (new.out(B, r),)


def _sampled_conv(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = _Inputs(dtype, device)
    B, C, O, r = 2, 4, 6, 35
    x, dy = new.numbers(B, C, 9, 7), new.numbers(B, O, 5, 4)
    o_idx, i_idx = new.indices(O, r), new.indices(C // 2 * 6 + 1, r)
    options = ((3, 2), (2, 2), (1, 1), (1, 1), 2, True, 0.5)
    yield (x, dy, o_idx, i_idx, *options), (new.out(B, r),)


def _gather_grads(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = _Inputs(dtype, device)
    grads = [new.numbers(13, 5), None, new.numbers(7, 3).T, new.numbers(300)]
    sizes = [65, 9, 21, 300]
    indices = [new.indices(size, size // 2, dtype=torch.int64) for size in sizes]
    scales = [0.5, 1.0, 2.0, -1.0]
    yield (grads, indices, (), scales), (new.out(sum(map(len, indices))),)
    indices[2:] = [new.indices(size, 17, 5, dtype=torch.int64) for size in sizes[2:]]
    signs = [None, None, *(new.indices(3, 17, 5, dtype=torch.int8) - 1 for _ in range(2))]
    yield (grads, indices, signs, scales), (new.out(sum(map(len, indices))),)


def _layers(*sizes: int) -> tuple[Tensor, int, int]:
    """Column bounds of layers, on the CPU; their last, and the packed matrices' size."""
    bounds = [0, *accumulate(sizes)]
    return torch.tensor(bounds), bounds[-1], sum(r * r for r in sizes)


_NARROW = (1, 33, 0, 70)
_WIDE = (40, 330, 330)  # wider than backend cuda factorises itself


def _gram(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = _Inputs(dtype, device)
    offsets, R, num_packed = _layers(*_NARROW)
    for n in (45, 600):  # within a chunk of rows, and more
        rows = new.numbers(n, R)
        yield (rows, offsets, 0.5, False), (new.out(num_packed),)
        yield (rows, offsets, 0.5, True), (new.out(num_packed),)


def _matrices(new: _Inputs, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed matrices that are positive definite with a shift, and right-hand sides."""
    offsets, R, num_packed = _layers(*sizes)
    matrices = new.out(num_packed)
    half = _Inputs(new.dtype, new.device).numbers(90, R)
    reference.gram(half, offsets, 1 / 64, False, matrices)
    shift = torch.ones(len(sizes), dtype=new.dtype, device=new.device)
    return matrices, offsets, shift, new.numbers(5, R)


def _damped_cholesky(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = _Inputs(dtype, device)
    for sizes in (_NARROW, _WIDE):
        matrices, offsets, shift, rows = _matrices(new, sizes)
        factors, info = new.out(len(matrices)), new.out(len(shift), dtype=torch.int32)
        yield (matrices, offsets, shift, rows), (factors, info, new.out(*rows.shape))
        failing = -100 * shift
        yield (matrices, offsets, failing, None), (new.out(len(matrices)), info.clone(), None)


def _cholesky_solve(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = _Inputs(dtype, device)
    for sizes in (_NARROW, _WIDE):
        matrices, offsets, shift, rows = _matrices(new, sizes)
        factors, info = new.out(len(matrices)), new.out(len(shift), dtype=torch.int32)
        reference.damped_cholesky(matrices, offsets, shift, None, factors, info, None)
        yield (factors, offsets, rows), (new.out(*rows.shape),)


def _score_topk(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    new = _Inputs(dtype, device)
    m, k = 3, 7
    values = torch.full((m, k), -torch.inf, dtype=dtype, device=device)
    indices = torch.full((m, k), -1, device=device)
    yield (new.numbers(m, 300), 5), (values, indices)  # ties: 17 numbers for 300 scores
    yield (new.numbers(m, 4), 305), (values, indices)


# op -> its cases, the dtypes of inputs, and how far off a result may be.
_CASES: dict[str, tuple[Callable[..., Iterator[Case]], tuple[torch.dtype, ...], float]] = {
    "sampled_outer": (_sampled_outer, _DTYPES, 0.0),
    "factored_outer": (_factored_outer, _DTYPES, 0.0),
    "sampled_embedding": (_sampled_embedding, _DTYPES, 0.0),
    "sampled_conv": (_sampled_conv, _DTYPES, 0.0),
    "gather_grads": (_gather_grads, _DTYPES, 0.0),
    "gram": (_gram, (torch.float32,), 0.0),
    "damped_cholesky": (_damped_cholesky, (torch.float32,), 1e-5),
    "cholesky_solve": (_cholesky_solve, (torch.float32,), 1e-5),
    "score_topk": (_score_topk, (torch.float32,), 0.0),
}
