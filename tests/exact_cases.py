"""Small models whose rows must be the gradients of the losses, whatever they do with the batch.

Each is a kind of thing that a capture cannot know of data: functions along the batch, setters,
hooks, writes through views, functions of one's own, losses in another order, parameters met in ways
that no rule has. Row b is the gradient of losses[b], and nothing else is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Exact(NamedTuple):
    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, ...]]
    loss_fn: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]


class Own(nn.Module):
    """A forward function, and the parameters and layers that it uses."""

    def __init__(self, function, **own):
        super().__init__()
        self.function = function
        for name, value in own.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            else:
                setattr(self, name, nn.Parameter(value))

    def forward(self, *inputs):
        return self.function(self, *inputs)


def every_output(model, batch):
    """A loss to which every element of an example's output adds in another way."""
    y = model(*batch)
    weight = torch.linspace(0.5, 1.5, max(1, y[0].numel())).to(y).view(y.shape[1:])
    return (y * weight).square().flatten(1).sum(1)


CASES: list[Exact] = []


def case(name, function, *shapes, loss_fn=every_output, ids=0, **own):
    """A case of `function(model, *batch)`; `own` makes what the model has."""

    def model():
        return Own(function, **{key: make() for key, make in own.items()})

    def batch():
        return tuple(torch.randint(ids, s) if ids else torch.randn(s) for s in shapes or [(4, 3)])

    CASES.append(Exact(name, model, batch, loss_fn))


def linear(*widths, **options):
    return lambda: nn.Linear(*widths, **options)


def param(*shape):
    return lambda: torch.randn(shape)


def two(middle):
    """Two layers, [4, 3] -> [4, 4] -> [4, 2], with something between."""
    return lambda s, x: s.k(middle(s.l(x).tanh()))


LAYERS = {"l": linear(3, 4), "k": linear(4, 2)}
ORDER = torch.tensor([2, 0, 3, 1])

