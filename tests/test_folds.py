"""Compressions whose entries are made of several coordinates: rows equal a matrix times the whole
gradient of one example, for every layer, in both modes."""

import copy
import math

import pytest
import torch
from cases import CASES, assert_exact, build, example
from layer_cases import LAYERS

from dropinf import (
    FJLT,
    SJLT,
    FactoredDropout,
    Gaussian,
    LoGra,
    Plan,
    Rademacher,
    Sketch,
    capture,
)
from dropinf.folds import Dense, Sums

COMPRESSIONS = {
    "Sketch": Sketch(r=13, s=3),
    "Sketch of all": Sketch(r=5, s=1000),
    "FactoredDropout": FactoredDropout(r=40),
    "Gaussian": Gaussian(r=7),
    "LoGra": LoGra(r=13),
}


def matrix(block):
    """[r, P] float64: the row of a block is this times the gradient of its parameters."""
    M = torch.zeros(block.r, block.P, dtype=torch.float64)
    first = 0
    for slot in block.slots:
        start, size = slot.offset - block.offset, math.prod(slot.shape)
        for c, position in enumerate(slot.index.tolist()):
            if slot.fold is None:
                M[start + c, first + position] = slot.scale
            elif isinstance(slot.fold, Sums):
                k = start + int(slot.fold.entry[c])
                assert M[k, first + position] == 0
                M[k, first + position] = slot.scale * int(slot.fold.sign[c])
        if isinstance(slot.fold, Dense):
            projection = slot.fold.projection
            whole = projection.project(torch.eye(projection.P, dtype=torch.float64)).T
            of_layer = projection.P == block.P
            own = whole[:, first : first + size] if of_layer else whole
            M[start : start + len(own), first : first + size] = own
        first += size
    return M


def true_rows(case, model, batch, plan):
    """Each example's whole gradient by ordinary autograd, times the matrices."""
    named = dict(model.named_parameters())
    matrices = [matrix(block) for block in plan.blocks]
    rows = []
    for b in range(len(batch[0])):
        loss = case.loss_fn(model, example(batch, b)).sum()
        parts = []
        for block, M in zip(plan.blocks, matrices, strict=True):
            own = [named[slot.name] for slot in block.slots]
            grads = torch.autograd.grad(loss, own, retain_graph=True, materialize_grads=True)
            parts.append(M @ torch.cat([g.flatten() for g in grads]).double())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["activations", "grads"])
@pytest.mark.parametrize("compression", COMPRESSIONS.values(), ids=COMPRESSIONS)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_rows_equal_autograd(layer, compression, mode):
    case = layer.case
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, compression)
    truth = true_rows(case, model, batch, plan)
    with capture(model, plan, mode) as tap:
        rows = tap.rows(case.loss_fn(model, batch))
        assert_exact(rows, truth, 1e-12)
        again = tap.rows(case.loss_fn(model, batch))  # with what the first one kept
        assert torch.equal(again, rows)


EVERYTHING = [
    *COMPRESSIONS.values(),
    Sketch(total=90, allocation="sqrt"),
    Rademacher(r=7),
    SJLT(r=7, s=3),
    FJLT(r=7),
    LoGra(r=1),
    FactoredDropout(r=1),
]


@pytest.mark.parametrize("compression", EVERYTHING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_rows(case, compression, backend):
    """As close to the float64 truth as twice what plain float32 autograd reaches."""
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, compression)
    truth = true_rows(case, model, batch, plan)
    narrow = copy.deepcopy(model).float()
    batch = tuple(t.float() if t.is_floating_point() else t for t in batch)
    plain = (true_rows(case, narrow, batch, plan) - truth).norm()
    with capture(narrow, plan, backend=backend.name) as tap:
        rows = tap.rows(case.loss_fn(narrow, batch))
    assert rows.dtype == torch.float32
    assert (rows.double() - truth).norm() <= 2 * plain
