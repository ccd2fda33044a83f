"""Tests of whole paths on a GPU: where they run, and by which kernels.

Without a GPU a rehearsal: DEVICE is the CPU, so that the tests are tested too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import dropinf
from dropinf.ops import dispatch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
# What calls get that name no backend: what is verified, or every kernel of one backend there is.
CHOICES = ["default", "cuda", "triton"]

needs_cuda = pytest.mark.skipif(not GPU, reason="needs CUDA")


@pytest.fixture(params=CHOICES if GPU else CHOICES[:1])
def backend(request, monkeypatch):
    """Which kernels calls get that name no backend; in float32, sums are of float32 products."""
    name = request.param
    if name != "default":
        if dropinf.backends()[name] != "available":
            pytest.skip(f"backend {name!r} is {dropinf.backends()[name]}")
        taken = {(name, op): "taken in this test" for op in dispatch.KERNELS}
        monkeypatch.setattr(dispatch, "VERIFIED", taken)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    dispatch.kernel.cache_clear()
    request.addfinalizer(dispatch.kernel.cache_clear)
    return name


def there(value: Any) -> Any:
    """What holds tensors, with them on DEVICE."""
    return tree_map(lambda t: t.to(DEVICE) if isinstance(t, Tensor) else t, value)


def assert_near(found: Tensor, truth: Tensor, limit: float = 1e-5) -> None:
    """Equal but for so much of the truth's norm, which is not zero; wherever they are."""
    found, truth = found.detach().cpu().double(), truth.detach().cpu().double()
    assert found.shape == truth.shape
    size = truth.norm().item()
    error = (found - truth).norm().item()
    assert size > 0 and error <= limit * size, f"off by {error / max(size, 1e-300):.2e}"
