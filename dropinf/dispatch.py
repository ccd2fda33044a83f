"""Which backends are here, why the others are not, and which one a call gets."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from dropinf import reference

try:
    importlib.import_module("dropinf._C")  # registers the ops
    _why_no_cpu = ""
except ImportError as error:
    _failure = Path(__file__).with_name("_build_failure.txt")
    _why_no_cpu = _failure.read_text().strip() if _failure.exists() else str(error)

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_STATES = {
    "cpu": f"not available: {_why_no_cpu}" if _why_no_cpu else "available",
    "reference": "available",
    "cuda": "not available: this version has no CUDA kernels; 'reference' takes CUDA tensors",
    "triton": "not available: its kernels run in Triton's interpreter, under TRITON_INTERPRET=1",
}
if os.environ.get("TRITON_INTERPRET") == "1":
    _STATES["triton"] = "available"


class BackendError(RuntimeError):
    """A backend that was named cannot take this call."""


def backends() -> dict[str, str]:
    """Every backend, with "available" or the reason why it is not."""
    return dict(_STATES)


def _native(op: str) -> Callable:
    return _missing if _why_no_cpu else getattr(torch.ops.dropinf, op).default


def _triton(op: str) -> Callable:
    def call(*args: object) -> Tensor:
        name = "merge_topk" if op == "score_topk" else op
        return getattr(importlib.import_module(f"dropinf.triton_kernels.{op}"), name)(*args)

    return call


def _missing(*args: object) -> None:
    raise BackendError(f"backend 'cpu' is {_STATES['cpu']}")


# op -> its backends, the preferred one first. Each writes into `out`, the last argument.
KERNELS: dict[str, dict[str, Callable]] = {
    "sampled_outer": {
        "cpu": _native("sampled_outer"),
        "reference": reference.sampled_outer,
        "triton": _triton("sampled_outer"),
    },
    "sampled_embedding": {
        "cpu": _native("sampled_embedding"),
        "reference": reference.sampled_embedding,
        "triton": _triton("sampled_embedding"),
    },
    "sampled_conv": {
        "cpu": _native("sampled_conv"),
        "reference": reference.sampled_conv,
        "triton": _triton("sampled_conv"),
    },
    "gather_grads": {"cpu": _native("gather_grads"), "reference": reference.gather_grads},
    "gram": {"cpu": _native("gram"), "reference": reference.gram, "triton": _triton("gram")},
    "damped_cholesky": {
        "cpu": _native("damped_cholesky"),
        "reference": reference.damped_cholesky,
    },
    "cholesky_solve": {"cpu": _native("cholesky_solve"), "reference": reference.cholesky_solve},
    "score_topk": {"reference": reference.merge_topk, "triton": _triton("score_topk")},
}


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

    A named `backend` is taken or refused; None takes the first that can take the call.

    Raises:
        BackendError: the named backend is unknown, not available, or cannot take the call.
    """
    kernels = KERNELS[op]
    call = (device, dtypes, out_dtype)
    if backend is None:
        return next(k for name, k in kernels.items() if not _obstacle(op, name, *call))
    obstacle = _obstacle(op, backend, *call)
    if obstacle:
        here = [name for name in kernels if not _obstacle(op, name, *call)]
        raise BackendError(f"{op}: backend '{backend}' is {obstacle}. Here: {str(here)[1:-1]}.")
    return kernels[backend]


def _obstacle(
    op: str,
    backend: str,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    out_dtype: torch.dtype,
) -> str | None:
    """Why `backend` cannot take the call, or None if it can."""
    state = _STATES.get(backend)
    if state is None:
        return "unknown"
    if state != "available":
        return state
    if backend not in KERNELS[op]:
        return "not written for this op"
    if backend == "cpu" and device.type != "cpu":
        return f"not for tensors on {device}"
    wrong = [d for d in dtypes if d not in _CPU_DTYPES]
    if backend in ("cpu", "triton") and wrong:
        return f"for float32, bfloat16 and float16, not {wrong[0]}"
    if backend in ("cpu", "triton") and out_dtype != torch.float32:
        return f"for a float32 out, not {out_dtype}"
    return None