# Functions along the batch: what comes out has the examples elsewhere, twice, mixed or not at all.
ALONG = {
    "sort": lambda y: y.sort(0)[0],
    "sort, descending from the end": lambda y: y.sort(-2, descending=True)[0],
    "msort": torch.msort,
    "argsort": lambda y: y[y.detach()[:, 0].argsort()],
    "topk": lambda y: y.topk(4, 0)[0],
    "topk of fewer": lambda y: torch.cat([y.topk(2, 0)[0], y[:2]]),
    "kthvalue": lambda y: y + y.kthvalue(2, 0)[0],
    "median": lambda y: y - y.median(0, keepdim=True)[0],
    "maximum over the batch": lambda y: y - y.amax(0),
    "masked_select": lambda y: (
        y.masked_select(torch.tensor([1, 0, 1, 1]).bool()[:, None]).view(3, 4).repeat(2, 1)[:4]
    ),
    "a boolean mask": lambda y: torch.cat([y[torch.tensor([1, 0, 1, 0]).bool()], y[1::2]]),
    "a mask of bytes": lambda y: torch.cat(
        [y[torch.tensor([0, 0, 1, 0], dtype=torch.uint8)], y[:3]]
    ),
    "one by a mask of bytes": lambda y: torch.cat(
        [y[torch.tensor([0, 0, 0, 1], dtype=torch.uint8)], torch.zeros(3, 4).to(y)]
    ),
    "roll": lambda y: y.roll(1, 0),
    "roll of both": lambda y: y.roll((1, -1), (0, 1)),
    "roll of all": lambda y: y.roll(3),
    "flip": lambda y: y.flip(0, 1),
    "flipud": torch.flipud,
    "rot90": lambda y: y.rot90(2, (0, 1)),
    "unfold": lambda y: y.unfold(0, 3, 1).flatten(0, 1).mT.reshape(-1, 4)[:4],
    "as_strided": lambda y: y.as_strided((4, 4), (1, 4)),
    "as_strided, shifted": lambda y: torch.cat([y.as_strided((3, 4), (4, 1), 4), y[:1]]),
    "index_put": lambda y: y.index_put((ORDER[:2],), y[2:]),
    "index_put, accumulated": lambda y: y.index_put((ORDER,), y.exp(), accumulate=True),
    "index_put from a mask of bytes": lambda y: y.index_put(
        (torch.tensor([0, 0, 1, 0], dtype=torch.uint8),), y[:1]
    ),
    "index_copy": lambda y: y.index_copy(0, ORDER[:3], y[1:]),
    "index_add": lambda y: y.index_add(0, ORDER, y.tanh()),
    "index_fill": lambda y: y.index_fill(0, ORDER[:1], 1.0),
    "scatter": lambda y: y.scatter(0, ORDER[:, None].expand(4, 4), y.exp()),
    "scatter_reduce": lambda y: y.scatter_reduce(
        0, ORDER.div(2, rounding_mode="floor")[:, None].expand(4, 4), y, "prod"
    ),
    "gather": lambda y: y.gather(0, ORDER[:, None].expand(4, 4)),
    "take_along_dim": lambda y: y.take_along_dim(ORDER[:, None], 0),
    "take": lambda y: y.take(torch.arange(15, -1, -1).view(4, 4)),
    "where over the batch": lambda y: torch.where(y > y.roll(1, 0), y, y.flip(0)),
    "where by a column": lambda y: torch.where(torch.tensor([[1], [0], [0], [1]]).bool(), y, y[1]),
    "einsum that mixes": lambda y: torch.einsum("bi,ci->bc", y, y),
    "einsum that transposes": lambda y: torch.einsum("bi->ib", y),
    "a matrix of the batch": lambda y: y @ y.T,
    "tril of it": lambda y: (y @ y.T).tril(),
    "triu": lambda y: y.triu(1) + y,
    "transposed": lambda y: y.T,
    "reshaped across": lambda y: y.reshape(2, 8).T.reshape(4, 4),
    "cumsum": lambda y: y.cumsum(0),
    "cummax": lambda y: y.cummax(0)[0],
    "logcumsumexp": lambda y: y.logcumsumexp(0),
    "softmax over the batch": lambda y: y.softmax(0),
    "normalized over the batch": lambda y: F.normalize(y, dim=0),
    "mean over the batch": lambda y: y - y.mean(0),
    "std_mean": lambda y: y - torch.std_mean(y, 0)[1],
    "repeat": lambda y: y.repeat(2, 1)[2:6],
    "repeat_interleave": lambda y: y.repeat_interleave(2, 0)[1:5],
    "tile": lambda y: y.tile(2, 1)[3:7],
    "diagonal": lambda y: y.diagonal()[:, None] + y,
    "a diagonal above": lambda y: y[:3] + y[:3].diagonal(1)[:, None],
    "movedim": lambda y: y.view(4, 2, 2).movedim(0, 1).reshape(4, 4),
    "split and joined": lambda y: torch.cat(y.split([1, 3])[::-1]),
    "unbound and stacked": lambda y: torch.stack(y.unbind()[::-1]),
    "unbound along the features": lambda y: torch.stack(y.unbind(1)),
    "chunks": lambda y: torch.cat(y.chunk(2)[::-1]),
    "tensor_split": lambda y: torch.cat(y.tensor_split((1, 2))[::-1]),
    "padded and cut": lambda y: F.pad(y, (0, 0, 1, 0))[:4],
    "padded by less than nothing": lambda y: F.pad(y, (0, 0, 1, -1)),
    "replicated and cut": lambda y: F.pad(y.T, (1, -1), mode="replicate").T,
    "reflected": lambda y: F.pad(y.T, (1, 0), mode="reflect").T[:4],
    "circular": lambda y: F.pad(y.T, (1, -1), mode="circular").T,
    "constant_pad_nd": lambda y: torch.constant_pad_nd(y, (0, 0, -1, 1)),
    "interpolated over the batch": lambda y: F.interpolate(y.T[None], 6)[0].T[1:5],
    "pooled over the batch": lambda y: F.avg_pool1d(y.T[None], 3, 1, 1)[0].T,
    "convolved over the batch": lambda y: (
        F.conv1d(y.T[None], torch.ones(4, 1, 3).to(y), padding=1, groups=4)[0].T
    ),
    "batch norm": lambda y: F.batch_norm(y, None, None, training=True),
    "pairwise distances": lambda y: torch.cdist(y, y),
    "kron": lambda y: torch.kron(y[:2], y[2:])[:, :4],
    "outer": lambda y: torch.outer(y[:, 0], y[:, 1]),
    "cross": lambda y: torch.cat([torch.linalg.cross(y[:3], y[1:], dim=0), y[:1]]),
    "fft over the batch": lambda y: torch.fft.fft(y, dim=0).abs(),
    "solve": lambda y: torch.linalg.solve(y @ y.T + torch.eye(4).to(y), y),
    "inverse": lambda y: torch.linalg.inv(y @ y.T + torch.eye(4).to(y)),
    "meshgrid": lambda y: torch.meshgrid(y[:, 0], y[:, 1], indexing="ij")[0],
    "combinations": lambda y: torch.combinations(y[:, 0], 2)[:4].repeat(1, 2),
    "block_diag": lambda y: torch.block_diag(y[:2, :2], y[2:, :2]),
    "renorm": lambda y: y.renorm(2, 0, 1.0),
    "grid_sample": lambda y: F.grid_sample(
        y[None, None], torch.linspace(-0.9, 0.9, 32).to(y).view(1, 4, 4, 2), align_corners=False
    )[0, 0],
    "attention over the batch": lambda y: F.scaled_dot_product_attention(y, y, y),
    "logsumexp": lambda y: y - y.logsumexp(0),
    "pack_padded_sequence": lambda y: (
        nn.utils.rnn.pack_padded_sequence(
            y.view(4, 2, 2), torch.tensor([2, 2, 1, 1]), batch_first=True
        )
        .data[:4]
        .repeat(1, 2)
    ),
    "block views of a product": lambda y: (y[:2] @ y.view(2, 4, 2)).reshape(4, 2).repeat(1, 2),
}
for name, middle in ALONG.items():
    case(name, two(middle), **LAYERS)


