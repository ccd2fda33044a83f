"""Families of models as they come, through `capture` and through `collect`, against plain autograd.

A row is what autograd gives for one loss of the same batched pass. It knows nothing of examples,
so that it is the truth also where a model mixes them.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import build, squares
from families import FAMILIES, family, normal, sparse_mixtral, weighted
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.integrations import moe
from zoo import causal

from dropinf import Dropout, Full, Plan, capture, collect

pytestmark = [
    pytest.mark.more,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


# A base in 4 bits, as under QLoRA: its kernel is a function that only its author can read.


class Int4Product(torch.autograd.Function):
    @staticmethod
    def unpacked(packed, scale, dtype):
        pairs = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
        return (pairs.to(dtype) - 8) * scale.to(dtype)

    @staticmethod
    def forward(ctx, x, packed, scale):
        ctx.save_for_backward(packed, scale)
        return x @ Int4Product.unpacked(packed, scale, x.dtype).T

    @staticmethod
    def backward(ctx, dy):
        return dy @ Int4Product.unpacked(*ctx.saved_tensors, dy.dtype), None, None


class Int4Linear(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        del self.weight
        packed = torch.randint(256, (outputs, inputs // 2), dtype=torch.uint8)
        self.register_buffer("weight", packed)
        self.register_buffer("scale", torch.rand(outputs, 1) / 8)

    def forward(self, x):
        return Int4Product.apply(x, self.weight, self.scale)


class Int4Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = Int4Linear(12, 36), Int4Linear(12, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 12)).unbind(2)
        return x + self.out(F.scaled_dot_product_attention(q, k, v))


def qlora():
    base = nn.Sequential(Int4Block(), nn.LayerNorm(12), Int4Block())
    return get_peft_model(base, LoraConfig(r=3, target_modules=["0.qkv", "0.out", "2.qkv"])).eval()


# Graphs of unequal size, whose nodes are one list.


class Graphs(nn.Module):
    """Two rounds of messages along edges, then a sum over each graph."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(5, 6), nn.Linear(6, 3)
        self.message = nn.ModuleList(nn.Linear(12, 6) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(6) for _ in range(2))

    def forward(self, nodes, edges, graph, number):
        h = self.embed(nodes)
        for message, norm in zip(self.message, self.norm, strict=True):
            m = torch.tanh(message(torch.cat([h[edges[0]], h[edges[1]]], 1)))
            h = norm(h + torch.zeros_like(h).index_add_(0, edges[1], m))
        return self.out(h.new_zeros(number, 6).index_add(0, graph, h))


def packed_graphs(sizes):
    """Nodes, edges and the graph of each node; each graph is a ring."""
    sizes = torch.tensor(sizes)
    graph = torch.repeat_interleave(sizes)
    first = sizes.cumsum(0) - sizes
    at = torch.arange(len(graph)) - first[graph]
    return torch.stack([torch.arange(len(graph)), (at + 1) % sizes[graph] + first[graph]]), graph


def graphs_batch():
    edges, graph = packed_graphs([4, 2, 5, 1])  # as many nodes as four graphs of three would have
    return torch.randn(12, 5), edges, graph


def graphs_loss(model, batch):
    nodes, edges, graph = batch
    return weighted(model(nodes, edges, graph, int(graph.max()) + 1))


def padded_graphs_loss(model, batch):
    """The same from a padded batch, which can be cut into examples."""
    nodes, sizes = batch
    edges, graph = packed_graphs(sizes.tolist())
    flat = torch.cat([n[:size] for n, size in zip(nodes, sizes.tolist(), strict=True)])
    return weighted(model(flat, edges, graph, len(nodes)))


# Gradients inside of the losses, and inside of the backward pass.


def heat(model, batch):
    """PINN: how far u(x, t) is from du/dt = d2u/dx2."""
    (at,) = batch
    at = at.clone().requires_grad_()
    du = torch.autograd.grad(model(at).sum(), at, create_graph=True)[0]
    d2u = torch.autograd.grad(du[:, 0].sum(), at, create_graph=True)[0]
    return (du[:, 1] - d2u[:, 0]).square() + (model(at * torch.tensor([1, 0]))[:, 0]).square()


