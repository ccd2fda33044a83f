"""The contestants of bench_host: a model of one's own, its loss and a plan -> what is timed."""

import contextlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from embed_case import need
from host_cases import FLOOR, OPEN, OPENED, PLAIN, Given
from torch import Tensor

import dropinf
from dropinf.tools.measuring import LeftOut
from dropinf.tools.microbenchmark.peers import PEERS, Work

SIDE = 8
R = SIDE * SIDE  # of a layer, of all contestants
OPACUS = "Opacus + index"


class Timed(NamedTuple):
    """A call, and the context that it is made in, which is not timed."""

    call: Callable[[], Any]
    inside: Any = contextlib.nullcontext()


def plain(given: Given, loss_fn: Callable, plan: dropinf.Plan) -> Timed:
    def call() -> None:
        given.model.zero_grad(set_to_none=True)
        loss_fn(given.model, given.batch).sum().backward()

    return Timed(call)


def input_gradient(given: Given, loss_fn: Callable, plan: dropinf.Plan) -> Timed:
    given.model.requires_grad_(False)
    _, label = given.batch

    def call() -> Tensor:
        leaf = given.leaf.detach().requires_grad_()
        loss = loss_fn(given.model, (leaf, label)).sum()
        return torch.autograd.grad(loss, leaf)[0]

    return Timed(call)


def rows_open(given: Given, loss_fn: Callable, plan: dropinf.Plan) -> Timed:
    tap = dropinf.capture(given.model, plan)
    return Timed(lambda: tap.rows(loss_fn(given.model, given.batch)), tap)


def rows_opened(given: Given, loss_fn: Callable, plan: dropinf.Plan) -> Timed:
    def call() -> Tensor:
        with dropinf.capture(given.model, plan) as tap:
            return tap.rows(loss_fn(given.model, given.batch))

    return Timed(call)


def opacus(given: Given, loss_fn: Callable, plan: dropinf.Plan) -> Timed:
    """Its gradients of each example, which it forms, at the plan's coordinates."""
    need("opacus")
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(given.model.train(), loss_reduction="sum")  # no hooks in eval mode
    named = dict(given.model.named_parameters())
    loss_fn(wrapped, given.batch).sum().backward()
    for slot in plan.slots:
        shape = list(named[slot.name].grad_sample.shape)
        if shape != [len(given.batch[0]), *slot.shape]:
            raise LeftOut(f"gives {shape} for {slot.name!r}, not a gradient of each example")
    wrapped.zero_grad(set_to_none=True)

    def call() -> Tensor:
        loss_fn(wrapped, given.batch).sum().backward()
        rows = [named[s.name].grad_sample.flatten(1)[:, s.index] * s.scale for s in plan.slots]
        wrapped.zero_grad(set_to_none=True)
        return torch.cat(rows, 1)

    return Timed(call)


def peer(name: str) -> Callable[..., Timed]:
    def contestant(given: Given, loss_fn: Callable, plan: dropinf.Plan) -> Timed:
        x, label = given.batch
        if name == "Bergson" and x.is_floating_point() and x.dim() == 2:
            x = x[:, None]  # it takes [B, T, I] alone
        layers = given.linear()
        earliest = given.model.get_parameter(f"{layers[0]}.weight")
        work = Work(given.model, (x, label), loss_fn, earliest, SIDE, layers)
        quiet = contextlib.redirect_stderr(io.StringIO())  # bars of progress
        return Timed(PEERS[name](work), quiet)

    return contestant


def contestants() -> dict[str, Callable[..., Timed]]:
    ours = {PLAIN: plain, FLOOR: input_gradient, OPEN: rows_open, OPENED: rows_opened}
    return {**ours, OPACUS: opacus, **{name: peer(name) for name in PEERS}}
