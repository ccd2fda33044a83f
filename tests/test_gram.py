"""gram: every layer's matrix of products, lower triangles only."""

import numpy as np
import pytest
import torch
from cholesky_cases import SIZES, bounds, columns, guarded, parts, random_rows
from conftest import EPS32, few_in_interpreter

import dropinf
from dropinf import ops

OPS = ("gram",)


def assert_gram(out, rows, sizes, scale=1.0, before=None):
    """Within the rounding bound of any float32 sum, and zero above the diagonals."""
    n = rows.shape[0]
    for l, (G, F) in enumerate(zip(columns(rows, sizes), parts(out, sizes), strict=True)):
        was = 0.0 if before is None else parts(before, sizes)[l]
        bound = (n + 3) * EPS32 * (abs(scale) * abs(G).T @ abs(G) + abs(was))
        excess = abs(F - (scale * G.T @ G + was)) - bound
        assert not (np.tril(excess) > 0).any() and np.isfinite(F).all()
        assert (np.triu(F - was, 1) == 0).all()


@pytest.mark.parametrize("n", [1, 3, 127, 128, 129, 300])
def test_gram(backend, n):
    few_in_interpreter(backend, n in (1, 129))
    rows = random_rows(n, sum(SIZES))
    assert_gram(ops.gram(rows, bounds(SIZES), backend=backend.name), rows, SIZES)


def test_scale_strides_and_nothing_else_written(backend):
    R = sum(SIZES)
    rows = random_rows(100, R + 5)[::2, 3:-2]
    out, untouched = guarded((sum(r * r for r in SIZES),))
    assert ops.gram(rows, bounds(SIZES), scale=-0.3, out=out, backend=backend.name) is out
    assert untouched()
    assert_gram(out, rows, SIZES, scale=-0.3)
    rows = random_rows(R, 9).T
    assert_gram(ops.gram(rows, bounds(SIZES), backend=backend.name), rows, SIZES)


def test_accumulate_leaves_what_is_above_the_diagonals(backend):
    sizes, rows = (5, 70, 8), random_rows(40, 83)
    before = random_rows(1, sum(r * r for r in sizes), seed=1)[0]
    out = before.clone()
    ops.gram(rows, bounds(sizes), scale=0.5, accumulate=True, out=out, backend=backend.name)
    assert_gram(out, rows, sizes, scale=0.5, before=before)


def test_nothing_read_beyond_a_layer(backend):
    sizes = (9, 3, 70)
    rows = random_rows(20, 82)
    rows[:, 9:12] = torch.nan
    out = ops.gram(rows, bounds(sizes), backend=backend.name)
    assert out[: 9 * 9].isfinite().all() and out[9 * 9 + 9 :].isfinite().all()
    assert np.isnan(np.tril(parts(out, sizes)[1])[np.tril_indices(3)]).all()


def test_empty(backend):
    assert ops.gram(torch.zeros(4, 0), (0,), backend=backend.name).shape == (0,)
    assert ops.gram(torch.zeros(4, 0), (0, 0), backend=backend.name).shape == (0,)
    assert not ops.gram(torch.zeros(0, 3), (0, 1, 3), backend=backend.name).any()
    out = torch.ones(5)
    ops.gram(torch.zeros(0, 3), (0, 1, 3), accumulate=True, out=out, backend=backend.name)
    assert (out == 1).all()


def test_bits_depend_on_the_layer_alone(backend):
    if backend.name == "reference":
        pytest.skip("the bits of torch.mm depend on its threads")
    sizes = SIZES if backend.name == "cpu" else (0, 3, 3, 17, 0, 17, 17, 65, 70)
    before, offsets, rows = torch.get_num_threads(), bounds(sizes), random_rows(300, sum(sizes))
    try:
        torch.set_num_threads(1)
        one = ops.gram(rows, offsets, backend=backend.name)
        torch.set_num_threads(2)
        assert torch.equal(one, ops.gram(rows, offsets, backend=backend.name))
    finally:
        torch.set_num_threads(before)
    starts = bounds([r * r for r in sizes])
    for l, r in enumerate(sizes):
        alone = ops.gram(rows[:, offsets[l] : offsets[l + 1]], (0, r), backend=backend.name)
        assert torch.equal(alone, one[starts[l] : starts[l + 1]])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": torch.zeros(2, 4)}, r"rows must be \[m, R=5\]"),
        ({"rows": torch.zeros(2, 5).half()}, "rows must be float32 or float64"),
        ({"offsets": (0, 7, 5)}, "offsets must rise from 0"),
        ({"accumulate": True}, "accumulate=True adds to out, which was not given"),
        ({"out": torch.zeros(12)}, r"out must be contiguous \[13\]"),
        ({"out": torch.zeros(13).half()}, "out must be float32 or float64"),
    ],
    ids=str,
)
def test_bad_input(backend, change, message):
    call = {"rows": torch.zeros(2, 5), "offsets": (0, 3, 5)} | change
    with pytest.raises(ValueError, match=message):
        ops.gram(**call, backend=backend.name)


def test_opcheck():
    if dropinf.backends()["cpu"] != "available":
        pytest.skip(dropinf.backends()["cpu"])
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(
        torch.ops.dropinf.gram.default,
        (random_rows(3, 12), torch.tensor([0, 3, 12]), 0.5, True, torch.zeros(90)),
    )
