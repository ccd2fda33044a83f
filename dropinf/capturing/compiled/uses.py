"""What the code of a graph does with a parameter, by the same rules as eager code."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dropinf.capturing.call_args import named
from dropinf.capturing.hints import Hints
from dropinf.capturing.rules import ELEMENTWISE, FORMS, Form, RefusedError

# How the compiler writes what eager code calls by another name.
_FUNCTIONS: dict[Any, Callable] = {
    operator.add: torch.add,
    operator.sub: torch.sub,
    operator.mul: torch.mul,
    operator.truediv: torch.div,
    operator.matmul: torch.matmul,
}
_ADDITIONS = (operator.add, operator.iadd, torch.add)
# Methods whose code the graph does not show.
_HIDDEN = {"register_hook", "register_post_accumulate_grad_hook", "backward", "retain_grad"}


@dataclass
class Use:
    """A call of tracked parameters that can have a site.

    Attributes:
        name: of the function.
        form: its form; None of a parameter that is expanded over what it meets.
        x: the node of its input.
        roles: the number of each role -> the node of its parameter.
        value: the node whose gradient the site needs.
        user: what alone is given it; None is all users.
        other: what it is first expanded to; None where it is not.
    """

    name: str
    form: Form | None
    x: fx.Node | None
    roles: dict[int, fx.Node]
    value: fx.Node
    user: fx.Node | None = None
    other: fx.Node | None = None


def use_of(node: fx.Node, tracked: Container[fx.Node], hints: Hints) -> Use | None:
    """How a node uses the parameters that are `tracked`; None if it can have no site."""
    func = function_of(node)
    if func is None:
        return None
    found = _in_form(node, func, tracked, hints) if func in FORMS else None
    if found is None and func in ELEMENTWISE:
        found = _spread(node, func, tracked)
    if found is None and func in (Tensor.expand, Tensor.expand_as):
        p = node.args[0]
        if p in tracked and not any(n in tracked for n in node.all_input_nodes[1:]):
            found = Use(named(func), None, None, {0: p}, node)
    return found


def example(node: fx.Node) -> Any:
    """What a node gave when the graph was made: a tensor without data, or a number."""
    return node.meta.get("example_value")


def function_of(node: fx.Node) -> Callable | None:
    """What a node calls, by the name that eager code has for it."""
    if node.op == "call_method":
        return getattr(Tensor, node.target, None)
    return _FUNCTIONS.get(node.target, node.target) if node.op == "call_function" else None


def hides_code(node: fx.Node) -> bool:
    """Whether a node has code of its own inside, or changes what a backward pass does."""
    func = function_of(node)
    inner = isinstance(func, torch._ops.HigherOrderOperator) or node.op == "call_module"
    hidden = node.op == "call_method" and node.target in _HIDDEN
    return inner or hidden or (func is not None and named(func).startswith("torch.autograd."))


def _in_form(
    node: fx.Node, func: Callable, tracked: Container[fx.Node], hints: Hints
) -> Use | None:
    given = node.all_input_nodes
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), example)
    tensors = {id(example(n)): n for n in given if isinstance(example(n), Tensor)}
    if len(tensors) < len(given):  # some are numbers that differ from call to call
        return None
    try:
        forms = list(FORMS[func](*args, **kwargs))
    except (RefusedError, TypeError):
        return None
    for form in forms:
        nodes = {k: tensors[id(role.tensor)] for k, role in enumerate(form.roles)}
        x, roles = tensors.get(id(form.x)), {k: n for k, n in nodes.items() if n in tracked}
        others = [n for n in nodes.values() if n not in tracked]
        if not roles or x is None or x in tracked or set(given) != {x, *nodes.values()}:
            continue
        if any(n.op != "placeholder" or _carries(n) for n in others):
            continue  # what is made of data or of parameters
        plausible = _carries(x) or hints.plausible(_concrete(form.x), form.flat)
        form.x = None
        use = Use(named(func), form, x, roles, node)
        if plausible or (func is F.embedding and _is_added(use)):
            return use
    return None


def _is_added(use: Use) -> bool:
    """Whether what was looked up for all examples alike is added to what they have; the site is
    then there."""
    node = use.value
    if len(node.users) != 1:
        return False
    (user,) = node.users
    if user.op == "call_method" and user.target == "to" and len(user.users) == 1:
        if example(user).dtype != example(node).dtype:
            return False
        node, (user,) = user, user.users
    if user.target not in _ADDITIONS or len(user.args) != 2 or user.kwargs:
        return False
    use.value, use.user, use.other = node, user, _other(user, node)
    return use.other is not None


def _spread(node: fx.Node, func: Callable, tracked: Container[fx.Node]) -> Use | None:
    """A parameter that broadcasts to what it meets."""
    if len(node.args) != 2 or node.kwargs or node.target in (operator.iadd,):
        return None
    mine = [a for a in node.args if isinstance(a, fx.Node) and a in tracked]
    other = _other(node, mine[0]) if len(mine) == 1 else None
    if other is None:
        return None
    return Use(named(func), None, None, {0: mine[0]}, mine[0], node, other)


def _other(node: fx.Node, one: fx.Node) -> fx.Node | None:
    """The other operand, if that is of the size of the result and `one` is not."""
    other = node.args[0] if node.args[1] is one else node.args[1]
    if not isinstance(other, fx.Node) or not isinstance(example(other), Tensor):
        return None
    size = sizes_of(example(node))
    return other if sizes_of(example(other)) == size != sizes_of(example(one)) else None


def _carries(node: fx.Node) -> bool:
    return example(node).requires_grad


def sizes_of(t: Tensor) -> tuple[int, ...]:
    """The size as it was when the graph was made."""
    return tuple(s if isinstance(s, int) else s.node.hint for s in t.shape)


def _concrete(t: Tensor) -> Tensor:
    """Of this size."""
    return torch.empty(sizes_of(t), dtype=t.dtype, device="meta")
