"""A graph of torch.compile, with a site at each call in which a tracked parameter meets data.

The compiler hands over straight-line code, whose inputs are parameters and data. If a parameter is
used in a way that `uses` does not know, or something hides code of its own, the graph is
refused, before it has run.

Whose the positions are inside is read by the walk, as everywhere, from the same code run on shapes
alone, once for all calls of the same shapes. What depends on data is lost there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import LocalSource
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from dropinf.capturing.call_args import named
from dropinf.capturing.closing import Closing
from dropinf.capturing.compiled.sites import (
    GRAPHS,
    GraphCall,
    Probe,
    Results,
    SiteCall,
    ids_of,
    tapped,
)
from dropinf.capturing.compiled.uses import (
    Use,
    example,
    function_of,
    hides_code,
    sizes_of,
    use_of,
)
from dropinf.capturing.graph import FormSite, Passes, Site, SpreadSite, edge_of
from dropinf.capturing.notes import NOTES
from dropinf.capturing.owners import NONE, Array, Owners
from dropinf.capturing.rules import Form
from dropinf.capturing.sources import Source
from dropinf.capturing.walk import walk

_KEYS = itertools.count()
_MAX_KEPT = 256  # shapes and owners whose walk is kept


class NotInGraphError(Exception):
    """A parameter has no site in a graph; the message says which and where."""


class CompiledGraph:
    """One graph, compiled with its sites."""

    def __init__(
        self, module: fx.GraphModule, inputs: Sequence[Any], closing: Closing, compiler: Callable
    ) -> None:
        """`closing` is that of the open capture; `compiler` takes a module and its real inputs.

        Raises:
            NotInGraphError: a tracked parameter has no site.
        """
        self._key = next(_KEYS)
        self._data = [i for i, t in enumerate(inputs) if not isinstance(t, nn.Parameter)]
        self._tracked = [
            i for i, t in enumerate(inputs) if isinstance(t, nn.Parameter) and t.requires_grad
        ]
        self._sites: list[_Kept] = []
        self._sources: Mapping[int, Source] | None = None  # of the last call, and its sites
        self._made: list[Site] = []
        self._found: dict[tuple, Inside] = {}
        self._walked: dict[int, Site] | None = None
        module = _copied(module)
        self._examples = [example(n) for n in module.graph.nodes if n.op == "placeholder"]
        self._put_sites(module, inputs, closing)
        GRAPHS[self._key] = self
        self._sited = _copied(module)  # compilers change what they are given
        probe = torch.zeros((), requires_grad=True, device=self._device)
        extra = [probe, torch.tensor(0)]
        with torch._functorch.config.patch(donated_buffer=False):  # the graph may be kept
            self._run = compiler(module, [*inputs, *extra])

    def __call__(self, tap: Passes, closing: Closing, *inputs: Any) -> Any:
        """The results, in a capture."""
        sources = {i: closing.detached(inputs[i]) for i in self._tracked}
        sites = [
            SiteCall(tap, site, kept.x_shape, kept.y)
            for site, kept in zip(self._sites_of(sources), self._sites, strict=True)
        ]
        shapes = (_autocast(self._device), *(_shape(inputs[i]) for i in self._data))
        edges = [edge_of(t) for t in _carrying(inputs[i] for i in self._data)]
        call = GraphCall(tap, self, shapes, sites, edges)
        return _of_call(
            call, self._run(*inputs, Probe.apply(tap.probe, call, self._device), call.number)
        )

    def _sites_of(self, sources: Mapping[int, Source]) -> list[Site]:
        """The sites of calls with these sources."""
        if self._sources is None or any(self._sources[i] is not s for i, s in sources.items()):
            self._sources = sources
            self._made = [kept.site(sources) for kept in self._sites]
        return self._made

    # The walk.

    def site(self, number: int, x: Tensor) -> Site | None:
        """The site that a call is of, as the graph runs for the walk; None while it is traced."""
        if self._walked is None:
            return None
        self._walked[number] = self._sites[number].site(None, x)
        return self._walked[number]

    def owners(self, shapes: tuple, outs: Sequence[Owners | None], T: int | None) -> Inside:
        """Of what is inside of a call, given the owners of its results."""
        key = (shapes, T, *(o if o is None or isinstance(o, str) else _bytes(o) for o in outs))
        if key not in self._found:
            if len(self._found) >= _MAX_KEPT:
                self._found.clear()
            self._found[key] = self._walk(shapes, outs, T)
        return self._found[key]

    def _walk(self, shapes: tuple, outs: Sequence[Owners | None], T: int | None) -> Inside:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._walked = {}
        try:
            with torch._C._EnableTorchFunction(), fake, _Noting(), torch.enable_grad():
                inputs, probe = self._inputs(shapes[1:]), torch.zeros((), requires_grad=True)
                with torch.autocast(*shapes[0]):
                    results = self._sited(*inputs, probe, torch.zeros((), dtype=torch.int64))
                with torch._C.DisableTorchFunction():
                    starts = zip(_carrying(results), outs, strict=False)
                    found = walk([(t, o) for t, o in starts if o is not None], T)
            by_site = {node.site: owners for node, owners in found.owners.items()}
            sites = [by_site.get(self._walked.get(k)) for k in range(len(self._sites))]
        except Exception as error:  # whatever cannot do without data
            lost = f"compiled code that needs data to be followed ({type(error).__name__})"
            given = [lost for s in shapes if isinstance(s, _Shape) and s.requires_grad]
            return Inside([lost] * len(self._sites), given, "")
        finally:
            self._walked = None
        given = []
        for t in _carrying(inputs[i] for i in self._data):
            nothing = np.full((1,) * t.dim(), NONE)
            given.append(found.leaves.get(id(t), (t, nothing))[1])
        return Inside(sites, given, found.opaque)

    def _inputs(self, shapes: tuple) -> list[Any]:
        """What stands for the inputs of a call."""
        inputs = [_shape(t) for t in self._examples]
        for i, shape in zip(self._data, shapes, strict=True):
            inputs[i] = shape
        return [t.tensor() if isinstance(t, _Shape) else t for t in inputs]

    # Sites are put in.

    def _put_sites(self, module: fx.GraphModule, inputs: Sequence[Any], closing: Closing) -> None:
        graph = module.graph
        given = [n for n in graph.nodes if n.op == "placeholder"]
        tracked = {given[i]: i for i in self._tracked}
        devices = {inputs[i].device for i in self._tracked}
        if len(devices) > 1:
            raise NotInGraphError("parameters on several devices")
        self._device = next(iter(devices), torch.device("cpu"))
        names = {node: closing.asked(inputs[i]) for node, i in tracked.items()}
        for t in inputs:
            if isinstance(t, Tensor) and (
                type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided
            ):
                raise NotInGraphError(f"an input of type {type(t).__name__}, {t.layout}")
        for node in graph.nodes:
            if hides_code(node):
                raise NotInGraphError(f"what is inside of {node.name!r}")
        with graph.inserting_after(given[-1]):
            call = graph.placeholder("dropinf_call")
            probe = graph.placeholder("dropinf_probe")
        for node in (probe, call):
            node._dynamo_source = LocalSource(node.target)
        for node in list(graph.nodes):
            met = [n for n in node.all_input_nodes if n in tracked]
            use = use_of(node, tracked, closing.hints) if met else None
            if use is not None:
                self._put_site(node, use, tracked, (probe, call))
            elif met:
                func = function_of(node)
                where = node.op if func is None else named(func)
                raise NotInGraphError(f"{names[met[0]]!r} in {where}")
        graph.lint()
        module.recompile()

    def _put_site(
        self, node: fx.Node, use: Use, tracked: Mapping[fx.Node, int], extra: tuple[fx.Node, ...]
    ) -> None:
        graph, y, x = node.graph, use.value, use.x
        for p in set(use.roles.values()):
            with graph.inserting_before(node):
                bare = graph.call_method("detach", (p,))
            bare.meta["example_value"] = example(p)
            node.replace_input_with(p, bare)
            y = bare if y is p else y
        user, meant = use.user, y
        with graph.inserting_before(node.next if user is None else user):
            if use.other is not None:
                y = graph.call_method("expand_as", (y, use.other))
                x = None if x is None else graph.call_function(ids_of, (x, y))
            given = (y, extra[0] if x is None else x, *extra, self._key, len(self._sites))
            site = graph.call_function(tapped, given)
        site.meta["example_value"] = example(use.other or y)
        if user is None:
            y.replace_all_uses_with(site, delete_user_cb=lambda one: one is not site)
        else:
            user.replace_input_with(meant, site)
        roles = {k: tracked[p] for k, p in use.roles.items()}
        shape = None
        if use.form is None:  # filled up with ones
            own = example(use.roles[0]).shape
            shape = torch.Size((1,) * (example(site).dim() - len(own)) + own)
        x_shape = () if use.x is None else sizes_of(example(use.x))
        self._sites.append(_Kept(use.name, use.form, roles, shape, x_shape, _shape(example(site))))


class _Kept(NamedTuple):
    """What the calls of one site have in common.

    Attributes:
        name, form: as of `Use`.
        roles: the number of each role -> the input that its parameter is.
        shape: of a parameter that is expanded, filled up with ones.
        x_shape, y: of the input and the result, as they were when the graph was made.
    """

    name: str
    form: Form | None
    roles: dict[int, int]
    shape: torch.Size | None
    x_shape: Sequence[int]
    y: _Shape

    def site(self, sources: Mapping[int, Source] | None, x: Tensor | None = None) -> Site:
        """That of one call; one without sources says no more than where owners go."""
        roles = self.roles if sources is not None else {}
        if self.form is None:
            return SpreadSite(self.name, [(sources[i], None) for i in roles.values()], self.shape)
        targets = [(sources[i], self.form.roles[k]) for k, i in roles.items()]
        return FormSite(self.name, targets, self.form, 0 if x is None else x.dim(), _again)


class Inside(NamedTuple):
    """What the walk found in a graph.

    Attributes:
        sites: owners of each site's result, None where it reaches no loss.
        given: of each input that carries a gradient.
        opaque: as of `Found`.
    """

    sites: list[Owners | None]
    given: list[Owners]
    opaque: str


class _Shape(NamedTuple):
    """What is known of a tensor without its data."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def tensor(self) -> Tensor:
        t = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return t.requires_grad_(self.requires_grad)


