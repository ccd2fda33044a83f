"""Small inputs that show whether a backend computes what `reference` says.

The truth is `reference` in float64 on the CPU. Inputs are multiples of 1/8 with few bits, so that
every product and sum is exact in float32 and each dtype, and the results must be equal, unless the
op has a tolerance. An op's cases stand in its own file, see `dispatch.add_op`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dropinf.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Case = tuple[Sequence[Any], Sequence[Tensor | None]]  # arguments, and what to write into


class SelfTest(NamedTuple):
    """Of an op: its cases for each of these dtypes, and how far off the largest results may be."""

    cases: Callable[[torch.dtype, torch.device], Iterator[Case]]
    dtypes: Sequence[torch.dtype]
    tolerance: float


# Of each op, from the op's own file.
SELF_TESTS: dict[str, SelfTest] = {}


def mismatch(op: str, kernel: Callable, device: torch.device) -> str | None:
    """What `kernel` got wrong on `device`, or None.

    Args:
        op: name of the op.
        kernel: with the signature of its function in `reference`.
        device: where its tensors are.
    """
    make, dtypes, tolerance = SELF_TESTS[op]
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


class Inputs:
    """Tensors that are the same numbers for every dtype and device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(1)

    def numbers(self, *shape: int) -> Tensor:
        eighths = torch.randint(-8, 9, shape, generator=self.generator)
        return (eighths / 8).to(self.device, self.dtype)

    def weights(self, *shape: int) -> Tensor:
        """Powers of two of either sign, and zeros, that differ from one to the next."""
        signs = torch.randint(-1, 2, shape, generator=self.generator)
        powers = torch.randint(-2, 3, shape, generator=self.generator)
        return (signs * 2.0**powers).to(self.device)

    def indices(self, size: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(size, shape, generator=self.generator).to(self.device, dtype)

    def out(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32) if dtype is None else dtype
        # Numbers that nothing here gives, as an integer has no NaN.
        return torch.full(shape, 12345, dtype=wide, device=self.device)
