"""Fixtures: the backends, and memory that shows when it was never written."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import dropinf

EPS32 = 2.0**-24  # largest relative error of one float32 rounding


class Backend(NamedTuple):
    name: str
    device: str


@pytest.fixture(autouse=True)
def empties_are_nan():
    """torch fills `empty` with NaN, so that an output that was never written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", "cpu-portable", "reference"])
def backend(request):
    name, _, capability = request.param.partition("-")
    state = dropinf.backends()[name]
    if state != "available":
        pytest.skip(f"backend {name!r} is {state}")
    if not capability:
        yield Backend(name, "cpu")
        return
    before = dropinf._C.cpu_capability()
    dropinf._C.set_cpu_capability(capability)
    yield Backend(name, "cpu")
    dropinf._C.set_cpu_capability(before)


def assert_within(out: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    """Each |out - exact| <= bound, which NaN is not."""
    assert out.shape == exact.shape
    excess = (out.double() - exact).abs() - bound
    assert (excess <= 0).all(), f"exceeds the bound by {excess.max().item():.3g}"
