"""float32 rows: scores at any damping, and of rows of any size, against float64 of numpy."""

import numpy as np
import pytest
import torch

import dropinf
from dropinf import RowStore
from dropinf.solvers import CG, Cholesky, DataInf, Diagonal, Eigen, Full, Identity, LiSSA

plan = dropinf.Plan.make(torch.nn.Linear(40, 1, bias=False), dropinf.Full())


def stores(n, rank, size=1.0):
    """n rows of that rank and size; 4 queries of size one, most of each outside of their span."""
    generator = torch.Generator().manual_seed(n + rank)
    basis, parts, queries = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rank, 40), (n, rank), (4, 40))
    )
    return RowStore((size * parts @ basis).float(), plan), RowStore(queries.float(), plan)


def truth(store, queries, damping):
    """By the singular values of the rows, of which no square is taken apart."""
    G, q = (s.rows.double().numpy() for s in (store, queries))
    s, Vt = np.linalg.svd(G, full_matrices=True)[1:]
    values = np.zeros(G.shape[1])
    values[: len(s)] = s**2 / len(G)
    return (q @ Vt.T) / (values + damping * values.mean()) @ (G @ Vt.T).T


def off(found, exact):
    return np.linalg.norm(found.double().numpy() - exact) / np.linalg.norm(exact)


DEFICIENT = [(Eigen, 60), (Eigen, 10), (Cholesky, 60), (Cholesky, 10), (Full, 60), (Full, 10)]
DEFICIENT += [(CG, 60), (CG, 10)]


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6, 1e-7])
@pytest.mark.parametrize("solver, n", DEFICIENT)
@pytest.mark.filterwarnings("ignore:CG.fit")
def test_little_damping_of_rows_of_rank_5(solver, n, damping):
    """What rows do not span of a query is 1/λ of it in the solution, and must cancel in scores."""
    store, queries = stores(n, rank=5)
    exact = truth(store, queries, damping)
    try:
        fitted = solver(damping).fit(store)
        found = dropinf.scores(queries, store, fitted)
    except RuntimeError as error:
        assert solver is CG and damping <= 1e-6 and "take Cholesky or Eigen" in str(error)
        return
    assert found.dtype == torch.float32
    assert off(found, exact) < 1e-4
    values, indices = dropinf.topk(queries, store, fitted, k=3)
    assert values.dtype == torch.float32
    assert torch.equal(values, found.gather(1, indices))
    assert off(values, np.sort(exact)[:, :-4:-1]) < 1e-4
    if isinstance(fitted, Cholesky):
        assert off(fitted.sweep([damping], queries)[0], exact) < 1e-4


def test_rows_that_say_nothing_come_first():
    """Invalid ones, and those of a batch that the layer has nothing of."""
    store, queries = stores(60, rank=5)
    exact = truth(store, queries, 1e-6)
    rows = torch.cat([torch.zeros(90, 40), store.rows])
    for valid in (torch.arange(150) >= 90, torch.arange(150) >= 40):
        padded = RowStore(rows, plan, valid)
        zeros = int((~valid).sum())
        fitted = Eigen(1e-6).fit(padded)
        found = dropinf.scores(queries, padded, fitted)[:, 90:]
        λ = 150 - zeros  # zeros among the valid rows scale F, and with it λ
        assert off(found * (60 / λ), exact) < 1e-4


def test_digits_that_are_lost_are_said():
    store, queries = stores(60, rank=5)
    with pytest.warns(UserWarning, match=r"CG\.fit: layer .* can leave a solution off"):
        CG(1e-6).fit(store)
    with pytest.warns(UserWarning, match=r"Eigen\.fit: layer .* keep few digits"):
        fitted = Eigen(1e-12).fit(store)
    with pytest.warns(UserWarning, match=r"Eigen\.solve_at: layer .* keep few digits"):
        fitted.solve_at(queries.rows, 1e-13)


