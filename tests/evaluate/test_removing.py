"""Leave-one-out and removal, against numpy, scipy, dattri and models that are trained anew."""

import numpy as np
import pytest
import scipy.stats
import torch

import dropinf
from dropinf import evaluate


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coarse(*shape, seed=0):
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("draw", [random, coarse], ids=["different", "ties"])
def test_leave_one_out_is_that_of_scipy_and_dattri(draw):
    """dattri's is Pearson's, of the losses of the models themselves."""
    dattri = pytest.importorskip("dattri.metric")
    scores, losses, baseline = draw(6, 15), draw(15, 6, seed=1), random(6, seed=2)
    found = evaluate.leave_one_out(scores, losses, baseline)
    x = scores.double().numpy() / 15
    y = (losses.double() - baseline.double()).T.numpy()
    pairs = list(zip(x, y, strict=True))
    truth = [scipy.stats.spearmanr(*pair).statistic for pair in pairs]
    np.testing.assert_allclose(found.rank_correlation.each, truth, rtol=1e-9, atol=1e-15)
    lines = [scipy.stats.linregress(*pair) for pair in pairs]
    np.testing.assert_allclose(found.slope.each, [line.slope for line in lines], rtol=1e-9)
    np.testing.assert_allclose(found.correlation.each, [line.rvalue for line in lines], rtol=1e-9)
    theirs, _ = dattri.loo_corr(scores.T, (losses, torch.arange(15)))
    np.testing.assert_allclose(found.correlation.each, theirs, atol=1e-6)
    assert found.slope.error == pytest.approx(
        np.std([line.slope for line in lines], ddof=1) / 6**0.5, rel=1e-9
    )


def test_leave_one_out_of_some_examples_and_seeds():
    scores, left = random(3, 20), torch.tensor([17, 4, 9, 0])
    losses, baseline = random(2, 4, 3, seed=1), random(2, 1, 3, seed=2)
    scores[:, 9] = torch.nan
    scores[1] = torch.nan
    found = evaluate.leave_one_out(scores, losses, baseline, left)
    kept = [0, 1, 3]
    for q in (0, 2):
        x = scores[q, left[kept]].double() / 20
        y = (losses.double().mean(0)[kept, q] - baseline.double().mean(0)[0, q]).numpy()
        assert found.slope.each[q] == pytest.approx(scipy.stats.linregress(x, y).slope, rel=1e-9)
    assert found.slope.each[1].isnan() and found.rank_correlation.left_out == 1


def test_leave_one_out_of_scores_that_are_all_the_same():
    """They agree with nothing, and have no slope."""
    scores = random(3, 7)
    scores[1] = 0.1
    found = evaluate.leave_one_out(scores, random(7, 3, seed=1), torch.zeros(3))
    assert found.correlation.each[1] == found.rank_correlation.each[1] == 0
    assert found.slope.left_out == 1 and found.correlation.left_out == 0


@pytest.fixture(scope="module")
def regression():
    """Ridge regression, which is solved exactly: (train, scores, x of queries)."""
    generator = torch.Generator().manual_seed(0)
    x, true = torch.randn(40, 4, generator=generator), torch.randn(4, generator=generator)
    y = x @ true + 0.5 * torch.randn(40, generator=generator)
    asked = torch.randn(12, 4, generator=generator)
    wanted = asked @ true + 0.5 * torch.randn(12, generator=generator)

    def fitted(indices):
        return torch.linalg.lstsq(x[indices].double(), y[indices].double()[:, None]).solution[:, 0]

    def train(indices, seed):
        return ((asked.double() @ fitted(indices)) - wanted).square() / 2

    model = torch.nn.Linear(4, 1, bias=False)
    model.weight.data = fitted(torch.arange(40)).float()[None]

    def loss_fn(model, batch):
        return (model(batch[0])[:, 0] - batch[1]).square() / 2

    plan = dropinf.Plan.make(model, dropinf.Full())
    store, queries = (
        dropinf.collect(model, [batch], loss_fn, plan, progress=False)
        for batch in ((x, y), (asked, wanted))
    )
    # Gauss-Newton of the squared loss: x xᵀ, which rows of residual 1 have.
    F = dropinf.RowStore(x, plan)
    solver = dropinf.solvers.Cholesky(damping=1e-6).fit(F)
    return train, dropinf.scores(queries, store, solver, weights="any")


def test_scores_that_are_right_are_found_right(regression):
    """All four figures, of exact leave-one-out scores of least squares, by retraining."""
    train, scores = regression
    n, m = 40, len(scores)
    whole = torch.ones(1, n, dtype=torch.bool)
    baseline = evaluate.retrain(train, whole, progress=False)
    each = evaluate.retrain(train, evaluate.without(n, torch.arange(n)), progress=False)
    found = evaluate.leave_one_out(scores, each, baseline)
    assert found.rank_correlation.value > 0.97
    assert found.slope.value == pytest.approx(1, abs=0.25)  # a leverage of 4 / 40 on average
    assert evaluate.leave_one_out(-scores, each, baseline).rank_correlation.value < -0.97

    members = evaluate.halves(n, 30)
    losses = evaluate.retrain(train, members, progress=False)
    assert evaluate.lds(scores, members, losses).value > 0.6

    k = 4
    one_each = evaluate.without(n, scores.topk(k).indices)
    top = evaluate.retrain(train, one_each, progress=False)
    at_random = evaluate.random_subsets(n, n - k, 20)
    at_random = evaluate.retrain(train, at_random, progress=False)
    found = evaluate.removal(top, at_random, baseline)
    assert found.difference.value > 2 * found.difference.error
    together = evaluate.without(n, scores.mean(0).topk(k).indices[None])
    together = evaluate.retrain(train, together, progress=False)
    assert evaluate.removal(together, at_random, baseline).difference.value > 0
    assert len(found.top.each) == m


def test_removal_by_hand():
    top, at_random, baseline = random(3, 4, 4), random(3, 5, 4, seed=1), random(3, 1, 4, seed=2)
    found = evaluate.removal(top, at_random, baseline)
    a, r, b = (x.double().numpy() for x in (top, at_random, baseline))
    own = np.array([[a[s, q, q] for q in range(4)] for s in range(3)])
    pairs = {
        "top": own - b[:, 0],
        "at_random": r.mean(1) - b[:, 0],
        "difference": own - r.mean(1),
    }
    for name, change in pairs.items():
        estimate = getattr(found, name)
        np.testing.assert_allclose(estimate.each, change.mean(0), rtol=1e-12)
        assert estimate.error == pytest.approx(change.mean(0).std(ddof=1) / 2)
        assert estimate.runs_error == pytest.approx(change.mean(1).std(ddof=1) / 3**0.5)


def test_removal_of_one_model_for_all_and_of_one_seed():
    top, at_random, baseline = random(1, 4), random(5, 4, seed=1), random(4, seed=2)
    found = evaluate.removal(top, at_random, baseline)
    np.testing.assert_allclose(found.top.each, (top[0].double() - baseline.double()), rtol=1e-12)
    assert np.isnan(found.top.runs_error) and not np.isnan(found.top.error)
    several = evaluate.removal(random(3, 1, 4), at_random, baseline)
    assert np.isnan(several.difference.runs_error)  # seeds are not paired
