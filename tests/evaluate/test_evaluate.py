"""LDS, the AUC of wrong labels and recall of sources, against scipy, scikit-learn and dattri."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from dropinf import evaluate


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coarse(*shape, seed=0):
    """Of few values, so that many tie; sums are exact in any order."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def spearman(scores, members, losses):
    """[m] by scipy: sums of members' scores against minus the losses [h, m], in float64."""
    scores, members, losses = (np.asarray(a, np.float64) for a in (scores, members, losses))
    return np.array(
        [
            scipy.stats.spearmanr(
                [row[kept > 0].sum() for kept in members], -losses[:, q]
            ).statistic
            for q, row in enumerate(scores)
        ]
    )


@pytest.mark.parametrize("draw", [random, coarse], ids=["different", "ties"])
def test_lds_is_that_of_scipy_and_dattri(draw):
    """The sign too: dattri is given minus the losses, as its own ground truth has them."""
    dattri = pytest.importorskip("dattri.metric")
    scores, losses = draw(7, 20), draw(12, 7, seed=1)
    members = evaluate.halves(20, 12, seed=3)
    found = evaluate.lds(scores, members, losses)
    truth = spearman(scores, members, losses)
    np.testing.assert_allclose(found.each, truth, rtol=1e-12, atol=1e-14)
    assert found.value == pytest.approx(truth.mean(), rel=1e-12)
    assert found.error == pytest.approx(truth.std(ddof=1) / 7**0.5, rel=1e-12)
    indices = torch.stack([row.nonzero()[:, 0] for row in members])
    theirs, _ = dattri.lds(scores.T, (-losses, indices))
    np.testing.assert_allclose(found.each, theirs, atol=1e-6)  # which they keep in float32


def test_lds_is_high_where_scores_are_right():
    """More of an example lowers the loss by its score, so sums rank minus the losses."""
    scores = random(5, 30)
    members = evaluate.halves(30, 20)
    found = evaluate.lds(scores, members, -(scores @ members.float().T).T)
    assert found.value == pytest.approx(1) and found.error == pytest.approx(0, abs=1e-12)


def test_lds_of_several_seeds_is_of_their_mean():
    scores, losses = random(4, 16), random(3, 10, 4, seed=1)
    members = evaluate.halves(16, 10)
    found = evaluate.lds(scores, members, losses)
    truth = spearman(scores, members, losses.double().mean(0))
    np.testing.assert_allclose(found.each, truth, rtol=1e-12)


def test_lds_of_invalid_queries_and_examples():
    scores, losses, members = random(5, 16), random(9, 5, seed=1), evaluate.halves(16, 9)
    zeroed = scores.clone()
    zeroed[:, 3] = 0
    scores[:, 3] = torch.nan
    scores[2] = torch.nan
    found = evaluate.lds(scores, members, losses)
    kept = [0, 1, 3, 4]
    truth = spearman(zeroed[kept], members, losses[:, kept])
    np.testing.assert_allclose(found.each[kept], truth, rtol=1e-12)
    assert found.each[2].isnan() and found.left_out == 1 and "1 left out" in str(found)
    assert found.value == pytest.approx(truth.mean())


def test_lds_of_scores_that_all_tie_is_zero():
    """As BM25's are for a query of other words: scipy has NaN, which would leave it out."""
    found = evaluate.lds(torch.zeros(2, 16), evaluate.halves(16, 9), random(9, 2))
    assert found.value == 0 and found.left_out == 0


@pytest.mark.parametrize("draw", [random, coarse], ids=["different", "ties"])
def test_error_over_retrained_models_is_the_jackknifes(draw):
    """Of the mean over queries, without each of the subsets in turn."""
    scores, losses, members = draw(5, 20), draw(9, 5, seed=1), evaluate.halves(20, 9)
    found = evaluate.lds(scores, members, losses)
    kept = [[i for i in range(9) if i != j] for j in range(9)]
    means = [spearman(scores, members[k], losses[k]).mean() for k in kept]
    assert found.runs_error == pytest.approx((8 * np.var(means)) ** 0.5, rel=1e-9)
    assert np.isnan(evaluate.lds(scores, members[:2], losses[:2]).runs_error)


def test_error_over_retrained_models():
    """It is the spread between choices of halves, for the same queries."""
    scores = random(6, 40)
    noise = 3.0 * random(150 * 40, 6, seed=2)
    values, errors = [], []
    for start in range(0, 150 * 40, 40):
        members = evaluate.halves(40, 40, seed=start)
        losses = noise[start : start + 40] - (scores @ members.float().T).T
        found = evaluate.lds(scores, members, losses)
        values.append(found.value)
        errors.append(found.runs_error)
    # The standard deviation of 150 has itself a relative error of 1 / sqrt(300), 6 %.
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)


