"""Solvers and scores against the formula in float64, written out densely."""

import numpy as np
import pytest
import torch
from cases import CASES, build, example
from conftest import EPS32, assert_within
from score_cases import formula, plan_of, stores

import dropinf.rows.part_files
import dropinf.rows.row_passes
from dropinf import (
    Dropout,
    Full,
    RowStore,
    energies,
    ensemble,
    influence,
    mean_query,
    scores,
    self_influence,
    topk,
)
from dropinf.solvers import Cholesky, Eigen, Identity


def whole_gradients(case, model, batch):
    rows = []
    for b in range(len(batch[0])):
        loss = case.loss_fn(model, example(batch, b)).sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["activations", "grads"])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[2]], ids=lambda case: case.name)
def test_full_influence_is_exact(case, mode):
    """influence(Full()) of a whole model against autograd and the written-out formula."""
    model, batch = build(case, torch.float64)
    _, queries = build(case, torch.float64, seed=1)
    loaders = [
        [example(data, slice(0, 3)), example(data, slice(3, None))] for data in (batch, queries)
    ]
    got = influence(
        model, *loaders, case.loss_fn, compression=Full(), damping=0.1, mode=mode, progress=False
    )
    train, queried = (whole_gradients(case, model, data) for data in (batch, queries))
    layers = [m for m in model.modules() if list(m.parameters(recurse=False))]
    sizes = [sum(p.numel() for p in m.parameters(recurse=False)) for m in layers]
    truth = formula(train, queried, sizes, 0.1)
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-10 * truth.abs().max().item())


def test_influence_draws_by_energy():
    """Unless the loader is gone after one pass."""
    case = CASES[0]
    model, batch = build(case, torch.float32)
    model = torch.nn.Sequential(model, torch.nn.Linear(model(batch[0]).shape[-1], 2000))
    loader = [example(batch, slice(0, 3)), example(batch, slice(3, None))]

    def loss_fn(model, batch):
        return model(batch[0]).flatten(1).square().mean(1)

    def found(train, **options):
        return influence(model, train, loader, loss_fn, progress=False, **options)

    by_energy = Dropout(r=1024, energies=energies(model, loader, loss_fn))
    drawn = found(loader, compression=by_energy)
    uniform = found(loader, compression=Dropout(r=1024))
    assert not torch.equal(drawn, uniform)
    assert torch.equal(found(loader), drawn)
    assert torch.equal(found(iter(loader)), uniform)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize(
    "n, sizes",
    [(40, (5, 17, 30)), (12, (5, 12, 13, 60)), (1, (4, 1)), (300, (64,))],
    ids=["r < n", "mixed", "one example", "one layer"],
)
def test_cholesky(n, sizes, damping):
    """Both forms: r x r where n >= r, n x n where n < r."""
    store, queries = stores(n, 7, *sizes)
    truth = formula(store.rows, queries.rows, sizes, damping)
    solver = Cholesky(damping).fit(store)
    got = scores(queries, store, solver)
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-9 * truth.abs().max().item())
    store32, queries32 = (RowStore(s.rows.float(), s.plan) for s in (store, queries))
    got32 = scores(queries32, store32, Cholesky(damping).fit(store32))
    assert got32.dtype == torch.float32
    rows32 = RowStore(store32.rows.double(), store.plan)
    solved = Cholesky(damping).fit(rows32).solve(queries32.rows.double())
    truth32 = formula(rows32.rows, queries32.rows.double(), sizes, damping)
    sizes32 = solved.abs() @ rows32.rows.abs().T  # a rounded solution, then a float32 dot product
    assert_within(got32, truth32, (store.plan.width + 2) * EPS32 * sizes32)


def test_row_scaling_cancels():
    """The damping is relative, so scaling all rows of a layer does not change its scores."""
    store, queries = stores(30, 4, 10, 20)
    scaled = [RowStore(s.rows * 1000, s.plan) for s in (store, queries)]
    one = scores(queries, store, Cholesky().fit(store))
    other = scores(scaled[1], scaled[0], Cholesky().fit(scaled[0]))
    torch.testing.assert_close(one, other)


