"""Setting "passes": a model's batch -> rows, gradients not formed where that can be avoided.

The model is a stack of linear layers with T positions an example, and the sizes are n examples, r
entries of each layer, and d weights of a layer. The floor is the forward pass and the backward
pass to the input, without which there is no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import dropinf
from dropinf.compression import Compression
from dropinf.tools.measuring import Call
from dropinf.tools.microbenchmark.formed import Point, need
from dropinf.tools.microbenchmark.peers import PEERS, Batch, Work

OURS, FLOOR = "dropinf Dropout", "forward + backward to the input"
T, NUM_LAYERS = 32, 4


class Inputs:
    """Work of a size, the same in every process."""

    def __init__(self, point: Point, device: torch.device) -> None:
        width = math.isqrt(point.d)
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for _ in range(NUM_LAYERS):
            layers += [nn.Linear(width, width), nn.ReLU()]
        model = nn.Sequential(*layers[:-1]).to(device)
        batch = tuple(torch.randn(2, point.n, T, width).to(device))
        self.r = point.r
        self.work = Work(model, batch, loss_fn, model[0].bias, math.isqrt(point.r))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """[B] squared errors."""
    x, wanted = batch
    return (model(x) - wanted).square().flatten(1).sum(1)


def make(point: Point, device: torch.device) -> Inputs:
    """Inputs of a size."""
    return Inputs(point, device)


def _floor(given: Inputs) -> Call:
    model, (x, wanted) = given.work.model, given.work.batch

    def call() -> object:
        model.requires_grad_(False)
        leaf = x.detach().requires_grad_()
        loss = loss_fn(model, (leaf, wanted)).sum()
        found = torch.autograd.grad(loss, leaf)
        model.requires_grad_(True)
        return found

    return call


def _captured(compression: Callable[[int], Compression]) -> Callable[[Inputs], Call]:
    def contestant(given: Inputs) -> Call:
        model, batch = given.work.model, given.work.batch
        tap = dropinf.capture(model, dropinf.Plan.make(model, compression(given.r)))

        def call() -> Tensor:
            with tap:
                return tap.rows(loss_fn(model, batch))

        return call

    return contestant


def _picked(given: Inputs) -> Callable[[dict[str, Tensor]], Tensor]:
    """Gradients [B, ...] by name -> rows [B, R]."""
    slots = dropinf.Plan.make(given.work.model, dropinf.Dropout(r=given.r)).slots
    index = {slot.name: slot.index.to(given.work.batch[0].device) for slot in slots}

    def pick(grads: dict[str, Tensor]) -> Tensor:
        return torch.cat([grads[s.name].flatten(1)[:, index[s.name]] * s.scale for s in slots], 1)

    return pick


def _vmapped(given: Inputs) -> Call:
    model, batch, pick = given.work.model, given.work.batch, _picked(given)

    def one(parameters: dict[str, Tensor], x: Tensor, wanted: Tensor) -> Tensor:
        return (functional_call(model, parameters, (x,)) - wanted).square().sum()

    gradients = vmap(grad(one), (None, 0, 0))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return lambda: pick(gradients(parameters, *batch))


def _one_by_one(given: Inputs) -> Call:
    model, batch, pick = given.work.model, given.work.batch, _picked(given)
    parameters = dict(model.named_parameters())

    def call() -> Tensor:
        rows = []
        for b in range(len(batch[0])):
            loss = loss_fn(model, (batch[0][b : b + 1], batch[1][b : b + 1])).sum()
            grads = torch.autograd.grad(loss, list(parameters.values()))
            rows.append(pick({n: g[None] for n, g in zip(parameters, grads, strict=True)}))
        return torch.cat(rows)

    return call


def _opacus(given: Inputs) -> Call:
    """Its per-sample gradients, from hooks on a copy of the model."""
    need("opacus")
    import copy

    from opacus.grad_sample import GradSampleModule

    model, batch, pick = given.work.model, given.work.batch, _picked(given)
    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")

    def call() -> Tensor:
        loss_fn(wrapped, batch).sum().backward()
        grads = {name: p.grad_sample for name, p in wrapped._module.named_parameters()}
        rows = pick(grads)
        wrapped.zero_grad(set_to_none=True)
        return rows

    return call


COMPRESSIONS: dict[str, Callable[[int], Compression]] = {
    OURS: lambda r: dropinf.Dropout(r=r),
    "dropinf Sketch, s=4": lambda r: dropinf.Sketch(r=r, s=4),
    "dropinf FactoredDropout": lambda r: dropinf.FactoredDropout(r=r),
    "dropinf LoGra": lambda r: dropinf.LoGra(r=r),
    "dropinf SJLT": lambda r: dropinf.SJLT(r=r),
    "dropinf FJLT": lambda r: dropinf.FJLT(r=r),
    "dropinf Gaussian": lambda r: dropinf.Gaussian(r=r),
    "dropinf Rademacher": lambda r: dropinf.Rademacher(r=r),
}
CONTESTANTS: dict[str, Callable[[Inputs], Call]] = {
    FLOOR: _floor,
    **{name: _captured(compression) for name, compression in COMPRESSIONS.items()},
    "vmap(grad) + index": _vmapped,
    "batch-1 loop + index": _one_by_one,
    "Opacus + index": _opacus,
    **{name: lambda given, peer=peer: peer(given.work) for name, peer in PEERS.items()},
}


def check(name: str, device: torch.device) -> None:
    """A contestant against its definition, on small inputs.

    What is dropinf's, against the same projection of gradients formed one by one; what keeps
    coordinates, against those. Peers have matrices of their own, so of their rows: that they are
    one linear map of the layers' gradients, with no entry always zero.

    Raises:
        LeftOut: it does not run.
        AssertionError: it computes something else.
    """
    if name in PEERS:
        _check_linear(name, device)
        return
    given = make(Point(3, 64, 32 * 32), device)
    model, batch = given.work.model, given.work.batch
    out = CONTESTANTS[name](given)()
    if name == FLOOR:
        x = batch[0].detach().requires_grad_()
        (truth,) = torch.autograd.grad(loss_fn(model, (x, batch[1])).sum(), x)
        torch.testing.assert_close(out[0], truth)
        return
    assert out.isfinite().all() and out.any(1).all(), name
    plan = dropinf.Plan.make(model, COMPRESSIONS.get(name, COMPRESSIONS[OURS])(64))
    truth = []
    for b in range(3):
        loss = loss_fn(model, tuple(t[b : b + 1] for t in batch)).sum()
        named = dict(model.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()))
        grads, parts = dict(zip(named, found, strict=True)), []
        for block in plan.blocks:
            row = torch.zeros(block.r, dtype=torch.float64, device=device)
            for slot in block.slots:
                values = grads[slot.name].double().flatten()[slot.index.to(device)] * slot.scale
                start = slot.offset - block.offset
                folded = values if slot.entry_map is None else slot.entry_map(values[None])[0]
                row[start : start + slot.r] += folded
            parts.append(row)
        truth.append(torch.cat(parts))
    truth = torch.stack(truth)
    assert (out.double() - truth).norm() <= 1e-4 * truth.norm(), name


def _check_linear(name: str, device: torch.device) -> None:
    """Rows of more examples than there are parameters: least squares finds the map, or there is
    none."""
    n, r, width = 600, 16, 8
    given = make(Point(n, r, width * width), device)
    model, (x, wanted) = given.work.model, given.work.batch
    rows = CONTESTANTS[name](given)().to(device).double()
    assert rows.shape == (n, r * NUM_LAYERS), name
    parameters = {k: p.detach().double() for k, p in model.named_parameters()}

    def one(parameters: dict[str, Tensor], x: Tensor, wanted: Tensor) -> Tensor:
        return (functional_call(model, parameters, (x,)) - wanted).square().sum()

    found = vmap(grad(one), (None, 0, 0))(parameters, x.double(), wanted.double())
    grads = torch.cat([g.flatten(1) for g in found.values()], 1)
    fitted = grads @ torch.linalg.pinv(grads, rtol=1e-9) @ rows
    assert (rows - fitted).norm() <= 1e-3 * rows.norm(), (name, "is not linear in the gradients")
    assert rows.any(0).all(), (name, "has entries that are always zero")