# In place, through views.
def in_place(y, write):
    y = y.clone()
    write(y)
    return y


WRITES = {
    "a row": lambda y: y[0].copy_(y[2].clone()),
    "a view of another shape": lambda y: y.view(-1)[4:8].copy_(y[0].clone()),
    "a transposed view": lambda y: y.T[0].add_(y[:, 1].clone().flip(0)),
    "item by item": lambda y: [y.__setitem__(i, y[3 - i].clone()) for i in range(2)],
    "by a mask": lambda y: y.__setitem__(y.detach()[:, 0] > 0, y[1].clone()),
    "by a mask of bytes": lambda y: y.__setitem__(
        torch.tensor([0, 1, 0, 0], dtype=torch.uint8), y[2].clone()
    ),
    "by indices": lambda y: y.__setitem__(ORDER[:2], y[2:].clone()),
    "by a list": lambda y: y.__setitem__([3, 0], y[:2].clone()),
    "by indices of both": lambda y: y.__setitem__((slice(None), [0, 2]), y[:, :2].clone().flip(0)),
    "behind a slice": lambda y: y.__setitem__((slice(1, None), ORDER[:2]), y[:3, :2].clone()),
    "with an ellipsis": lambda y: y.__setitem__((..., 1), y[:, 0].clone().flip(0)),
    "in a view that was indexed": lambda y: y[1:].__setitem__(slice(0, 2), y[:2].clone()),
    "by swapping": lambda y: y.copy_(y.clone().roll(1, 0)),
    "masked_scatter_": lambda y: y.masked_scatter_(
        torch.tensor([[1], [0], [1], [0]]).bool(), y.clone()[2:]
    ),
    "index_add_": lambda y: y.index_add_(0, ORDER, y.clone()),
    "put_": lambda y: y.put_(torch.tensor([0, 5]), y.clone()[3, :2]),
    "fill_diagonal_": lambda y: y.fill_diagonal_(0.5),
    "as_strided_scatter": lambda y: y.copy_(
        y.clone().as_strided_scatter(y.clone()[2:], (2, 4), (4, 1))
    ),
    "squeeze_, then a row": lambda y: y.unsqueeze_(0).squeeze_(0)[1].zero_(),
    "t_ twice": lambda y: y.t_().mul_(2).t_(),
}
for name, write in WRITES.items():
    case(f"written: {name}", two(lambda y, write=write: in_place(y, write)), **LAYERS)