def _shape(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return t
    return _Shape(t.shape, t.stride(), t.dtype, t.device, t.requires_grad)


def _autocast(device: torch.device) -> tuple[str, torch.dtype, bool, bool]:
    kind = device.type
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), False


class _Noting(TorchFunctionMode):
    """Makes the notes that the walk reads."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if func in NOTES:
            with torch._C.DisableTorchFunction():
                NOTES[func](args, kwargs or {}, y)
        return y


def _of_call(call: GraphCall, results: Sequence[Any]) -> list[Any]:
    """The results, behind which the walk finds the call."""
    results, carrying = list(results), _carrying(results)
    if not carrying:
        return results
    memory = {t.untyped_storage()._cdata for t in carrying}
    if len(memory) < len(carrying) or any(t.is_leaf or t._is_view() for t in carrying):
        return results  # what is written into one is seen in another
    with torch.autograd._unsafe_preserve_version_counter(tuple(carrying)):
        Results.apply(call, *carrying)
    return results


def _carries(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad


def _carrying(some: Iterable[Any]) -> list[Tensor]:
    return [t for t in some if _carries(t)]


def _again(x: Tensor) -> Tensor:
    raise RuntimeError("capture: a gradient of a gradient in compiled code")


def _bytes(owners: Array) -> tuple:
    return owners.shape, owners.tobytes()


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    graph, nodes = fx.Graph(), {}
    graph.output(graph.graph_copy(module.graph, nodes))
    for node, new in nodes.items():
        if node.op == "placeholder":
            new._dynamo_source = node._dynamo_source
    copied = fx.GraphModule(module, graph)
    copied.meta = dict(module.meta)
    return copied
