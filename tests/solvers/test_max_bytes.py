"""max_bytes bounds what fit, solve and self-influences have in memory, and changes no result."""

from functools import partial

import pytest
import torch
from live_bytes import measured
from score_cases import stores

from dropinf import RowStore, ensemble, scores, self_influence
from dropinf.solvers import CG, Cholesky, DataInf, Diagonal, Eigen, Full, Identity, LiSSA

SOLVERS = {
    "cholesky": Cholesky,
    "full": Full,
    "eigen": Eigen,
    "eigen of rank 3": partial(Eigen, rank=3),
    "cg": partial(CG, 10.0, tol=1e-9),
    "lissa": partial(LiSSA, 10.0, tol=1e-9),
    "lissa, sampled": partial(LiSSA, 10.0, depth=5, batch_size=100),
    "datainf": DataInf,
    "diagonal": Diagonal,
    "identity": Identity,
    "cosine": partial(Identity, cosine=True),
}
PASSES = ("cg", "lissa", "lissa, sampled", "datainf")  # over the store at each solve
# In float32 the bound is half as many bytes, and what is done in parts takes many times as long.
TYPES = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.more), torch.float64], ids=str
)


def case(name, dtype):
    """A store with invalid rows, queries, and a bound that is a share of the store."""
    n, m, share = (200, 40, 1) if name in PASSES else (1000, 300, 1 if name == "full" else 4)
    store, queries = stores(n, m, *[16] * 4, dtype=dtype)
    store.valid[[1, n // 2]] = False
    return store, queries, store.num_bytes // share


def check_close(got, truth):
    """As far as sums in another order, or iterations to 1e-9, are the same."""
    bound = {torch.float32: 1e-5, torch.float64: 1e-8}[got.dtype]
    bound *= truth[truth.isfinite()].abs().max().item()
    torch.testing.assert_close(got, truth, rtol=0, atol=bound, equal_nan=True)


@TYPES
@pytest.mark.parametrize("name", SOLVERS)
def test_fit_and_solve(name, dtype):
    store, queries, bound = case(name, dtype)
    queries.rows[7, 3] = torch.nan  # the others are solved for without it
    fit = measured(lambda: SOLVERS[name](max_bytes=bound).fit(store))
    solve = measured(lambda: fit.result.solve(queries.rows))
    assert fit.peak <= bound
    assert fit.left + solve.peak - queries.num_bytes <= bound
    check_close(solve.result, SOLVERS[name]().fit(store).solve(queries.rows))


@pytest.mark.parametrize("name", PASSES)
def test_more_queries_than_have_room(name):
    """Of a layer alone, too: they are solved for some at a time."""
    store, queries = stores(100, 300, 400, 400, dtype=torch.float64)
    bound = 1_000_000
    solver = SOLVERS[name](max_bytes=bound).fit(store)
    solve = measured(lambda: solver.solve(queries.rows))
    assert queries.num_bytes > bound and solve.peak - queries.num_bytes <= bound
    check_close(solve.result, SOLVERS[name]().fit(store).solve(queries.rows))


@TYPES
@pytest.mark.parametrize("name", [name for name in SOLVERS if "lissa" not in name])
def test_self_influence(name, dtype):
    store, _, bound = case(name, dtype)
    fit = measured(lambda: SOLVERS[name](max_bytes=bound).fit(store))
    own = measured(lambda: self_influence(store, fit.result))
    assert fit.left + own.peak - own.result.nbytes <= bound
    check_close(own.result, self_influence(store, SOLVERS[name]().fit(store)))


@pytest.mark.parametrize("name", ["cholesky", "eigen", "datainf", "diagonal"])
def test_relative_scores(name):
    """Beside the solutions of the queries and the scores there are the factors of the rows."""
    store, queries, bound = case(name, torch.float64)
    queries = RowStore(queries.rows[:3], queries.plan)
    fit = measured(lambda: SOLVERS[name](max_bytes=bound).fit(store))
    found = measured(lambda: scores(queries, store, fit.result, relative=True))
    beside = found.result.nbytes + queries.num_bytes + 3 * 8 * len(store)
    assert fit.left + found.peak - beside <= bound
    truth = scores(queries, store, SOLVERS[name]().fit(store), relative=True)
    check_close(found.result, truth)


@TYPES
@pytest.mark.parametrize("name", ["cholesky", "full", "eigen"])
def test_sweep(name, dtype):
    store, queries, bound = case(name, dtype)
    queries = RowStore(queries.rows[:60], queries.plan)
    dampings = [0.03, 0.1, 1.0, 3.0, 10.0]
    bound *= 2 if name == "full" else 1
    fit = measured(lambda: SOLVERS[name](max_bytes=bound).fit(store))
    swept = measured(lambda: fit.result.sweep(dampings, queries))
    assert fit.left + swept.peak - swept.result.nbytes <= bound
    check_close(swept.result, SOLVERS[name]().fit(store).sweep(dampings, queries))


@pytest.mark.parametrize("n, sizes", [(20, [100] * 12), (400, [20] * 60)], ids=["n < r", "r < n"])
@pytest.mark.parametrize("name", ["cholesky", "eigen"])
def test_what_is_kept_goes_to_a_file(name, n, sizes):
    store, queries = stores(n, 30, *sizes)
    bound = 40_000 if name == "cholesky" else 150_000
    fit = measured(lambda: SOLVERS[name](max_bytes=bound).fit(store))
    solve = measured(lambda: fit.result.solve(queries.rows))
    assert fit.peak <= bound and fit.left < bound // 4
    assert fit.left + solve.peak - queries.num_bytes <= bound
    whole = measured(lambda: SOLVERS[name]().fit(store))
    check_close(solve.result, whole.result.solve(queries.rows))


def test_ensemble_keeps_one_part():
    parts = [(*stores(900, 40, 5, seed=seed)[::-1], Identity()) for seed in range(3)]
    for _, store, solver in parts:
        solver.fit(store)
    found = measured(lambda: ensemble(parts))
    size = 8 * 40 * 900
    assert found.peak <= 3.1 * size + 8 * 40 * 5  # mean, error, and the scores of one part


@pytest.mark.parametrize("name", SOLVERS)
def test_bounds_that_are_too_small(name):
    """A bound that the message gives is enough for what it names."""
    store, queries = stores(40, 9, 12, 30)
    calls = {
        "solve": lambda solver: solver.solve(queries.rows),
        "self-influence": lambda solver: self_influence(store, solver),
        "sweep": lambda solver: solver.sweep([0.1, 1.0], queries),
    }
    if name in ("identity", "cosine", "lissa, sampled"):
        del calls["solve"]  # which takes no memory, or
    if not hasattr(SOLVERS[name]().fit(store), "sweep"):
        del calls["sweep"]
    for what, call in calls.items():
        bound, said = 300, 0
        for _ in range(20):
            try:
                call(SOLVERS[name](max_bytes=bound).fit(store))
                break
            except ValueError as error:
                assert f", got {bound}; raise it, or keep fewer coordinates" in str(error)
                needed = int(str(error).split("needs max_bytes=")[1].split()[0])
                assert needed > bound
                bound, said = needed, said + 1
        else:
            pytest.fail(f"{what}: the bounds of the messages are not enough")
        assert said
    with pytest.raises(ValueError, match="max_bytes must be positive, got 0"):
        SOLVERS[name](max_bytes=0)