def residual_in_place(s, x):
    x = s.l(x)
    h = s.k(x)
    x += h  # only the bias of k is tracked, so that autograd keeps no x
    return x.tanh()


def bias_only():
    layer = nn.Linear(4, 4)
    layer.weight.requires_grad_(False)
    return layer


case("x += layer(x) of which the bias alone is tracked", residual_in_place, l=linear(3, 4),
     k=bias_only)  # fmt: skip


def moved_on(s, x):
    y = s.l(x)
    z = y + s.p
    y.mul_(2)
    return torch.cat([y, z], 1)


case("what a parameter was added to, changed in place", moved_on, l=linear(3, 4), p=param(4))


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
case("a hook on the losses", two(torch.sin), loss_fn=hook_on_the_losses, **LAYERS)


# Functions of one's own.
class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return dy * w, (dy * x).flatten(0, -2).sum(0)


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


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy.flip(0)


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

case("a Function of -p.exp()", lambda s, x: Scale.apply(s.l(x), -s.p.exp()), l=linear(3, 4),
     p=param(4))  # fmt: skip
case("a Function of p", lambda s, x: s.k(Scale.apply(s.l(x), s.p)), **LAYERS, p=param(4))
case("a Function with two results", lambda s, x: torch.cat(Pair.apply(s.l(x), s.m(x)), 1),
     l=linear(3, 4), m=linear(3, 4))  # fmt: skip
case("a Function of which one result is used", lambda s, x: Pair.apply(s.l(x), s.m(x))[1],
     l=linear(3, 4), m=linear(3, 4))  # fmt: skip
case("a Function whose backward moves examples", two(lambda y: Detour.apply(y)), **LAYERS)
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
    "a Function": lambda s, y: Scale.apply(s.h(y), s.p.exp()),
    "what mixes": lambda s, y: s.h(y) - y.mean(0),
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

# Ragged batches, and loops over examples.
LENGTHS = [1, 4, 2, 5]


def ragged(s, x):
    parts = s.l(x).tanh().split(LENGTHS)
    return torch.stack([s.k(part).sum(0) for part in parts])


def pooled_graph(s, x):
    graph = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
    h = s.l(x).tanh()
    edge = torch.arange(12).view(2, 6)
    h = h.index_add(0, edge[1], s.m(h[edge[0]]))  # messages, also from another graph
    return torch.zeros(4, 2).to(h).index_add(0, graph, s.k(h))


def padded(s, x):
    parts = nn.utils.rnn.pad_sequence(s.l(x).split(LENGTHS), batch_first=True)
    return s.k(parts.tanh())


def packed(s, x):
    packed = nn.utils.rnn.pack_padded_sequence(
        x, torch.tensor([2, 5, 1, 3]), batch_first=True, enforce_sorted=False
    )
    return nn.utils.rnn.pad_packed_sequence(s.g(packed)[0], batch_first=True)[0]


def nested(s, x):
    return torch.stack([s.k(s.l(x[b : b + 1]).tanh())[0] for b in (2, 0, 3, 1)])


