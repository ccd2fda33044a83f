"""Passes that differ from a known one in what neither a call nor a graph shows at first sight."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from cases import squares
from torch import nn

from dropinf import Dropout, Full, Plan, capture, keeps_examples

pytestmark = pytest.mark.filterwarnings("ignore:rows. a backward pass for each:UserWarning")


def true_rows(model, plan, loss_fn):
    """Each loss alone through ordinary autograd, then the plan's coordinates and scales."""
    named, rows = dict(model.named_parameters()), []
    for loss in loss_fn():
        grads = torch.autograd.grad(
            loss,
            [named[slot.name] for slot in plan.slots],
            retain_graph=True,
            materialize_grads=True,
        )
        parts = zip(plan.slots, grads, strict=True)
        rows.append(torch.cat([g.flatten()[slot.index] * slot.scale for slot, g in parts]))
    return torch.stack(rows)


def assert_exact(rows, model, plan, loss_fn):
    truth = true_rows(model, plan, loss_fn)
    assert (rows - truth).norm() <= 1e-5 * truth.norm()


def assert_same(model, plan, loss_fn, change):
    """Rows of a model of which two passes are known, before and after a change of it."""
    with capture(model, plan) as tap:
        for _ in range(2):
            tap.rows(loss_fn())
        change()
        rows = tap.rows(loss_fn())
    assert_exact(rows, model, plan, loss_fn)


class Calling(nn.Module):
    """Calls one function with its parameters and with values that change."""

    def __init__(self, call, *shapes, **values):
        super().__init__()
        self.call, self.values = call, values
        self.weights = nn.ParameterList([torch.randn(shape) for shape in shapes])

    def forward(self, x):
        return self.call(x, *self.weights, **self.values)


def test_a_list_that_is_written_to():
    model = Calling(F.conv2d, (3, 2, 3, 3), padding=[1, 1])
    x = torch.randn(4, 2, 7, 7)
    plan = Plan.make(model, Dropout(r=9))
    assert_same(
        model, plan, lambda: squares(model, (x,)), lambda: model.values["padding"].__setitem__(0, 2)
    )


def test_a_number_in_a_tensor_that_is_written_to():
    def call(x, weight, bias, beta):
        return torch.addmm(bias, x, weight, beta=beta)

    model = Calling(call, (4, 3), (3,), beta=torch.tensor(1.0))
    x = torch.randn(3, 4)
    plan = Plan.make(model, Dropout(r=9))
    assert_same(model, plan, lambda: squares(model, (x,)), lambda: model.values["beta"].fill_(3))


def test_an_input_that_was_two_arguments():
    def call(x, weight, again):
        x = 2 * x
        return F.linear(x, weight, x if again else 3 * x)[None]

    model = Calling(call, (4, 4), again=True)
    x = torch.randn(4, requires_grad=True)
    plan = Plan.make(model, Dropout(r=9))
    assert_same(model, plan, lambda: squares(model, (x,)), lambda: model.values.update(again=False))


def test_ones_that_were_a_mask():
    def call(x, weight, index):
        return F.linear(x, weight)[index]

    model = Calling(call, (5, 4), index=torch.ones(3, dtype=torch.bool))
    x = torch.randn(3, 4)
    plan = Plan.make(model, Dropout(r=9))
    assert_same(
        model,
        plan,
        lambda: squares(model, (x,)),
        lambda: model.values.update(index=torch.ones(3, dtype=torch.int64)),
    )


def test_a_slice_whose_ends_are_written_to():
    start, stop = torch.tensor(0), torch.tensor(1)
    x = torch.randn(3, 4)

    def call(x, weight):
        y = F.linear(x, weight)
        y[start:stop] = F.linear(x.sum(0, keepdim=True), weight)
        return y

    def change():
        start.fill_(1)
        stop.fill_(2)

    model = Calling(call, (5, 4))
    plan = Plan.make(model, Dropout(r=9))
    assert_same(model, plan, lambda: squares(model, (x,)), change)


def test_losses_that_become_wider():
    def call(x, weight, dtype):
        return F.linear(x, weight).to(dtype)

    model = Calling(call, (5, 4), dtype=torch.bfloat16)
    x = torch.randn(3, 4)
    plan = Plan.make(model, Dropout(r=9))
    assert_same(
        model,
        plan,
        lambda: squares(model, (x,)),
        lambda: model.values.update(dtype=torch.float64),
    )


def test_several_images_of_one_example():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2))
    x = torch.randn(5, 2, 5, 5)
    plan = Plan.make(model, Dropout(r=9))
    assert_same(model, plan, lambda: squares(model, (x,)).mean(0, keepdim=True), lambda: None)


class Outer(nn.Module):
    """Two layers, and what comes between them."""

    def __init__(self, inner):
        super().__init__()
        self.last, self.first = nn.Linear(3, 2), nn.Linear(4, 5)
        self.inner = [inner]  # no part of this model

    def forward(self, x):
        return self.last(self.inner[0](self.first(x).tanh()).tanh())


def test_two_captures_of_one_graph():
    """Sites of one capture write nothing into the rows of another."""
    inner = nn.Sequential()
    inner.add_module("between", nn.Linear(5, 3))
    outer, x = Outer(inner), torch.randn(3, 4)
    models = outer, inner
    plans = [Plan.make(model, Dropout(r=r)) for model, r in zip(models, (5, 7), strict=True)]
    with capture(outer, plans[0]) as one, capture(inner, plans[1]) as other:
        for _ in range(3):
            losses = squares(outer, (x,))
            rows = [one.rows(losses, retain_graph=True), other.rows(losses)]
    for model, plan, found in zip(models, plans, rows, strict=True):
        assert_exact(found, model, plan, lambda: squares(outer, (x,)))


