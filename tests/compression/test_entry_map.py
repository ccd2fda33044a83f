"""Compressions whose entries are made of several coordinates: rows equal a matrix times the whole
gradient of one example, for every layer, in both modes."""

import math
from functools import cache

import pytest
import torch
from cases import CASES, assert_exact, build, example
from conftest import EPS32
from layer_cases import LAYERS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def gradients(case, model, batch):
    """Each example's gradients by ordinary autograd, by name of the parameter."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = []
    for b in range(len(batch[0])):
        loss = case.loss_fn(model, example(batch, b)).sum()
        grads = torch.autograd.grad(loss, trained.values(), materialize_grads=True)
        found.append(dict(zip(trained, grads, strict=True)))
    return found


def times_matrices(grads, plan):
    """The rows [B, R] of gradients: each whole gradient times the matrices."""
    parts = []
    for block in plan.blocks:
        whole = [torch.cat([g[slot.name].flatten() for slot in block.slots]) for g in grads]
        parts.append(torch.stack(whole) @ matrix(block).T)
    return torch.cat(parts, 1)


def true_rows(case, model, batch, plan):
    return times_matrices(gradients(case, model, batch), plan)


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


class Float32Sums(TorchDispatchMode):
    """float64 ops, as far off as float32 ones may be: by a random draw of their rounding errors.

    A float32 sum of n terms is the sum of terms that are each off by √n 2^-24 at most, most likely
    (Higham & Mary 2019, "A new approach to probabilistic rounding error analysis"): so each number
    that an op is given moves by that much, n the longest dimension of its tensor.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func._schema.is_mutable:
            args = [self.moved(arg) for arg in args]
        return func(*args, **kwargs or {})

    def moved(self, arg):
        if not isinstance(arg, torch.Tensor) or not arg.is_floating_point():
            return arg
        assert arg.dtype == torch.float64
        most = math.sqrt(max(arg.shape, default=1)) * EPS32
        return arg * (1 + most * (2 * torch.rand_like(arg) - 1))


@cache
def float64_gradients(case):
    """The case's gradients, and four draws of what rounding to float32 may make of them."""
    model, batch = build(case, torch.float64)
    exact, draws = gradients(case, model, batch), []
    for _ in range(4):
        with Float32Sums() as sums:
            grads = gradients(case, model, batch)
        # Once more, as they are summed to entries.
        draws.append([{name: sums.moved(g) for name, g in one.items()} for one in grads])
    return exact, draws


@pytest.mark.parametrize("compression", COMPRESSIONS.values(), ids=COMPRESSIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_rows(case, compression, backend):
    """As close to the float64 truth as rounding lets float32 sums of these lengths be."""
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, compression)
    exact, draws = float64_gradients(case)
    truth = times_matrices(exact, plan)
    errors = [(times_matrices(draw, plan) - truth).norm() for draw in draws]
    model.float()
    batch = tuple(t.float() if t.is_floating_point() else t for t in batch)
    with capture(model, plan, backend=backend.name) as tap:
        rows = tap.rows(case.loss_fn(model, batch))
    assert rows.dtype == torch.float32
    assert (rows.double() - truth).norm() <= torch.stack(errors).square().mean().sqrt()


def paths_of(model, x, compression):
    plan = Plan.make(model, compression)
    with capture(model, plan) as tap:
        tap.rows(model(x).flatten(1).sum(1))
    return plan, {name.rpartition(".")[2]: path for name, path in plan.paths.items()}


class SampledOuter(TorchDispatchMode):
    """The shapes of the coordinates of each call of the op, from Python or from C++."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.dropinf.sampled_outer.default:
            self.shapes.append(tuple(args[2].shape))
        return func(*args, **(kwargs or {}))


def test_a_sketch_of_a_linear_layer_is_one_call():
    """Of its weight and its bias, and nothing else."""
    with SampledOuter() as calls:
        _, paths = paths_of(nn.Linear(20, 30), torch.randn(3, 5, 20), Sketch(r=13))
    assert calls.shapes == [(13, 4)]
    assert set(paths.values()) == {"closed form"}


@pytest.mark.parametrize("compression", [FactoredDropout(r=40), LoGra(r=40)], ids=str)
def test_linear_layers_form_no_gradient(compression, monkeypatch):
    """Grids and two-sided projections go through one op."""
    widths, inside = [], ops.factored_outer

    def counted(*args, **options):
        out = inside(*args, **options)
        widths.append(out.shape[1])
        return out

    monkeypatch.setattr(ops, "factored_outer", counted)
    plan, paths = paths_of(nn.Linear(20, 30), torch.randn(3, 5, 20), compression)
    assert plan.slots[0].r in widths and max(widths) < 30 * 20
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
    print(plan.describe())
    assert " gradient formed " in capsys.readouterr().out
    plan, _ = paths_of(nn.Linear(20, 30, bias=False), torch.randn(3, 20), FactoredDropout(r=101))
    print(plan.describe())
    assert (
        "101 entries were asked for: grids of a x b have no more than 100"
        in capsys.readouterr().out
    )
    plan, _ = paths_of(nn.Linear(20, 30, bias=False), torch.randn(3, 20), FactoredDropout(r=100))
    print(plan.describe())
    assert "asked for" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", [Gaussian, Rademacher, SJLT, FJLT, LoGra])
def test_projections_of_layers_differ(kind):
    layers = [nn.Linear(20, 20, bias=False) for _ in range(2)]
    one, other = (matrix(block) for block in Plan.make(nn.Sequential(*layers), kind(r=16)).blocks)
    assert (one * other).sum().abs() < 0.5 * one.square().sum()
