"""dropinf as an attributor of dattri."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import dropinf

pytest.importorskip("dattri", reason="dattri is not installed: pip install 'dattri==0.3.*'")
from dattri.algorithm.influence_function import IFAttributorExplicit
from dattri.task import AttributionTask
from dattri_cases import (
    M,
    N,
    as_dattris,
    checkpoints,
    loader,
    network,
    own_losses,
    own_margins,
    task_of,
)

from dropinf.integrations.dattri import DropinfAttributor


def own_scores(model, plan, targets=own_losses):
    """[m, n] without the adapter."""
    store = dropinf.collect(model, loader(N), own_losses, plan, progress=False)
    queries = dropinf.collect(model, loader(M), targets, plan, progress=False)
    return dropinf.scores(queries, store, dropinf.solvers.Cholesky().fit(store))


def assert_equal_to_rounding(found, truth):
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("by_energy", [False, True])
@pytest.mark.parametrize("batch_of_one", [True, False])
@pytest.mark.parametrize("target", [None, own_margins])
def test_scores_are_dropinfs(batch_of_one, target, by_energy):
    """Over two checkpoints: the mean of dropinf's own, transposed; a part of the data is a part."""
    model, states = network(), checkpoints()
    energies = dropinf.energies(model, loader(N), own_losses) if by_energy else None
    compression = dropinf.Dropout(r=12, energies=energies)
    plan = dropinf.Plan.make(model, compression)
    task = task_of(model, states, batch_of_one, target)
    given = compression if by_energy else plan
    attributor = DropinfAttributor(task, given, batch_of_one=batch_of_one)
    train, queries = loader(N), loader(M)
    attributor.cache(train)
    found = attributor.attribute(train, queries)
    truth = torch.zeros(M, N)
    for state in states:
        other = network()
        other.load_state_dict(state)
        truth += own_scores(other, plan, target or own_losses) / 2
    assert_equal_to_rounding(found, truth.T)
    part = DataLoader(TensorDataset(*(t[8:20] for t in train.dataset.tensors)), batch_size=5)
    assert_equal_to_rounding(attributor.attribute(part, queries), truth.T[8:20])
    if target is None:
        diagonal = attributor.attribute(train, train).diagonal()
        torch.testing.assert_close(attributor.self_attribute(), diagonal, rtol=1e-3, atol=1e-4)


LAYERS = {
    "2": ["2.weight", "2.bias"],  # a layer
    "0.weight": ["0.weight"],
    ("0.bias", "2.weight"): ["0.bias", "2.weight"],
}


@pytest.mark.parametrize("layer_name", LAYERS)
def test_layer_name(layer_name):
    """Scores of a plan for those layers alone."""
    model = network()
    given = layer_name if isinstance(layer_name, str) else list(layer_name)
    attributor = DropinfAttributor(task_of(model), dropinf.Dropout(r=5), layer_name=given)
    assert [slot.name for slot in attributor.plan.slots] == LAYERS[layer_name]
    attributor.cache(loader(N))
    found = attributor.attribute(loader(N), loader(M))
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=5), include=LAYERS[layer_name])
    assert_equal_to_rounding(found, own_scores(model, plan).T)


@pytest.mark.parametrize("layer_name", [None, ["2.weight", "2.bias"]])
def test_sign_and_order_are_dattris(layer_name):
    """At a large damping both are products of whole gradients, dattri's over the damping."""
    # In one batch: dattri adds the inverses of all batches.
    model, train, queries = network(), loader(N, N), loader(M, 4)
    theirs = IFAttributorExplicit(task_of(model), layer_name, regularization=1e4)
    theirs.cache(train)
    expected = theirs.attribute(train, queries).detach() * 1e4
    ours = DropinfAttributor(
        task_of(model), dropinf.Full(), dropinf.solvers.Identity, layer_name=layer_name
    )
    ours.cache(train)
    found = ours.attribute(train, queries)
    assert found.shape == expected.shape == (N, M)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(found.abs().max()))


def test_what_is_checked():
    """Each function once: the loss in `cache`, a target of its own where it is first called."""
    calls = []

    def counted(name, random=False):
        function = as_dattris(model, own_losses)

        def call(params, data):
            calls.append(name)
            return function(params, data) + (torch.rand(()) if random else 0)

        return call

    def made(**functions):
        task = AttributionTask(model=model, checkpoints=model.state_dict(), **functions)
        return DropinfAttributor(task, dropinf.Dropout(r=12))

    model, train, queries = network(), loader(N), loader(M)
    attributor = made(loss_func=counted("loss"), target_func=counted("target"))
    attributor.cache(train)
    calls.clear()
    attributor.attribute(train, queries)
    assert len(calls) > 1 and set(calls) == {"target"}
    calls.clear()
    attributor.attribute(train, queries)
    assert calls == ["target"]  # for one batch
    attributor = made(loss_func=counted("loss"))
    attributor.cache(train)
    calls.clear()
    attributor.attribute(train, queries)
    assert calls == ["loss"]
    with pytest.raises(ValueError, match="example 0 has output"):
        made(loss_func=counted("loss", random=True)).cache(train)
    attributor = made(loss_func=counted("loss"), target_func=counted("target", random=True))
    attributor.cache(train)
    for _ in range(2):
        with pytest.raises(ValueError, match="example 0 has output"):
            attributor.attribute(train, queries)


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
        DropinfAttributor(AttributionTask(elsewhere, model, model.state_dict()), plan).cache(
            loader(N)
        )
    with pytest.raises(ValueError, match="layer_name='2' as well; give a compression"):
        DropinfAttributor(task_of(model), plan, layer_name="2")
    with pytest.raises(ValueError, match=r"'3\.weight' matches no trainable parameter"):
        DropinfAttributor(task_of(model), dropinf.Full(), layer_name=["2.weight", "3.weight"])