def test_a_graph_of_an_earlier_capture_is_refused():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(3, 4)
    with capture(model, Plan.make(model, Dropout(r=5))) as tap:
        for _ in range(2):
            tap.rows(squares(model, (x,)))
        losses = squares(model, (x,))
    with (
        capture(model, Plan.make(model, Dropout(r=7))) as tap,
        pytest.raises(RuntimeError, match="computed inside of a capture"),
    ):
        tap.rows(losses)


@keeps_examples
class Interrupting(torch.autograd.Function):
    """Calls something in the backward pass."""

    call = None

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        Interrupting.call()
        return dy


def test_a_pass_that_failed_is_freed_in_a_later_one():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(3, 4)
    plan = Plan.make(model, Dropout(r=9))
    kept = []

    def fail():
        raise KeyboardInterrupt

    def loss_fn():
        return squares(lambda x: Interrupting.apply(model(x)), (x,))

    with capture(model, plan) as tap:
        Interrupting.call = lambda: None
        for _ in range(2):
            tap.rows(loss_fn())
        losses = loss_fn()
        Interrupting.call = fail
        try:
            tap.rows(losses, retain_graph=True)
        except KeyboardInterrupt as error:
            kept.append(error)
        Interrupting.call = lambda: (kept.clear(), gc.collect())
        rows = tap.rows(losses)
    assert_exact(rows, model, plan, loss_fn)


def test_rows_inside_of_a_pass():
    """A hook that takes the rows of another graph leaves the pass around it as it was."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(3, 4)
    plan, inner = Plan.make(model, Full()), []

    def loss_fn():
        return squares(lambda x: Interrupting.apply(model(x)), (x,))

    with capture(model, plan) as tap:
        losses = squares(model, (x,))
        Interrupting.call = lambda: inner.append(tap.rows(losses))
        rows = [tap.rows(loss_fn()), *inner]
    Interrupting.call = lambda: None
    for found in rows:
        assert_exact(found, model, plan, loss_fn)


def test_a_part_of_no_elements():
    """What is made of a parameter may be empty, where several losses are of one example."""

    def call(x, weight, layer):
        return torch.cat([x * weight, F.linear(x[1:] * (2 * weight)[1:], layer)])

    model = Calling(call, (1, 6), (6, 6))
    x = torch.randn(1, 6)
    plan = Plan.make(model, Dropout(r=5))
    assert_same(model, plan, lambda: squares(model, (x,)).repeat_interleave(2), lambda: None)


def captured(model):
    plan = Plan.make(model, Full())
    with capture(model, plan) as tap:
        tap.rows(squares(model, (torch.randn(3, 4),)))
    return plan  # as long as it lives, what is known of the model is kept


def test_parameters_can_be_swapped_afterwards():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    plan = captured(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model[0].weight.dtype == torch.float64
    with capture(model, plan) as tap:
        x = torch.randn(3, 4).double()
        rows = tap.rows(squares(model, (x,)))
    assert_exact(rows, model, plan, lambda: squares(model, (x,)))


def test_gradients_are_taken_after_a_swap():
    """Which leaves torch's list of a parameter's hooks where nobody reads it."""
    model, x = nn.Linear(4, 3), torch.randn(3, 4)
    plan = Plan.make(model, Full())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for dtype in (torch.float32, torch.float64):
            model.to(dtype)
            with capture(model, plan, "grads") as tap:
                rows = tap.rows(squares(model, (x.to(dtype),)))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_exact(rows, model, plan, lambda: squares(model, (x.double(),)))


@pytest.mark.parametrize("what", ["hook", "attribute"])
def test_a_parameter_that_leads_to_its_model_does_not_hold_it(what):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    if what == "hook":
        model[0].weight.register_hook(lambda g, model=model: None)
    else:
        model[0].weight.owner = model
    plan = captured(model)
    gone = weakref.ref(model)
    del model
    for _ in range(2):
        gc.collect()
    assert gone() is None and plan.width


def test_a_loss_that_mixed_is_not_remembered():
    """A mean makes every layer's result shared by examples; the next right loss is closed."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    plan = Plan.make(model, Full())
    x = torch.randn(4, 6)

    def right():
        return squares(model, (x,))

    def mean():
        return right().mean().expand(len(x))

    for loss_fn in (right, mean, mean, mean, right, right):
        with capture(model, plan) as tap:
            rows = tap.rows(loss_fn())
        assert_exact(rows, model, plan, loss_fn)
    assert set(plan.paths.values()) == {"closed form"}


def test_a_batch_of_one_does_not_hide_why():
    """Why a parameter takes a pass for each loss, which a single example cannot show."""
    model = Calling(lambda x, w: torch.einsum("btd,bte,def->btf", x, x, w), (6, 6, 3))
    plan = Plan.make(model, Full())
    paths = []
    for B in (4, 1):
        with capture(model, plan) as tap:
            tap.rows(squares(model, (torch.randn(B, 2, 6),)))
        paths.append(dict(plan.paths))
    assert paths[0] == paths[1] == {"weights.0": "a pass for each loss: Bmm, which mixes examples"}
