"""Setters, hooks, functions of one's own, torch.func, checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import ScaleKernel
from exact_models import LAYERS, collection, every_output, linear, param, two
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dropinf

CASES, case = collection()


# Setters.
def clamped(s, x):
    s.l.weight.data = s.l.weight.data.clamp(-0.2, 0.2)
    return s.l(x)


def set_gradient(s, x):
    s.l.weight.grad = torch.ones_like(s.l.weight)
    y = s.l(x)
    s.l.weight.grad = None
    return y


def copied_into(s, x):
    with torch.no_grad():
        s.l.weight.copy_(s.l.weight / s.l.weight.norm())
        s.l.bias.data.mul_(0.5)
    return s.l(x)


def another_data(s, x):
    y = s.l(x)
    y.data = y.data.flip(0)
    return s.k(y.tanh())


def turned_data(s, x):
    w = s.l.weight * 1
    w.data = w.data.flip(0)
    return F.linear(x, w)


case("p.data = in the forward", clamped, l=linear(3, 4))
case("p.grad = in the forward", set_gradient, l=linear(3, 4))
case("p.copy_ without gradients", copied_into, l=linear(3, 4))
case("y.data = of an activation", another_data, **LAYERS)
case("w.data = of what is made of a parameter", turned_data, l=linear(3, 4))


# Hooks.
def with_hook(hook):
    def between(y):
        y = y * 1
        if y.requires_grad:
            hook(y)
        return y

    return two(between)


HOOKS = {
    "on a tensor": lambda y: y.register_hook(lambda g: g.flip(0)),
    "on a tensor, that scales": lambda y: y.register_hook(lambda g: 2 * g),
    "on its node": lambda y: y.grad_fn.register_hook(
        lambda gi, go: tuple(None if g is None else g.roll(1, 0) for g in gi)
    ),
    "before its node": lambda y: y.grad_fn.register_prehook(lambda go: (go[0].flip(0),)),
    "on a node further down": lambda y: y.grad_fn.next_functions[0][0].register_hook(
        lambda gi, go: tuple(None if g is None else g.flip(0) for g in gi)
    ),
    "by a gradient edge": lambda y: torch.autograd.graph.get_gradient_edge(y).node.register_prehook(
        lambda go: (go[0].flip(0),)
    ),
}
for name, hook in HOOKS.items():
    case(f"a hook {name}", with_hook(hook), **LAYERS)


def hooked_module(register):
    def make():
        layer = nn.Linear(4, 4)
        register(layer)
        return layer

    return make


case(
    "a full backward hook",
    lambda s, x: s.k(s.h(s.l(x)).tanh()),
    **LAYERS,
    h=hooked_module(lambda m: m.register_full_backward_hook(lambda m, gi, go: (gi[0].flip(0),))),
)
case(
    "a full backward prehook",
    lambda s, x: s.k(s.h(s.l(x)).tanh()),
    **LAYERS,
    h=hooked_module(lambda m: m.register_full_backward_pre_hook(lambda m, go: (go[0].flip(0),))),
)
case(
    "a forward hook that turns the batch",
    lambda s, x: s.k(s.h(s.l(x)).tanh()),
    **LAYERS,
    h=hooked_module(lambda m: m.register_forward_hook(lambda m, args, y: y.flip(0))),
)


def hook_on_a_parameter(s, x):
    s.l.weight.register_hook(lambda g: 3 * g)
    return s.l(x)


def hook_on_what_is_made_of_one(s, x):
    w = s.l.weight * 2
    if w.requires_grad:
        w.register_hook(lambda g: 3 * g)
    return F.linear(x, w)


def hook_on_a_view_of_one(s, x):
    w = s.l.weight.T
    if w.requires_grad:
        w.register_hook(lambda g: g.flip(0))
    return x @ w


def hook_on_the_losses(model, batch):
    losses = every_output(model, batch)
    if losses.requires_grad:
        losses.register_hook(lambda g: g * torch.tensor([1.0, 2.0, 3.0, 4.0]).to(g))
    return losses


case("a hook on a parameter", hook_on_a_parameter, l=linear(3, 4))
case("a hook on what is made of a parameter", hook_on_what_is_made_of_one, l=linear(3, 4))
case("a hook on a view of a parameter", hook_on_a_view_of_one, l=linear(3, 4))


def hooked(make, hook, before=lambda s: s.l.weight):
    """A hook on `before(model)`, while `make(model)` is what meets the data."""

    def forward(s, x):
        use, which = make(s), before(s)
        if which.requires_grad:
            which.register_hook(hook)
        return use(x)

    return forward


def view_before(s):
    w = s.l.weight.T
    return lambda x: x @ w


def used_twice(s):
    w = s.l.weight.exp()
    return lambda x: F.linear(x, w) + F.linear(2 * x, w)


def prehook_of_a_copy(s, x):
    w = s.l.weight.clone()
    if w.requires_grad:
        w.grad_fn.register_prehook(lambda g: (g[0] * 2,))
    return F.linear(x, w)


def equilibrium(s, x):
    """The hook runs a backward pass of its own, through layers that are captured as well."""
    z = torch.tanh(0.3 * s.h(s.l(x)))
    start = z.detach().requires_grad_()
    again = torch.tanh(0.3 * s.h(start))
    if z.requires_grad:
        z.register_hook(lambda g: g + torch.autograd.grad(again, start, g, retain_graph=True)[0])
    return s.k(z)


case("a hook with a gradient of its own", equilibrium, **LAYERS, h=linear(4, 4))
case("one example, and a hook with a gradient of its own", equilibrium, (1, 3), **LAYERS,
     h=linear(4, 4))  # fmt: skip
case("a hook after the view was made", hooked(view_before, lambda g: 2 * g), l=linear(3, 4))
case("a hook that is not linear", hooked(used_twice, lambda g: g.clamp(-0.1, 0.1)), l=linear(3, 4))
case("a prehook of a copy of a parameter", prehook_of_a_copy, l=linear(3, 4))
case("a hook on the losses", two(torch.sin), loss_fn=hook_on_the_losses, **LAYERS)


# Functions of one's own.
class Pair(torch.autograd.Function):
    """Two results, one of them turned."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y, (x + y).flip(0)

    @staticmethod
    def backward(ctx, da, db):
        x, y = ctx.saved_tensors
        db = db.flip(0)
        return da * y + db, da * x + db