class Potential(nn.Module):
    """An energy of atoms: their kinds, and a network of the distances between them."""

    def __init__(self):
        super().__init__()
        self.kind = nn.Embedding(4, 3)
        self.pair = nn.Sequential(nn.Linear(7, 8), nn.SiLU(), nn.Linear(8, 1))

    def forward(self, kinds, at):
        i, j = torch.triu_indices(at.shape[1], at.shape[1], 1)
        distance = (at[:, i] - at[:, j]).norm(dim=-1, keepdim=True)
        kinds = self.kind(kinds)
        return self.pair(torch.cat([kinds[:, i], kinds[:, j], distance], -1)).sum((1, 2))


def energy_and_forces(model, batch):
    kinds, at, energy, forces = batch
    at = at.clone().requires_grad_()
    found = model(kinds, at)
    pull = -torch.autograd.grad(found.sum(), at, create_graph=True)[0]
    return (found - energy).square() + (pull - forces).square().sum((1, 2))


def critic():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.Softplus(),
        nn.Linear(8, 1),
    )


def real_and_fake():
    return torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)


def gradient_penalty(model, batch):
    """WGAN-GP."""
    real, fake = batch
    between = ((real + fake) / 2).requires_grad_()
    slope = torch.autograd.grad(model(between).sum(), between, create_graph=True)[0]
    off = slope.flatten(1).norm(dim=1) - 1
    return (model(fake) - model(real))[:, 0] + 10 * off.square()


def regressor():
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2))


def maml(model, batch):
    """Each example is a task: one step on its support set, then the loss of its query set."""
    losses = []
    for x, y, query_x, query_y in zip(*batch, strict=True):
        parameters = dict(model.named_parameters())
        inner = (model(x) - y).square().mean()
        steps = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
        moved = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), steps, strict=True)}
        y = torch.func.functional_call(model, moved, query_x)
        losses.append((y - query_y).square().mean())
    return torch.stack(losses)


def maml_in_torch_func(model, batch):
    """The same with torch.func, all tasks at once."""

    def loss(parameters, x, y):
        return (torch.func.functional_call(model, parameters, x) - y).square().mean()

    def task(x, y, query_x, query_y):
        parameters = dict(model.named_parameters())
        steps = torch.func.grad(loss)(parameters, x, y)
        return loss({n: p - 0.1 * steps[n] for n, p in parameters.items()}, query_x, query_y)

    return torch.vmap(task)(*batch)


def tasks():
    return torch.randn(3, 5, 3), torch.randn(3, 5, 2), torch.randn(3, 4, 3), torch.randn(3, 4, 2)


class Equilibrium(nn.Module):
    """DEQ: z = f(z, x), and a backward pass that solves for the gradient in a hook."""

    def __init__(self):
        super().__init__()
        self.into, self.f, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.into(x)

        def step(z):
            return torch.tanh(0.3 * self.f(z) + x)

        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(60):
                z = step(z)
        z = step(z)
        if z.requires_grad:
            z0 = z.detach().requires_grad_()
            f0 = step(z0)

            def solved(dy):
                g = dy
                for _ in range(60):
                    g = dy + torch.autograd.grad(f0, z0, g, retain_graph=True)[0]
                return g

            z.register_hook(solved)
        return self.out(z)


def atoms():
    return torch.randint(4, (3, 4)), torch.randn(3, 4, 3), torch.randn(3), torch.randn(3, 4, 3)


def physics():
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


TWICE = [
    family("PINN", physics, normal(5, 2), heat, closed=False),
    family("energies and forces", Potential, atoms, energy_and_forces, closed=False),
    family("gradient penalty", critic, real_and_fake, gradient_penalty, closed=False),
    family("MAML", regressor, tasks, maml, closed=False),
]
WRITTEN = [
    family("QLoRA", qlora, normal(4, 5, 12), squares),
    family("GNN", Graphs, graphs_batch, graphs_loss),
    family(
        "GNN, padded batch",
        Graphs,
        lambda: (torch.randn(4, 5, 5), torch.tensor([4, 3, 5, 1])),
        padded_graphs_loss,
    ),
    family("MAML in torch.func", regressor, tasks, maml_in_torch_func),
    family("DEQ", Equilibrium, normal(4, 3), squares),
]


