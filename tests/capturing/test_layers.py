"""Every kind of layer: rows equal one-example autograd in float64, by the path that is meant."""

import copy

import pytest
import torch
from cases import assert_exact, build, true_rows
from layer_cases import LAYERS
from torch import nn

from dropinf import Dropout, Full, Plan, capture


def short(path):
    """The path without the reason."""
    return "passes" if path.startswith("a pass for each loss") else path


@pytest.mark.filterwarnings("ignore:rows. a backward pass for each:UserWarning")
@pytest.mark.parametrize("compression", [Dropout(r=13), Full()], ids=["Dropout", "Full"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_rows_equal_autograd(layer, compression):
    case = layer.case
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, compression)
    truth = true_rows(case, model, batch, plan)
    with capture(model, plan) as tap:
        assert_exact(tap.rows(case.loss_fn(model, batch)), truth)
    assert set(map(short, plan.paths.values())) == layer.paths
    plan = Plan.make(model, compression)
    with capture(model, plan, "grads") as tap:
        assert_exact(tap.rows(case.loss_fn(model, batch)), truth)
    assert set(plan.paths.values()) == {".grad"}


@pytest.mark.filterwarnings("ignore:rows. a backward pass for each:UserWarning")
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


def by_passes(model, x, why):
    """Rows are the gradients of the losses, with the reason in the path of some parameter."""

    model = model.double()
    plan, seed = Plan.make(model, Full()), torch.get_rng_state()
    with pytest.warns(UserWarning, match="a backward pass for each"), capture(model, plan) as tap:
        y = model(x)
        y = y[0] if isinstance(y, tuple) else y
        rows = tap.rows(y.flatten(1).square().sum(1))
    torch.set_rng_state(seed)
    y = model(x)
    losses = (y[0] if isinstance(y, tuple) else y).flatten(1).square().sum(1)
    truth = []
    for loss in losses:
        parameters = [model.get_parameter(slot.name) for slot in plan.slots]
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        truth.append(torch.cat([g.flatten() for g in grads]))
    assert_exact(rows, torch.stack(truth))
    reasons = {path for path in plan.paths.values() if path.startswith("a pass for each loss: ")}
    assert any(why in reason for reason in reasons), plan.paths


@pytest.mark.parametrize(
    "model, shape, why",
    [
        (nn.BatchNorm1d(5), (4, 5), "NativeBatchNorm, as what all examples share"),
        (nn.EmbeddingBag(9, 5, max_norm=1.0), None, "EmbeddingBag, which is not known"),
        (nn.Embedding(9, 5, max_norm=1.0), None, "Embedding, which is not known"),
        (nn.Embedding(9, 5, scale_grad_by_freq=True), None, "Embedding, which is not known"),
        (PackedLSTM(), (4, 6, 5), "CopySlices"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_no_closed_form(model, shape, why):
    torch.manual_seed(0)
    x = torch.randint(9, (4, 6)) if shape is None else torch.randn(shape, dtype=torch.float64)
    by_passes(model, x, why)


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
        table = x.new_zeros(2, 5)
        table[0] = self.w
        return x @ table.t()


class Mixup(nn.Module):
    """Adds every example to another one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(x + x[torch.randperm(len(x))])


class Turned(nn.Module):
    """Examples that an unknown function moves behind a layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(x).as_strided((5, 4), (4, 1)).reshape(4, 5)


class Several(nn.Module):
    """LSTM layers with dropout between them, which is random."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 3, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.rnn(x[:, None].repeat(1, 3, 1))[0]


@pytest.mark.parametrize(
    "model, why",
    [
        (Sorted(), "mixes examples"),
        (WithoutBatch(), "Mm, which mixes examples"),
        (Turned(), "AsStrided, which is not known"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_moves_along_the_batch(model, why):
    torch.manual_seed(0)
    by_passes(model, torch.randn(4, 5, dtype=torch.float64), why)


@pytest.mark.parametrize("model", [InPlace(), Mixup(), Several()], ids=lambda m: type(m).__name__)
def test_what_happens_before_parameters_does_not_matter(model):
    """Only where an output goes decides whose it is."""
    torch.manual_seed(0)
    model, x = model.double(), torch.randn(4, 5, dtype=torch.float64)
    plan, seed = Plan.make(model, Full()), torch.get_rng_state()
    rows = []
    for mode in ("activations", "grads"):
        torch.set_rng_state(seed)
        with capture(model, plan, mode) as tap:
            rows.append(tap.rows(model(x).flatten(1).square().sum(1)))
        if mode == "activations":
            assert set(plan.paths.values()) <= {"closed form", "pulled back"}
    assert_exact(*rows)


@pytest.mark.parametrize(
    "after",
    [
        lambda y, scale: torch.cat((y * scale[0, 0]).split([1, 2, 1])),
        lambda y, scale: (y * scale)[0, 0],
        lambda y, scale: torch.bmm(y[None], scale[0].expand(1, 5, 5))[0],
    ],
    ids=["a batch in parts", "a scale with ones in front", "an expert"],
)
def test_what_stays_closed(after):
    model, x = nn.Linear(5, 5).double(), torch.randn(4, 5, dtype=torch.float64)
    model.scale = nn.Parameter(torch.ones(1, 1, 1, 5).double())
    plan = Plan.make(model, Full())
    with capture(model, plan) as tap:
        tap.rows(after(model(x), model.scale).square().sum(1))
    assert set(plan.paths.values()) <= {"closed form", "pulled back"}


def test_the_least_that_an_rms_norm_divides_by():
    """That of the dtype that torch computes in, seen where half inputs are small."""
    model, x = nn.RMSNorm(6).bfloat16(), 0.03 * torch.randn(4, 5, 6).bfloat16()
    rows = []
    for mode in ("activations", "grads"):
        with capture(model, Plan.make(model, Full()), mode) as tap:
            rows.append(tap.rows(model(x).float().sum((1, 2))))
    torch.testing.assert_close(*rows, rtol=0.05, atol=0.05 * rows[1].abs().max().item())


def test_grouped_mm_without_groups():
    """[E, n, I] @ [E, I, O], and what torch itself refuses."""
    model, x = nn.Module(), torch.randn(2, 4, 16)
    model.w = nn.Parameter(torch.randn(2, 16, 8))
    plan = Plan.make(model, Full())
    ends = torch.tensor([2, 8], dtype=torch.int32)
    with capture(model, plan) as tap:
        rows = tap.rows(torch._grouped_mm(x, model.w).square().sum((0, 2)))
        with pytest.raises(RuntimeError, match="Bias"):
            torch._grouped_mm(x.flatten(0, 1), model.w, offs=ends, bias=torch.zeros(2, 8))
    truth = 2 * torch.einsum("eni,eno->neio", x, x @ model.w.detach()).flatten(1)
    torch.testing.assert_close(rows, truth)


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
