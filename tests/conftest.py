"""Fixtures: the backends, and memory that shows when it was never written."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from cuda_host import build

if not torch.cuda.is_available():  # Triton reads it when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"

from on_device import OpsOn

import dropinf
from dropinf import dispatch

EPS32 = 2.0**-24  # largest relative error of one float32 rounding
ON_A_GPU = ["cuda"] if torch.cuda.is_available() else []
BACKENDS = ["cpu", "cpu-portable", "cuda-host", *ON_A_GPU, "triton", "reference"]


class Backend(NamedTuple):
    name: str
    device: str  # where it computes; what tests give to the ops is on the CPU, see `OpsOn`


@pytest.fixture(autouse=True)
def empties_are_nan():
    """torch fills `empty` with NaN, so that an output that was never written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_generate_tests(metafunc):
    """Every backend of what a module tests: it names its ops in OPS, or tests whole models."""
    if "backend" not in metafunc.fixturenames or hasattr(metafunc.module, "backend"):
        return
    if any("backend" in m.args[0] for m in metafunc.definition.iter_markers("parametrize")):
        return  # with the op that it is of
    ops = getattr(metafunc.module, "OPS", ())
    names = ["cpu", "cpu-portable", "reference"]
    if ops:  # whole models take minutes on the others without a GPU
        names = BACKENDS
        kernels = [dispatch.KERNELS[op] for op in ops]
        names = [n for n in names if all(n.partition("-")[0] in k for k in kernels)]
    metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request, monkeypatch):
    name, _, variant = request.param.partition("-")
    if variant == "host":
        on_the_host(request, monkeypatch)
    state = dropinf.backends()[name]
    if state != "available":
        pytest.skip(f"backend {name!r} is {state}")
    if dispatch._DEVICES.get(name) == "cuda":
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
    monkeypatch.setattr(dispatch, "_self_test", self_test_on_the_host)
    dispatch.kernel.cache_clear()
    request.addfinalizer(dispatch.kernel.cache_clear)


# Once a process, as that of the others, and apart from what dispatch knows of them.
self_test_on_the_host = lru_cache(dispatch._self_test.__wrapped__)


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
    if backend.name not in dispatch.GPU_BACKENDS:
        with pytest.raises((ValueError, IndexError, RuntimeError), match=f"{name}|out of range"):
            run()
        return
    out = run()
    assert out[:, k].isnan().all() and out.isnan().sum() == out.shape[0]