WAYS = ["capture", "collect"]
# Where a model goes through float32 inside, the last bit of a float64 sum tips a rounding now and
# then, and autograd's own gradients differ by 3e-7 between one loss and a sum of them.
DOUBLE, SINGLE = 1e-9, 2e-6


def gradients(model, batch, loss_fn):
    """For each loss of the batch the gradient of every parameter, by autograd alone."""
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "materialize_grads": True}
    return [
        dict(zip(named, torch.autograd.grad(loss, list(named.values()), **options), strict=True))
        for loss in loss_fn(model, batch)
    ]


def rows_of(way, model, batch, loss_fn, **options):
    """Rows and their plan; those of `collect` are of the same batch twice."""
    torch.manual_seed(1)
    if way == "collect":
        plan = Plan.make(model, Full())
        return collect(model, [batch, batch], loss_fn, plan, progress=False).rows, plan
    plan = Plan.make(model, Dropout(r=50))
    with capture(model, plan, **options) as tap:
        return tap.rows(loss_fn(model, batch)), plan


def expected(plan, truth):
    """The entries that the plan picks of these gradients."""
    rows = torch.zeros(len(truth), plan.width, dtype=torch.float64)
    for slot in plan.slots:
        for row, grads in zip(rows, truth, strict=True):
            row[slot.entries] = grads[slot.name].flatten()[slot.index] * slot.scale
    return rows


def error(rows, plan, truth):
    """Relative, of all rows; and the parameter whose entries are off most."""
    right = expected(plan, truth)
    assert right.abs().amax(0).gt(0).float().mean() > 0.4  # the truth is not rows of zeros
    right = right.repeat(len(rows) // len(right), 1)
    assert rows.shape == right.shape
    off = rows.double() - right
    worst = max(plan.slots, key=lambda slot: off[:, slot.entries].norm())
    return off.norm() / right.norm(), worst.name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES + WRITTEN + TWICE, ids=lambda family: family.case.name)
def test_rows_equal_autograd(family, way):
    loss_fn = family.case.loss_fn
    model, batch = build(family.case, torch.float64)
    truth = gradients(model, batch, loss_fn)
    rows, plan = rows_of(way, model, batch, loss_fn, **family.options)
    off, where = error(rows, plan, truth)
    assert off < (SINGLE if family.float32 else DOUBLE), where


@pytest.mark.parametrize("family", TWICE, ids=lambda family: family.case.name)
def test_gradients_of_gradients_in_closed_form(family):
    """Those with respect to data are exact; for a parameter's own the error names the way out."""
    model, batch = build(family.case, torch.float64)
    if family.case.name == "MAML":
        with pytest.raises(RuntimeError, match="closed=False"):
            rows_of("capture", model, batch, family.case.loss_fn)
        return
    truth = gradients(model, batch, family.case.loss_fn)
    rows, plan = rows_of("capture", model, batch, family.case.loss_fn)
    off, where = error(rows, plan, truth)
    assert off < DOUBLE, where


def unused_experts(truth):
    used = sum(g["model.layers.0.mlp.experts.down_proj"].abs().flatten(1).sum(1) for g in truth)
    return int((used == 0).sum())


@pytest.mark.parametrize("way", WAYS)
def test_grouped_mm_with_experts_without_tokens(way):
    """It has no float64: as close to the other experts' truth as twice plain float32."""
    case = sparse_mixtral("eager")
    model, batch = build(case, torch.float64)
    truth = gradients(model, batch, causal)
    assert unused_experts(truth)
    narrow = copy.deepcopy(model).float()
    narrow.config._experts_implementation = "grouped_mm"
    rows, plan = rows_of(way, narrow, batch, causal)
    plain, _ = error(expected(plan, gradients(narrow, batch, causal)), plan, truth)
    assert error(rows, plan, truth)[0] <= 2 * plain < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_an_op_of_transformers_own_with_experts_without_tokens(way, monkeypatch):
    """What stands in for grouped_mm where there is none: an op that torch knows nothing about."""
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
    model, batch = build(sparse_mixtral("grouped_mm"), torch.float64)
    truth = gradients(model, batch, causal)
    assert unused_experts(truth)
    rows, plan = rows_of(way, model, batch, causal)
    off, where = error(rows, plan, truth)
    assert off < SINGLE, where
