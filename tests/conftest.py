"""Fixtures: the backends, and memory that shows when it was never written."""

from __future__ import annotations

import os
import signal
from functools import lru_cache, wraps
from typing import NamedTuple

# Before torch is imported, and for the processes that tests start: what they compute is small, and
# threads that wait for each other take longer than one. Tests of threads ask for theirs.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from cuda_host import build
from filelock import FileLock

if not torch.cuda.is_available():  # Triton reads it when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"

from on_device import OpsOn

import dropinf
from dropinf.ops import dispatch, selftest

torch.set_num_threads(1)  # a plugin may have imported it before
# What a script runs in the background ignores it, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

EPS32 = 2.0**-24  # largest relative error of one float32 rounding
ON_A_GPU = ["cuda"] if torch.cuda.is_available() else []
BACKENDS = ["cpu", "cpu-portable", "cuda-host", *ON_A_GPU, "triton", "reference"]
# Kernels run thread after thread on the host, or by Triton's interpreter: a thousand times slower.
INTERPRETED = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []
EMULATED = ["cuda-host", *INTERPRETED]


@pytest.fixture(autouse=True, scope="session")
def self_test_by_interpreter():
    """Of Triton's sampled_outer without the cases that are for kernels which take an order.

    Triton's takes none, and to interpret those is two thirds of a minute, in each process;
    `test_triton_passes` runs them.
    """
    whole, op = selftest.mismatch, "sampled_outer"
    every = selftest.SELF_TESTS[op]

    def some(dtype, device):  # float64 has no orders
        for (args, _), case in zip(
            every.cases(torch.bfloat16, torch.device("cpu")), every.cases(dtype, device)
        ):
            if not args[6]:
                yield case

    @wraps(whole)
    def mismatch(of, kernel, device):
        if INTERPRETED and of == op and kernel is dispatch.KERNELS[op]["triton"]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(selftest.SELF_TESTS, op, every._replace(cases=some))
                return whole(of, kernel, device)
        return whole(of, kernel, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selftest, "mismatch", mismatch)
        yield


class Backend(NamedTuple):
    name: str
    device: str  # where it computes; what tests give to the ops is on the CPU, see `OpsOn`
    emulated: bool


@pytest.fixture(autouse=True)
def empties_are_nan():
    """torch fills `empty` with NaN, so that an output that was never written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_generate_tests(metafunc):
    """Every backend of what a module tests: it names its ops in OPS, or tests whole models.

    Marks choose: `ops("gram")` instead of OPS; `backends("cuda", "cpu")` those that a test is
    about; `cases("shape, dtype", choose)` its other arguments by backend, of which
    choose("cuda-host") gives tuples.
    """
    if "backend" not in metafunc.fixturenames or hasattr(metafunc.module, "backend"):
        return
    if any("backend" in m.args[0] for m in metafunc.definition.iter_markers("parametrize")):
        return  # with the op that it is of
    mark = metafunc.definition.get_closest_marker("ops")
    names = backends_of(mark.args if mark else getattr(metafunc.module, "OPS", ()))
    for mark in metafunc.definition.iter_markers("backends"):
        names = [name for name in names if name in mark.args or name.partition("-")[0] in mark.args]
    mark = metafunc.definition.get_closest_marker("cases")
    if mark is None:
        metafunc.parametrize("backend", names, indirect=True)
        return
    arguments, choose = mark.args
    cases = [(name, *case) for name in names for case in choose(name)]
    ids = ["-".join(map(str, case)) for case in cases]
    metafunc.parametrize(f"backend, {arguments}", cases, indirect=["backend"], ids=ids)


def backends_of(ops):
    """Those that have all of these ops; of none, those that whole models are run on.

    These two round differently; whatever else an op may be computed by is tested on its own.
    """
    if not ops:
        return ["cpu", "reference"]
    kernels = [dispatch.KERNELS[op] for op in ops]
    return [n for n in BACKENDS if all(n.partition("-")[0] in k for k in kernels)]


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
        yield Backend(name, "cuda:0", emulated=False)
        return
    if variant != "portable":
        yield Backend(name, "cpu", request.param in EMULATED)
        return
    before = dropinf._C.cpu_capability()
    dropinf._C.set_cpu_capability(variant)
    yield Backend(name, "cpu", request.param in EMULATED)
    dropinf._C.set_cpu_capability(before)


@lru_cache
def load_on_the_host():
    """The library is built by one process, whatever number of them runs tests."""
    build.BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(build.BUILD / "lock"):
        build.load()


def on_the_host(request, monkeypatch):
    """Backend "cuda" for CPU tensors: the same kernels, run on the host."""
    load_on_the_host()
    for op, kernels in dispatch.KERNELS.items():
        if "cuda" in kernels:
            monkeypatch.setitem(kernels, "cuda", getattr(torch.ops.dropinf_host, op).default)
    monkeypatch.setitem(dispatch._STATES, "cuda", "available")
    monkeypatch.setitem(dispatch._DEVICES, "cuda", "cpu")
    monkeypatch.setattr(dispatch, "_self_test", self_test_on_the_host)
    dispatch.kernel.cache_clear()
    request.addfinalizer(dispatch.kernel.cache_clear)


# Once for all tests, apart from what dispatch keeps.
self_test_on_the_host = lru_cache(dispatch._self_test.__wrapped__)


def numbers_of_threads():
    """1, 2, 3: torch has as many meanwhile."""
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(before)


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


@pytest.fixture
def dropinf_(monkeypatch, capsys):
    """dropinf_("topk", "run"): exit code, stdout and stderr of a call of the command line."""
    from cli_runs import call

    return lambda *arguments: call(monkeypatch, capsys, *arguments)


@pytest.fixture
def ok(dropinf_):
    """stdout of a call of the command line that works."""

    def run(*arguments):
        code, out, err = dropinf_(*arguments)
        assert code == 0, err
        return out

    return run
