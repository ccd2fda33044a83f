"""Which backends are here, why the others are not, and which one a call gets.

A backend for GPUs is picked by default only for the ops that VERIFIED names: those whose results on
a GPU are recorded. Named, it is used wherever it can run, after a self-test of the op on that
device; a mismatch is an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from dropinf.ops import reference, selftest
from dropinf.ops.selftest import DTYPES, Case, SelfTest

try:
    importlib.import_module("dropinf._C")  # registers the ops
    _why_no_cpu = ""
except ImportError as error:
    _failure = Path(__file__).parent.with_name("_build_failure.txt")
    _why_no_cpu = _failure.read_text("utf-8").strip() if _failure.exists() else str(error)

GPU_BACKENDS = ("cuda", "triton")

_H200 = "nvidia-h200-2026-11-27.json"
# (backend, op) -> the file in bench/results/ that records its results on a GPU.
VERIFIED: dict[tuple[str, str], str] = {
    ("cuda", "sampled_outer"): _H200,
    ("cuda", "sampled_embedding"): _H200,
    ("cuda", "sampled_conv"): _H200,
    ("cuda", "sampled_norm"): _H200,
    ("cuda", "gather_grads"): _H200,
    ("cuda", "gram"): _H200,
    ("cuda", "damped_cholesky"): _H200,
    ("cuda", "cholesky_solve"): _H200,
}


class BackendError(RuntimeError):
    """A backend that was named cannot take this call, or computes something else.

    Every op raises it; nothing falls back to another backend.

        try:
            rows = dropinf.ops.sampled_outer(x, dy, o_idx, i_idx, backend="cuda")
        except dropinf.BackendError as error:
            print(error)  # which backends are here
    """


def _why_no_cuda() -> str:
    if _why_no_cpu:
        return _why_no_cpu
    build = importlib.import_module("dropinf._C").build_info()
    if not build["cuda"]:
        return f"the extension was built without CUDA, {build['why_no_cuda']}"
    return "" if torch.cuda.is_available() else "torch finds no GPU"


# Triton decides this when a kernel is defined, so when triton_kernels is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _why_no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _INTERPRETED or torch.cuda.is_available():
        return ""
    return "torch finds no GPU; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter"


_WHY_NOT: dict[str, Callable[[], str]] = {
    "cpu": lambda: _why_no_cpu,
    "reference": lambda: "",
    "cuda": _why_no_cuda,
    "triton": _why_no_triton,
}
# Of the backends that were asked for: a question to CUDA at import, or by a call on the CPU, could
# break CUDA in processes that are forked later.
_STATES: dict[str, str] = {}
# The tensors that a backend takes; reference takes any.
_DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cpu" if _INTERPRETED else "cuda"}


def _state(backend: str) -> str:
    if backend not in _STATES:
        why_not = _WHY_NOT[backend]()
        _STATES[backend] = f"not available: {why_not}" if why_not else "available"
    return _STATES[backend]


def backends() -> dict[str, str]:
    """Every backend, with "available" or the reason why it is not.

    `dropinf backends` prints it.

        print(dropinf.backends())
    """
    return {name: _state(name) for name in _WHY_NOT}


def _native(op: str) -> Callable:
    return _missing if _why_no_cpu else getattr(torch.ops.dropinf, op).default


def _missing(*args: object) -> None:
    raise BackendError(f"backend 'cpu' is {_state('cpu')}")


def _triton(op: str) -> Callable:
    """The launcher in triton_kernels, which is imported when it is first called."""

    def launch(*args: object) -> object:
        run = getattr(importlib.import_module(f"dropinf.triton_kernels.{op}"), op)
        return run(*map(_resolved, args))

    return launch


def _resolved(arg: object) -> object:
    """The same numbers in memory, which torch itself sees to for ops that it dispatches."""
    if not isinstance(arg, torch.Tensor):
        return arg
    return arg.new_zeros(arg.shape) if arg._is_zerotensor() else arg.resolve_neg()


def _on_meta(*args: object) -> None:
    """`out` has its shape and its dtype, and nothing is computed."""


# op -> its backends, the preferred one first. Each writes into `out`, the last argument.
KERNELS: dict[str, dict[str, Callable]] = {}


def add_op(
    op: str,
    backends: Sequence[str],
    cases: Callable[[torch.dtype, torch.device], Iterator[Case]],
    dtypes: Sequence[torch.dtype] = DTYPES,
    tolerance: float = 0.0,
) -> None:
    """Make an op known; the file that has its checks calls this.

    Args:
        op: its name, that of its function in `reference`, its native op and its Triton launcher.
        backends: those it is written for beside `reference`, the preferred one first.
        cases: cases(dtype, device): small inputs on which they must agree with `reference`.
        dtypes: of the cases.
        tolerance: how far off they may be, as a part of the largest.
    """
    makers = {"cuda": _native, "triton": _triton, "cpu": _native}
    kernels = {name: makers[name](op) for name in backends}
    KERNELS[op] = {**kernels, "reference": getattr(reference, op)}
    selftest.SELF_TESTS[op] = SelfTest(cases, dtypes, tolerance)


# Looking it up anew costs 1 µs, of the 10 µs that 200 small layers may take in all.
@lru_cache(maxsize=256)
def kernel(
    op: str,
    backend: str | None,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    out_dtype: torch.dtype,
) -> Callable:
    """The kernel for a call on `device` with inputs of `dtypes` and an output of `out_dtype`.

    A named `backend` is taken or refused; None takes the first that can take the call and, on a
    GPU, is verified.

    Raises:
        BackendError: the named backend is unknown, not available, or cannot take the call; or the
            one taken fails its self-test.
    """
    kernels = KERNELS[op]
    call = (device, dtypes, out_dtype)
    name = default(op, *call) if backend is None else backend
    why_not = obstacle(op, name, *call)
    if why_not:
        if name in kernels and _state(name) != "available":  # says more, and to who named it
            why_not = _state(name)
        here = [n for n in kernels if not obstacle(op, n, *call)]
        raise BackendError(f"{op}: backend '{name}' is {why_not}. Here: {str(here)[1:-1]}.")
    if device.type == "meta":
        return _on_meta
    if name in GPU_BACKENDS:
        _self_test(op, name, device)
    return kernels[name]


def is_native(op: str, backend: str | None, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether calls with a float32 `out` go to the op of the extension, as C++ calls it.

    So capture knows whether it may call the op from C++, for arguments of that dtype and device;
    `backend` is a name, or None for the default.

        dropinf.ops.is_native("sampled_outer", None, torch.device("cpu"), torch.float32)
    """
    if _why_no_cpu or dtype not in DTYPES or device.type == "meta":
        return False
    try:
        return kernel(op, backend, device, (dtype,), torch.float32) is _native(op)
    except BackendError:  # which the call itself is to raise
        return False


