"""The self-test of backends: right ones pass, wrong ones are refused by name."""

import bisect
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import load_on_the_host
from cuda_host import build
from kernel_faults import FAULTS
from outer_cases import good
from places import ROOT
from torch.overrides import TorchFunctionMode

import dropinf
from dropinf import ops
from dropinf.ops import bank_schedule, dispatch, reference, selftest

RESULTS = ROOT / "bench" / "results"
CPU = torch.device("cpu")
OPS = sorted(dispatch.KERNELS)


@pytest.mark.parametrize("op", OPS)
def test_reference_passes(op):
    assert selftest.mismatch(op, getattr(reference, op), CPU) is None


class OnTheCpu(TorchFunctionMode):
    """What asks for any other device gets the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def here(arg):
            return CPU if isinstance(arg, torch.device) else arg

        kwargs = {name: here(arg) for name, arg in (kwargs or {}).items()}
        return function(*map(here, args), **kwargs)


@pytest.mark.parametrize("op", OPS)
def test_a_gpu_has_the_cases_of_the_truth(op):
    """Cases that turned on the device would fail there and nowhere else."""
    with OnTheCpu():
        assert selftest.mismatch(op, getattr(reference, op), torch.device("cuda")) is None


@pytest.mark.parametrize("op", OPS)
def test_cpu_passes(op):
    if dropinf.backends()["cpu"] != "available":
        pytest.skip(dropinf.backends()["cpu"])
    if "cpu" not in dispatch.KERNELS[op]:
        pytest.skip(f"{op} is not written for backend 'cpu'")
    assert selftest.mismatch(op, dispatch.KERNELS[op]["cpu"], CPU) is None


@pytest.mark.more  # interpreted, it takes long
def test_triton_passes():
    """Also those cases of sampled_outer that other tests leave out, see conftest.py."""
    if dropinf.backends()["triton"] != "available":
        pytest.skip(dropinf.backends()["triton"])
    device = torch.device(dispatch._DEVICES["triton"])
    kernel = dispatch.KERNELS["sampled_outer"]["triton"]
    assert selftest.mismatch.__wrapped__("sampled_outer", kernel, device) is None


def spoilt(op, how, *args):
    """`reference`, and then one of its results spoilt."""
    getattr(reference, op)(*args)
    out = next(a for a in reversed(args) if isinstance(a, torch.Tensor) and a.is_floating_point())
    how(out.flatten() if out.is_contiguous() else out)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "how",
    [lambda out: out[-1:].add_(0.01), lambda out: out[:1].fill_(torch.nan)],
    ids=["off", "NaN"],
)
def test_wrong_results_are_seen(op, how):
    message = selftest.mismatch(op, partial(spoilt, op, how), CPU)
    assert message.startswith("with torch.float32, off by ")


def test_nothing_written_is_seen():
    for op in OPS:
        assert selftest.mismatch(op, lambda *args: None, CPU)


def test_staged_cases():
    """Passes and sums with every dtype; and all together, every kernel that is chosen by slots."""
    if not bank_schedule.AVAILABLE:
        pytest.skip("the C++ extension makes the orders")
    make, dtypes, _ = selftest.SELF_TESTS["sampled_outer"]
    kernels = set()
    for dtype in dtypes:
        cases = [args for args, _ in make(dtype, CPU) if len(args[6]) == 3]
        passes = [args[6][0] for args in cases]
        assert max(map(len, passes)) > 1 and any(args[4].dim() == 2 for args in cases)
        # 384 threads, each of 5, 13 or 25 coordinates.
        kernels |= {bisect.bisect_left([5 * 384, 13 * 384], int(p[:, 5].max())) for p in passes}
    assert kernels == {0, 1, 2}


# In a process of its own, which can load one library of these ops.
ON_THE_HOST = """
import sys
import torch
from dropinf.ops import selftest
_, op, library = sys.argv
torch.ops.load_library(library)
kernel = getattr(torch.ops.dropinf_host, op).default
print(selftest.mismatch(op, kernel, torch.device("cpu")))
"""


@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=[pytest.mark.more] * (op != "sampled_outer")) for op in FAULTS]
)
def test_a_fault_in_a_kernel_is_found(op, tmp_path):
    """Built for the host, the kernels are right, and wrong after a fault is planted."""
    load_on_the_host()
    assert selftest.mismatch(op, getattr(torch.ops.dropinf_host, op).default, CPU) is None
    library = build.library(build.planted(tmp_path, *FAULTS[op]), "")
    command = [sys.executable, "-c", ON_THE_HOST, op, str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("with torch.float32, off by"), done.stdout + done.stderr


def test_a_backend_that_fails_is_refused(monkeypatch):
    """Named, it raises with its name and the way out, every time; the default is another."""
    monkeypatch.delitem(dispatch.VERIFIED, ("cuda", "sampled_outer"), raising=False)
    wrong = partial(spoilt, "sampled_outer", lambda out: out.mul_(2))
    monkeypatch.setitem(dispatch.KERNELS["sampled_outer"], "cuda", wrong)
    monkeypatch.setitem(dispatch._STATES, "cuda", "available")
    monkeypatch.setitem(dispatch._DEVICES, "cuda", "cpu")
    dispatch.kernel.cache_clear()
    for _ in range(2):
        with pytest.raises(dropinf.BackendError, match="sampled_outer: backend 'cuda' fails its"):
            ops.sampled_outer(**good, backend="cuda")
    assert ops.sampled_outer(**good).shape == (2, 6)
    # Verified, it is the default, and its failure is an error: nothing falls back silently.
    monkeypatch.setitem(dispatch.VERIFIED, ("cuda", "sampled_outer"), "some.json")
    dispatch.kernel.cache_clear()
    with pytest.raises(dropinf.BackendError, match="backend 'cuda' fails its self-test"):
        ops.sampled_outer(**good)
    dispatch.kernel.cache_clear()


def test_default_only_if_verified(monkeypatch):
    """A backend for GPUs that is there and right is still not the default until it is verified."""
    monkeypatch.delitem(dispatch.VERIFIED, ("cuda", "sampled_outer"), raising=False)
    calls = []

    def traced(*args):
        calls.append("cuda")
        return reference.sampled_outer(*args)

    monkeypatch.setitem(dispatch.KERNELS["sampled_outer"], "cuda", traced)
    monkeypatch.setitem(dispatch._STATES, "cuda", "available")
    monkeypatch.setitem(dispatch._DEVICES, "cuda", "cpu")
    dispatch.kernel.cache_clear()
    ops.sampled_outer(**good)
    assert not calls
    ops.sampled_outer(**good, backend="cuda")
    assert calls
    calls.clear()
    monkeypatch.setitem(dispatch.VERIFIED, ("cuda", "sampled_outer"), "some.json")
    dispatch.kernel.cache_clear()
    ops.sampled_outer(**good)
    assert calls
    dispatch.kernel.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_column_cases(dtype):
    """The self-test runs the columns kernel by rows that are aligned and others with a bias, in
    chunks whose last buffer is not full."""
    if not bank_schedule.AVAILABLE:
        pytest.skip("the C++ extension makes the orders")
    make = selftest.SELF_TESTS["sampled_outer"][0]
    cases = [args for args, _ in make(dtype, CPU) if len(args[6]) == 4]
    aligned = {args[0].shape[2] % 4 == 0 == args[1].shape[2] % 4 for args in cases}
    assert aligned == {True, False} == {args[5] for args in cases}
    assert all(args[0].shape[1] % 8 for args in cases)
    assert max(args[0].shape[1] for args in cases) > 192  # positions of a chunk
    sums = [args for args in cases if args[2].dim() == 2]
    assert any(len(args[0]) > 1 and (args[4] == 0).any() for args in sums)
