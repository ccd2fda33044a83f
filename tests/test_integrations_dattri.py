"""dattri with dropinf's projection, and dropinf as an attributor of dattri."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dropinf

pytest.importorskip("dattri", reason="dattri is not installed: pip install 'dattri==0.3.*'")
from dattri.algorithm import trak
from dattri.algorithm.influence_function import IFAttributorExplicit
from dattri.algorithm.trak import TRAKAttributor
from dattri.metric import lds, mislabel_detection_auc
from dattri.task import AttributionTask

from dropinf.integrations.dattri import DropinfAttributor, projection

N, M = 40, 6


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def loader(n, batch_size=16, **options):
    generator = torch.Generator().manual_seed(n)
    data = TensorDataset(
        torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator)
    )
    return DataLoader(data, batch_size=batch_size, **options)


def task_of(model, checkpoints=None, batch_of_one=True, function=None):
    def loss(params, data):
        x, label = data if batch_of_one else (t.unsqueeze(0) for t in data)
        return F.cross_entropy(torch.func.functional_call(model, params, x), label)

    return AttributionTask(function or loss, model, checkpoints or model.state_dict())


def own_losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def own_scores(model, plan, damping=0.1):
    store, queries = (
        dropinf.collect(model, loader(n), own_losses, plan, progress=False) for n in (N, M)
    )
    return dropinf.scores(queries, store, dropinf.solvers.Cholesky(damping).fit(store))


@pytest.mark.parametrize("batch_of_one", [True, False])
def test_scores_are_dropinfs(batch_of_one):
    """Over two checkpoints: the mean of dropinf's own, transposed; a part of the data is a part."""
    model = network()
    states = [{k: v * c for k, v in network().state_dict().items()} for c in (1.0, 1.5)]
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=12))
    attributor = DropinfAttributor(
        task_of(model, states, batch_of_one), plan, batch_of_one=batch_of_one
    )
    train, queries = loader(N), loader(M)
    attributor.cache(train)
    found = attributor.attribute(train, queries)
    truth = torch.zeros(M, N)
    for state in states:
        other = network()
        other.load_state_dict(state)
        truth += own_scores(other, plan) / 2
    torch.testing.assert_close(found, truth.T, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))
    part = DataLoader(TensorDataset(*(t[8:20] for t in train.dataset.tensors)), batch_size=5)
    torch.testing.assert_close(
        attributor.attribute(part, queries),
        found[8:20],
        rtol=1e-4,
        atol=1e-5 * float(truth.abs().max()),
    )
    diagonal = attributor.attribute(train, train).diagonal()
    torch.testing.assert_close(attributor.self_attribute(), diagonal, rtol=1e-3, atol=1e-4)


def test_sign_and_order_are_dattris():
    """At a large damping both are products of whole gradients, dattri's over the damping."""
    # In one batch: dattri adds the inverses of all batches.
    model, train, queries = network(), loader(N, N), loader(M, 4)
    theirs = IFAttributorExplicit(task_of(model), regularization=1e4)
    theirs.cache(train)
    expected = theirs.attribute(train, queries).detach() * 1e4
    ours = DropinfAttributor(task_of(model), dropinf.Full(), dropinf.solvers.Identity)
    ours.cache(train)
    found = ours.attribute(train, queries)
    assert found.shape == expected.shape == (N, M)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(found.abs().max()))


def test_dattris_metrics():
    attributor = DropinfAttributor(task_of(network()), dropinf.Dropout(r=12))
    train = loader(N)
    attributor.cache(train)
    found = attributor.attribute(train, loader(M))
    subsets = torch.stack([torch.randperm(N)[: N // 2] for _ in range(8)])
    sums = torch.stack([found[s].sum(0) for s in subsets])
    correlation, _ = lds(found, (sums, subsets))
    torch.testing.assert_close(correlation, torch.ones(M))  # with the sums themselves
    own = attributor.self_attribute()
    wrong = torch.zeros(N)
    wrong[own.topk(5).indices] = 1
    assert float(mislabel_detection_auc(own, wrong)[0]) == pytest.approx(1)


@pytest.mark.parametrize("proj_type", ["dropout", "sketch"])
def test_trak_attributor_with_projection(proj_type):
    """dattri's TRAK scores are those of its own formula on projected gradients."""
    model, train, queries = network(), loader(N), loader(M)
    before = trak.random_project, dict(trak.DEFAULT_PROJECTOR_KWARGS)
    task = task_of(model, batch_of_one=False)

    def correct(params, data):
        return torch.exp(-task.get_loss_func(flatten=False)(params, data))

    with projection(proj_type):
        attributor = TRAKAttributor(
            task, correct, projector_kwargs={"proj_dim": 16}, regularization=1e-3
        )
        attributor.cache(train)
        found = attributor.attribute(queries)
    assert before == (trak.random_project, dict(trak.DEFAULT_PROJECTOR_KWARGS))

    D = sum(p.numel() for p in model.parameters())
    projector = dropinf.DropoutProjector(D, 16, proj_type=proj_type)
    g, q = (torch.cat(list(_gradients(model, n))) / D**0.5 for n in (N, M))
    g, q = projector.project(g), projector.project(q)
    p = torch.cat([torch.exp(-own_losses(model, batch)) for batch in train]).detach()
    truth = q @ torch.linalg.solve(g.T @ g + 1e-3 * torch.eye(16), g.T) * (1 - p)
    torch.testing.assert_close(found, truth.T, rtol=1e-3, atol=1e-3 * float(truth.abs().max()))


def _gradients(model, n):
    for x, label in zip(*loader(n).dataset.tensors, strict=True):
        losses = own_losses(model, (x[None], label[None]))
        grads = torch.autograd.grad(losses.sum(), list(model.parameters()))
        yield torch.cat([g.flatten() for g in grads])[None]


def test_refused():
    model, other = network(), network()
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=12))
    attributor = DropinfAttributor(task_of(model), plan)
    with pytest.raises(RuntimeError, match=r"call cache\(full_train_dataloader\) first"):
        attributor.attribute(loader(N), loader(M))
    with pytest.raises(ValueError, match="shuffle=False"):
        attributor.cache(loader(N, shuffle=True))

    def elsewhere(params, data):
        return F.cross_entropy(torch.func.functional_call(other, params, data[0]), data[1])

    with pytest.raises(ValueError, match="must call the model that the plan is for"):
        DropinfAttributor(task_of(model, function=elsewhere), plan).cache(loader(N))


def test_readme_example():
    """Its lines on dattri run as they stand."""
    model, train, queries = network(), loader(N), loader(M)
    task = task_of(model)
    namespace = {"dropinf": dropinf, "task": task, "train": train, "queries": queries}
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = [x.split("```")[0] for x in readme.split("```python\n")[1:]]
    (block,) = (x for x in blocks if "integrations.dattri" in x)
    exec(block, namespace)
    assert namespace["scores"].shape == (N, M)
