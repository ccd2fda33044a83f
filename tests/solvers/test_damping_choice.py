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
    choice = choose_damping(dampings, parts)
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
    assert choose_damping([0.1, 1.0], parts).values.tolist() == [0, 0]


def test_bad_input():
    parts = parts_of(2)
    with pytest.raises(ValueError, match="no dampings"):
        choose_damping([], parts)
    with pytest.raises(ValueError, match="two masks or more, got 1"):
        choose_damping([0.1], parts[:1])
    with pytest.raises(ValueError, match="two parts have the same plan"):
        choose_damping([0.1], [parts[0], parts[0]])
    with pytest.raises(ValueError, match="differ in queries or examples"):
        choose_damping([0.1], [parts[0], parts_of(2, n=40)[1]])
