"""Compressions whose entries are made of several coordinates: rows equal a matrix times the whole
gradient of one example, for every layer, in both modes."""

import copy
import math

import pytest
import torch
from cases import CASES, assert_exact, build, example
from layer_cases import LAYERS
from torch import nn

from dropinf import (
    FJLT,
    SJLT,
    Dropout,
    FactoredDropout,
    Full,
    Gaussian,
    LoGra,
    Plan,
    Rademacher,
    Sketch,
    capture,
    ops,
)
from dropinf.compression import DenseProjection, SignedSums

COMPRESSIONS = {
    "Sketch": Sketch(r=13, s=3),
    "Sketch of all": Sketch(r=5, s=1000),
    "FactoredDropout": FactoredDropout(r=40),
    "Gaussian": Gaussian(r=7),
    "LoGra": LoGra(r=13),
}


OTHERS = [
    Sketch(total=90, allocation="sqrt"),
    Rademacher(r=7),
    SJLT(r=7, s=3),
    FJLT(r=7),
    LoGra(r=1),
]


def matrix(block):
    """[r, P] float64: the row of a block is this times the gradient of its parameters."""
    M = torch.zeros(block.r, block.P, dtype=torch.float64)
    first = 0
    for slot in block.slots:
        start, size = slot.offset - block.offset, math.prod(slot.shape)
        for c, position in enumerate(slot.index.tolist()):
            if slot.entry_map is None:
                M[start + c, first + position] = slot.scale
            elif isinstance(slot.entry_map, SignedSums):
                k = start + int(slot.entry_map.entry[c])
                assert M[k, first + position] == 0
                M[k, first + position] = slot.scale * int(slot.entry_map.sign[c])
        if isinstance(slot.entry_map, DenseProjection):
            projection = slot.entry_map.projection
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
            whole = torch.cat([g.flatten() for g in grads])
            parts.append(M.to(whole) @ whole)
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name != "Sketch of all"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_layers(layer, compression):
    check(layer.case, COMPRESSIONS[compression], "activations")


# One layer called twice, a table that two layers share, parameters that are frozen.
SHARING = [case for case in CASES if any(part in case.name for part in ("twice", "tied", "frozen"))]


@pytest.mark.parametrize("mode", ["activations", "grads"])
@pytest.mark.parametrize("compression", OTHERS, ids=str)
@pytest.mark.parametrize("case", SHARING, ids=lambda case: case.name)
def test_models(case, compression, mode):
    check(case, compression, mode)


@pytest.mark.parametrize("compression", COMPRESSIONS.values(), ids=COMPRESSIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradient_buffers(case, compression):
    check(case, compression, "grads")


def check(case, compression, mode):
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, compression)
    truth = true_rows(case, model, batch, plan)
    with capture(model, plan, mode) as tap:
        rows = tap.rows(case.loss_fn(model, batch))
        assert_exact(rows, truth, 1e-12)
        again = tap.rows(case.loss_fn(model, batch))  # with what the first one kept
        assert torch.equal(again, rows)


@pytest.mark.parametrize("compression", COMPRESSIONS.values(), ids=COMPRESSIONS)
def test_row_of_a_loop(compression):
    """tap.row() reads .grad of a loop of one's own, one gradient missing."""
    model = nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(4, 3), "unused": nn.Linear(2, 2)})
    model.double()
    plan = Plan.make(model, compression)
    with capture(model, plan, "grads") as tap:
        x = torch.randn(2, 5, dtype=torch.float64)
        model["b"](model["a"](x).tanh()).square().sum().backward()
        row = tap.row()
    parts = []
    for block in plan.blocks:
        own = [model.get_parameter(slot.name) for slot in block.slots]
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
        parts.append(matrix(block) @ torch.cat([g.flatten() for g in flat]))
    assert_exact(row[None], torch.cat(parts)[None], 1e-12)


