"""A graph of torch.compile, with a site at each call in which a tracked parameter meets data.

The compiler hands over straight-line code, whose inputs are parameters and data. What a function
does with a parameter is looked up in the same rules as in eager code. If a parameter is used in any
other way, or something hides code of its own, the graph is refused.

Whose the positions are inside is read by the walk, as everywhere, from the same code run on shapes
alone: what depends on data is lost there.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.source import LocalSource
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from dropinf.capturing.call_args import named
from dropinf.capturing.closing import Closing
from dropinf.capturing.compiled_sites import GRAPHS, GraphCall, Results, ids_of, tapped
from dropinf.capturing.graph import Edge, FormSite, Passes, edge_of
from dropinf.capturing.hints import Hints
from dropinf.capturing.notes import NOTES
from dropinf.capturing.owners import NONE, Array, Owners
from dropinf.capturing.rules import FORMS, Form, RefusedError
from dropinf.capturing.sources import Source
from dropinf.capturing.walk import walk

_KEYS = itertools.count()
_MAX_KEPT = 256  # shapes and owners whose walk is kept
# How the compiler writes what eager code calls by another name.
_FUNCTIONS: dict[Any, Callable] = {operator.mul: torch.mul, operator.matmul: torch.matmul}
_ADDITIONS = (operator.add, operator.iadd, torch.add)
# Methods whose code the graph does not show.
_HIDDEN = {"register_hook", "register_post_accumulate_grad_hook", "backward", "retain_grad"}


class NotInGraphError(Exception):
    """A parameter has no site in a graph; the message says which and why."""


class CompiledGraph:
    """One graph, compiled with its sites.

    Attributes:
        refused: why it has none, if so; it then runs as written.
    """

    def __init__(
        self, module: fx.GraphModule, inputs: Sequence[Any], closing: Closing, compiler: Callable
    ) -> None:
        """`closing` is that of the open capture; `compiler` takes a module and its real inputs."""
        self._key, self.refused = next(_KEYS), ""
        self._plain = _copied(module)  # compilers change what they are given
        module = _copied(module)
        self._examples = [_example(n) for n in module.graph.nodes if n.op == "placeholder"]
        self._data = [i for i, t in enumerate(inputs) if not isinstance(t, nn.Parameter)]
        self._tracked = [
            i for i, t in enumerate(inputs) if isinstance(t, nn.Parameter) and t.requires_grad
        ]
        self._forms: list[tuple[str, Form, list[tuple[int, int]]]] = []
        self._kept: dict[tuple, Any] = {}
        self._walked: dict[int, FormSite] | None = None
        GRAPHS[self._key] = self
        try:
            self._put_sites(module, inputs, closing)
        except NotInGraphError as error:
            self.refused = str(error)
            return
        self._sited = _copied(module)
        extra = [torch.zeros((), requires_grad=True), torch.tensor(0)]
        with torch._functorch.config.patch(donated_buffer=False):  # its graph may be kept
            self._run = compiler(module, [*inputs, *extra])

    # Runs.

    def __call__(self, tap: Passes, closing: Closing, *inputs: Any) -> Any:
        """The results, in a capture."""
        sources = [] if self.refused else [closing.detached(inputs[i]) for i in self._tracked]
        if self.refused or None in sources:
            with closing:
                return self._plain(*inputs)
        shapes = tuple(map(_shape, (inputs[i] for i in self._data)))
        edges = self._edges(inputs)
        call = GraphCall(tap, self, shapes, self._sites(inputs, sources), edges)
        results = self._run(*inputs, tap.probe, call.number)
        if self._edges(inputs) != edges:
            call.moved = "compiled code that writes to what it is given"
        return _of_call(call, results)

    def _edges(self, inputs: Sequence[Any]) -> list[Edge]:
        """Of what carries a gradient, and is no parameter."""
        tensors = (inputs[i] for i in self._data if isinstance(inputs[i], Tensor))
        return [edge_of(t) for t in tensors if t.requires_grad]

    def _sites(self, inputs: Sequence[Any], sources: Sequence[Source]) -> list[FormSite]:
        known = dict(zip(self._tracked, sources, strict=True))
        return [
            FormSite(name, [(known[i], form.roles[k]) for k, i in roles], form, None, 0, _again)
            for name, form, roles in self._forms
        ]

    # The walk.

    def site(self, number: int, x: Tensor) -> FormSite | None:
        """The site that a call is of, as the graph runs for the walk; None while it is traced."""
        if self._walked is None:
            return None
        name, form, _ = self._forms[number]
        self._walked[number] = FormSite(name, [], form, edge_of(x), x.dim(), _again)
        return self._walked[number]

    def owners(self, shapes: tuple, outs: Sequence[Owners | None], T: int | None) -> Inside:
        """Of what is inside of a call, given the owners of its results."""
        key = (shapes, T, *(o if o is None or isinstance(o, str) else _bytes(o) for o in outs))
        if key not in self._kept:
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            self._kept[key] = self._walk(shapes, outs, T)
        return self._kept[key]

    def _walk(self, shapes: tuple, outs: Sequence[Owners | None], T: int | None) -> Inside:
        self._walked = {}
        try:
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            with torch._C._EnableTorchFunction(), fake, _Noting(), torch.enable_grad():
                inputs = self._inputs(shapes)
                probe = torch.zeros((), requires_grad=True)
                results = self._sited(*inputs, probe, torch.zeros((), dtype=torch.int64))
            with torch._C.DisableTorchFunction():
                starts = zip(_carrying(results), outs, strict=False)
                found = walk([(t, o) for t, o in starts if o is not None], T)
            owners = [found.owners.get(self._walked.get(k)) for k in range(len(self._forms))]
        finally:
            self._walked = None
        given = []
        for t in _carrying(inputs[i] for i in self._data):
            _, mine = found.leaves.get(id(t), (t, np.full((1,) * t.dim(), NONE)))
            given.append(mine)
        return Inside(owners, given, found.opaque)

    def _inputs(self, shapes: tuple) -> list[Any]:
        """What stands for the inputs of a call."""
        inputs = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            if isinstance(t, Tensor) and i not in self._data
            else None
            for i, t in enumerate(self._examples)
        ]
        for i, shape in zip(self._data, shapes, strict=True):
            inputs[i] = shape.tensor() if isinstance(shape, _Shape) else shape
        return inputs

    # Sites are put in.

    def _put_sites(self, module: fx.GraphModule, inputs: Sequence[Any], closing: Closing) -> None:
        graph = module.graph
        nodes = [n for n in graph.nodes if n.op == "placeholder"]
        tracked = {nodes[i]: i for i in self._tracked}
        for node, i in tracked.items():
            if closing.detached(inputs[i]) is None:
                raise NotInGraphError(f"{node.target} has a hook")
        for node in graph.nodes:
            _refuse_hidden(node)
        with graph.inserting_after(nodes[-1]):
            call = graph.placeholder("dropinf_call")
            probe = graph.placeholder("dropinf_probe")
        for node in (probe, call):
            node._dynamo_source = LocalSource(node.target)
        for node in list(graph.nodes):
            if any(n in tracked for n in node.all_input_nodes):
                self._put_site(node, tracked, closing.hints, (probe, call))
        graph.lint()
        module.recompile()

    def _put_site(
        self,
        node: fx.Node,
        tracked: dict[fx.Node, int],
        hints: Hints,
        extra: tuple[fx.Node, fx.Node],
    ) -> None:
        graph = node.graph
        found = _form_of(node, tracked, hints)
        if found is None:
            name = next(n.target for n in node.all_input_nodes if n in tracked)
            raise NotInGraphError(f"{name} in {named(_function(node))}")
        form, x, roles, after = found
        for p in set(roles.values()):
            with graph.inserting_before(node):
                node.replace_input_with(p, graph.call_method("detach", (p,)))
        number, y = len(self._forms), node
        self._forms.append(
            (named(_function(node)), form, [(k, tracked[p]) for k, p in roles.items()])
        )
        if after is None:
            with graph.inserting_after(node):
                site = graph.call_function(tapped, (y, x, *extra, self._key, number))
            site.meta["example_value"] = _example(node)
            node.replace_all_uses_with(site, delete_user_cb=lambda user: user is not site)
            return
        addition, y, other = after
        with graph.inserting_before(addition):
            wide = graph.call_method("expand_as", (y, other))
            ids = graph.call_function(ids_of, (x, wide))
            site = graph.call_function(tapped, (wide, ids, *extra, self._key, number))
            site.meta["example_value"] = _example(other)
        addition.replace_input_with(y, site)


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

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def tensor(self) -> Tensor:
        t = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        return t.requires_grad_(self.requires_grad)


def _shape(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return t
    return _Shape(t.shape, t.stride(), t.dtype, t.device, t.requires_grad)


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
    if len({t.untyped_storage()._cdata for t in carrying}) < len(carrying):
        call.moved = "compiled code two of whose results share memory"
        return results
    marked = iter(Results.apply(call, *carrying))
    return [next(marked) if _carries(t) else t for t in results]


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


# How a graph is read.


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _function(node: fx.Node) -> Callable | None:
    if node.op == "call_method":
        return getattr(Tensor, node.target, None)
    return _FUNCTIONS.get(node.target, node.target) if node.op == "call_function" else None


def _refuse_hidden(node: fx.Node) -> None:
    """Refuse what has code of its own inside."""
    inner = isinstance(node.target, torch._ops.HigherOrderOperator) or node.op == "call_module"
    if inner or node.target in _HIDDEN or named(_function(node)) .startswith("torch.autograd"):
        raise NotInGraphError(f"what is inside of {node.name}")


def _form_of(
    node: fx.Node, tracked: Mapping[fx.Node, int], hints: Hints
) -> tuple[Form, fx.Node, dict[int, fx.Node], tuple[fx.Node, fx.Node, fx.Node] | None] | None:
    """The form of a call, the node of its input, the roles of tracked parameters, and the addition
    where it is expanded over the batch, if it is."""
    func, given = _function(node), node.all_input_nodes
    if func not in FORMS:
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _example)
    numbers = [a for a in tree_iter((args, kwargs)) if isinstance(a, (torch.SymInt, torch.SymFloat))]
    tensors = {id(_example(n)): n for n in given if isinstance(_example(n), Tensor)}
    if numbers or len(tensors) < len(given):
        return None
    try:
        forms = list(FORMS[func](*args, **kwargs))
    except (RefusedError, TypeError):
        return None
    for form in forms:
        nodes = {k: tensors[id(role.tensor)] for k, role in enumerate(form.roles)}
        x, roles = tensors.get(id(form.x)), {k: n for k, n in nodes.items() if n in tracked}
        # All but the input are parameters, those that are not tracked without a gradient.
        fixed = all(n.op == "placeholder" and not _carries(_example(n)) for n in nodes.values() if n not in tracked)
        if x is None or x in tracked or not fixed or set(given) != {x, *nodes.values()} or not roles:
            continue
        plausible = _carries(form.x) or hints.plausible(_concrete(form.x), form.flat)
        after = None if plausible else _expanded(node, func)
        if plausible or after is not None:
            form.x = None
            return form, x, roles, after
    return None


def _expanded(node: fx.Node, func: Callable) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Where what was looked up for all examples alike is added to what they have: the addition,
    what it is given, and the other operand."""
    if func is not F.embedding or len(node.users) != 1:
        return None
    (user,) = node.users
    if user.op == "call_method" and user.target == "to" and len(user.users) == 1:
        if _example(user).dtype != _example(node).dtype:
            return None
        node, (user,) = user, user.users
    if user.target not in _ADDITIONS or len(user.args) != 2 or user.kwargs:
        return None
    other = user.args[0] if user.args[1] is node else user.args[1]
    same = isinstance(other, fx.Node) and other is not node
    if not same or not isinstance(_example(other), Tensor):
        return None
    if _sizes(_example(other)) != _sizes(_example(user)):
        return None
    return user, node, other


def _sizes(t: Tensor) -> tuple[int, ...]:
    """The size as it was when the graph was compiled."""
    return tuple(s if isinstance(s, int) else s.node.hint for s in t.shape)


def _concrete(t: Tensor) -> Tensor:
    """Of this size."""
    return torch.empty(_sizes(t), dtype=t.dtype, device="meta")
