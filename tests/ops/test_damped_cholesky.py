"""damped_cholesky: the factors of many layers, their damping, and what a bad pivot does."""

import itertools

import numpy as np
import pytest
import torch
from cholesky_cases import (
    MATRICES,
    SIZES,
    bounds,
    columns,
    guarded,
    packed,
    parts,
    random_rows,
    sizes_for,
    spread,
    symmetric,
)
from conftest import EPS32, numbers_of_threads

import dropinf
from dropinf import ops

OPS = ("damped_cholesky", "cholesky_solve")


def layers(name, sizes):
    make, shift = MATRICES[name]
    matrices = packed([make(r, l) for l, r in enumerate(sizes)])
    return matrices, torch.full((len(sizes),), shift)


def lapack(A):
    """LAPACK's float32 factor of a float64 matrix, or None where it fails."""
    L, info = torch.linalg.cholesky_ex(torch.from_numpy(A).float())
    return None if info else L


@pytest.mark.parametrize("name", MATRICES)
def test_residuals_are_at_most_twice_lapacks(backend, name):
    sizes = sizes_for(backend, once=name == "spread")
    matrices, shift = layers(name, sizes)
    rows = random_rows(5, sum(sizes))
    factors, info, solved = ops.damped_cholesky(
        matrices, bounds(sizes), shift, rows=rows, backend=backend.name
    )
    assert not info.any() and info.dtype == torch.int32
    for A, L, q, x in zip(
        symmetric(matrices, shift.double().numpy(), sizes),
        parts(factors, sizes),
        columns(rows, sizes),
        columns(solved, sizes),
        strict=True,
    ):
        if not len(A):
            continue
        theirs = lapack(A)
        assert not np.triu(L, 1).any()
        floor = 8 * EPS32 * np.linalg.norm(A)  # LAPACK's can be zero by luck
        their_L = theirs.double().numpy()
        residual = np.linalg.norm(A - L @ L.T)
        assert residual <= 2 * np.linalg.norm(A - their_L @ their_L.T) + floor
        their_x = torch.cholesky_solve(torch.from_numpy(q.T).float(), theirs).double().numpy().T
        floor = 8 * EPS32 * np.linalg.norm(A) * np.linalg.norm(their_x)
        assert np.linalg.norm(x @ A - q) <= 2 * np.linalg.norm(their_x @ A - q) + floor


def test_factors_against_numpy(backend):
    matrices, shift = layers("spread", SIZES)
    factors, *_ = ops.damped_cholesky(matrices, bounds(SIZES), 0.5, backend=backend.name)
    exact = symmetric(matrices, shift.double().numpy() * 0 + 0.5, SIZES)
    for A, L in zip(exact, parts(factors, SIZES), strict=True):
        if len(A):
            np.testing.assert_allclose(L, np.linalg.cholesky(A), rtol=0, atol=2e-6)


def test_each_layer_has_its_own_shift(backend):
    sizes = (3, 9, 70)
    shift = torch.tensor([0.5, 2.0, 30.0])
    factors, *_ = ops.damped_cholesky(
        torch.zeros(sum(r * r for r in sizes)), bounds(sizes), shift, backend=backend.name
    )
    for L, s in zip(parts(factors, sizes), shift.tolist(), strict=True):
        np.testing.assert_allclose(L, np.sqrt(s) * np.eye(len(L)), rtol=2 * EPS32)


