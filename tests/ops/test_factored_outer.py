"""factored_outer: a grid of gradient entries, against einsum in float64 numpy."""

import numpy as np
import pytest
import torch
from conftest import EPS32, assert_within

from dropinf import BackendError, ops
from dropinf.ops import reference

# B, T, O, I, rows, columns: 1s, primes, all, none, several examples a step.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (3, 7, 11, 13, 5, 4),
    (2, 5, 6, 9, None, 3),
    (2, 5, 6, 9, 4, None),
    (4, 3, 6, 9, None, None),
    (2, 0, 6, 9, 2, 3),
    (2, 5, 6, 9, 0, 3),
    (0, 5, 6, 9, 2, 3),
    (5, 300, 40, 50, 20, 30),
]


def inputs(B, T, O, I, a, b, dtype):
    x, dy = torch.randn(B, T, I).to(dtype), torch.randn(B, T, O).to(dtype)
    o_idx, i_idx = (
        None if k is None else torch.randperm(n)[:k].sort().values for n, k in ((O, a), (I, b))
    )
    return x, dy, o_idx, i_idx


def exact(x, dy, o_idx, i_idx):
    x, dy = (t.double().numpy() for t in (x, dy))
    x = x if i_idx is None else x[:, :, i_idx.numpy()]
    dy = dy if o_idx is None else dy[:, :, o_idx.numpy()]
    return torch.from_numpy(np.einsum("bto,bti->boi", dy, x)).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factored_outer(shape, dtype, monkeypatch):
    monkeypatch.setattr(reference, "_MAX_ELEMENTS", 4000)  # steps of a few examples
    x, dy, o_idx, i_idx = inputs(*shape, dtype)
    truth = exact(x, dy, o_idx, i_idx)
    sizes = exact(x.abs(), dy.abs(), o_idx, i_idx)
    row = torch.full((len(x), truth.shape[1] + 9), torch.nan, dtype=torch.float64)
    weights = torch.randn(truth.shape[1])
    ops.factored_outer(x, dy, o_idx, i_idx, weights=weights, out=row[:, 4:-5])
    out = ops.factored_outer(x, dy, o_idx, i_idx)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == wide
    eps = 2.0**-53 if dtype == torch.float64 else EPS32
    bound = (shape[1] + 1) * eps * sizes
    assert_within(out, truth, bound)
    weights = weights.double()
    assert_within(row[:, 4:-5], truth * weights, (shape[1] + 2) * eps * sizes * weights.abs())
    assert row[:, :4].isnan().all() and row[:, -5:].isnan().all()


def test_strided_inputs():
    x, dy, o_idx, i_idx = inputs(2, 8, 6, 9, 3, 4, torch.float32)
    expanded = dy[:, :1].expand_as(dy)
    turned = x.mT.contiguous().mT
    truth = exact(turned, expanded, o_idx, i_idx)
    torch.testing.assert_close(
        ops.factored_outer(turned, expanded, o_idx, i_idx).double(), truth, rtol=1e-5, atol=1e-5
    )


def good():
    x, dy, o_idx, i_idx = inputs(2, 8, 6, 9, 3, 4, torch.float32)
    return {"x": x, "dy": dy, "o_idx": o_idx, "i_idx": i_idx}


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"x": torch.randn(2, 9)}, r"x must be \[B, T, I\], got \(2, 9\)"),
        ({"dy": torch.randn(2, 7, 6)}, r"dy must be \[B=2, T=8, O\], got \(2, 7, 6\)"),
        ({"dy": torch.randn(2, 8, 6).double()}, "dy must be torch.float32"),
        ({"o_idx": torch.zeros(3, dtype=torch.int32)}, "o_idx must be torch.int64"),
        ({"i_idx": torch.zeros(3, 1, dtype=torch.int64)}, "i_idx must have one dimension"),
        ({"out": torch.empty(2, 11)}, r"out must be floating point \(2, 12\)"),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=f"factored_outer: {message}"):
        ops.factored_outer(**{**good(), **bad})


@pytest.mark.parametrize("name, size", [("o_idx", 6), ("i_idx", 9)])
@pytest.mark.parametrize("beyond", [0, -30])
def test_index_out_of_range(name, size, beyond):
    index = torch.tensor([0, size + beyond])
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        ops.factored_outer(**{**good(), name: index})


def test_named_backend_is_refused():
    with pytest.raises(BackendError, match="backend 'cpu' is not written for this op"):
        ops.factored_outer(**good(), backend="cpu")