@pytest.mark.parametrize("compression", COMPRESSIONS.values(), ids=COMPRESSIONS)
def test_rows_of_tokens(compression):
    """Per token, the rows of an example's positions add up to its row."""
    case = next(case for case in CASES if case.name == "GPT-2, tied")
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, compression)
    with capture(model, plan) as tap:
        rows = tap.rows(case.loss_fn(model, batch))
    with capture(model, plan, per="token") as tap:
        tokens = tap.rows(case.loss_fn(model, batch))
    assert_exact(tokens.unflatten(0, (len(rows), -1)).sum(1), rows, 1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_rows(case, backend):
    """As close to the float64 truth as twice what plain float32 autograd reaches, all in all.

    In the rows of one compression, a single entry that rounding happens to hit decides.
    """
    ours, plain = [], []
    for compression in COMPRESSIONS.values():
        model, batch = build(case, torch.float64)
        plan = Plan.make(model, compression)
        truth = true_rows(case, model, batch, plan)
        narrow = copy.deepcopy(model).float()
        batch = tuple(t.float() if t.is_floating_point() else t for t in batch)
        plain.append((true_rows(case, narrow, batch, plan).double() - truth).norm())
        with capture(narrow, plan, backend=backend.name) as tap:
            rows = tap.rows(case.loss_fn(narrow, batch))
        assert rows.dtype == torch.float32
        ours.append((rows.double() - truth).norm())
        assert ours[-1] <= 4 * plain[-1]
    assert torch.stack(ours).norm() <= 2 * torch.stack(plain).norm()


def paths_of(model, x, compression):
    plan = Plan.make(model, compression)
    with capture(model, plan) as tap:
        tap.rows(model(x).flatten(1).sum(1))
    return plan, {name.rpartition(".")[2]: path for name, path in plan.paths.items()}


@pytest.mark.parametrize("compression", [Sketch(r=13), FactoredDropout(r=40), LoGra(r=40)], ids=str)
def test_linear_layers_form_no_gradient(compression, monkeypatch):
    """Signs, grids and two-sided projections go through one op, bias included."""
    calls = []
    for op in ("sampled_outer", "factored_outer"):
        inside = getattr(ops, op)

        def counted(x, dy, o_idx, i_idx, op=op, inside=inside, **options):
            out = inside(x, dy, o_idx, i_idx, **options)
            calls.append((op, out.shape[1], options.get("sign") is not None))
            return out

        monkeypatch.setattr(ops, op, counted)
    plan, paths = paths_of(nn.Linear(20, 30), torch.randn(3, 5, 20), compression)
    weight = plan.slots[0].r
    if isinstance(compression, Sketch):
        assert calls == [("sampled_outer", 13, True)]
    else:
        assert ("factored_outer", weight, False) in calls
        assert all(width < 30 * 20 for _, width, _ in calls)
    assert paths["weight"] == "closed form"


def test_a_whole_weight_is_one_product(monkeypatch):
    """Of `Full`, beside its bias; what a layer of few parameters keeps whole, too."""
    widths = []
    inside = ops.factored_outer
    monkeypatch.setattr(
        ops, "factored_outer", lambda *args, **kw: widths.append(1) or inside(*args, **kw)
    )
    for compression in (Full(), Dropout(r=1000)):
        paths_of(nn.Linear(20, 30), torch.randn(3, 5, 20), compression)
    assert len(widths) == 2


class Half(nn.Module):
    """One of its parameters has no part in the loss."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        return x @ self.used.T


@pytest.mark.parametrize("compression", COMPRESSIONS.values(), ids=COMPRESSIONS)
def test_a_parameter_that_is_not_met(compression):
    """It leaves the entries that it shares with others as they are."""
    model, x = Half().double(), torch.randn(4, 5, dtype=torch.float64)
    plan = Plan.make(model, compression)
    (block,) = plan.blocks
    with capture(model, plan) as tap:
        rows = tap.rows(model(x).square().sum(1))
    grads = torch.einsum("bo,bi->boi", 2 * model(x).detach(), x).flatten(1)  # [B, 30]
    whole = torch.cat([grads, torch.zeros_like(grads)], 1)
    torch.testing.assert_close(rows, whole @ matrix(block).T)


def test_describe_says_what_forms_the_gradient(capsys):
    plan, paths = paths_of(nn.Linear(20, 30), torch.randn(3, 5, 20), Gaussian(r=7))
    assert set(paths.values()) == {"gradient formed"}
    plan.describe()
    assert " gradient formed " in capsys.readouterr().out
    plan, _ = paths_of(nn.Linear(20, 30, bias=False), torch.randn(3, 20), FactoredDropout(r=101))
    plan.describe()
    assert (
        "101 entries were asked for: grids of a x b have no more than 100"
        in capsys.readouterr().out
    )
    plan, _ = paths_of(nn.Linear(20, 30, bias=False), torch.randn(3, 20), FactoredDropout(r=100))
    plan.describe()
    assert "asked for" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", [Gaussian, Rademacher, SJLT, FJLT, LoGra])
def test_projections_of_layers_differ(kind):
    layers = [nn.Linear(20, 20, bias=False) for _ in range(2)]
    one, other = (matrix(block) for block in Plan.make(nn.Sequential(*layers), kind(r=16)).blocks)
    assert (one * other).sum().abs() < 0.5 * one.square().sum()
