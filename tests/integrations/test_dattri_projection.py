"""dattri's own attributors under `projection`, against their formulas in float64."""

import pytest
import torch

import dropinf

pytest.importorskip("dattri", reason="dattri is not installed: pip install 'dattri==0.3.*'")
from dattri.algorithm import dvemb, tracin, trak
from dattri.algorithm.dvemb import DVEmbAttributor
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from dattri_cases import M, N, checkpoints, loader, network, own_losses, own_margins, task_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dropinf.integrations.dattri import projection

D, R = 57, 16
TYPES = ["dropout", "sketch"]
KWARGS = {"proj_dim": R, "proj_seed": 3}


def features(state, losses, n, proj_type, model_id):
    """[n, R] projected gradients, one example at a time, and the losses [n]."""
    model = network()
    model.load_state_dict(state)
    model.double()
    rows, values = [], []
    for x, label in zip(*loader(n).dataset.tensors, strict=True):
        value = losses(model, (x[None].double(), label[None])).sum()
        grads = torch.autograd.grad(value, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
        values.append(value.detach())
    projector = dropinf.DropoutProjector(D, R, 3, proj_type, dtype=torch.float64)
    return projector.project(torch.stack(rows), model_id), torch.stack(values)


def assert_close(found, truth, tolerance=1e-5):
    limit = tolerance * float(truth.abs().max())
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=limit)


@pytest.fixture(autouse=True)
def dattri_is_as_before():
    def state():
        return [
            (module.random_project, module.DEFAULT_PROJECTOR_KWARGS.copy())
            for module in (trak, tracin, dvemb)
        ] + [DVEmbAttributor._setup_projectors]

    before = state()
    yield
    assert state() == before


@pytest.mark.parametrize("target", [None, own_margins])
@pytest.mark.parametrize("proj_type", TYPES)
def test_trak(proj_type, target):
    """Q Φ (XᵀX + λ)⁻¹ of two checkpoints with masks of their own (arXiv 2303.14186, section 3)."""
    states = checkpoints()
    task = task_of(network(), states, batch_of_one=False, target=target)

    def correct(params, data):
        return torch.exp(-task.get_loss_func(flatten=False)(params, data))

    with projection(proj_type):
        attributor = TRAKAttributor(task, correct, KWARGS, regularization=1e-2)
        attributor.cache(loader(N))
        found = attributor.attribute(loader(M))
    truth, q = torch.zeros(M, N).double(), torch.zeros(N).double()
    for i, state in enumerate(states):
        g, losses = features(state, own_losses, N, proj_type, i)
        asked, _ = features(state, target or own_losses, M, proj_type, i)
        kernel = g.T @ g / D + 1e-2 * torch.eye(R)
        truth += asked @ torch.linalg.solve(kernel, g.T) / D / 2
        q += (1 - torch.exp(-losses)) / 2
    assert_close(found, (truth * q).T, 1e-4)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("proj_type", TYPES)
def test_tracin(proj_type, normalized):
    """Products, or cosines, weighted over two checkpoints (arXiv 2002.08484)."""
    states, weights = checkpoints(), [0.1, 0.4]
    task = task_of(network(), states, batch_of_one=False, target=own_margins)
    with projection(proj_type):
        attributor = TracInAttributor(task, torch.tensor(weights), normalized, KWARGS)
        found = attributor.attribute(loader(N), loader(M))
        own = attributor.self_attribute(loader(N))
    truth, squares = torch.zeros(N, M).double(), torch.zeros(N).double()
    for i, (state, weight) in enumerate(zip(states, weights, strict=True)):
        g, _ = features(state, own_losses, N, proj_type, i)
        asked, _ = features(state, own_margins, M, proj_type, i)
        if normalized:
            g, asked = (f / f.norm(dim=1, keepdim=True) for f in (g, asked))
        truth += weight * g @ asked.T
        squares += weight * g.pow(2).sum(1)
    assert_close(found, truth)
    assert_close(own, squares)