def test_layer_of_zeros_scores_nothing():
    store, queries = stores(30, 4, 10, 20)
    rows = store.rows.clone()
    rows[:, :10] = 0
    zeros = RowStore(rows, store.plan)
    got = scores(queries, zeros, Cholesky().fit(zeros))
    truth = formula(store.rows[:, 10:], queries.rows[:, 10:], (20,), 0.1)
    torch.testing.assert_close(got, truth)


def test_identity():
    store, queries = stores(30, 4, 10, 20)
    got = scores(queries, store, Identity().fit(store))
    torch.testing.assert_close(got, queries.rows @ store.rows.T)


def test_invalid_rows_do_not_count(monkeypatch):
    store, queries = stores(40, 6, 5, 50)
    monkeypatch.setattr(dropinf.rows.part_files, "CHUNK_BYTES", 7 * store.plan.width * 8)
    valid = torch.ones(40, dtype=torch.bool)
    valid[[0, 9, 33]] = False
    rows = store.rows.clone()
    rows[~valid] = 1000  # whatever stands there
    marked = RowStore(rows, store.plan, valid)
    query_valid = torch.tensor([True, False, True, True, True, True])
    asked = RowStore(queries.rows, queries.plan, query_valid)
    solver = Cholesky().fit(marked)
    got = scores(asked, marked, solver)
    truth = formula(store.rows[valid], queries.rows, (5, 50), 0.1)
    torch.testing.assert_close(got[query_valid][:, valid], truth[query_valid])
    assert got[:, ~valid].isnan().all() and got[1].isnan().all()
    values, indices = topk(asked, marked, solver, k=37)
    assert not set(indices[0].tolist()) & {0, 9, 33}
    assert values[1].isnan().all() and (indices[1] == 2**63 - 1).all()


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("rows_a_chunk", [1, 7, 1000])
def test_topk_equals_sorted_scores(k, rows_a_chunk, monkeypatch):
    store, queries = stores(40, 6, 5, 9)
    monkeypatch.setattr(dropinf.rows.part_files, "CHUNK_BYTES", rows_a_chunk * store.plan.width * 8)
    solver = Cholesky().fit(store)
    values, indices = topk(queries, store, solver, k)
    all_scores = scores(queries, store, solver)
    order = all_scores.argsort(1, descending=True)[:, :k]
    assert torch.equal(indices, order)
    torch.testing.assert_close(values, all_scores.gather(1, order))


@pytest.mark.parametrize("n, sizes", [(40, (5, 17)), (9, (5, 60))], ids=["r x r", "n x n"])
def test_self_influence_and_relative_scores(n, sizes, monkeypatch):
    store, queries = stores(n, 6, *sizes)
    monkeypatch.setattr(dropinf.rows.part_files, "CHUNK_BYTES", 3 * store.plan.width * 8)
    monkeypatch.setattr(dropinf.rows.row_passes, "PART_BYTES", 7 * store.plan.width * 8)
    valid = torch.ones(n, dtype=torch.bool)
    valid[4] = False
    rows = store.rows.clone()
    rows[4] = torch.nan
    rows[5] = 0
    marked = RowStore(rows, store.plan, valid)
    solver = Cholesky().fit(marked)
    kept = rows[valid]
    own = formula(kept, kept, sizes, 0.1).diagonal()
    got = self_influence(marked, solver)
    torch.testing.assert_close(got[valid], own)
    assert got[4].isnan() and got[5] == 0
    truth = formula(kept, queries.rows, sizes, 0.1) / own.sqrt()
    truth[:, 4] = 0  # the row of zeros, behind the one that is left out
    relative = scores(queries, marked, solver, relative=True)
    torch.testing.assert_close(relative[:, valid], truth)
    values, indices = topk(queries, marked, solver, 5, relative=True)
    best = relative.nan_to_num(-torch.inf).topk(5)
    torch.testing.assert_close(values, best.values)
    assert torch.equal(indices, best.indices)