def test_more_layers_than_a_launch_takes(backend):
    """Of each layer one number: r = 1, so what is solved is rows / (matrices + shift)."""
    sizes = [1] * 1400
    matrices, shift = 1 + torch.arange(1400.0), torch.linspace(0.1, 2.0, 1400)
    rows = random_rows(3, 1400)
    factors, info, solved = ops.damped_cholesky(
        matrices, bounds(sizes), shift, rows=rows, backend=backend.name
    )
    exact = matrices.double() + shift.double()
    assert not info.any()
    torch.testing.assert_close(factors.double(), exact.sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(solved.double(), rows.double() / exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sizes", [(5, 8, 9, 8, 4), (70, 129), (9,), (5, 333, 333)], ids=str)
def test_a_bad_pivot_is_reported_and_fills_its_layer(backend, sizes):
    bad, r = len(sizes) - 1, sizes[-1]
    for pivot, value in ((r, -1.0), (2, torch.nan), (1, 0.0)):
        made = [spread(n, l) + np.eye(n) for l, n in enumerate(sizes)]
        made[bad] = np.eye(r)
        made[bad][pivot - 1, pivot - 1] = value
        rows = random_rows(3, sum(sizes))
        factors, info, solved = ops.damped_cholesky(
            packed(made), bounds(sizes), rows=rows, backend=backend.name
        )
        assert info.tolist() == [0] * bad + [pivot]
        good = sum(n * n for n in sizes[:bad])
        assert factors[:good].isfinite().all() and factors[good:].isnan().all()
        assert solved[:, :-r].isfinite().all() and solved[:, -r:].isnan().all()


def test_nan_below_the_diagonal_is_a_bad_pivot(backend):
    made = spread(20, 0) + np.eye(20)
    made[11, 4] = np.nan
    _, info, _ = ops.damped_cholesky(packed([made]), (0, 20), backend=backend.name)
    assert info.tolist() == [12]


@pytest.mark.parametrize("sizes", [(3, 8, 9, 4, 4, 5, 6, 7, 1), (130,)], ids=str)
def test_indefinite_and_all_zero(backend, sizes):
    zeros = torch.zeros(sum(r * r for r in sizes))
    factors, info, _ = ops.damped_cholesky(zeros, bounds(sizes), backend=backend.name)
    assert info.tolist() == [1] * len(sizes) and factors.isnan().all()
    # 1 and 2 off the diagonal: the second pivot is negative.
    indefinite = packed([np.where(np.eye(r), 1.0, 2.0) for r in sizes])
    _, info, _ = ops.damped_cholesky(indefinite, bounds(sizes), backend=backend.name)
    assert info.tolist() == [0 if r == 1 else 2 for r in sizes]


def test_in_place_strided_rows_and_nothing_else_written(backend):
    sizes = sizes_for(backend)
    matrices, shift = layers("spread", sizes)
    offsets, rows = bounds(sizes), random_rows(19, sum(sizes) + 6)[::2, 2:-4]
    plain = ops.damped_cholesky(matrices, offsets, shift, rows=rows, backend=backend.name)
    out, untouched = guarded(matrices.shape)
    guard = ops.damped_cholesky(
        matrices, offsets, shift, rows=rows.contiguous(), out=out, backend=backend.name
    )
    assert guard.factors is out and untouched()
    again = ops.damped_cholesky(matrices, offsets, shift, out=matrices, backend=backend.name)
    assert again.factors is matrices and again.solved is None
    for other in (guard.factors, again.factors):
        assert torch.equal(other, plain.factors)
    assert torch.equal(guard.solved, plain.solved)


def test_empty(backend):
    for offsets, m in (((0,), 0), ((0, 0, 0), 2), ((0, 3), 0)):
        matrices = torch.eye(3).flatten()[: 9 * bool(offsets[-1])]
        factors, info, solved = ops.damped_cholesky(
            matrices, offsets, rows=torch.zeros(m, offsets[-1]), backend=backend.name
        )
        assert torch.equal(factors, matrices) and not info.any()
        assert info.shape == (len(offsets) - 1,) and solved.shape == (m, offsets[-1])


@pytest.mark.backends("cuda-host")  # the shared memory of a GPU is what it is
def test_chips_with_other_shared_memory(backend, request):
    """A block has 163 KB on sm_80, 227 on sm_90, and 99 on sm_86 and sm_89; layers that do not fit
    are cut into blocks."""
    sizes = (208, 216, 264, 272, 280, 320, 321)
    widest = {99: 208, 163: 272, 227: 320}
    matrices = packed([spread(r, r) for r in sizes])
    rows = random_rows(3, sum(sizes))
    set_max = torch.ops.dropinf_host.set_max_shared_bytes
    request.addfinalizer(lambda: set_max(163 * 1024))  # which all other tests have
    found = {}
    for limit in widest:
        set_max(limit * 1024)
        found[limit] = ops.damped_cholesky(
            matrices, bounds(sizes), 0.1, rows=rows, backend=backend.name
        )
        factors = parts(found[limit].factors, sizes)
        exact = symmetric(matrices, [0.1] * len(sizes), sizes)
        for whole, A in zip(factors, exact, strict=True):
            assert np.abs(whole @ whole.T - A).max() < 1e-5 * np.abs(A).max()
        torch.testing.assert_close(found[limit].solved, found[99].solved, rtol=1e-3, atol=1e-4)
    # Which way a layer went is in its bits.
    for small, large in itertools.pairwise(widest):
        both = (parts(found[limit].factors, sizes) for limit in (small, large))
        for r, ours, theirs in zip(sizes, *both, strict=True):
            assert np.array_equal(ours, theirs) == (not widest[small] < r <= widest[large])


@pytest.mark.backends("cpu", "cuda")  # LAPACK's bits depend on its threads
@pytest.mark.parametrize("width", ["wide", "narrow"])
def test_bits_depend_on_the_layer_alone(backend, width):
    sizes, m = (*SIZES, 8, 8, 60, 61, 62, 64, 64, 64, 63, 9, 20, 96), 67
    if backend.name == "cuda":  # many take long on the host
        sizes = (0, 1, 8, 9, 31, 64, 65, 130)
    if width == "wide":
        sizes, m = (9, 330, 321), 17
    matrices, shift = layers("spread", sizes)
    rows = random_rows(m, sum(sizes))
    offsets, starts = bounds(sizes), bounds([r * r for r in sizes])
    one = ops.damped_cholesky(matrices, offsets, shift, rows=rows, backend=backend.name)
    for _ in numbers_of_threads() if backend.name == "cpu" else [1]:
        together = ops.damped_cholesky(matrices, offsets, shift, rows=rows, backend=backend.name)
        assert torch.equal(together.factors, one.factors)
        assert torch.equal(together.solved, one.solved)
    for l, r in enumerate(sizes):
        columns_l = slice(offsets[l], offsets[l + 1])
        alone = ops.damped_cholesky(
            matrices[starts[l] : starts[l + 1]],
            (0, r),
            shift[l : l + 1],
            rows=rows[:3, columns_l],
            backend=backend.name,
        )
        assert torch.equal(alone.factors, one.factors[starts[l] : starts[l + 1]])
        assert torch.equal(alone.solved, one.solved[:3, columns_l])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"matrices": torch.zeros(12)}, r"matrices must be contiguous \[13\]"),
        ({"matrices": torch.zeros(13).int()}, "matrices must be float32 or float64"),
        ({"matrices": torch.zeros(13).bfloat16()}, "matrices must be float32 or float64"),
        ({"matrices": torch.zeros(26)[::2]}, r"matrices must be contiguous \[13\]"),
        ({"offsets": (0, 3, 2)}, "offsets must rise from 0"),
        ({"offsets": (1, 3, 5)}, "offsets must rise from 0"),
        ({"offsets": ()}, "offsets must rise from 0"),
        ({"shift": torch.zeros(3)}, r"shift must be contiguous \[2\]"),
        ({"shift": torch.zeros(2).double()}, "shift must be torch.float32"),
        ({"rows": torch.zeros(2, 4)}, r"rows must be \[m, R=5\]"),
        ({"rows": torch.zeros(5)}, r"rows must be \[m, R=5\]"),
        ({"rows": torch.zeros(2, 5).double()}, "rows must be torch.float32"),
        ({"out": torch.zeros(12)}, r"out must be contiguous \[13\]"),
        ({"out": torch.zeros(13).double()}, "out must be torch.float32"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    call = {"matrices": torch.zeros(13), "offsets": (0, 3, 5), "shift": 1.0} | change
    with pytest.raises(ValueError, match=message):
        ops.damped_cholesky(**call)


def test_float64_goes_to_reference():
    factors, *_ = ops.damped_cholesky(4.0 * torch.eye(3).double().flatten(), (0, 3))
    assert torch.equal(factors, 2.0 * torch.eye(3).double().flatten())
    if dropinf.backends()["cpu"] == "available":
        with pytest.raises(dropinf.BackendError, match="float64"):
            ops.damped_cholesky(torch.eye(3).double().flatten(), (0, 3), backend="cpu")


def test_opcheck():
    if dropinf.backends()["cpu"] != "available":
        pytest.skip(dropinf.backends()["cpu"])
    torch.use_deterministic_algorithms(False)
    matrices, shift = layers("spread", (3, 9))
    matrices = matrices.nan_to_num()
    rows, info = random_rows(2, 12), torch.zeros(2, dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.dropinf.damped_cholesky.default,
        (
            matrices,
            torch.tensor([0, 3, 12]),
            shift,
            rows,
            torch.zeros_like(matrices),
            info,
            torch.zeros_like(rows),
        ),
    )
