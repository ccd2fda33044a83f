"""sweep against separate fits, and choose_damping against its definition in numpy."""

import itertools

import numpy as np
import pytest
import torch
from score_cases import stores

from dropinf import Dropout, Plan, RowStore, choose_damping, scores
from dropinf.solvers import Cholesky, Eigen, Full

DAMPINGS = [1e-3, 0.1, 10.0]


@pytest.mark.parametrize("solver", [Cholesky, Full, Eigen])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("n, sizes", [(60, (5, 17, 30)), (12, (5, 12, 13, 60)), (1, (4, 1))])
def test_sweep_equals_separate_fits(solver, absolute, n, sizes):
    store, queries = stores(n, 7, *sizes)
    rows = store.rows.clone()
    valid = torch.ones(n, dtype=torch.bool)
    if n > 1:
        rows[3] = 1000
        valid[3] = False
    store = RowStore(rows, store.plan, valid)
    queries = RowStore(queries.rows, store.plan, torch.arange(7) != 2)
    swept = solver(absolute=absolute).fit(store).sweep(DAMPINGS, queries)
    assert swept.shape == (3, 7, n)
    for damping, got in zip(DAMPINGS, swept, strict=True):
        fitted = solver(damping, absolute=absolute).fit(store)
        truth = scores(queries, store, fitted)
        bound = 1e-8 * truth[~truth.isnan()].abs().max().item()
        torch.testing.assert_close(got, truth, rtol=0, atol=bound, equal_nan=True)


def test_sweep_over_other_rows(tmp_path):
    """The training rows may be others than those of the fit; a loaded solver needs both."""
    fitted, queries = stores(60, 4, 5, 17)
    other = RowStore(torch.randn(9, 22, dtype=torch.float64), fitted.plan)
    solver = Cholesky().fit(fitted)
    got = solver.sweep([0.3], queries, other)[0]
    torch.testing.assert_close(got, scores(queries, other, Cholesky(0.3).fit(fitted)))
    solver.save(tmp_path / "solver")
    with pytest.raises(ValueError, match=r"sweep: needs the rows .*Cholesky\.load\(path, store\)"):
        Cholesky.load(tmp_path / "solver").sweep([0.3], queries, other)
    loaded = Cholesky.load(tmp_path / "solver", fitted)
    torch.testing.assert_close(loaded.sweep([0.3], queries, other)[0], got)
    with pytest.raises(ValueError, match="queries were made under plan"):
        solver.sweep([0.3], stores(3, 3, 7)[0])
    with pytest.raises(ValueError, match="damping must be a number from 0, got -1"):
        solver.sweep([-1], queries)
    with pytest.raises(RuntimeError, match=r"Cholesky\.sweep: the solver was not fitted; call fit"):
        Cholesky().sweep([0.3], queries)


def parts_of(num_masks, n=50, m=6, seed=0):
    """(queries, store, solver) of the same examples under several masks, with true signal."""
    rng = np.random.default_rng(seed)
    model = torch.nn.Sequential(torch.nn.Linear(10, 6), torch.nn.Linear(6, 4))
    P = sum(p.numel() for p in model.parameters())
    train, asked = rng.standard_normal((n, 5)), rng.standard_normal((m, 5))
    mix = rng.standard_normal((5, P))
    train, asked = (
        torch.from_numpy(a @ mix + 0.5 * rng.standard_normal((len(a), P))) for a in (train, asked)
    )
    train[:9] = 0  # their scores tie
    parts = []
    for mask in range(num_masks):
        plan = Plan.make(model, Dropout(r=12, seed=mask))
        columns, first = [], 0
        for slot in plan.slots:
            columns.append(slot.index + first)
            first += int(np.prod(slot.shape))
        columns = torch.cat(columns)
        store = RowStore(train[:, columns].contiguous(), plan)
        queries = RowStore(asked[:, columns].contiguous(), plan)
        parts.append((queries, store, Cholesky().fit(store)))
    return parts


def spearman(a, b):
    """Pearson of the ranks, of which ties share the mean."""
    a, b = ([(x < v).sum() + (x <= v).sum() for v in x] for x in (a, b))
    return np.corrcoef(a, b)[0, 1]