def test_negative_self_influence_is_refused():
    store, queries = stores(9, 2, 5)
    solver = Identity().fit(store)
    solver._solve = lambda rows, solved, room: solved.copy_(-rows)
    with pytest.raises(ValueError, match="self-influence of example 0 is -"):
        scores(queries, store, solver, relative=True)


def test_ensemble_of_masks():
    """Mean and standard error over parts, against numpy; a generator is taken one at a time."""
    parts, each = [], []
    for seed in range(4):
        store, queries = stores(20, 3, 5, 9, seed=seed)
        parts.append((queries, store, Cholesky().fit(store)))
        each.append(scores(*parts[-1]).numpy())
    mean, error = ensemble(iter(parts))
    np.testing.assert_allclose(mean, np.mean(each, 0), rtol=1e-12)
    np.testing.assert_allclose(error, np.std(each, 0, ddof=1) / 2, rtol=1e-9)
    single = ensemble(parts[:1])
    np.testing.assert_allclose(single.mean, each[0])
    assert single.error.isnan().all()
    relative = ensemble(parts, relative=True).mean
    np.testing.assert_allclose(
        relative, np.mean([scores(*part, relative=True) for part in parts], 0), rtol=1e-12
    )
    with pytest.raises(ValueError, match="no parts"):
        ensemble([])
    store, queries = stores(21, 3, 5, 9)
    with pytest.raises(ValueError, match=r"part 1 has scores \[3, 21\], those before it \[3, 20\]"):
        ensemble([parts[0], (queries, store, Cholesky().fit(store))])
    queries, store, solver = parts[1]
    turned = RowStore(store.rows, store.plan, ids=list(range(20))[::-1])
    with pytest.raises(ValueError, match="part 1 has examples of other ids than the first, or in"):
        ensemble([parts[0], (queries, turned, solver)])


