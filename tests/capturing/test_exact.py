"""Rows are the gradients of the losses, whatever a model does with its batch; see exact_cases."""

import copy

import pytest
import torch
from exact_cases import CASES

from dropinf import Full, Plan, capture, collect

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:rows. a backward pass for each:UserWarning"),
]


def made(case):
    torch.manual_seed(0)
    model = case.model().double().eval()
    batch = tuple(t.double() if t.is_floating_point() else t for t in case.batch())
    return model, batch, Plan.make(model, Full())


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
    assert truth.abs().sum() > 0
    torch.testing.assert_close(rows, truth.to(rows), rtol=0, atol=1e-12 * truth.abs().max().item())


def captured(case, model, batch, plan):
    with capture(model, plan) as tap:
        return tap.rows(case.loss_fn(model, batch))


def collected(case, model, batch, plan):
    return collect(model, [batch], case.loss_fn, plan, check=False, progress=False).rows


@pytest.mark.parametrize("way", [captured, collected], ids=lambda way: way.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_are_the_gradients_of_the_losses(case, way):
    model, batch, plan = made(case)
    truth = true_rows(case, model, batch, plan)
    assert_rows(way(case, model, batch, plan), truth)