def test_eigen_of_a_graded_spectrum():
    """Eigenvalues down to 1e-12 of the largest, whose vectors must not lean towards the others."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((r, 12)))[0] for r in (12, 40))
    store = RowStore(torch.from_numpy(U * np.logspace(0, -6, 12) @ V.T), plan)
    queries = RowStore(torch.from_numpy(rng.standard_normal((3, 40))), plan)
    for damping in (1e-3, 1e-6, 1e-9):
        found = dropinf.scores(queries, store, Eigen(damping).fit(store))
        assert off(found, truth(store, queries, damping)) < 2e-6


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-12, 1e12, 1e18, 1e25])
@pytest.mark.parametrize("solver", [Cholesky, Full, Eigen, CG, Diagonal])
@pytest.mark.parametrize("n", [60, 10])
def test_rows_of_any_size(solver, size, n):
    """Squares of rows, and solutions, leave what float32 can hold; scores do not."""
    store, queries = stores(n, 8, size)
    fitted = solver(0.1).fit(store)
    found = dropinf.scores(queries, store, fitted)
    if solver is Diagonal:
        G, q = (s.rows.double().numpy() for s in (store, queries))
        squares = (G**2).mean(0)
        exact = q / (squares + 0.1 * squares.mean()) @ G.T
    else:
        exact = truth(store, queries, 0.1)
    assert off(found, exact) < 2e-5
    assert torch.equal(dropinf.topk(queries, store, fitted, k=1)[0][:, 0], found.amax(1))
    own = dropinf.self_influence(store, fitted)
    if solver is not Diagonal:
        assert off(own, np.diag(truth(store, store, 0.1))) < 2e-5


@pytest.mark.parametrize("exponents", [(83, 83), (-90, -90), (-139, -139), (83, 0), (-139, 0)])
@pytest.mark.parametrize("solver", [Cholesky, Eigen, CG, Diagonal])
def test_queries_as_large_as_rows(solver, exponents):
    """A power of two in both is in no score. One layer in each form of Cholesky."""
    layers, generator = [30, 150], torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(r, 1, bias=False) for r in layers))
    two = dropinf.Plan.make(model, dropinf.Full())
    power = torch.tensor([2.0**e for e in exponents], dtype=torch.float64)
    power = power.repeat_interleave(torch.tensor(layers))
    # Few bits, which numbers as small as 2^-139 still have.
    rows = [torch.randint(-64, 65, (k, 180), generator=generator) for k in (60, 4)]
    plain, (store, queries) = (
        [RowStore((r * p).float(), two) for r in rows] for p in (torch.ones(180), power)
    )
    exact = dropinf.scores(*plain[::-1], solver(0.1).fit(plain[0]))
    found = dropinf.scores(queries, store, solver(0.1).fit(store))
    assert off(found, exact.double().numpy()) < 1e-5


def test_queries_beyond_float32():
    """float64 queries of any size, with factors in float32."""
    store, queries = stores(60, 40)
    fitted, q = Cholesky().fit(store), queries.rows.double()
    for exponent in (-200, 200):
        assert torch.equal(fitted.solve(q * 2.0**exponent), fitted.solve(q) * 2.0**exponent)


ANY = [Cholesky, Full, Eigen, CG, LiSSA, DataInf, Diagonal]


@pytest.mark.parametrize("solver", [*ANY, Identity])
def test_scores_beyond_float32_are_refused(solver):
    """Not infinite, nor NaN: the layer is named, and float64 rows have the same scores."""
    size = 2.0**70 if solver is Identity else 2.0**-70
    store, queries = stores(60, 40, size)
    large = RowStore(queries.rows * 2.0**90, plan)
    fitted = solver().fit(store)
    calls = [
        lambda: dropinf.scores(large, store, fitted),
        lambda: dropinf.topk(large, store, fitted, k=2),
        lambda: dropinf.self_influence(large, fitted),
    ]
    if hasattr(fitted, "sweep"):
        calls.append(lambda: fitted.sweep([0.1], large))
    for call in calls:
        with pytest.raises(ValueError, match=r"beyond the range of torch.float32, by layer ''; sc"):
            call()
    wide, asked = (RowStore(s.rows.double(), plan) for s in (store, large))
    found = dropinf.scores(asked, wide, solver().fit(wide))
    smaller = dropinf.scores(queries, store, fitted).double() * 2.0**90
    assert found.isfinite().all() and off(found, smaller.numpy()) < 1e-3


@pytest.mark.parametrize("exponent, what", [(-540, "small"), (520, "large")])
@pytest.mark.parametrize("solver", ANY)
@pytest.mark.parametrize("n", [60, 10])
def test_squares_beyond_float64_are_refused(solver, n, exponent, what):
    store, _ = stores(n, 40)
    rows = store.rows.double() * 2.0**exponent
    with pytest.raises(ValueError, match=rf"fit: the squares of layer '.*' are too {what} for fl"):
        solver().fit(RowStore(rows, plan))


def test_an_absolute_damping_beside_tiny_rows():
    store, queries = stores(60, 40, 1e-20)
    found = dropinf.scores(queries, store, Cholesky(1.0, absolute=True).fit(store))
    exact = queries.rows.double() @ store.rows.double().T
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max())


def test_sizes_survive_a_file(tmp_path):
    store, queries = stores(60, 40, 1e-20)
    fitted = Cholesky(0.1).fit(store)
    fitted.save(tmp_path / "solver")
    again = Cholesky.load(tmp_path / "solver")
    exact = dropinf.scores(queries, store, fitted)
    assert torch.equal(dropinf.scores(queries, store, again), exact) and exact.any()


def test_what_float32_holds_is_solved_once(monkeypatch):
    store, queries = stores(60, 40)
    fitted, dtypes = Cholesky(0.1).fit(store), []
    solve = fitted.solve
    monkeypatch.setattr(fitted, "solve", lambda q: dtypes.append(q.dtype) or solve(q))
    dropinf.scores(queries, store, fitted)
    assert dtypes == [torch.float32]