class Detour(torch.autograd.Function):
    """Its backward is not the derivative of its forward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy.roll(1, 0)


class Mul(torch.autograd.Function):
    """Has the name of one of torch's own, and does something else."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x.flip(0)

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy.flip(0)


class Rerun(torch.autograd.Function):
    """A checkpoint of one's own: its backward runs forward again, and a backward pass."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.run(x), dy)
        return None, x.grad


class RerunGiven(torch.autograd.Function):
    """As diffusion models have it: it is given the parameters, and hands them gradients."""

    @staticmethod
    def forward(ctx, run, x, *parameters):
        ctx.run, ctx.x, ctx.parameters = run, x, parameters
        return run(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x.view_as(x))
        return None, *torch.autograd.grad(y, [x, *ctx.parameters], dy, allow_unused=True)


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy.flip(0)


@dropinf.keeps_examples
class Both(torch.autograd.Function):
    """Two results, each of which has the examples where x has them."""

    @staticmethod
    def forward(ctx, x):
        return x * 2, x * 3

    @staticmethod
    def backward(ctx, da, db):
        return 2 * da + 3 * db


@dropinf.keeps_examples
class Weighed(torch.autograd.Function):
    """[B, I] by the sum of what is not of the examples, [n, I]."""

    @staticmethod
    def forward(ctx, x, shared):
        ctx.save_for_backward(x, shared)
        return x * shared.sum(0)

    @staticmethod
    def backward(ctx, dy):
        x, shared = ctx.saved_tensors
        return dy * shared.sum(0), (dy * x).sum(0).expand_as(shared)


def one_turned(s, x):
    a, b = Both.apply(s.l(x))
    return s.k(a.tanh() + b.flip(0))


@torch.jit.script
def scripted(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).flip(0).tanh()


@torch.jit.script
def scripted_layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, w, b).roll(1, 0)


@torch.library.custom_op("dropinf_tests::turned", mutates_args=())
def turned(x: Tensor, w: Tensor) -> Tensor:
    return x.flip(0) * w


turned.register_fake(lambda x, w: torch.empty_like(x))
turned.register_autograd(
    lambda ctx, dy: (dy.flip(0) * ctx.saved_tensors[1], (dy * ctx.saved_tensors[0].flip(0)).sum(0)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)

case("a Function of -p.exp()", lambda s, x: ScaleKernel.apply(s.l(x), -s.p.exp()), l=linear(3, 4),
     p=param(4))  # fmt: skip
case("a Function of p", lambda s, x: s.k(ScaleKernel.apply(s.l(x), s.p)), **LAYERS, p=param(4))
case("a Function with two results", lambda s, x: torch.cat(Pair.apply(s.l(x), s.m(x)), 1),
     l=linear(3, 4), m=linear(3, 4))  # fmt: skip
case("a Function of which one result is used", lambda s, x: Pair.apply(s.l(x), s.m(x))[1],
     l=linear(3, 4), m=linear(3, 4))  # fmt: skip
case("a declared Function of something shared", lambda s, x: Weighed.apply(s.l(x), s.h(
    torch.ones(6, 4).to(x).cumsum(0))), **LAYERS, h=linear(4, 4))  # fmt: skip
case("a declared Function of whose results one is turned", one_turned, **LAYERS)
case("a Function whose backward moves examples", two(lambda y: Detour.apply(y)), **LAYERS)
case("a checkpoint of one's own", lambda s, x: s.k(Rerun.apply(
    lambda y: s.h(y).tanh(), s.l(x))), **LAYERS, h=linear(4, 4))  # fmt: skip
case("a checkpoint of one's own that moves", lambda s, x: s.k(Rerun.apply(
    lambda y: s.h(y).flip(0), s.l(x))), **LAYERS, h=linear(4, 4))  # fmt: skip
case("a checkpoint of one's own, given the parameters", lambda s, x: s.k(RerunGiven.apply(
    lambda y: s.h(y).tanh(), s.l(x), *s.h.parameters())), **LAYERS, h=linear(4, 4))  # fmt: skip
case("a checkpoint in one of one's own", lambda s, x: s.k(Rerun.apply(
    lambda y: checkpoint(s.h, y, use_reentrant=True), s.l(x))), **LAYERS,
     h=linear(4, 4))  # fmt: skip
case("a Function called Mul", two(lambda y: Mul.apply(y)), **LAYERS)
case("a Function in place", two(lambda y: InPlace.apply(y * 1)), **LAYERS)
case("a scripted function", lambda s, x: s.k(scripted(s.l(x), s.p)), **LAYERS, p=param(4))
case("a scripted layer", lambda s, x: s.k(scripted_layer(x, s.w, s.b).tanh()), k=linear(4, 2),
     w=param(4, 3), b=param(4))  # fmt: skip
case("a custom op", lambda s, x: s.k(turned(s.l(x), s.p)), **LAYERS, p=param(4))
case("a traced function", lambda s, x: s.k(_traced()(s.l(x))), **LAYERS)


def _traced():
    return torch.jit.trace(
        lambda y: y.flip(0) * 2, torch.ones(4, 4, dtype=torch.float64), check_trace=False
    )


# torch.func.
case("vmap of a layer", lambda s, x: torch.vmap(s.l)(x), l=linear(3, 4))
case("vmap over the features", lambda s, x: s.k(torch.vmap(torch.sort, 1, 1)(s.l(x))[0]), **LAYERS)
case("vmap of parameters", lambda s, x: torch.vmap(lambda w: x @ w)(s.p).transpose(0, 1),
     p=param(2, 3, 4))  # fmt: skip
case("jvp", lambda s, x: s.k(torch.func.jvp(s.l, (x,), (torch.ones_like(x),))[1].tanh()), **LAYERS)
case("jvp of the layers around", lambda s, x: torch.func.jvp(
    lambda x: s.k(s.l(x).tanh()), (x,), (x.flip(0),))[1], **LAYERS)  # fmt: skip
case("grad", lambda s, x: torch.func.grad(lambda x: s.k(s.l(x).tanh()).sum())(x), **LAYERS)
case("vmap of grad", lambda s, x: torch.vmap(
    torch.func.grad(lambda x: s.k(s.l(x).tanh()).sum()))(x), **LAYERS)  # fmt: skip
case("functional_call", lambda s, x: torch.func.functional_call(
    s.l, {"weight": s.l.weight.flip(0), "bias": s.l.bias * 2}, (x,)), l=linear(3, 4))  # fmt: skip

# Checkpoints of both kinds around what moves examples, keeps them, or meets parameters openly.
INSIDE = {
    "layers": lambda s, y: s.h(y).tanh(),
    "a turn": lambda s, y: s.h(y).flip(0),
    "a sort": lambda s, y: s.h(y).sort(0)[0],
    "a Function": lambda s, y: ScaleKernel.apply(s.h(y), s.p.exp()),
    "what mixes": lambda s, y: s.h(y) - y.mean(0),
    "parameters without a rule": lambda s, y: torch.addmm(s.p, y, s.h.weight, beta=2),
    "a checkpoint": lambda s, y: checkpoint(lambda y: s.h(y).roll(1, 0), y, use_reentrant=False),
}
for name, inside in INSIDE.items():
    for reentrant in (False, True):
        case(
            f"a {'reentrant ' * reentrant}checkpoint around {name}",
            lambda s, x, inside=inside, reentrant=reentrant: s.k(
                checkpoint(lambda y: inside(s, y), s.l(x), use_reentrant=reentrant)
            ),
            **LAYERS,
            h=linear(4, 4),
            p=param(4),
        )

# Checkpoints with several results, and of a batch of one.
for reentrant in (False, True):
    kind = "a reentrant checkpoint" if reentrant else "a checkpoint"
    case(
        f"{kind} with two results",
        lambda s, x, r=reentrant: torch.cat(
            checkpoint(lambda y: (s.k(y), s.h(y).tanh()), s.l(x), use_reentrant=r), 1
        ),
        **LAYERS,
        h=linear(4, 4),
    )
    case(
        f"{kind} of one example",
        lambda s, x, r=reentrant: checkpoint(s.k, s.l(x), use_reentrant=r),
        (1, 3),
        **LAYERS,
    )


# Forward-mode differentiation.
def directional(s, x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        y = torch.autograd.forward_ad.unpack_dual(s.k(s.l(dual).tanh()))
        return y.primal + y.tangent


case("forward-mode differentiation", directional, **LAYERS)
