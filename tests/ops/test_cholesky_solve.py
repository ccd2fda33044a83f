"""cholesky_solve: every layer's slice of the rows times the inverse of its matrix."""

import numpy as np
import pytest
import torch
from cholesky_cases import bounds, columns, guarded, parts, random_rows, sizes_for
from conftest import EPS32, numbers_of_threads

import dropinf
from dropinf import ops

OPS = ("cholesky_solve", "damped_cholesky")


def factors_of(sizes, seed=0):
    """Lower factors with diagonals well away from zero."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.empty(0)]
    for r in sizes:
        lower = torch.randn(r, r, generator=generator).tril() / max(r, 1) ** 0.5
        lower.diagonal().abs_().add_(1.0)
        made.append(lower.flatten())
    return torch.cat(made)


@pytest.mark.parametrize("m", [1, 7, 16, 61])
def test_cholesky_solve(backend, m):
    sizes = sizes_for(backend, once=m == 7)
    factors, rows = factors_of(sizes), random_rows(m, sum(sizes))
    solved = ops.cholesky_solve(factors, bounds(sizes), rows, backend=backend.name)
    for L, q, x in zip(
        parts(factors, sizes), columns(rows, sizes), columns(solved, sizes), strict=True
    ):
        if not len(L):
            continue
        A = L @ L.T
        exact = np.linalg.solve(A, q.T).T
        theirs = torch.cholesky_solve(
            torch.from_numpy(q.T).float(), torch.from_numpy(L).float()
        ).T.double()
        floor = 8 * EPS32 * np.linalg.norm(A) * np.linalg.norm(exact)
        assert np.linalg.norm(x @ A - q) <= 2 * np.linalg.norm(theirs.numpy() @ A - q) + floor
        error = np.linalg.norm(x - exact)
        assert error <= 2 * np.linalg.norm(theirs.numpy() - exact) + 8 * EPS32 * np.linalg.norm(
            exact
        ) * np.linalg.cond(A)


# Several right-hand sides at a time beside a wide layer; more than the factors' own launch takes.
@pytest.mark.parametrize("sizes, m", [((9, 70, 8, 200, 8, 8, 7, 6), 21), ((9, 33, 8), 150)])
def test_same_bits_as_damped_cholesky(backend, sizes, m):
    rows = random_rows(m, sum(sizes))
    matrices = torch.cat([2.0 * torch.eye(r).flatten() + 1 / (r + 3) for r in sizes])
    factors, _, solved = ops.damped_cholesky(
        matrices, bounds(sizes), 0.5, rows=rows, backend=backend.name
    )
    assert torch.equal(
        ops.cholesky_solve(factors, bounds(sizes), rows, backend=backend.name), solved
    )
    if backend.name != "reference":
        few = ops.cholesky_solve(factors, bounds(sizes), rows[-3:], backend=backend.name)
        assert torch.equal(few, solved[-3:])


def test_in_place_strided_and_nothing_else_written(backend):
    sizes = sizes_for(backend)
    factors, offsets, R = factors_of(sizes), bounds(sizes), sum(sizes)
    rows = random_rows(26, R + 6)[::2, 2:-4]
    plain = ops.cholesky_solve(factors, offsets, rows.contiguous(), backend=backend.name)
    out, untouched = guarded((13, R))
    assert ops.cholesky_solve(factors, offsets, rows, out=out, backend=backend.name) is out
    assert torch.equal(out, plain) and untouched()
    wide, _ = guarded((13, R + 6))
    ops.cholesky_solve(factors, offsets, rows, out=wide[:, 3:-3], backend=backend.name)
    assert torch.equal(wide[:, 3:-3], plain)
    assert wide[:, :3].isnan().all() and wide[:, -3:].isnan().all()
    assert ops.cholesky_solve(factors, offsets, rows, out=rows, backend=backend.name) is rows
    assert torch.equal(rows, plain)


@pytest.mark.backends("cpu")
def test_many_rows_and_threads(backend):
    sizes = (300, 20, 20, 20, 20)
    factors, rows = factors_of(sizes), random_rows(500, sum(sizes))
    one = ops.cholesky_solve(factors, bounds(sizes), rows, backend="cpu")
    few = ops.cholesky_solve(factors, bounds(sizes), rows[100:103], backend="cpu")
    assert torch.equal(one[100:103], few)
    for _ in numbers_of_threads():
        assert torch.equal(ops.cholesky_solve(factors, bounds(sizes), rows, backend="cpu"), one)


def test_empty_and_failed(backend):
    for offsets, m in (((0,), 3), ((0, 0), 3), ((0, 3), 0)):
        factors = torch.eye(3).flatten()[: 9 * bool(offsets[-1])]
        rows = torch.zeros(m, offsets[-1])
        assert ops.cholesky_solve(factors, offsets, rows, backend=backend.name).shape == rows.shape
    factors = torch.cat([torch.full((16,), torch.nan), torch.eye(2).flatten()])
    solved = ops.cholesky_solve(factors, (0, 4, 6), torch.ones(2, 6), backend=backend.name)
    assert solved[:, :4].isnan().all() and (solved[:, 4:] == 1).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"factors": torch.zeros(12)}, r"factors must be contiguous \[13\]"),
        ({"factors": torch.zeros(13).half()}, "factors must be float32 or float64"),
        ({"rows": torch.zeros(2, 6)}, r"rows must be \[m, R=5\]"),
        ({"rows": torch.zeros(2, 5).double()}, "rows must be torch.float32"),
        ({"out": torch.zeros(3, 5)}, r"out must be \(2, 5\)"),
        ({"out": torch.zeros(5, 2).T}, "stride 1 in R"),
        ({"out": torch.zeros(2, 5).double()}, "out must be torch.float32"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    call = {"factors": torch.zeros(13), "offsets": (0, 3, 5), "rows": torch.zeros(2, 5)} | change
    with pytest.raises(ValueError, match=message):
        ops.cholesky_solve(**call)


def test_opcheck():
    if dropinf.backends()["cpu"] != "available":
        pytest.skip(dropinf.backends()["cpu"])
    torch.use_deterministic_algorithms(False)
    rows = random_rows(2, 12)
    torch.library.opcheck(
        torch.ops.dropinf.cholesky_solve.default,
        (factors_of((3, 9)), torch.tensor([0, 3, 12]), rows, torch.zeros_like(rows)),
    )
