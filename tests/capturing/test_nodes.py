"""What is done in C++ and what is known from earlier passes: the same bits as sites in Python."""

import copy
import gc
import weakref

import pytest
import torch
from cases import CASES, build, squares, true_rows
from layer_cases import LAYERS
from torch import nn
from zoo import ZOO

from dropinf import Dropout, Full, Plan, Sketch, capture
from dropinf.capturing import NotClosedError, closing, extension, kept
from dropinf.capturing.walk import walk

pytestmark = [
    pytest.mark.skipif(extension.CPP is None, reason="the extension was not built"),
    pytest.mark.filterwarnings("ignore:rows. a backward pass for each:UserWarning"),
]
ALL = [*CASES, *(layer.case for layer in LAYERS), *ZOO]


def in_python(monkeypatch):
    for module in (closing, kept):
        monkeypatch.setattr(module, "CPP", None)


def narrow(case, dtype):
    model, batch = build(case, torch.float64)
    batch = tuple(t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t for t in batch)
    return model.to(dtype), batch


def same_bits(case, compression, dtype, monkeypatch, **options):
    """The rows of the first pass, one whose calls are known, and one in another capture."""
    model, batch = narrow(case, dtype)
    plan = Plan.make(model, compression)

    def rows_in(passes):
        with capture(model, plan, **options) as tap:
            return [tap.rows(case.loss_fn(model, batch)) for _ in range(passes)]

    rows = rows_in(2) + rows_in(1)
    paths = dict(plan.paths)
    with monkeypatch.context() as patch:
        in_python(patch)
        plan = Plan.make(model, compression)
        plain = rows_in(2) + rows_in(1)
    assert all(map(torch.equal, rows, plain))
    assert paths == plan.paths


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_the_same_bits(case, monkeypatch):
    same_bits(case, Dropout(r=13), torch.float32, monkeypatch)