def test_choose_by_consistency():
    parts = parts_of(3)
    dampings = [10.0, 1e-6, 0.1, 1e-2]
    choice = choose_damping(dampings, parts, "agreement")
    expected = []
    for damping in dampings:
        each = [scores(q, s, Cholesky(damping).fit(s)).numpy() for q, s, _ in parts]
        pairs = itertools.combinations(each, 2)
        expected.append(
            np.mean([[spearman(x, y) for x, y in zip(a, b, strict=True)] for a, b in pairs], 0)
        )
    expected = np.array(expected)
    values, errors = expected.mean(1), expected.std(1, ddof=1) / np.sqrt(6)
    np.testing.assert_allclose(choice.values, values, atol=1e-9)
    np.testing.assert_allclose(choice.errors, errors, atol=1e-9)
    best = values.argmax()
    near = [d for d, v in zip(dampings, values, strict=True) if v >= values[best] - errors[best]]
    assert choice.damping == min(near)
    assert choice.damping > 1e-6  # which inverts the noise


def test_choose_by_metric():
    parts = parts_of(2)
    seen = []

    def metric(found):
        assert found.shape == (6, 50)
        seen.append(found)
        return -abs(len(seen) - 2)  # the second call of each part is best

    one = choose_damping(DAMPINGS, parts[:1], metric)
    assert one.damping == DAMPINGS[1] and one.errors.isnan().all()
    assert one.values.tolist() == [-1, 0, -1]
    torch.testing.assert_close(seen[2], scores(*parts[0][:2], Cholesky(10.0).fit(parts[0][1])))
    both = choose_damping(DAMPINGS, parts, lambda found: float(found.abs().mean()))
    assert both.damping == 1e-3 and (both.errors > 0).all()


def test_scores_without_an_order_agree_with_nothing():
    parts = []
    for queries, store, _ in parts_of(2):
        store = RowStore(torch.zeros_like(store.rows), store.plan)
        parts.append((queries, store, Cholesky().fit(store)))
    assert choose_damping([0.1, 1.0], parts, "agreement").values.tolist() == [0, 0]


def test_bad_input():
    parts = parts_of(2)
    with pytest.raises(ValueError, match="no dampings"):
        choose_damping([], parts)
    with pytest.raises(ValueError, match="1 masks or more, got 0"):
        choose_damping([0.1], [])
    with pytest.raises(ValueError, match="2 masks or more, got 1"):
        choose_damping([0.1], parts[:1], "agreement")
    with pytest.raises(ValueError, match="two parts have the same plan"):
        choose_damping([0.1], [parts[0], parts[0]], "agreement")
    with pytest.raises(ValueError, match="differ in queries or examples"):
        choose_damping([0.1], [parts[0], parts_of(2, n=40)[1]], "agreement")
    with pytest.raises(ValueError, match="'noise', 'likelihood', 'agreement', got 'loss'"):
        choose_damping([0.1], parts, "loss")
    with pytest.raises(ValueError, match="got None"):
        choose_damping([0.1], parts, None)
    queries, store, solver = parts[0]
    none = RowStore(queries.rows, store.plan, torch.zeros(len(queries), dtype=torch.bool))
    with pytest.raises(ValueError, match="no query is valid"):
        choose_damping([0.1], [(none, store, solver)], "likelihood")
    zero = RowStore(torch.zeros_like(store.rows), store.plan)
    with pytest.raises(ValueError, match="every row of the fit is zero"):
        choose_damping([0.1], [(queries, zero, Cholesky(absolute=True).fit(zero))])
    with pytest.raises(RuntimeError, match="the solver was not fitted"):
        choose_damping([0.1], [(queries, store, Cholesky())])