@pytest.mark.parametrize("draw", [random, coarse], ids=["different", "ties"])
def test_auc_is_that_of_scikit_learn(draw):
    metrics = pytest.importorskip("sklearn.metrics")
    values = draw(60)
    wrong = torch.arange(60) % 4 == 0
    values[wrong] += 1
    found = evaluate.mislabeled_auc(values, wrong)
    assert found.value == pytest.approx(metrics.roc_auc_score(wrong, values), rel=1e-12)
    assert found.value > 0.5 and found.each is None


def test_auc_is_dattris_where_nothing_ties():
    """Both take large values for suspicious; where values tie, dattri's goes by the order."""
    dattri = pytest.importorskip("dattri.metric")
    values, wrong = random(60), torch.arange(60) % 4 == 0
    theirs, _ = dattri.mislabel_detection_auc(values, wrong)
    assert evaluate.mislabeled_auc(values, wrong).value == pytest.approx(float(theirs), abs=1e-6)
    assert evaluate.mislabeled_auc(torch.zeros(60), wrong).value == 0.5


def test_auc_error_is_delongs():
    """By its definition, from all pairs, and beside the spread of samples drawn anew."""
    values, wrong = coarse(40), torch.arange(40) < 15
    found = evaluate.mislabeled_auc(values, wrong)
    bad, good = (values[at].double().numpy() for at in (wrong, ~wrong))
    pairs = (bad[:, None] > good) + 0.5 * (bad[:, None] == good)
    variance = pairs.mean(1).var(ddof=1) / 15 + pairs.mean(0).var(ddof=1) / 25
    assert found.error == pytest.approx(variance**0.5, rel=1e-12)
    drawn = [
        evaluate.mislabeled_auc(random(40, seed=s) + wrong.float(), wrong) for s in range(1000)
    ]
    spread = np.std([each.value for each in drawn])
    assert np.mean([each.error for each in drawn]) == pytest.approx(spread, rel=0.1)


def test_auc_leaves_out_what_is_invalid():
    values, wrong = random(30), torch.arange(30) < 10
    truth = evaluate.mislabeled_auc(values[1:29], wrong[1:29])
    values[[0, 29]] = torch.nan
    found = evaluate.mislabeled_auc(values, wrong)
    assert found.value == truth.value and found.left_out == 2


def by_all_orders(scores, own, k):
    """Means of hits among the first k and of 1 / rank of the first, over orders that sort."""
    hits, ranks = [], []
    for order in itertools.permutations(range(len(scores))):
        sorted_scores = [scores[i] for i in order]
        if sorted_scores == sorted(sorted_scores, reverse=True):
            hits.append(sum(own[i] for i in order[:k]))
            ranks.append(1 / (1 + [own[i] for i in order].index(True)))
    return np.mean(hits), np.mean(ranks)


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("draw", [random, coarse], ids=["different", "ties"])
def test_recall_is_the_mean_over_orders_of_ties(draw, k):
    scores, own = draw(8, 7), random(8, 7, seed=5) > 0.3
    own[:, 2] |= ~own.any(1)
    found = evaluate.recall(scores, own, k)
    truth = [by_all_orders(s.tolist(), o.tolist(), k) for s, o in zip(scores, own, strict=True)]
    hits, first = np.array(truth).T
    np.testing.assert_allclose(found.share.each, hits / k, rtol=1e-12)
    np.testing.assert_allclose(found.recall.each, hits / own.sum(1).numpy(), rtol=1e-12)
    np.testing.assert_allclose(found.reciprocal_rank.each, first, rtol=1e-12)
    assert found.share.error == pytest.approx((hits / k).std(ddof=1) / 8**0.5, rel=1e-12)
    assert found.chance == pytest.approx(float(own.double().mean()))


def test_recall_by_labels_without_what_is_invalid():
    """Labels of any kind; a query of no source that is there is left out."""
    scores = torch.tensor([[9.0, 1, 2, 0], [0, 0, 0, 0], [1, 2, 3, 4], [4, 3, 2, 1]])
    scores[:, 0], scores[2] = torch.nan, torch.nan
    found = evaluate.recall(scores, (["a", "b", "a", "z"], ["a", "b", "a", "a"]), k=1)
    np.testing.assert_allclose(found.share.each, [1, 1 / 3, np.nan, np.nan])
    np.testing.assert_allclose(found.recall.each, [1 / 2, 1 / 3, np.nan, np.nan])
    np.testing.assert_allclose(
        found.reciprocal_rank.each, [1, (1 + 1 / 2 + 1 / 3) / 3, *[np.nan] * 2]
    )
    assert found.share.left_out == 2 and found.chance == pytest.approx(1 / 2)
    labels = torch.tensor([0, 1, 0, 5]), torch.tensor([0, 1, 0, 0])
    np.testing.assert_allclose(evaluate.recall(scores, labels, 1).share.each, found.share.each)
