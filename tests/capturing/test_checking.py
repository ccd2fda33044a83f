"""The probe of collect: models that mix examples are found, and others are left alone."""

import collections
import dataclasses
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, build, cross_entropy, squares, true_rows
from torch import nn
from torch.utils.data import default_collate
from transformers import BatchEncoding

from dropinf import Dropout, Full, Plan, collect
from dropinf.capturing.batch_parts import (
    example_at,
    moved_to,
    one_example,
    places_of,
    size_at,
)
from dropinf.capturing.checking import _differing

MODES = ["activations", "grads"]
x, label = torch.randn(6, 5), torch.randint(3, (6,))


def gather(model, batch=(x, label), loss_fn=cross_entropy, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "collect: dropout is on")
        plan = Plan.make(model, Full())
        return collect(model, [batch], loss_fn, plan, progress=False, **options)


def warned(model, batch=(x, label), loss_fn=cross_entropy, **options):
    """Rows all the same: they are exact, and depend on the batch."""
    return collect(model, [batch], loss_fn, Plan.make(model, Full()), progress=False, **options)


def frozen(module):
    return module.requires_grad_(False)


def test_rounding_of_what_cancels_is_no_difference():
    """A bias before a softmax: its gradient is zero but for rounding."""
    plan = Plan.make(nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1)), Full())
    one = torch.tensor([1e3] * 3 + [1e-6, -1e-6])
    other = torch.tensor([1e3] * 3 + [2e-6, 1e-6])
    assert _differing(one, other, plan, 2.0**-23) is None
    assert _differing(one, one * torch.tensor([1.0, 1.1, 1, 1, 1]), plan, 2.0**-23) == "0"


def test_one_loss_of_one_example():
    gather(nn.Linear(5, 3), (x[:1], label[:1]))


def test_the_layer_that_mixes_behind_positions():
    """[B * T, I]: example b has T rows of each output."""
    model = nn.Sequential(
        nn.Flatten(0, 1), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Unflatten(0, (-1, 3))
    )
    with pytest.warns(UserWarning, match=r"layer '2' \(BatchNorm1d\) is the first"):
        warned(model, (torch.randn(6, 3, 5),), squares)


@pytest.mark.parametrize("mode", MODES)
def test_batch_norm_in_train_mode(mode):
    model = nn.Sequential(
        nn.Linear(5, 4), nn.ReLU(), frozen(nn.BatchNorm1d(4)), nn.Linear(4, 3), nn.Softplus()
    )
    statistics = [b.clone() for b in model.buffers()]
    with pytest.warns(UserWarning, match=r"alone does not \(layer '2' \(BatchNorm1d\): Expected"):
        store = warned(model, mode=mode)
    assert store.rows.any(1).all()
    # One forward of the batch, as without the check: what the probe ran is undone.
    assert int(model[2].num_batches_tracked) == int(statistics[-1]) + 1
    assert len(warned(model, mode=mode, check=False)) == 6


