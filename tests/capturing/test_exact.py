"""Rows are the gradients of the losses, whatever a model does with its batch; see exact_models."""

import copy

import exact_autograd
import exact_batches
import exact_parameters
import pytest
import torch
from torch import nn

from dropinf import Dropout, Full, Plan, capture, collect

CASES = [*exact_batches.CASES, *exact_autograd.CASES, *exact_parameters.CASES]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:rows. a backward pass for each:UserWarning"),
]


def made(case):
    torch.manual_seed(0)
    batch = tuple(t.double() if t.is_floating_point() else t for t in case.batch())
    return case.model().double().eval(), batch


def true_rows(case, model, batch, plan):
    """Row b: the gradient of losses[b], by plain autograd, in a forward pass of its own."""
    rows, b, B = [], 0, 1
    while b < B:
        one = copy.deepcopy(model)  # which may change itself
        losses = case.loss_fn(one, batch)
        B = len(losses)
        if losses[b].requires_grad:
            losses[b].backward()
        found = dict(one.named_parameters())
        row = []
        for slot in plan.slots:
            p = found[slot.name]
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            row.append(grad.flatten()[slot.index] * slot.scale)
        rows.append(torch.cat(row))
        b += 1
    return torch.stack(rows)


def assert_rows(rows, truth):
    assert truth.abs().sum() > 0 and rows.dtype == truth.dtype
    torch.testing.assert_close(rows, truth, rtol=0, atol=1e-12 * truth.abs().max().item())


def captured(case, model, batch, plan):
    with capture(model, plan) as tap:
        return tap.rows(case.loss_fn(model, batch))


def collected(case, model, batch, plan):
    return collect(model, [batch], case.loss_fn, plan, check=False, progress=False).rows


@pytest.mark.parametrize(
    "way, compression",
    [(captured, Full()), (collected, Dropout(r=7))],
    ids=["captured", "collected"],
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_are_the_gradients_of_the_losses(case, way, compression):
    model, batch = made(case)
    plan = Plan.make(model, compression)
    truth = true_rows(case, model, batch, plan)
    assert_rows(way(case, model, batch, plan), truth)


@pytest.mark.parametrize("mode", ["activations", "grads"])
def test_complex_parameters_are_refused(mode):
    """A row holds real numbers, and would have half of the gradient."""
    model = nn.Linear(3, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match="complex"):
        plan = Plan.make(model, Full())
        with capture(model, plan, mode) as tap:
            tap.rows(model(torch.randn(4, 3, dtype=torch.complex64)).abs().sum(1))