def default(
    op: str, device: torch.device, dtypes: Sequence[torch.dtype], out_dtype: torch.dtype
) -> str:
    """The backend that a call gets that names none."""
    for name in KERNELS[op]:
        unverified = name in GPU_BACKENDS and (name, op) not in VERIFIED
        if not unverified and not obstacle(op, name, device, dtypes, out_dtype):
            return name
    raise AssertionError("reference takes every call")


@lru_cache(maxsize=256)
def _self_test(op: str, backend: str, device: torch.device) -> None:
    """Once a process for each op and device; errors are not cached, so they come every time."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise BackendError(
            f"{op}: the self-test of backend '{backend}' cannot run while a CUDA graph is "
            "captured; call the op once before"
        )
    mismatch = selftest.mismatch(op, KERNELS[op][backend], device)
    if mismatch:
        raise BackendError(
            f"{op}: backend '{backend}' fails its self-test on {device}: {mismatch}. "
            "Name backend='reference', and report it with the output of python -m dropinf doctor."
        )


def obstacle(
    op: str,
    backend: str,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    out_dtype: torch.dtype,
) -> str | None:
    """Why `backend` cannot take the call, or None if it can."""
    if backend not in _WHY_NOT:
        return "unknown"
    if backend not in KERNELS[op]:
        return "not written for this op"
    if backend == "reference":
        return None
    if device.type != _DEVICES[backend]:  # before the state, which may ask CUDA
        return f"not for tensors on {device}"
    if _state(backend) != "available":
        return _state(backend)
    wrong = [d for d in dtypes if d not in DTYPES]
    if wrong:
        return f"for float32, bfloat16 and float16, not {wrong[0]}"
    if out_dtype != torch.float32:
        return f"for a float32 out, not {out_dtype}"
    return None