def test_batch_norm_of_images():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), frozen(nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 3))
    with pytest.warns(
        UserWarning, match=r"another row .* layer '1' \(BatchNorm2d\) is the first whose output"
    ):
        warned(model, (torch.randn(3, 2, 7, 7),), squares, mode="grads")


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
    with pytest.warns(UserWarning, match=r"layer 'last' \(Linear\) is the first"):
        warned(Mixing(), mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_losses_that_mix(mode):
    """In-batch negatives: the losses look like one per example."""

    def contrastive(model, batch):
        y = model(batch[0])
        return F.cross_entropy(y @ y.T, torch.arange(len(y)), reduction="none")

    with pytest.warns(UserWarning, match="no layer's output differs, but its loss does"):
        warned(nn.Linear(5, 3), loss_fn=contrastive, mode=mode)

    def share_of_the_mean(model, batch):
        return cross_entropy(model, batch) / len(batch[0])

    with pytest.warns(UserWarning, match="its loss does"):
        warned(nn.Linear(5, 3), loss_fn=share_of_the_mean, mode=mode)


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
    with pytest.warns(UserWarning, match=r"example \d alone .*batch_dim="):
        warned(SequenceFirst(), batch, sequence_losses)
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


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_said_to_be_on(training):
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train(training)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warned(model)
        warned(model, check=False)
    found = [str(each.message).startswith("collect: dropout is on") for each in said]
    assert found == [True] * training


def test_a_model_that_does_not_take_one_example():
    class Squeezing(nn.Linear):
        def forward(self, x):
            return super().forward(x.squeeze())

    with pytest.warns(UserWarning, match=r"example \d alone does not \(.*check=False"):
        warned(Squeezing(5, 3))
    gather(Squeezing(5, 3), check=False)


def test_a_batch_that_cannot_be_cut():
    class Opaque:
        def __init__(self):
            self.x = x

    model = nn.Linear(5, 3)
    with pytest.warns(UserWarning, match="could not cut example . out of a batch of type Opaque"):
        collect(model, [Opaque()], lambda m, b: squares(m, (b.x,)), Plan.make(model, Full()),
                progress=False)  # fmt: skip


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    names: list


Pair = collections.namedtuple("Pair", "x label")


def test_one_example():
    ids = torch.arange(12).reshape(4, 3)
    number = torch.tensor(3.0)
    assert one_example((ids, number), 1, 4, 0)[0].tolist() == [[3, 4, 5]]
    assert one_example((ids, number), 0, 4, 0)[1] is number
    assert one_example(Pair(ids, ids[:, 0]), 2, 4, 0).label.tolist() == [6]
    assert one_example({"a": [ids, ids]}, 0, 4, 0)["a"][1].shape == (1, 3)
    encoding = one_example(BatchEncoding({"input_ids": ids}), 0, 4, 0)
    assert isinstance(encoding, BatchEncoding) and encoding["input_ids"].shape == (1, 3)
    record = one_example(Record(ids, list("abcd")), 3, 4, 0)
    assert record.x.tolist() == [[9, 10, 11]] and record.names == ["d"]
    assert one_example((ids.T, ids[:, 0]), 0, 4, 1)[0].shape == (3, 1)
    assert one_example((ids.T, ids[:, 0]), 0, 4, 1)[1].shape == (1,)
    assert one_example({"n": 4}, 0, 4, 0) is None
    assert one_example(default_collate([{"x": r} for r in ids]), 0, 4, 0)["x"].shape == (1, 3)


def test_moved_to():
    ids, meta = torch.arange(12).reshape(4, 3), torch.device("meta")
    batch = {"x": [ids, (ids, "a")], "pair": Pair(ids, 3), "record": Record(ids, ["b"])}
    moved = moved_to(meta, batch)
    found = [moved["x"][0], moved["x"][1][0], moved["pair"].x, moved["record"].x]
    assert all(t.is_meta and t.shape == (4, 3) for t in found)
    assert moved["x"][1][1] == "a" and moved["pair"].label == 3 and moved["record"].names == ["b"]
    encoding = moved_to(meta, BatchEncoding({"input_ids": ids}))
    assert isinstance(encoding, BatchEncoding) and encoding["input_ids"].is_meta
    assert batch["x"][0] is ids and moved_to(ids.device, batch) is batch


class Named(dict):
    name = None


@dataclasses.dataclass(frozen=True)
class Padded:
    x: torch.Tensor
    length: int = dataclasses.field(init=False, default=3)


def test_moved_to_of_classes_that_are_not_made_of_their_parts():
    ids, meta = torch.arange(12).reshape(4, 3), torch.device("meta")
    named = Named(x=ids)
    named.name = "first"
    moved = moved_to(meta, named)
    assert moved["x"].is_meta and moved.name == "first" and named["x"] is ids
    lists = collections.defaultdict(list, x=ids)
    assert moved_to(meta, lists)["x"].is_meta and moved_to(meta, lists)["y"] == []
    padded = Padded(ids)
    assert moved_to(meta, padded).x.is_meta and moved_to(meta, padded).length == 3
    assert padded.x is ids


def test_a_smaller_batch_is_cut_at_the_same_places():
    """Its number of examples may be that of something else in a larger one."""
    batch, last = (
        {"x": torch.randn(n, 5), "scale": torch.randn(4, 2), "of": list("abcdef")[:n]}
        for n in (6, 4)
    )
    places = places_of(batch, 6, 0)
    assert size_at(last, places, 0) == 4
    one = example_at(last, 3, places, 0)
    assert torch.equal(one["x"], last["x"][3:]) and one["scale"] is last["scale"]
    assert one["of"] == ["d"]
    assert size_at({"x": torch.randn(3, 5), "scale": 1, "of": ["a"]}, places, 0) is None


def test_the_checks_cost_a_batch_and_an_example():
    sizes = []

    class Counting(nn.Linear):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    model = Counting(5, 3)
    plan = Plan.make(model, Dropout(r=5))
    collect(model, [(x, label), (x, label)], cross_entropy, plan, progress=False)
    assert sizes == [6, 6, 1, 6]


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_checks_use_up_no_random_numbers(draw):
    """An example alone draws fewer than its batch; what comes after draws as without checks."""

    def loss_fn(model, batch):
        for _ in batch[0]:
            draw()
        return squares(model, batch)

    model, after = nn.Linear(5, 3), []
    for check in (True, False):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        gather(model, (x,), loss_fn, check=check)
        after.append(draw())
    assert after[0] == after[1]
