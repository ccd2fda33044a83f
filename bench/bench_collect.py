"""Whole models: what capturing rows costs in time and memory, beside the passes it rides on, what a
user of torch would write, and other packages."""

import sys

import pytest
import torch
from memory import peak_in_own_process, peak_of, skip_without_proc
from models import MODELS, loss_fn, losses
from torch import nn
from torch.func import functional_call, grad, vmap

import dropinf
from dropinf.tools.measuring import LeftOut
from dropinf.tools.microbenchmark.peers import PEERS, Work

SIDE = 32  # of the square of numbers that the peers keep of a layer
R = SIDE * SIDE


def forward(model, batch):
    def call():
        with torch.no_grad():
            return loss_fn(model, batch)

    return call


def input_gradient(model, batch, frozen):
    """Backward to the input alone; frozen parameters let autograd save no layer inputs."""
    x, label = batch

    def call():
        model.requires_grad_(not frozen)
        leaf = model.embed(x).detach().requires_grad_()
        result = torch.autograd.grad(losses(model.body(leaf), label).sum(), leaf)
        model.requires_grad_(True)
        return result

    return call


def ordinary(model, batch):
    def call():
        loss_fn(model, batch).sum().backward()
        model.zero_grad(set_to_none=True)

    return call


def capture(model, batch):
    tap = dropinf.capture(model, plan_of(model))

    def call():
        with tap:
            return tap.rows(loss_fn(model, batch))

    return call


def capture_grads(model, batch):
    """One example a batch, which is the best form of this mode."""
    tap = dropinf.capture(model, plan_of(model), mode="grads")

    def call():
        with tap:
            return torch.cat([tap.rows(loss_fn(model, one)) for one in singles(batch)])

    return call


def vmap_index(model, batch):
    plan = plan_of(model)

    def one_loss(parameters, x, label):
        return losses(functional_call(model, parameters, (x[None],)), label[None]).sum()

    def call():
        detached = {name: p.detach() for name, p in model.named_parameters()}
        return pick(plan, vmap(grad(one_loss), (None, 0, 0))(detached, *batch))

    return call


def batch_1_loop(model, batch):
    plan, parameters = plan_of(model), dict(model.named_parameters())

    def call():
        rows = []
        for one in singles(batch):
            grads = torch.autograd.grad(loss_fn(model, one).sum(), list(parameters.values()))
            rows.append(pick(plan, {n: g[None] for n, g in zip(parameters, grads, strict=True)}))
        return torch.cat(rows)

    return call


def plan_of(model):
    return dropinf.Plan.make(model, dropinf.Dropout(r=R))


def work(model, batch):
    return Work(model, batch, loss_fn, model.earliest, SIDE)


def singles(batch):
    """The examples of a batch, each a batch of one."""
    return list(zip(*(part.split(1) for part in batch), strict=True))


def pick(plan, gradients):
    """Rows of gradients [B, ...] by the parameter's name."""
    parts = [gradients[s.name].flatten(1)[:, s.index] * s.scale for s in plan.slots]
    return torch.cat(parts, 1)


# Name -> a call with model and batch that gives a call without arguments: one step over the batch.
CONTESTANTS = {
    "dropinf capture": capture,
    "dropinf capture, mode='grads', batch 1": capture_grads,
    "forward": forward,
    "forward + input gradient": lambda *args: input_gradient(*args, frozen=True),
    "forward + input gradient, inputs saved": lambda *args: input_gradient(*args, frozen=False),
    "forward + backward": ordinary,
    "vmap(grad) + index": vmap_index,
    "batch-1 loop + index": batch_1_loop,
    **{name: lambda *args, peer=peer: peer(work(*args)) for name, peer in PEERS.items()},
}


def to_reach(model):
    """Contestant -> smallest and largest allowed of its time over ours."""
    bounds = {"vmap(grad) + index": (2, None), "batch-1 loop + index": (1, None)}
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return {"forward + input gradient": (1 / 1.15, None), **bounds}
    return {
        "forward + input gradient": (1 / 1.05, None),
        "forward + backward": (1 / 0.85, None),
        **bounds,
    }


def set_up(title):
    """The model and batch of a title, the same in every process."""
    torch.manual_seed(0)
    return MODELS[title]()


def passes(model, batch):
    """Calls by contestant, and why the others are left out."""
    calls, left_out = {}, {}
    for name, contestant in CONTESTANTS.items():
        try:
            calls[name] = contestant(model, batch)
        except LeftOut as reason:
            left_out[name] = str(reason)
    return calls, left_out


@pytest.mark.parametrize("title", MODELS)
def bench_whole_model(timed, benchmark, title):
    model, batch = set_up(title)
    calls, left_out = passes(model, batch)
    check_rows(model, batch, calls)
    timed(calls, "dropinf capture", to_reach(model), rounds=5, settle=True)
    benchmark.extra_info["left_out"] = left_out


def check_rows(model, batch, calls):
    """Everybody gives rows: the same ones, or a peer's own of all the linear layers."""
    rows = calls["dropinf capture"]()
    for name in CONTESTANTS:
        if "index" in name or "grads" in name:
            assert (calls[name]() - rows).norm() <= 1e-4 * rows.norm(), name
    num_linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    for name in calls.keys() & PEERS.keys():
        theirs = calls[name]()
        assert theirs.shape == (len(batch[0]), num_linear * R), name
        squares = theirs.unflatten(1, (num_linear, R))
        assert squares.isfinite().all() and squares.any(2).all(), name


@pytest.mark.parametrize("title", MODELS)
def bench_whole_model_memory(benchmark, title):
    """Peak resident memory of one step above what the process held before, MB (10⁶ bytes)."""
    skip_without_proc()
    model, batch = set_up(title)
    calls, left_out = passes(model, batch)
    peaks = {name: peak_in_own_process(__file__, title, name) for name in calls}
    rows = len(batch[0]) * plan_of(model).width * 4 / 1e6
    ours = "dropinf capture"
    benchmark.extra_info.update(peaks=peaks, rows=rows, ours=ours, left_out=left_out)
    benchmark.pedantic(lambda: None)


def main(title: str, name: str) -> None:
    """Print the peak of one pass, in this process of its own."""
    print(peak_of(CONTESTANTS[name](*set_up(title))))


if __name__ == "__main__":
    main(*sys.argv[1:])