def test_ensemble_with_weights():
    """Weighted means and their errors against numpy; TracIn's sum; equal weights: a plain mean."""
    parts, each = [], []
    for seed in range(4):
        store, queries = stores(20, 3, 5, 9, seed=seed)
        parts.append((queries, store, Identity().fit(store)))
        each.append((queries.rows @ store.rows.T).numpy())
    w = np.array([1e-3, 5e-4, 2e-3, 1e-4])
    mean, error = ensemble(iter(parts), weights=w)
    truth = np.average(each, 0, weights=w)
    np.testing.assert_allclose(mean, truth, rtol=1e-10, atol=1e-12)
    tracin = sum(w[k] * each[k] for k in range(4))
    np.testing.assert_allclose(mean * sum(w), tracin, rtol=1e-10, atol=1e-12)
    spread = sum(w[k] ** 2 * (each[k] - truth) ** 2 for k in range(4))
    np.testing.assert_allclose(error, np.sqrt(4 / 3 * spread) / w.sum(), rtol=1e-9)
    for one, other in zip(ensemble(parts, weights=[7.0] * 4), ensemble(parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert ensemble(parts[:1], weights=[0.1]).error.isnan().all()
    for weights, said in (
        ([1.0] * 3, "more parts than the 3 weights"),
        ([1.0] * 5, "5 weights were given for 4 parts"),
        ([1.0, -1.0, 1.0, 1.0], "must be positive numbers, one a part"),
        ([1.0, float("nan")], "must be positive numbers"),
        (0.5, "must be positive numbers, one a part, got 0.5"),
        ("all", "weights must be 'same' or 'any', got 'all'"),
    ):
        with pytest.raises(ValueError, match=said):
            ensemble(parts, weights=weights)


@pytest.mark.parametrize("solver", [Cholesky(), Identity(cosine=True)], ids=["Cholesky", "cosine"])
def test_scores_by_layer(solver, monkeypatch):
    """Each layer's own part, which add up; NaN where a row is invalid."""
    store, queries = stores(40, 6, 5, 9, 13)
    monkeypatch.setattr(dropinf.rows.part_files, "CHUNK_BYTES", 7 * store.plan.width * 8)
    store.valid[3] = queries.valid[2] = False
    got = scores(queries, store, solver.fit(store), by="layer")
    assert got.shape == (3, 6, 40)
    valid = store.valid
    torch.testing.assert_close(got.sum(0), scores(queries, store, solver), equal_nan=True)
    assert got[:, 2].isnan().all() and got[:, :, 3].isnan().all()
    if isinstance(solver, Cholesky):
        for l, (start, size) in enumerate(((0, 5), (5, 9), (14, 13))):
            part = slice(start, start + size)
            truth = formula(store.rows[valid][:, part], queries.rows[:, part], (size,), 0.1)
            torch.testing.assert_close(got[l][queries.valid][:, valid], truth[queries.valid])
    relative = scores(queries, store, Cholesky().fit(store), by="layer", relative=True)
    whole = scores(queries, store, Cholesky().fit(store), relative=True)
    torch.testing.assert_close(relative.sum(0), whole, equal_nan=True)
    with pytest.raises(ValueError, match=r"by must be 'layer' or None, got 'token'; .*per='token'"):
        scores(queries, store, solver, by="token")


@pytest.mark.parametrize("relative", [False, True])
def test_smallest_scores(relative):
    store, queries = stores(40, 6, 5, 9)
    store.valid[3] = False
    solver = Cholesky().fit(store)
    values, indices = topk(queries, store, solver, 7, largest=False, relative=relative)
    everything = scores(queries, store, solver, relative=relative)
    everything[:, 3] = torch.inf
    order = everything.argsort(1)[:, :7]
    assert torch.equal(indices, order)
    torch.testing.assert_close(values, everything.gather(1, order))


def test_an_invalid_query_has_no_index():
    """What stands for one is an error in any list, tensor or store, with ids as without."""
    store, queries = stores(20, 3, 5, 9)
    queries.valid[1] = False
    texts = [f"text {i}" for i in range(20)]
    for largest in (True, False):
        for ids in (False, True):
            solver = Cholesky().fit(store)
            values, found = topk(queries, store, solver, 2, ids=ids, largest=largest)
            assert values[1].isnan().all() and not values[[0, 2]].isnan().any()
            assert [texts[i] for i in found[0]]
            for wrong in (
                lambda found=found: texts[found[1, 0]],
                lambda found=found: torch.arange(20)[found[1]],
                lambda found=found: np.arange(20)[int(found[1, 0])],
                lambda found=found: store.at(found[1]),
            ):
                with pytest.raises(IndexError):
                    wrong()
    named = RowStore(store.rows, store.plan, ids=texts)
    assert topk(queries, named, Cholesky().fit(named), 2, ids=True)[1][1] == [None, None]


def test_mean_query():
    store, queries = stores(20, 5, 5, 9)
    queries.valid[1] = False
    queries.rows[1] = torch.nan
    solver = Cholesky().fit(store)
    mean = mean_query(queries)
    truth = scores(queries, store, solver)[queries.valid].mean(0, keepdim=True)
    torch.testing.assert_close(scores(mean, store, solver), truth)
    assert len(mean) == 1 and mean.weights == queries.weights
    queries.valid[:] = False
    with pytest.raises(ValueError, match="none of the 5 queries is valid"):
        mean_query(queries)


@pytest.mark.parametrize("side", ["queries", "training texts"])
def test_scores_of_tokens(side):
    """Of rows per token, whose F is that of examples: they add up to the examples' scores."""
    case = next(c for c in CASES if c.name == "transformer")
    model, batch = build(case, torch.float64)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=30))

    def rows(**options):
        return dropinf.collect(model, [batch], case.loss_fn, plan, progress=False, **options)

    texts, tokens = rows(), rows(per="token")
    solver = Cholesky().fit(texts)
    pair = (tokens, texts) if side == "queries" else (texts, tokens)
    found = scores(*pair, solver)
    found = found if side == "queries" else found.T
    total = torch.zeros(len(texts), len(texts), dtype=torch.float64)
    total.index_add_(0, tokens.origin[:, 0], found)
    truth = scores(texts, texts, solver)
    truth = truth if side == "queries" else truth.T
    torch.testing.assert_close(total, truth, rtol=0, atol=1e-9 * truth.abs().max().item())