@pytest.mark.parametrize("proj_type", TYPES)
def test_dvemb(proj_type):
    """η Π_k (I - η_k G_k) g, over the later steps k and batches G_k (arXiv 2412.09538)."""
    model = network()
    states, steps = checkpoints(), [range(0, 16), range(16, 40), range(0, 20), range(20, 40)]
    x, label = loader(N).dataset.tensors
    with projection(proj_type):
        task = task_of(model, batch_of_one=False)
        attributor = DVEmbAttributor(task, proj_dim=R, proj_seed=3)
        for t, step in enumerate(steps):  # two epochs of two steps, at their own weights
            model.load_state_dict(states[t // 2])
            step = torch.tensor(step)
            attributor.cache_gradients(t // 2, (x[step], label[step]), step, 0.05 * (t + 1))
        attributor.cache()
        model.load_state_dict(states[1])
        found = [attributor.attribute(loader(M), epoch=epoch) for epoch in (0, 1, None)]
    asked, _ = features(states[1], own_losses, M, proj_type, 0)
    later, truth = torch.eye(R).double(), torch.zeros(2, N, M).double()
    for t, step in reversed(list(enumerate(steps))):
        rows = features(states[t // 2], own_losses, N, proj_type, 0)[0][list(step)]
        rate = 0.05 * (t + 1) / len(step)
        truth[t // 2, list(step)] += rate * rows @ later.T @ asked.T
        later = later @ (torch.eye(R) - rate * rows.T @ rows)
    for ours, theirs in zip(found, (*truth, truth.sum(0)), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["kronecker", "elementwise"])
def test_dvembs_factors_are_refused(kind):
    def loss(model, data, device):
        return own_losses(model, data).mean()

    model = network()
    with projection():
        task = AttributionTask(loss, model, model.state_dict())
        attributor = DVEmbAttributor(task, proj_dim=8, factorization_type=kind)
        with pytest.raises(ValueError, match=f"factorization_type='{kind}' projects both sides"):
            attributor.cache_gradients(0, next(iter(loader(N))), torch.arange(16), 0.1)


def test_projections_do_not_mix(monkeypatch):
    """Neither of an attributor that goes in or out, nor of one with a proj_type of its own."""

    def attributor(**kwargs):
        task = task_of(network(), batch_of_one=False)
        return TracInAttributor(task, torch.ones(1), False, kwargs)

    def run(made):
        made.attribute(loader(N), loader(M))

    own = tracin.DEFAULT_PROJECTOR_KWARGS.copy()  # dattri will write proj_dim into it
    monkeypatch.setattr(tracin, "DEFAULT_PROJECTOR_KWARGS", own)
    outside = attributor(proj_dim=R)
    with projection():
        inside = attributor(proj_dim=R)
        run(inside)
        with pytest.raises(ValueError, match="make it inside of `with projection"):
            run(outside)
        with pytest.raises(ValueError, match="'normal', not 'dropout'"):
            run(attributor(proj_dim=R, proj_type="normal"))
        with pytest.raises(ValueError, match=f"proj_dim must be 1 to grad_dim={D}, got {D + 1}"):
            run(attributor(proj_dim=D + 1, proj_type="dropout"))
    with pytest.raises(ValueError, match="Invalid proj_type"):
        run(inside)
    run(outside)


@pytest.mark.parametrize(
    "owner, name",
    [
        (tracin, "DEFAULT_PROJECTOR_KWARGS"),
        (dvemb, "random_project"),
        (DVEmbAttributor, "_setup_projectors"),
    ],
)
def test_another_dattri_is_refused(monkeypatch, owner, name):
    """As its main branch, which has typed parameters for the dictionary; nothing stays replaced."""
    monkeypatch.delattr(owner, name)
    theirs = trak.random_project
    with (
        pytest.raises(ImportError, match=f"not like the releases .*0\\.3\\.x.*{name}.*pip install"),
        projection(),
    ):
        pass
    assert trak.random_project is theirs
    monkeypatch.undo()  # before `dattri_is_as_before` looks


WIDE = 30


def skewed(n):
    """Of features whose sizes are over orders of magnitude."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.exp(1.5 * torch.randn(WIDE, generator=generator))
    x = torch.randn(n, WIDE, generator=generator) * sizes
    return DataLoader(TensorDataset(x, torch.arange(n) % 3), 16)


def own_tracin(task, kwargs):
    attributor = TracInAttributor(task, torch.ones(1), False, kwargs)
    return attributor.attribute(skewed(N), skewed(M))


def own_trak(task, kwargs):
    loss = task.get_loss_func(flatten=False)
    attributor = TRAKAttributor(
        task, lambda params, data: torch.exp(-loss(params, data)), kwargs, regularization=1e-2
    )
    attributor.cache(skewed(N))
    return attributor.attribute(skewed(M))


def own_dvemb(task, kwargs):
    attributor = DVEmbAttributor(task, **kwargs)
    attributor.cache_gradients(0, next(iter(skewed(N))), torch.arange(16), 0.1)
    attributor.cache()
    return attributor.attribute(skewed(M))


@pytest.mark.parametrize("run", [own_tracin, own_trak, own_dvemb])
@pytest.mark.parametrize("form", ["energies", "a tensor"])
@pytest.mark.parametrize("proj_type", TYPES)
def test_energies(proj_type, form, run):
    """Of 16 entries, scores agree more with those of all 819 coordinates than of uniform ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDE, 24), nn.Tanh(), nn.Linear(24, 3))
    task = task_of(model, batch_of_one=False)
    if form == "energies":
        energies = dropinf.energies(model, skewed(N), own_losses)
    else:
        gradients = task.get_grad_loss_func(in_dims=(None, 0))
        energies = gradients(task.get_param(0)[0], next(iter(skewed(N)))).square().mean(0)

    def scores(proj_type, proj_dim, seed=0, by=None):
        with projection(proj_type, by):
            return run(task, {"proj_dim": proj_dim, "proj_seed": seed}).flatten().double()

    exact = scores("dropout", 819)  # which leaves the gradients as they are
    mean = {}
    for by in (None, energies):
        found = torch.stack([exact, *(scores(proj_type, 16, seed, by) for seed in range(10))])
        mean[by] = float(torch.corrcoef(found)[0, 1:].mean())
    assert mean[energies] > mean[None] + 0.1


def test_bad_energies_are_refused():
    """Those of other parameters than the attributor's, and none at all, when it is called."""
    task = task_of(network(), batch_of_one=False)
    energies = dropinf.energies(network(), loader(N), own_losses)
    layer = ["2.weight", "2.bias"]
    of_layer = dropinf.energies(network(), loader(N), own_losses, include=layer)

    def run(given, **options):
        with projection(energies=given):
            attributor = TracInAttributor(
                task, torch.ones(1), False, {"proj_dim": 8, "proj_seed": 0}, **options
            )
            return attributor.attribute(loader(N), loader(M))

    with pytest.raises(ValueError, match=f"energies are of {D} numbers, grad_dim is 21; .*include"):
        run(energies, layer_name=layer)
    assert run(of_layer, layer_name=layer).shape == (N, M)
    with pytest.raises(ValueError, match=r"'dropout by energy .*', not 'dropout by energy .*'"):
        with projection(energies=torch.rand(D)):
            attributor = TracInAttributor(task, torch.ones(1), False, {"proj_dim": 8})
        with projection(energies=torch.rand(D)):
            attributor.attribute(loader(N), loader(M))
    for wrong, said in {
        "nan": (torch.full((D,), float("nan")), "must be finite"),
        "none": (torch.zeros(D), "nothing to draw by"),
        "a list": ([1.0] * D, "what dropinf.energies returns, or a tensor .*, got list"),
    }.values():
        with pytest.raises(ValueError, match=said), projection(energies=wrong):
            pass
    with pytest.raises(ValueError, match=rf"real numbers \[grad_dim={D}\], got torch.float32 \(5,"):
        run(torch.ones(5))
