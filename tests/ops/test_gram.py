"""gram: every layer's matrix of products, lower triangles only."""

import numpy as np
import pytest
import torch
from cholesky_cases import SIZES, bounds, columns, guarded, parts, random_rows, sizes_for
from conftest import EMULATED, EPS32, numbers_of_threads

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


def numbers_of_rows(backend):
    """One, few, and around the steps that kernels take."""
    return [(n,) for n in ((1, 17, 129) if backend in EMULATED else (1, 3, 127, 128, 129, 300))]


@pytest.mark.cases("n", numbers_of_rows)
def test_gram(backend, n):
    sizes = sizes_for(backend, once=n == 17 and backend.name == "cuda")
    rows = random_rows(n, sum(sizes))
    assert_gram(ops.gram(rows, bounds(sizes), backend=backend.name), rows, sizes)


def test_scale_strides_and_nothing_else_written(backend):
    sizes = sizes_for(backend)
    R = sum(sizes)
    rows = random_rows(40, R + 5)[::2, 3:-2]
    out, untouched = guarded((sum(r * r for r in sizes),))
    assert ops.gram(rows, bounds(sizes), scale=-0.3, out=out, backend=backend.name) is out
    assert untouched()
    assert_gram(out, rows, sizes, scale=-0.3)
    rows = random_rows(R, 9).T
    assert_gram(ops.gram(rows, bounds(sizes), backend=backend.name), rows, sizes)


def test_accumulate_leaves_what_is_above_the_diagonals(backend):
    sizes, rows = (30, 34, 1, 70), random_rows(40, 135)  # two fill a tile of 64
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


@pytest.mark.backends("cpu", "cuda", "triton")  # the bits of torch.mm depend on its threads
def test_bits_depend_on_the_layer_alone(backend):
    sizes = SIZES if backend.name == "cpu" else (0, 3, 3, 17, 0, 17, 17, 65, 70)
    n = 40 if backend.emulated else 300
    offsets, rows = bounds(sizes), random_rows(n, sum(sizes))
    one = ops.gram(rows, offsets, backend=backend.name)
    for _ in numbers_of_threads() if backend.name == "cpu" else [1]:
        assert torch.equal(one, ops.gram(rows, offsets, backend=backend.name))
    starts = bounds([r * r for r in sizes])
    for l, r in enumerate(sizes):
        alone = ops.gram(rows[:, offsets[l] : offsets[l + 1]], (0, r), backend=backend.name)
        assert torch.equal(alone, one[starts[l] : starts[l + 1]])


@pytest.mark.backends("cpu", "cuda")  # the others do not cut sums
@pytest.mark.parametrize("accumulate", [False, True])
def test_long_sums(backend, accumulate):
    """Of more rows than a block sums at a time."""
    sizes, rows = (5, 70, 8), random_rows(1100, 83)
    before = random_rows(1, sum(r * r for r in sizes), seed=1)[0]
    out = before.clone()
    ops.gram(rows, bounds(sizes), scale=0.5, accumulate=accumulate, out=out, backend=backend.name)
    assert_gram(out, rows, sizes, scale=0.5, before=before if accumulate else None)


@pytest.mark.backends("cpu", "cuda")
def test_bits_of_long_sums_depend_on_the_layer_alone(backend):
    sizes, rows = (1400, 9, 70), random_rows(520, 1479)  # 257 tiles: each has one block
    out = ops.gram(rows, bounds(sizes), backend=backend.name)
    alone = ops.gram(rows[:, 1400:], (0, 9, 79), backend=backend.name)
    assert torch.equal(out[1400 * 1400 :], alone)


@pytest.mark.backends("reference", "cpu", "cuda")  # a minute in Triton's interpreter
def test_more_layers_than_a_launch_takes(backend):
    """Small ones, which share tiles up to the end of a CUDA launch's table."""
    sizes = (3, *[1] * 1400, 2, 70)
    rows = random_rows(5, sum(sizes))
    out = ops.gram(rows, bounds(sizes), backend=backend.name)
    assert_gram(out, rows, sizes)


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
def test_bad_input(change, message):
    call = {"rows": torch.zeros(2, 5), "offsets": (0, 3, 5)} | change
    with pytest.raises(ValueError, match=message):
        ops.gram(**call)


def test_opcheck():
    if dropinf.backends()["cpu"] != "available":
        pytest.skip(dropinf.backends()["cpu"])
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(
        torch.ops.dropinf.gram.default,
        (random_rows(3, 12), torch.tensor([0, 3, 12]), 0.5, True, torch.zeros(90)),
    )
