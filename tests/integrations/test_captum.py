"""captum's calls on dropinf: against captum's own TracInCP, and against dropinf's own calls."""

import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import dropinf

pytest.importorskip("captum", reason="captum is not installed")

from captum.influence import DataInfluence, TracInCP
from captum.influence._utils.common import KMostInfluentialResults

from dropinf.integrations.captum import DropoutInfluence

N, M, CLASSES = 23, 4, 3
SUM = nn.CrossEntropyLoss(reduction="sum")
SOLVERS = {
    "Cholesky": lambda: dropinf.solvers.Cholesky(damping=0.1),
    "cosine": lambda: dropinf.solvers.Identity(cosine=True),
    "DataInf": lambda: dropinf.solvers.DataInf(),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double()


def examples(n, seed, labels="classes"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    if labels == "classes":
        return x, torch.randint(CLASSES, (n,), generator=generator)
    return x, torch.randn(n, CLASSES, generator=generator, dtype=torch.float64)


def data(labels="classes"):
    return TensorDataset(*examples(N, 1, labels))


def assert_close(ours, theirs):
    """To rounding: of float32 where the rows are, which dropinf's are."""
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)


@pytest.fixture
def tracin(model, tmp_path):
    """captum's own, of one checkpoint, whose rate is 1 where the file names none."""

    def make(loss_fn, labels="classes"):
        torch.save(model.state_dict(), tmp_path / "1.pt")
        return TracInCP(
            model,
            data(labels),
            [str(tmp_path / "1.pt")],
            loss_fn=loss_fn,
            batch_size=5,
            sample_wise_grads_per_batch=loss_fn.reduction == "sum",
        )

    return make


LOSSES = {  # name: (loss, labels); the last sums over the outputs of an example too
    "cross entropy": (nn.CrossEntropyLoss(reduction="none"), "classes"),
    "cross entropy, sum": (SUM, "classes"),
    "squared error, sum": (nn.MSELoss(reduction="sum"), "numbers"),
}


@pytest.mark.filterwarnings("ignore:.*did not already require gradients")  # captum's own
@pytest.mark.parametrize("name", LOSSES)
def test_all_coordinates_and_no_inverse_are_captums_tracin(name, model, tracin):
    """Every call with the same arguments, and the same numbers."""
    loss_fn, labels = LOSSES[name]
    theirs = tracin(loss_fn, labels)
    ours = DropoutInfluence(
        model, data(labels), loss_fn, dropinf.Full(),
        solver=dropinf.solvers.Identity(), batch_size=6,
    )  # fmt: skip
    assert isinstance(ours, DataInfluence)
    asked = examples(M, 2, labels)
    loader = DataLoader(TensorDataset(*asked), batch_size=3)
    for inputs in (asked, loader):
        for aggregate in (False, True):
            options = {"aggregate": aggregate}
            assert_close(ours.influence(inputs, **options), theirs.influence(inputs, **options))
            for proponents in (True, False):
                options |= {"k": 5, "proponents": proponents}
                found, wanted = (
                    ours.influence(inputs, **options),
                    theirs.influence(inputs, **options),
                )
                assert type(found) is type(wanted) is KMostInfluentialResults
                assert torch.equal(found.indices, wanted.indices)
                assert found.indices.dtype == wanted.indices.dtype
                assert_close(found.influence_scores, wanted.influence_scores)
    assert_close(ours.self_influence(), theirs.self_influence())
    assert_close(ours.self_influence(asked), theirs.self_influence(asked))


@pytest.mark.parametrize("by_energy", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mode", ["activations", "grads"])
def test_equals_dropinf(solver, mode, by_energy, model):
    def losses(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    x, labels = examples(M, 2)
    loader = DataLoader(data(), batch_size=9)
    energies = dropinf.energies(model, loader, losses) if by_energy else None
    compression = dropinf.Dropout(r=20, energies=energies)
    ours = DropoutInfluence(model, data(), SUM, compression, solver=SOLVERS[solver](), mode=mode)
    plan = dropinf.Plan.make(model, compression)
    options = {"mode": mode, "progress": False}
    store = dropinf.collect(model, loader, losses, plan, **options)
    asked = dropinf.collect(model, [(x, labels)], losses, plan, **options)
    fitted = SOLVERS[solver]().fit(store)
    wanted = dropinf.scores(asked, store, fitted)
    assert_close(ours.influence((x, labels)), wanted)
    assert_close(ours.self_influence(), dropinf.self_influence(store, fitted))
    for proponents in (True, False):
        best = wanted.topk(3, largest=proponents)
        found = ours.influence((x, labels), k=3, proponents=proponents)
        assert torch.equal(found.indices, best.indices)
        assert_close(found.influence_scores, best.values)


def test_losses_that_mean_the_same(model):
    """A sum, none, and a function give the same scores; a loss of tests is used for tests alone."""
    asked, compression = examples(M, 2), dropinf.Dropout(r=20)
    per_example = nn.CrossEntropyLoss(reduction="none")
    wanted = DropoutInfluence(model, data(), SUM, compression).influence(asked)
    for loss_fn in (per_example, lambda outputs, labels: per_example(outputs, labels)):
        found = DropoutInfluence(model, data(), loss_fn, compression).influence(asked)
        assert torch.equal(found, wanted)
    twice = DropoutInfluence(
        model, data(), SUM, compression, test_loss_fn=lambda y, t: 2 * per_example(y, t)
    )
    assert_close(twice.influence(asked), 2 * wanted)
    assert SUM.reduction == "sum"  # theirs is left as it was


def test_layers_store_and_several_features(tmp_path):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, CLASSES), nn.Linear(5, CLASSES)

        def forward(self, x, z):
            return self.a(x) + self.b(z)

    x, labels = examples(N, 1)
    ours = DropoutInfluence(
        Sum(), TensorDataset(x.float(), x.float() ** 2, labels), SUM, dropinf.Dropout(r=6),
        exclude="b", path=tmp_path / "rows",
    )  # fmt: skip
    assert [block.name for block in ours.plan.blocks] == ["a"]
    assert len(dropinf.RowStore.load(tmp_path / "rows")) == N
    assert ours.influence((x[:2].float(), x[:2].float(), labels[:2])).shape == (2, N)


class Dictionaries(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"x": torch.zeros(5).double(), "label": 0}


def drawn(sampler):
    return DataLoader(data(), 4, sampler=sampler)


REFUSED = {  # what is wrong: (arguments instead of the right ones, what the error says)
    "a mean": ({"loss_fn": nn.CrossEntropyLoss()}, "loss_fn must give one loss.*reduction='mean'"),
    "a test mean": ({"test_loss_fn": nn.MSELoss()}, "test_loss_fn must give .*'mean'"),
    "checkpoints": ({"loss_fn": ["1.pt"]}, "loss_fn must be .*got a list of 1; .*no checkpoints"),
    "no loss": ({"loss_fn": None}, "loss_fn must be .*got a NoneType; .*own losses goes with"),
    "a test name": ({"test_loss_fn": "mse"}, "test_loss_fn must be .*got a str"),
    "a scalar": ({"loss_fn": lambda y, t: nn.functional.cross_entropy(y, t)}, "one loss per"),
    "shuffled": ({"train_dataset": DataLoader(data(), 4, shuffle=True)}, "shuffle=False"),
    "a drawn subset": ({"train_dataset": drawn(SubsetRandomSampler([3, 1]))}, "shuffle=False"),
    "drawn": ({"train_dataset": drawn(WeightedRandomSampler([1.0] * N, 5))}, "shuffle=False"),
    "two sizes": ({"train_dataset": DataLoader(data(), 4), "batch_size": 4}, "leave batch_size"),
    "dictionaries": ({"train_dataset": Dictionaries()}, "features and labels.*got a dict"),
    "no coordinates": ({"compression": 20}, "compression must be one of Dropout, .* got 20"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_refuses_what_it_cannot_be_made_of(wrong, model):
    right = {"train_dataset": data(), "loss_fn": SUM, "compression": dropinf.Dropout(r=20)}
    arguments, message = REFUSED[wrong]
    with pytest.raises(ValueError, match=message):
        DropoutInfluence(model, **(right | arguments))


def test_refuses_bad_inputs(model):
    ours = DropoutInfluence(model, data(), SUM, dropinf.Dropout(r=20))
    x, labels = examples(M, 2)
    for inputs, got in ((x, "a Tensor"), ((x,), "a tuple of 1")):
        for call in (ours.influence, ours.self_influence):
            with pytest.raises(ValueError, match=rf"\(x, labels\), got {got}"):
                call(inputs)
    for k in (0, N + 1):
        for options in ({}, {"proponents": False}, {"aggregate": True}):
            with pytest.raises(ValueError, match=f"k must be 1 to {N}"):
                ours.influence((x, labels), k=k, **options)
