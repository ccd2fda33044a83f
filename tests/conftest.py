"""Fixtures: the backends, and memory that shows when it was never written."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"

import dropinf
from dropinf.dispatch import KERNELS

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


@pytest.fixture(params=["cpu", "cpu-portable", "reference", "triton"])
def backend(request):
    """Every backend; a module says in OPS which ops it tests."""
    name, _, capability = request.param.partition("-")
    state = dropinf.backends()[name]
    if state != "available":
        pytest.skip(f"backend {name!r} is {state}")
    ops = getattr(request.module, "OPS", ())
    if name == "triton" and not ops:
        pytest.skip("whole models take minutes in Triton's interpreter")
    missing = [op for op in ops if name not in KERNELS[op]]
    if missing:
        pytest.skip(f"{missing[0]} is not written for backend {name!r}")
    if not capability:
        yield Backend(name, "cpu")
        return
    before = dropinf._C.cpu_capability()
    dropinf._C.set_cpu_capability(capability)
    yield Backend(name, "cpu")
    dropinf._C.set_cpu_capability(before)


def few_in_interpreter(backend: Backend, wanted: bool) -> None:
    """Skip a case that Triton's interpreter takes long for, unless it is one of the few wanted."""
    if backend.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1" and not wanted:
        pytest.skip("slow in Triton's interpreter, and covered by the cases that are run there")


def assert_within(out: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    """Each |out - exact| <= bound, which NaN is not."""
    assert out.shape == exact.shape
    excess = (out.double() - exact).abs() - bound
    assert (excess <= 0).all(), f"exceeds the bound by {excess.max().item():.3g}"


def assert_refused_or_nan(backend: Backend, run, k: int, name: str) -> None:
    """Entry k has an index out of range: an error, or NaN from a kernel that cannot raise one."""
    if backend.name != "triton":
        with pytest.raises((ValueError, IndexError, RuntimeError), match=f"{name}|out of range"):
            run()
        return
    out = run()
    assert out[:, k].isnan().all() and out.isnan().sum() == out.shape[0]
