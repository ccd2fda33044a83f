"""Sites in compiled code: what the compiler traces, and what the code calls as it runs.

A call of a parameter keeps its form: the function is called with a detached copy, and its result
goes through `Tapped`, the identity. Its backward calls one op, `dropinf::write_rows`, which hands x
and dy to the site as a site in eager code does. To the compiler, the op makes a scalar of x and dy
that is the gradient of the tap's probe; so it is run once, where x and dy are there, and everything
around it is fused as if it were not.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dropinf.capturing.extension import CPP
from dropinf.capturing.graph import INSIDES, SITES, Edge, Passes, Site
from dropinf.capturing.owners import Owners

_NUMBERS = itertools.count()
_CALLS: weakref.WeakValueDictionary[int, GraphCall] = weakref.WeakValueDictionary()


class Walked(Protocol):
    """A graph that runs again, on shapes alone, for the walk."""

    def site(self, number: int, x: Tensor) -> Site | None:
        """A site of it, while it runs for the walk; None while it is traced."""

    def owners(self, shapes: tuple, outs: Sequence[Owners | None], T: int | None) -> Any:
        """Of the sites and of the inputs with a gradient, given those of its results."""


class SiteCall:
    """One call of a site in compiled code: to the walk and the backward pass, its node.

    Attributes:
        tap, site: as of a node.
        shape: of its input when the graph was made, whose last dimensions do not change.
        dy: the same of its output, with dtype and device.
    """

    def __init__(self, tap: Passes, site: Site, shape: Sequence[int], dy: Any) -> None:
        self.tap, self.site, self.shape, self.dy = tap, site, shape, dy


class GraphCall:
    """One call of a compiled graph.

    Attributes:
        sites: its sites, by number.
        edges: of the inputs that carry a gradient.
        number: what the compiled code knows it by.
        native: what its sites do in C++, if there is such.
        told: what tells it from others, for a walk.
    """

    def __init__(
        self,
        tap: Passes,
        graph: Walked,
        shapes: tuple,
        sites: Sequence[SiteCall],
        edges: Sequence[Edge],
    ) -> None:
        self.tap, self.sites = tap, sites
        self.edges, self.number = edges, torch.tensor(next(_NUMBERS))
        self._graph, self._shapes = graph, shapes
        number = int(self.number)
        self.native = None if CPP is None else CPP.CompiledCall(number)
        _CALLS[number] = self

    @property
    def told(self) -> tuple:
        return self._graph, self._shapes, *(node.site for node in self.sites)

    def owners(self, outs: list[Owners | None], T: int | None, found: Any) -> Sequence[Owners]:
        """The walk has come to its results: those of its inputs; its sites are `found`."""
        inside, given, opaque = self._graph.owners(self._shapes, outs, T)
        found.opaque = found.opaque or opaque
        for node, owners in zip(self.sites, inside, strict=True):
            if owners is not None:
                found.owners.setdefault(node, owners)
        return given


class Unseen:
    """To the walk, a call that it meets from behind, past its results."""

    edges: Sequence[Edge] = ()
    sites: Sequence[SiteCall] = ()
    told = ()

    def __init__(self, call: GraphCall) -> None:
        self._call = call

    def owners(self, outs: Any, T: int | None, found: Any) -> Sequence[Owners]:
        """Nothing is known of its sites."""
        lost = "compiled code that writes to what it is given, or whose results share memory"
        found.owners.update(dict.fromkeys(self._call.sites, lost))
        return ()


class Probe(torch.autograd.Function):
    """The tap's probe, for one call, which lives as long as the graph does."""

    @staticmethod
    def forward(ctx: Any, probe: Tensor, call: GraphCall, device: torch.device) -> Tensor:
        ctx.inside, ctx.device = Unseen(call), probe.device
        return probe.new_zeros((), device=device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.zeros((), device=ctx.device), None, None  # without a copy from a GPU


class Tapped(torch.autograd.Function):
    """The identity on the result of a call whose parameters were detached."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        probe: Tensor,
        call: Tensor,
        number: int,
        site: Site | None,
    ) -> Tensor:
        ctx.save_for_backward(x, call)
        ctx.number, ctx.site = number, site
        return y.clone()  # which the compiler leaves out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a gradient of a gradient")
        x, call = ctx.saved_tensors
        written = torch.ops.dropinf.write_rows(x, dy, call, ctx.number)
        return dy if ctx.needs_input_grad[0] else None, None, written, None, None, None


class Results(torch.autograd.Function):
    """The results of a compiled graph themselves; the walk goes on from here to its inputs."""

    @staticmethod
    def forward(ctx: Any, call: GraphCall, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.inside = call
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(*results)  # not copies or views, which differ where they are written to
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads


SITES.add(Tapped._backward_cls)
INSIDES.update((Results._backward_cls, Probe._backward_cls))


def tapped(y: Tensor, x: Tensor, probe: Tensor, call: Tensor, graph: int, number: int) -> Tensor:
    """What stands in a graph behind a call of a parameter."""
    walked = GRAPHS.get(graph)
    with torch._C.DisableTorchFunction():
        site = None if walked is None else walked.site(number, x)
    return Tapped.apply(y, x, probe, call, number, site)


def ids_of(ids: Tensor, wide: Tensor) -> Tensor:
    """The ids of a table's rows that were expanded to `wide`."""
    return ids.expand(wide.shape[:-1])


GRAPHS: weakref.WeakValueDictionary[int, Walked] = weakref.WeakValueDictionary()


def write_in_python(x: Tensor, dy: Tensor, number: int, site: int) -> None:
    """A site has its input and its gradient, and does not write by itself."""
    call = _CALLS.get(number)
    if call is None:
        raise RuntimeError("capture: a backward pass of what was computed in a capture, after it")
    writer = call.tap.writer_now()
    if writer is None:
        call.tap.refuse_outside()
    else:
        with torch._C.DisableTorchFunction():
            writer.write(call.sites[site], x, dy)


if CPP is None:  # as csrc/capture/compiled_call.cpp has it
    _LIBRARY = torch.library.Library("dropinf", "FRAGMENT")
    _LIBRARY.define(
        "write_rows(Tensor x, Tensor dy, Tensor call, int site) -> Tensor",
        tags=(torch.Tag.cudagraph_unsafe,),
    )

    @torch.library.impl(_LIBRARY, "write_rows", "CompositeExplicitAutograd")
    def _write_rows(x: Tensor, dy: Tensor, call: Tensor, site: int) -> Tensor:
        write_in_python(x, dy, int(call), site)
        return dy.new_zeros((), dtype=torch.float32)

    @torch.library.impl(_LIBRARY, "write_rows", "Meta")
    def _written(x: Tensor, dy: Tensor, call: Tensor, site: int) -> Tensor:
        return dy.new_empty((), dtype=torch.float32)