@pytest.mark.parametrize("compression", [Sketch(r=7, s=3), Full()], ids=["Sketch", "Full"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_bits_of_other_compressions(case, compression, monkeypatch):
    same_bits(case, compression, torch.float32, monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_bits_in_half_precision(case, monkeypatch):
    same_bits(case, Dropout(r=13), torch.bfloat16, monkeypatch)


def walks(monkeypatch):
    """How many walks were made."""
    made = []

    def counted(*args):
        made.append(args)
        return walk(*args)

    monkeypatch.setattr("dropinf.capturing.backward.walk", counted)
    return made


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))


def test_a_known_pass_is_not_walked_again(monkeypatch):
    made, model = walks(monkeypatch), mlp()
    plan = Plan.make(model, Dropout(r=6))
    for _ in range(2):
        with capture(model, plan) as tap:
            for B in (3, 2, 3, 2):
                tap.rows(squares(model, (torch.randn(B, 4),)))
    assert len(made) == 2


class Branching(nn.Module):
    """Goes another way where the data say so, over the same layers and shapes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0:
            x = self.second(self.first(x).tanh())
        elif x[0, 0] > 0:
            x = self.first(self.second(x).tanh())
        else:
            x = self.first(self.first(x).tanh()) + self.second(x.flip(0)).flip(0)
        return x


def branches():
    x = torch.randn(3, 4)
    mixed = -x.abs() - 2
    mixed[0, 0] = 3
    return [x.abs(), mixed, -x.abs()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_pass_that_differs(dtype, monkeypatch):
    torch.manual_seed(0)
    made, model = walks(monkeypatch), Branching().to(dtype)
    plan = Plan.make(model, Full())
    batches = [x.to(dtype) for x in branches()]
    with capture(model, plan) as tap:
        for x in batches + batches[::-1] + batches:
            rows = tap.rows(squares(model, (x,)))
            losses = squares(model, (x,))
            for row, loss in zip(rows, losses, strict=True):
                with tap.paused():
                    model_copy = copy.deepcopy(model)
                    own = squares(model_copy, (x,))[int((losses == loss).nonzero()[0])]
                    truth = torch.autograd.grad(own, list(model_copy.parameters()))
                torch.testing.assert_close(row, torch.cat([g.flatten() for g in truth]))
    assert len(made) == 3


class Picking(nn.Module):
    """Takes its examples in an order that a buffer, a list or the data give."""

    def __init__(self):
        super().__init__()
        self.layer, self.order = nn.Linear(4, 3), [0, 1, 2]
        self.index = nn.Buffer(torch.arange(3))
        self.roll = 0

    def forward(self, x):
        y = self.layer(x)[self.index].roll(self.roll, 0)
        return torch.stack([y[i] for i in self.order])


@pytest.mark.parametrize("B", [3, 1])
def test_what_a_graph_keeps_is_compared(B, monkeypatch):
    """Graphs of the same functions and shapes, whose nodes keep other numbers and indices."""
    made, model = walks(monkeypatch), Picking()
    plan = Plan.make(model, Full())
    x = torch.randn(3, 4)
    with capture(model, plan) as tap:
        for order, index, roll in [
            ([0, 1, 2], [0, 1, 2], 0),
            ([2, 0, 1], [0, 1, 2], 0),
            ([0, 1, 2], [1, 2, 0], 0),
            ([0, 1, 2], [0, 1, 2], 1),
            ([0, 1, 2], [0, 1, 2], 0),
        ]:
            model.order, model.roll = order, roll
            model.index.copy_(torch.tensor(index))
            losses = squares(model, (x,))[:B]
            rows = tap.rows(losses)
            at = torch.tensor(index).roll(roll)[torch.tensor(order)][:B]
            y = model.layer(x).detach()[at]
            weight = y[:, :, None] * x[at][:, None]
            truth = 2 * torch.cat([weight.flatten(1), y], 1)
            torch.testing.assert_close(rows, truth)
    assert len(made) >= 4


def test_parameters_that_were_replaced():
    model = mlp()
    plan = Plan.make(model, Full())
    for _ in range(2):
        with capture(model, plan) as tap:
            x = torch.randn(3, 4)
            rows = tap.rows(squares(model, (x,)))
        torch.testing.assert_close(rows.sum(0), summed(model, x))
        model[0].weight = nn.Parameter(torch.randn(5, 4))
        model[3] = nn.Linear(5, 3)


def summed(model, x):
    grads = torch.autograd.grad(squares(model, (x,)).sum(), list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def test_storage_that_was_replaced():
    model = mlp()
    plan = Plan.make(model, Full())
    x = torch.randn(3, 4)
    with capture(model, plan) as tap:
        for _ in range(3):
            rows = tap.rows(squares(model, (x,)))
            with tap.paused():
                torch.testing.assert_close(rows.sum(0), summed(model, x))
            with torch.no_grad():
                model[0].weight.data = torch.randn(5, 4)
                model[3].bias.add_(1)


def test_a_write_between_the_passes_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plan = Plan.make(model, Full())
    with capture(model, plan) as tap:
        for _ in range(2):
            losses = squares(model, (torch.randn(3, 4),))
            with torch.no_grad():
                model[1].weight.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                tap.rows(losses)


class Hooking(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.hooks = nn.Linear(4, 3), False

    def forward(self, x):
        if self.hooks:
            self.layer.bias.register_hook(lambda g: 2 * g)
        y = self.layer(x)
        return y


def test_a_hook_in_a_later_pass():
    """Calls that are known are not taken for those of a parameter that is hooked."""
    model = Hooking()
    plan = Plan.make(model, Full())
    x = torch.randn(3, 4)
    with capture(model, plan) as tap:
        tap.rows(squares(model, (x,)))
        model.hooks = True
        with pytest.raises(NotClosedError):
            squares(model, (x,))
    with capture(model, plan) as tap:
        rows = tap.rows(squares(model, (x,)))  # of the two hooks that are there now
    model.hooks = False
    torch.testing.assert_close(rows[:, -3:], 8 * model.layer(x).detach())


def test_a_kept_graph_gives_other_rows():
    model = mlp()
    plan = Plan.make(model, Full())
    x = torch.randn(3, 4)
    with capture(model, plan) as tap:
        for _ in range(2):
            y = model(x)
            rows = [tap.rows(y[:, k], retain_graph=True) for k in (0, 1, 0)]
            tap.rows(y[:, 2])
            with pytest.raises(RuntimeError, match="second time"):
                tap.rows(y[:, 2])
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])


def test_a_site_without_a_gradient_has_no_entries():
    """A node that autograd does not come to writes nothing, and its columns are zeros."""

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.second(Cut.apply(self.first(x)).tanh())

    model = Model()
    plan = Plan.make(model, Full())
    from dropinf import keeps_examples

    keeps_examples(Cut)
    with capture(model, plan) as tap:
        for _ in range(2):
            rows = tap.rows(squares(model, (torch.randn(3, 4),)))
            assert not rows[:, :20].any() and rows[:, 20:].all()


def test_nothing_is_kept_of_a_model_that_is_gone():
    model = mlp()
    plan = Plan.make(model, Full())
    with capture(model, plan) as tap:
        for _ in range(3):
            tap.rows(squares(model, (torch.randn(3, 4),)))
    gone = [weakref.ref(t) for t in (model, tap, *model.parameters())]
    del model, tap
    gc.collect()
    assert all(reference() is None for reference in gone)


def test_rows_equal_autograd_by_known_calls():
    """The C++ side against one-example float64 autograd, which shares nothing with it."""
    for case in CASES:
        model, batch = narrow(case, torch.float32)
        plan = Plan.make(model, Dropout(r=40))
        with capture(model, plan) as tap:
            rows = [tap.rows(case.loss_fn(model, batch)) for _ in range(3)][-1]
        wide = tuple(
            t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in batch
        )
        truth = true_rows(case, model.double(), wide, plan)
        assert (rows - truth).norm() <= 1e-5 * truth.norm(), case.name


def test_many_lengths(monkeypatch):
    """Each is walked once, as long as they are not too many; the oldest goes first."""
    monkeypatch.setattr(kept, "_MAX_RECORDS", 3)
    made, model = walks(monkeypatch), mlp()
    plan = Plan.make(model, Full())
    with capture(model, plan) as tap:
        for T in (1, 2, 3, 1, 2, 3, 4, 1, 3, 4, 2):
            rows = tap.rows(squares(model, (torch.randn(2, T, 4),)))
            assert rows.shape == (2, plan.width)
    assert [len(starts[0][0]) for starts, _ in made] == [2] * 6  # 1, 2, 3, then 4, 1 and 2 again
