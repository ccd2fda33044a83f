"""dattri's own metrics on scores of DropinfAttributor, against chance."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dropinf

pytest.importorskip("dattri", reason="dattri is not installed: pip install 'dattri==0.3.*'")
from dattri.metric import calculate_lds_ground_truth, lds, mislabel_detection_auc
from dattri.model_util.retrain import retrain_lds
from dattri_cases import own_losses, task_of

from dropinf.integrations.dattri import DropinfAttributor

N, M, SUBSETS, FLIPPED = 120, 20, 30, 18


def data(num, flipped=0):
    """Three overlapping clouds of points; the first labels are false."""
    generator = torch.Generator().manual_seed(num)
    label = torch.arange(num) % 3
    centres = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    x = centres[label] + torch.randn(num, 5, generator=generator)
    label[:flipped] = (label[:flipped] + 1) % 3
    return DataLoader(TensorDataset(x, label), batch_size=num)


def trained(train, seed=None):
    """At the minimum of the regularised loss, which is convex: Newton's method from zero."""
    ((x, label),) = train

    def loss(flat):
        logits = x @ flat[:15].view(3, 5).T + flat[15:]
        return nn.functional.cross_entropy(logits, label) + 0.01 * flat @ flat

    flat = torch.zeros(18)
    for _ in range(6):
        step = torch.linalg.solve(torch.func.hessian(loss)(flat), torch.func.grad(loss)(flat))
        flat = flat - step
    model = nn.Linear(5, 3)
    nn.utils.vector_to_parameters(flat, model.parameters())
    assert torch.func.grad(loss)(flat).norm() < 1e-4
    return model


def assert_close(found, truth):
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))


def test_lds(tmp_path):
    """Sums of scores rank the retrained models' losses on random halves."""
    train, queries = data(N), data(M)
    model = trained(train)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=12))
    attributor = DropinfAttributor(task_of(model), plan)
    attributor.cache(train)
    found = attributor.attribute(train, queries)

    def target(path, loader):
        retrained = nn.Linear(5, 3)
        retrained.load_state_dict(torch.load(path))
        ((x, label),) = loader
        return own_losses(retrained, (x, label)).detach()

    retrain_lds(trained, train, str(tmp_path), num_subsets=SUBSETS, seed=0)
    truth = calculate_lds_ground_truth(target, str(tmp_path), queries)
    correlations, _ = lds(found, truth)
    # Of a random ranking each has variance 1 / (SUBSETS - 1), and so at most has their mean,
    # however they depend on each other.
    assert float(correlations.mean()) > 4 / (SUBSETS - 1) ** 0.5

    store, asked = (
        dropinf.collect(model, part, own_losses, plan, progress=False) for part in (train, queries)
    )
    own = dropinf.scores(asked, store, dropinf.solvers.Cholesky().fit(store)).T
    assert_close(found, own)
    # Two neighbours in a ranking that rounding exchanges move it by 12 / (n^3 - n).
    exchanged = 12 / (SUBSETS**3 - SUBSETS)
    assert ((lds(own, truth)[0] - correlations).abs() <= 3 * exchanged).all()


def test_mislabel_detection():
    """Self-influence finds labels that were changed."""
    train = data(N, FLIPPED)
    model = trained(train)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=12))
    attributor = DropinfAttributor(task_of(model), plan)
    attributor.cache(train)
    found = attributor.self_attribute()
    wrong = torch.arange(N) < FLIPPED
    auc = float(mislabel_detection_auc(found, wrong)[0])
    # The standard deviation of a random order's (Mann and Whitney 1947).
    assert auc > 0.5 + 4 * ((N + 1) / (12 * FLIPPED * (N - FLIPPED))) ** 0.5

    store = dropinf.collect(model, train, own_losses, plan, progress=False)
    own = dropinf.self_influence(store, dropinf.solvers.Cholesky().fit(store))
    assert_close(found, own)
    assert auc == pytest.approx(float(mislabel_detection_auc(own, wrong)[0]), abs=0.01)
    higher = (own[wrong][:, None] > own[~wrong]).double()  # the AUC's definition
    assert auc == pytest.approx(float(higher.mean()), abs=0.01)
