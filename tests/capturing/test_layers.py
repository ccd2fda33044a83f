"""Every kind of layer: rows equal one-example autograd in float64, by the path that is meant."""

import copy

import pytest
import torch
from cases import assert_exact, build, true_rows
from layer_cases import LAYERS
from torch import nn

from dropinf import Dropout, Full, Plan, capture


@pytest.mark.parametrize("compression", [Dropout(r=13), Full()], ids=["Dropout", "Full"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_rows_equal_autograd(layer, compression):
    case = layer.case
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, compression)
    truth = true_rows(case, model, batch, plan)
    with capture(model, plan) as tap:
        assert_exact(tap.rows(case.loss_fn(model, batch)), truth)
    paths = set(plan.paths.values())
    assert paths <= {"closed form", "general"}
    assert ("general" in paths) == (layer.path == "general")
    plan = Plan.make(model, compression)
    with capture(model, plan, "grads") as tap:
        assert_exact(tap.rows(case.loss_fn(model, batch)), truth)
    assert set(plan.paths.values()) == {".grad"}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_float32_rows(layer, backend):
    """As close to the float64 truth as twice what plain float32 autograd reaches."""
    case = layer.case
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, Dropout(r=50))
    truth = true_rows(case, model, batch, plan)
    narrow = copy.deepcopy(model).float()
    batch = tuple(t.float() if t.is_floating_point() else t for t in batch)
    plain = (true_rows(case, narrow, batch, plan).double() - truth).norm()
    with capture(narrow, plan, backend=backend.name) as tap:
        rows = tap.rows(case.loss_fn(narrow, batch))
    assert rows.dtype == torch.float32
    assert (rows.double() - truth).norm() <= 2 * plain


class PackedLSTM(nn.LSTM):
    def __init__(self):
        super().__init__(5, 3, batch_first=True)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 5, 3, 1]), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(super().forward(packed)[0], batch_first=True)[0]


@pytest.mark.parametrize(
    "model, shape, why",
    [
        (nn.BatchNorm1d(5), (4, 5), "BatchNorm in train mode mixes the examples"),
        (nn.EmbeddingBag(9, 5, max_norm=1.0), None, "max_norm rewrites the table"),
        (nn.Embedding(9, 5, max_norm=1.0), None, "max_norm rewrites the table"),
        (nn.Embedding(9, 5, scale_grad_by_freq=True), None, "counts ids over the whole batch"),
        (nn.LSTM(5, 3, 2, dropout=0.5, batch_first=True), (4, 6, 5), "dropout .* is random"),
        (PackedLSTM(), (4, 6, 5), "given a PackedSequence"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_refused_with_the_reason(model, shape, why):
    x = torch.randint(9, (4, 6)) if shape is None else torch.randn(shape)
    with (
        pytest.raises(RuntimeError, match=rf"shape \(.*{why}"),
        capture(model, Plan.make(model, Full())) as tap,
    ):
        y = model(x)
        y = y[0] if isinstance(y, tuple) else y
        tap.rows(y.flatten(1).sum(1))


class Sorted(nn.Module):
    """Its inside depends on the whole batch, through a function without a closed form."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 5))

    def forward(self, x):
        return torch.einsum("bi,cj,ij->bc", x, x, self.w)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5))

    def forward(self, x):
        w = self.w.clone()
        w[0] = 0
        return x * w


class WithoutBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5))

    def forward(self, x):
        table = torch.zeros(2, 5)
        table[0] = self.w
        return x @ table.t()


class Mixup(nn.Module):
    """Adds every example to another one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(x + x[torch.randperm(len(x))])


class Rearranged(nn.Module):
    """Rows picked by an index whose order is lost on the way."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        picked = x[torch.randperm(len(x))]
        return self.layer(picked.cumsum(1).as_strided((2, 10), (10, 1)).reshape(-1, 5))


@pytest.mark.parametrize(
    "model, why",
    [
        (Sorted(), r"einsum: (example 0 alone|it does not take)"),
        (InPlace(), "__setitem__: it is changed in place"),
        (WithoutBatch(), "written into a tensor without the batch"),
        (Mixup(), "picked by an index and then rearranged"),
        (Rearranged(), "picked by an index and then rearranged"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_exact_is_refused(model, why):
    x = torch.randn(4, 5)
    with (
        pytest.raises(RuntimeError, match=why),
        capture(model, Plan.make(model, Full())) as tap,
    ):
        tap.rows(model(x).flatten(1).sum(1))


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))

    def forward(self, ids):
        return self.w[ids]


def test_indices_from_the_end():
    model, ids = Table(), torch.tensor([[-1, 0, 2], [-4, -1, 1]])
    found = []
    for given in (ids, ids % 4):
        with capture(model, Plan.make(model, Full())) as tap:
            found.append(tap.rows(model(given).square().sum((1, 2))))
    assert torch.equal(*found) and found[0].any(1).all()