@pytest.mark.parametrize("solver", [Cholesky, Eigen])
@pytest.mark.parametrize("n, sizes, best", [(60, (6, 6), 0.1), (12, (12, 12), 1.0)])
def test_noise_is_the_mean_over_entries_of_decades(solver, n, sizes, best):
    """r / n is the relative damping; and trace / n the absolute one."""
    store, queries = stores(n, 3, *sizes)
    part = [(queries, store, solver().fit(store))]
    choice = choose_damping([1e-3, 0.1, 1.0, 100.0], part)
    assert choice.damping == best and choice.metric == "noise" and not choice.at_edge
    off = [-abs(np.log10(d * n / sizes[0])) for d in choice.dampings]
    np.testing.assert_allclose(choice.values, off, atol=1e-12)
    rows = store.rows.double().numpy().reshape(n, 2, sizes[0])
    noise = (rows**2).sum((0, 2)) / n**2  # trace / n of both layers
    part = [(queries, store, solver(absolute=True).fit(store))]
    choice = choose_damping([1e-6, noise[0], 1e6], part)
    off = [-np.abs(np.log10(λ / noise)).mean() for λ in choice.dampings]
    np.testing.assert_allclose(choice.values, off, atol=1e-9)
    assert choice.damping == noise[0]


def test_noise_goes_by_the_layers_with_most_entries():
    store, queries = stores(100, 3, 2, 50)
    part = [(queries, store, Cholesky().fit(store))]
    choice = choose_damping([0.02, 0.5, 10.0], part)
    assert choice.damping == 0.5
    off = -(50 * 0 + 2 * np.log10(25)) / 52
    assert float(choice.values[1]) == pytest.approx(off, abs=1e-12)


@pytest.mark.parametrize("solver", [Cholesky, Eigen])
@pytest.mark.parametrize("n, sizes", [(60, (5, 17)), (9, (5, 17))])
def test_likelihood_of_held_out_queries(solver, n, sizes):
    """Against scipy's density of a Gaussian."""
    stats = pytest.importorskip("scipy.stats")
    store, queries = stores(n, 7, *sizes)
    queries = RowStore(queries.rows, store.plan, torch.arange(7) != 2)
    part = [(queries, store, solver().fit(store))]
    dampings = [0.03, 0.3, 30.0]
    choice = choose_damping(dampings, part, "likelihood")
    asked = queries.rows[queries.valid].double().numpy()
    expected = np.zeros((6, 3))
    for block in store.plan.blocks:
        G = store.rows[:, block.entries].double().numpy()
        F = G.T @ G / n
        for k, damping in enumerate(dampings):
            covariance = F + damping * np.trace(F) / len(F) * np.eye(len(F))
            normal = stats.multivariate_normal(cov=covariance)
            expected[:, k] += normal.logpdf(asked[:, block.entries])
    np.testing.assert_allclose(choice.values, expected.mean(0), rtol=1e-7)
    np.testing.assert_allclose(choice.errors, expected.std(0, ddof=1) / 6**0.5, rtol=1e-6)
    assert choice.damping == dampings[int(expected.mean(0).argmax())]


def test_likelihood_finds_the_ridge_of_a_gaussian():
    """Of queries whose covariance is F + λ itself."""
    store, _ = stores(40, 1, 60)
    G = store.rows.double()
    F = G.T @ G / 40
    λ = 0.3 * F.trace() / 60
    root = torch.linalg.cholesky(F + λ * torch.eye(60))
    noise = torch.randn(500, 60, generator=torch.Generator().manual_seed(1)).double()
    queries = RowStore(noise @ root.T, store.plan)
    dampings = [0.003, 0.03, 0.3, 3.0]
    choice = choose_damping(dampings, [(queries, store, Eigen().fit(store))], "likelihood")
    assert choice.damping == 0.3


def test_the_edge_is_said():
    parts = parts_of(1)
    with pytest.warns(UserWarning, match="0.001 is at the end of the dampings given"):
        choice = choose_damping([1e-5, 1e-4, 1e-3], parts)
    assert choice.at_edge and "a better one may be beyond" in str(choice)
    assert not choose_damping([0.3], parts).at_edge
    lines = str(choose_damping([10.0, 1e-3, 0.3], parts)).splitlines()
    assert len(lines) == 4 and "decades" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["0.001", "0.3", "10"]
    assert ["chosen" in line for line in lines[1:]] == [False, True, False]