case("parts of different lengths", ragged, (12, 3), **LAYERS)
case("graphs with messages between them", pooled_graph, (12, 3), **LAYERS, m=linear(4, 4))
case("pad_sequence", padded, (12, 3), **LAYERS)
case("a packed GRU", packed, (4, 5, 3), g=lambda: nn.GRU(3, 4, batch_first=True))
case("a loop over examples", lambda s, x: torch.stack([s.k(s.l(e)) for e in x]), **LAYERS)
case("a loop over examples in another order", nested, **LAYERS)
case("a loop that writes", lambda s, x: [y := torch.zeros(4, 4).to(x), [
    y.__setitem__(b, s.l(x[3 - b])) for b in range(4)], s.k(y)][-1], **LAYERS)  # fmt: skip
case("as many tokens as examples", lambda s, x: s.l(x.transpose(0, 1)).transpose(0, 1), (4, 4, 3),
     l=linear(3, 2))  # fmt: skip
case("time-major and flattened", lambda s, x: s.l(x.transpose(0, 1).reshape(-1, 3)).view(
    6, 4, -1).transpose(0, 1), (4, 6, 3), l=linear(3, 2))  # fmt: skip
case("doubled, then apart again", lambda s, x: s.l(torch.cat([x, x.flip(0)])).view(2, 4, 4).prod(0),
     l=linear(3, 4))  # fmt: skip
case("each example expanded", lambda s, x: s.l(x.expand(3, 4, 3)).sum(0), l=linear(3, 4))


# Losses that are not the examples, in order.
def losses(change):
    return lambda model, batch: change(every_output(model, batch))


LOSSES = {
    "permuted": lambda l: l[ORDER],
    "a subset": lambda l: l[[2, 3]],
    "repeated": lambda l: l.repeat(2),
    "repeated one by one": lambda l: l.repeat_interleave(2),
    "sorted": lambda l: l.sort()[0],
    "flipped": lambda l: l.flip(0),
    "without a mean": lambda l: l - l.mean(),
    "weighted against each other": lambda l: l.softmax(0) * l,
    "of pairs": lambda l: (l[:, None] - l).square().flatten(),
    "one of them": lambda l: l[1:2],
    "their sum": lambda l: l.sum()[None],
    "one twice": lambda l: torch.stack([l[0], l[0], l[3], l[0]]),
    "without some": lambda l: l * torch.tensor([1.0, 0.0, 1.0, 0.0]).to(l),
    "of no example": lambda l: torch.cat([l, torch.ones(1).to(l)]),
    "dropped where small": lambda l: torch.where(l > l.median(), l, l.detach()),
}
for name, change in LOSSES.items():
    case(f"losses, {name}", two(torch.sin), loss_fn=losses(change), **LAYERS)


def contrastive(model, batch):
    y = model(*batch)
    return F.cross_entropy(y @ y.T, torch.arange(len(y)), reduction="none")


def anchored(model, batch):
    away = sum((p - 1).pow(2).sum() for p in model.parameters())
    return every_output(model, batch) + away


def each_anchored(model, batch):
    """A penalty of another weight for each example."""
    weight = torch.tensor([1.0, 2.0, 0.0, -1.0]).to(batch[0])
    return every_output(model, batch) + weight * model.l.weight.square().sum()


def decayed_in_place(model, batch):
    losses = every_output(model, batch)
    for p in model.parameters():
        losses += 0.1 * p.norm()
    return losses


def only_a_penalty(model, batch):
    return torch.stack([model.l.weight.square().sum(), model.l.bias.exp().sum()])


case("in-batch negatives", two(torch.sin), loss_fn=contrastive, **LAYERS)
case("a penalty", two(torch.sin), loss_fn=anchored, **LAYERS)
case("a penalty of each example", two(torch.sin), loss_fn=each_anchored, **LAYERS)
case("a penalty added in place", two(torch.sin), loss_fn=decayed_in_place, **LAYERS)
case("losses without data", two(torch.sin), loss_fn=only_a_penalty, **LAYERS)
case("losses that are a parameter's", two(torch.sin), loss_fn=lambda m, b: m.l.bias.exp(),
     **LAYERS)  # fmt: skip


case("losses that are one", two(torch.sin), loss_fn=lambda m, b: m.l.bias, **LAYERS)