def test_bad_input():
    store, queries = stores(20, 3, 5, 9)
    solver = Cholesky().fit(store)
    other = RowStore(torch.randn(3, 14, dtype=torch.float64), plan_of(14))
    made, foreign = store.plan.fingerprint, other.plan.fingerprint
    for call in (scores, topk):
        with pytest.raises(ValueError, match=f"queries were made under plan {foreign}, .*{made}"):
            call(other, store, solver)
        with pytest.raises(ValueError, match=f"solver was fitted under plan {made}, .*{foreign}"):
            call(other, other, solver)
        with pytest.raises(RuntimeError, match="the solver was not fitted; call fit"):
            call(queries, store, Cholesky())
    for k in (0, 21):
        with pytest.raises(ValueError, match=f"k must be 1 to 20, .*got {k}"):
            topk(queries, store, solver, k)
    with pytest.raises(RuntimeError, match=r"Cholesky\.solve: call fit"):
        Cholesky().solve(queries.rows)
    with pytest.raises(ValueError, match=r"must be \[m, 14\], got \(3, 13\)"):
        solver.solve(queries.rows[:, 1:])
    for damping in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping must be"):
            Cholesky(damping)
    nothing = RowStore(torch.zeros(2, 14), store.plan, torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="none of the store's 2 rows is valid"):
        Cholesky().fit(nothing)


def test_singular_without_damping():
    store, _ = stores(3, 1, 2, 9)
    with pytest.raises(ValueError, match=r"layer '1' \(n=3, r=9\) is singular at damping=0"):
        Cholesky(0).fit(store)
    twins = RowStore(torch.ones(20, 11, dtype=torch.float64), store.plan)
    with pytest.raises(ValueError, match=r"layer '0' \(n=20, r=2\) is singular"):
        Cholesky(0).fit(twins)


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_is_asked_or_valid(n):
    store, queries = stores(20, 3, 2, 4)
    solver = Eigen().fit(store)
    none = RowStore(torch.zeros(n, 6), store.plan, torch.zeros(n, dtype=torch.bool))
    assert self_influence(none, solver).tolist() == pytest.approx([np.nan] * n, nan_ok=True)
    for relative in (False, True):
        assert scores(queries, none, solver, relative=relative).isnan().all()
        assert scores(none, store, solver, relative=relative).shape == (n, 20)
    assert topk(none, store, solver, 2)[0].shape == (n, 2)
    assert solver.sweep([0.1, 1.0], queries, none).isnan().all()
    swept = solver.sweep([0.1, 1.0], none, store)
    assert swept.shape == (2, n, 20) and swept.isnan().all()


@pytest.mark.parametrize("largest, sign, k", [(True, -1, 1), (True, -1, 3), (False, 1, 3)])
def test_scores_below_all_range(largest, sign, k):
    """They never enter the largest, so that there is no index to name them by."""
    plan = plan_of(4)
    queries = RowStore(torch.full((2, 4), 1e30), plan)
    valid = torch.tensor([False, True, True, True])
    store = RowStore(sign * queries.rows.repeat(2, 1), plan, valid)
    with pytest.raises(ValueError, match="topk: a score is beyond the range"):
        topk(queries, store, Identity().fit(store), k, largest=largest)
    store = RowStore(torch.tensor([[1.0], [-1e30], [2.0]]).expand(3, 4), plan)
    with pytest.raises(ValueError, match="topk: a score is beyond the range"):
        topk(queries, store, Identity().fit(store), 3)
    assert topk(queries, store, Identity().fit(store), 2)[1].tolist() == [[2, 0]] * 2
