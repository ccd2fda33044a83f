"""The probe of collect: models that mix examples are found, and others are left alone."""

import collections
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, build, cross_entropy, squares, true_rows
from torch import nn
from torch.utils.data import default_collate
from transformers import BatchEncoding

from dropinf import Dropout, Full, Plan, collect
from dropinf.capturing.checking import first_example

MODES = ["activations", "grads"]
x, label = torch.randn(6, 5), torch.randint(3, (6,))


def gather(model, batch=(x, label), loss_fn=cross_entropy, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = Plan.make(model, Full())
        return collect(model, [batch], loss_fn, plan, progress=False, **options)


def frozen(module):
    return module.requires_grad_(False)


@pytest.mark.parametrize("mode", MODES)
def test_batch_norm_in_train_mode(mode):
    model = nn.Sequential(
        nn.Linear(5, 4), nn.ReLU(), frozen(nn.BatchNorm1d(4)), nn.Linear(4, 3), nn.Softplus()
    )
    statistics = [b.clone() for b in model.buffers()]
    if mode == "activations":
        with pytest.raises(RuntimeError, match=r"BatchNorm of an input \(6, 4\).*call \.eval\(\)"):
            gather(model, mode=mode)
        model[2].eval()
        gather(model, mode=mode)
        return
    with pytest.raises(ValueError, match=r"alone does not \(layer '2' \(BatchNorm1d\): Expected"):
        gather(model, mode=mode)
    # One forward of the batch, as without the check: what the probe ran is undone.
    assert int(model[2].num_batches_tracked) == int(statistics[-1]) + 1
    assert len(gather(model, mode=mode, check=False)) == 6


def test_batch_norm_of_images():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), frozen(nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 3))
    with pytest.raises(
        ValueError, match=r"another row .* layer '1' \(BatchNorm2d\) is the first whose output"
    ):
        gather(model, (torch.randn(3, 2, 7, 7),), squares, mode="grads")


class Mixing(nn.Module):
    """Subtracts the mean over the batch, without a module of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        y = self.first(x)
        return self.last(torch.tanh(y - y.mean(0)))


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_mixes(mode):
    with pytest.raises(ValueError, match=r"layer 'last' \(Linear\) is the first"):
        gather(Mixing(), mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_losses_that_mix(mode):
    """In-batch negatives: the losses look like one per example."""

    def contrastive(model, batch):
        y = model(batch[0])
        return F.cross_entropy(y @ y.T, torch.arange(len(y)), reduction="none")

    with pytest.raises(ValueError, match="no layer's output differs, but its loss does"):
        gather(nn.Linear(5, 3), loss_fn=contrastive, mode=mode)

    def share_of_the_mean(model, batch):
        return cross_entropy(model, batch) / len(batch[0])

    with pytest.raises(ValueError, match="its loss does"):
        gather(nn.Linear(5, 3), loss_fn=share_of_the_mean, mode=mode)


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):  # [T, B, 5]
        return self.layer(x).transpose(0, 1)


def sequence_losses(model, batch):
    return model(batch[0]).pow(2).sum((1, 2))


def test_a_batch_dimension_that_was_taken_for_another():
    """T = B: nothing in the shapes says that dimension 0 is time."""
    batch = (torch.randn(4, 4, 5),)
    with pytest.raises(ValueError, match=r"example 0 alone .*batch_dim="):
        gather(SequenceFirst(), batch, sequence_losses)
    model = SequenceFirst().double()
    batch = (batch[0].double(),)
    store = gather(model, batch, sequence_losses, batch_dim=1)
    case = CASES[0]._replace(loss_fn=lambda m, b: sequence_losses(m, (b[0].transpose(0, 1),)))
    truth = true_rows(case, model, (batch[0].transpose(0, 1),), store.plan)
    torch.testing.assert_close(store.rows, truth)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_models_that_do_not_mix(case, dtype, mode):
    """Also in train mode, whose dropout differs from pass to pass."""
    model, batch = build(case, dtype)
    model.train()
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    gather(model, batch, lambda m, b: case.loss_fn(m, b).to(torch.float32), mode=mode)
    if not any(isinstance(m, nn.Dropout) for m in model.modules()):
        assert torch.equal(torch.rand(()), expected)  # no random number was used up


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_inside_of_attention(need_weights):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)

        def forward(self, x):
            dropped = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
            return self.attention(x, dropped, x, need_weights=need_weights)[0]

    gather(Attending(), (torch.randn(4, 5, 6),), squares)


def test_autocast_is_no_mixing():
    model = nn.Sequential(nn.Linear(5, 64), nn.GELU(), nn.Linear(64, 3))

    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model, batch).float()

    gather(model, loss_fn=loss_fn)


def test_random_models_are_said_not_to_be_checked():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    with pytest.warns(UserWarning, match="model is random, so that it was not checked"):
        collect(Noisy(5, 3), [(x, label)], cross_entropy, Plan.make(Noisy(5, 3), Full()),
                progress=False)  # fmt: skip
    gather(Noisy(5, 3), check=False)


def test_a_model_that_does_not_take_one_example():
    class Squeezing(nn.Linear):
        def forward(self, x):
            return super().forward(x.squeeze())

    with pytest.raises(ValueError, match=r"example 0 alone does not \(.*check=False"):
        gather(Squeezing(5, 3))
    gather(Squeezing(5, 3), check=False)


def test_a_batch_that_cannot_be_cut():
    class Opaque:
        def __init__(self):
            self.x = x

    model = nn.Linear(5, 3)
    with pytest.warns(UserWarning, match="could not cut example 0 out of a batch of type Opaque"):
        collect(model, [Opaque()], lambda m, b: squares(m, (b.x,)), Plan.make(model, Full()),
                progress=False)  # fmt: skip


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    names: list


Pair = collections.namedtuple("Pair", "x label")


def test_first_example():
    ids = torch.arange(12).reshape(4, 3)
    number = torch.tensor(3.0)
    assert first_example((ids, number), 4, 0)[0].tolist() == [[0, 1, 2]]
    assert first_example((ids, number), 4, 0)[1] is number
    assert first_example(Pair(ids, ids[:, 0]), 4, 0).label.tolist() == [0]
    assert first_example({"a": [ids, ids]}, 4, 0)["a"][1].shape == (1, 3)
    encoding = first_example(BatchEncoding({"input_ids": ids}), 4, 0)
    assert isinstance(encoding, BatchEncoding) and encoding["input_ids"].shape == (1, 3)
    record = first_example(Record(ids, list("abcd")), 4, 0)
    assert record.x.shape == (1, 3) and record.names == ["a"]
    assert first_example((ids.T, ids[:, 0]), 4, 1)[0].shape == (3, 1)
    assert first_example((ids.T, ids[:, 0]), 4, 1)[1].shape == (1,)
    assert first_example({"n": 4}, 4, 0) is None
    assert first_example(default_collate([{"x": r} for r in ids]), 4, 0)["x"].shape == (1, 3)


def test_the_check_costs_one_example():
    sizes = []

    class Counting(nn.Linear):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    model = Counting(5, 3)
    plan = Plan.make(model, Dropout(r=5))
    collect(model, [(x, label), (x, label)], cross_entropy, plan, progress=False)
    assert sizes == [6, 1, 6]
