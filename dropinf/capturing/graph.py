"""Sites: what a call in closed form leaves in autograd's graph, whose backward writes rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from dropinf.capturing.extension import CPP
from dropinf.capturing.owners import Array, Owners, mixed
from dropinf.capturing.rules import Bias, Form, Role
from dropinf.capturing.sources import Source
from dropinf.compression import ParamPlan

Edge = tuple[Any, int]  # a node of the graph, and which of its results

# In the metadata of a node: that a hook may change the gradient there.
HOOKED = "dropinf: hooked"
# In that of a result: the edge of the argument whose examples stand where the result's do, and the
# number of dimensions in front for which that holds.
LIKE = "dropinf: like"


class Writer(Protocol):
    """What a backward pass of `rows` does with what the sites see."""

    def write(self, node: Any, x: Tensor | None, dy: Tensor) -> None: ...


class Passes(Protocol):
    """Who knows the backward pass that is running."""

    probe: Tensor

    def writer_now(self) -> Writer | None:
        """That of the pass of `rows` which asks; None in any other backward pass."""

    def gradients(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """A call of torch.autograd while the capture is open."""

    def refuse_outside(self) -> None:
        """Raise if the backward pass that is running fills .grad, and is not one of `rows`."""

    def runs_again(self) -> tuple[bool, Any] | None:
        """None in a forward pass; else whether it is torch's checkpoint that runs one again."""


@dataclass(eq=False)
class Site:
    """A function and the parameters that it sees by detached copies alone; each call is a node.

    Attributes:
        name: of the function.
        targets: its parameters, or what was made of them.
    """

    name: str
    targets: Sequence[tuple[Source, Role | None]]

    @property
    def slots(self) -> list[ParamPlan]:
        """The parameters behind it."""
        return [slot for source, _ in self.targets for slot in source.slots]

    def edges(self, node: Any) -> Sequence[Edge]:
        """Where a call of it hands a gradient, past the function itself."""
        return ()

    def taken(self, owners: Array, T: int | None) -> Owners:
        """The owners of its output, if it can write rows by them."""
        return owners

    def given(self, owners: Owners) -> Owners:
        """The owners of its input, given those of its output."""
        return owners


@dataclass(eq=False)
class FormSite(Site):
    """A function with a closed form, whose input is data."""

    form: Form
    rank: int  # dimensions of its input
    again: Callable[[Tensor], Tensor]  # the function, of its input and the parameters themselves

    def __post_init__(self) -> None:
        # The gradient of a bias alone does not read the input, so that it need not be kept.
        coordinates = [role.coordinates for _, role in self.targets]
        self.reads = not all(isinstance(c, Bias) and c.i > 0 for c in coordinates)
        self.prepared_for: tuple | None = None  # dtype and device of dy, to write by themselves
        self.writes: Any = None  # what they then write, None if that takes Python

    @property
    def kind(self) -> tuple:
        """The same for sites that a walk cannot tell apart."""
        form = self.form
        targets = tuple(
            (type(source).__name__, *(slot.name for slot in source.slots))
            for source, _ in self.targets
        )
        return self.name, targets, self.rank, form.features, form.experts

    def edges(self, node: Any) -> Sequence[Edge]:
        below = node.next_functions[_X]
        return () if below[0] is None else (below,)

    def taken(self, owners: Array, T: int | None) -> Owners:
        dims = list(range(self._num_lead(owners), owners.ndim))
        if self.form.experts:
            dims[0] -= 1
        return mixed(owners, dims, T, self.name)

    def given(self, owners: Owners) -> Owners:
        if isinstance(owners, str) or self.form.experts:
            return owners
        lead = owners.shape[: self._num_lead(owners)]
        return owners.reshape(lead + (1,) * (self.rank - len(lead)))

    def _num_lead(self, owners: Array) -> int:
        return 1 if self.form.features is None else owners.ndim - self.form.features[1]


@dataclass(eq=False)
class SpreadSite(Site):
    """A parameter that was expanded over what it meets.

    Attributes:
        shape: its own, filled up with ones to the dimensions of what it meets.
    """

    shape: torch.Size


class Output(torch.autograd.Function):
    """The identity on the result of a call; its backward has the gradient and the saved input.

    The probe is a leaf that requires grad, so that autograd comes here although no parameter does.
    """

    @staticmethod
    def forward(
        ctx: Any, tap: Passes, site: FormSite, probe: Tensor, x: Tensor, y: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*([x] if site.reads else []))
        ctx.tap, ctx.site, ctx.shape = tap, site, x.shape
        return y.data  # not a view of y: a later in-place activation would be refused on one

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *with_gradient(ctx.tap, ctx, dy)


# Of the edges of an output's node: the probe's, the input's, and that of the function itself.
_X, _Y = 1, 2


def with_gradient(tap: Passes, node: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """An output has its gradient; returns those of the input and of the function itself."""
    writer, site = tap.writer_now(), node.site
    if writer is None:
        tap.refuse_outside()
    if writer is not None:
        saved = node.saved_tensors  # which a checkpoint may make anew, watched
        with torch._C.DisableTorchFunction():
            x = saved[0] if saved else dy.new_zeros(()).expand(node.shape)
            writer.write(node, x, dy)
    elif torch.is_grad_enabled() and node.next_functions[_X][0] is not None and site.reads:
        # A gradient that is itself to be derived, so by the parameters as well.
        (x,) = node.saved_tensors
        with torch._C.DisableTorchFunction():
            (dx,) = torch.autograd.grad(site.again(x), x, dy, create_graph=True)
        return dx, None
    return None, None if node.next_functions[_Y][0] is None else dy


class Operand(torch.autograd.Function):
    """A parameter, expanded over what it meets; its backward has the gradient of all of that."""

    @staticmethod
    def forward(
        ctx: Any, tap: Passes, site: SpreadSite, probe: Tensor, p: Tensor, shape: torch.Size
    ) -> Tensor:
        ctx.tap, ctx.site = tap, site
        return p.expand(shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        writer = ctx.tap.writer_now()
        if writer is None:
            ctx.tap.refuse_outside()
        else:
            with torch._C.DisableTorchFunction():
                writer.write(ctx, None, dy)
        return None, None, None, None, None


def with_output(tap: Passes, site: FormSite, shared: Any, x: Tensor, y: Tensor) -> Tensor:
    """y, the result of a call, with a node of the site in the graph.

    `shared` is what the site's nodes in C++ have in common; None for nodes in Python.
    """
    if shared is None:
        return Output.apply(tap, site, tap.probe, x, y)
    return CPP.attach_site(shared, tap, tap.probe, x, y)


# Nodes that have a site; and nodes with an `inside` that says where the walk goes on past them.
SITES: set[type] = {
    Output._backward_cls,
    Operand._backward_cls,
    *([] if CPP is None else [CPP.SiteNode]),
}
INSIDES: set[type] = set()


def site_of(node: Any) -> Site | None:
    """The site that a node of the graph is of."""
    return node.site if type(node) in SITES else None


def edge_of(t: Tensor) -> Edge | None:
    """Where a tensor's gradient goes."""
    if not t.requires_grad:
        return None
    if t.grad_fn is not None:
        return t.grad_fn, t.output_nr
    edge = get_gradient_edge(t)
    return edge.node, edge.output_nr


def of_one(b: int, rank: int) -> Array:
    """All of a tensor is example b's."""
    return np.full((1,) * rank, b)
