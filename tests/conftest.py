"""Fixtures: the backends, and memory that shows when it was never written."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from cuda_host import build
from on_device import OpsOn

import dropinf
from dropinf import dispatch

EPS32 = 2.0**-24  # largest relative error of one float32 rounding
ON_A_GPU = ["cuda", "triton"] if torch.cuda.is_available() else []


class Backend(NamedTuple):
    name: str
    device: str  # where it computes; what tests give to the ops is on the CPU, see `OpsOn`


@pytest.fixture(autouse=True)
def empties_are_nan():
    """torch fills `empty` with NaN, so that an output that was never written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", "cpu-portable", "cuda-host", "reference", *ON_A_GPU])
def backend(request, monkeypatch):
    name, _, variant = request.param.partition("-")
    op = request.module.__name__.removeprefix("test_")
    if name not in dispatch.KERNELS.get(op, [name]):
        pytest.skip(f"{op} is not written for backend {name!r}")
    if variant == "host":
        on_the_host(request, monkeypatch)
    state = dropinf.backends()[name]
    if state != "available":
        pytest.skip(f"backend {name!r} is {state}")
    if dispatch._DEVICES.get(name) == "cuda":
        if op not in dispatch.KERNELS:
            pytest.skip("test_gpu.py has the model that runs on a GPU")
        monkeypatch.setattr(request.module, "ops", OpsOn("cuda:0"))
        yield Backend(name, "cuda:0")
        return
    if variant != "portable":
        yield Backend(name, "cpu")
        return
    before = dropinf._C.cpu_capability()
    dropinf._C.set_cpu_capability(variant)
    yield Backend(name, "cpu")
    dropinf._C.set_cpu_capability(before)


def on_the_host(request, monkeypatch):
    """Backend "cuda" for CPU tensors: the same kernels, run by threads of the host."""
    build.load()
    for op, kernels in dispatch.KERNELS.items():
        if "cuda" in kernels:
            monkeypatch.setitem(kernels, "cuda", getattr(torch.ops.dropinf_host, op).default)
    monkeypatch.setitem(dispatch._STATES, "cuda", "available")
    monkeypatch.setitem(dispatch._DEVICES, "cuda", "cpu")
    for cached in (dispatch.kernel, dispatch._self_test):
        cached.cache_clear()
        request.addfinalizer(cached.cache_clear)


def assert_within(out: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    """Each |out - exact| <= bound, which NaN is not."""
    assert out.shape == exact.shape
    excess = (out.double() - exact).abs() - bound
    assert (excess <= 0).all(), f"exceeds the bound by {excess.max().item():.3g}"


def assert_refused(backend: Backend, call, message: str) -> None:
    """The call raises; or, for an index out of range on a GPU's backend, which cannot raise without
    waiting for the device, gives NaN."""
    if backend.name in ("cuda", "triton") and "range" in message:
        assert call().isnan().all()
        return
    message = message.replace("on cpu", f"on {backend.device}")
    with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
        call()