# Parameters met in ways of their own.
def tied(s, x):
    return F.linear(s.l(x).tanh(), s.l.weight.T) + s.l.weight.sum(0)


def written_together(s, x):
    W = torch.zeros(4, 3).to(s.a)
    W[:, :2], W[:, 2:] = s.a, s.b
    return F.linear(x, W)


def read_by_the_batch(s, x):
    return F.linear(x, s.l.weight[ORDER]) + s.l.weight[x.detach()[:, 0].argsort(), 0][:, None]


def own_weights(s, x):
    """A weight for each example, of two that are mixed."""
    mix = s.l(x).softmax(1)  # [4, 2]
    return torch.einsum("be,eio,bi->bo", mix, s.p, x)


def hyper(s, x):
    return torch.bmm(s.l(x).view(4, 2, 3), x[:, :, None])[..., 0] + s.p


case("a tied weight", tied, l=linear(3, 4))
case("a weight used twice", lambda s, x: s.l(s.l(x).tanh()), l=linear(3, 3))
case("a weight sliced", lambda s, x: F.linear(x, s.p[1::2]) + F.linear(x, s.p[:2]), p=param(4, 3))
case("a weight with a row of its own for each", lambda s, x: x * s.p, p=param(4, 3))
case("a bias along the batch", lambda s, x: s.l(x) + s.p[:, None], l=linear(3, 4), p=param(4))
case("a parameter looked up by example", read_by_the_batch, l=linear(3, 4))
case("a weight written together", written_together, a=param(4, 2), b=param(4, 1))
case("weights mixed by example", own_weights, l=linear(3, 2), p=param(2, 3, 4))
case("weights made of the data", hyper, l=linear(3, 6), p=param(2))
case("a parameter through numpy-like steps", lambda s, x: x @ torch.stack([*s.p.unbind()][::-1]),
     p=param(3, 4))  # fmt: skip
case("stacked layers weighed", lambda s, x: (s.w.view(2, 1, 1) * torch.stack(
    [s.l(x), s.m(x)])).sum(0), l=linear(3, 4), m=linear(3, 4), w=param(2))  # fmt: skip
case("bilinear", lambda s, x: s.l(x, x.flip(0)), l=lambda: nn.Bilinear(3, 3, 4))
case("einsum of two parameters", lambda s, x: torch.einsum("bi,ij,jk->bk", x, s.p, s.q),
     p=param(3, 5), q=param(5, 4))  # fmt: skip
case("max with a parameter", lambda s, x: torch.maximum(s.l(x), s.p).flip(0), l=linear(3, 4),
     p=param(4))  # fmt: skip
case("a parameter of no dimension", lambda s, x: s.l(x) * s.p + s.p.exp(), l=linear(3, 4),
     p=param())  # fmt: skip
case("ids along the batch", lambda s, i: s.e(i.flatten()).view(4, 3, 5), (4, 3), ids=6,
     e=lambda: nn.Embedding(6, 5))  # fmt: skip
case("ids turned", lambda s, i: s.e(i.T).transpose(0, 1).cumsum(1), (4, 4), ids=6,
     e=lambda: nn.Embedding(6, 5))  # fmt: skip
case("a bag by offsets", lambda s, i: s.e(i.flatten(), torch.tensor([0, 1, 4, 7])), (4, 3), ids=6,
     e=lambda: nn.EmbeddingBag(6, 5))  # fmt: skip

# Complex numbers.
case("complex einsum", lambda s, x: torch.einsum(
    "bi,io->bo", torch.fft.fft(s.l(x)), torch.view_as_complex(s.w)).abs(), l=linear(3, 4),
     w=param(4, 2, 2))  # fmt: skip
case("complex product", lambda s, x: (torch.fft.rfft(x) * torch.view_as_complex(s.w)).abs(), (4, 6),
     w=param(4, 2))  # fmt: skip
case("torch.complex of two", lambda s, x: (torch.complex(x @ s.p, x @ s.q).flip(0) ** 2).angle(),
     p=param(3, 4), q=param(3, 4))  # fmt: skip
