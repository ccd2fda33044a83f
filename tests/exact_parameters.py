"""Parameters that meet data in ways of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from exact_models import ORDER, Own, collection, linear, param
from torch import nn

CASES, case = collection()


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
case("a bias of another module", lambda s, x: F.linear(x, s.l.weight, s.m.b),
     l=linear(3, 4, bias=False), m=lambda: Own(None, b=torch.randn(4)))  # fmt: skip
case("a scale with ones in front", lambda s, x: (s.l(x) * s.p)[0, 0], l=linear(3, 4),
     p=param(1, 1, 1, 4))  # fmt: skip
case("states of both directions", lambda s, x: s.r(x, s.l(x[:, 0]).view(-1, 4, 5).transpose(
    0, 1).contiguous())[0], (3, 2, 3), l=linear(3, 20), r=lambda: nn.GRU(
        3, 5, 2, bidirectional=True, batch_first=True))  # fmt: skip
case("an LSTM of projections without biases", lambda s, x: s.r(x)[0], (4, 5, 3),
     r=lambda: nn.LSTM(3, 4, proj_size=2, bias=False, batch_first=True))  # fmt: skip
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

# A weight or a bias that is itself made of data.
case("a bias made of data", lambda s, x: F.linear(x, s.w, s.k(x).mean(0)), w=param(4, 3),
     k=linear(3, 4))  # fmt: skip
case("a weight made of data", lambda s, x: F.linear(x, s.k(x).sum(0).view(4, 3), s.b), b=param(4),
     k=linear(3, 12))  # fmt: skip
case("a norm's weight made of data", lambda s, x: F.layer_norm(s.l(x), (4,), s.k(x).mean(0), s.b),
     b=param(4), l=linear(3, 4), k=linear(3, 4))  # fmt: skip
case("a kernel's bias made of data", lambda s, x: F.conv1d(x, s.w, s.k(x).mean((0, 1))), (4, 3, 6),
     w=param(4, 3, 2), k=linear(6, 4))  # fmt: skip
case("a bias expanded from a number, B = O", lambda s, x: F.linear(x, s.w, s.b.expand(4)),
     w=param(4, 3), b=param())  # fmt: skip


# In place on what is made of a parameter.
def changed(make, change, late=False):
    def forward(s, x):
        w = make(s.w)
        y = x * w.sum(0) if late else None
        change(w)
        return x @ w.T if y is None else y

    return forward


COPIES = {
    "a copy": lambda w: w.clone(),
    "a cast": lambda w: w.float().double(),
    "a product": lambda w: 2 * w,
    "a view of a copy": lambda w: w.clone().view(-1).view(4, 3),
}
for name, make in COPIES.items():
    case(f"{name} of a parameter, doubled in place", changed(make, lambda w: w.mul_(2)),
         w=param(4, 3))  # fmt: skip
    case(f"{name} of a parameter, written in place", changed(make, lambda w: w[1:].zero_()),
         w=param(4, 3))  # fmt: skip
    case(f"{name} of a parameter, changed after its use", changed(make, lambda w: w.mul_(2), True),
         w=param(4, 3))  # fmt: skip


def copied_and_added(s, x):
    y = x.clone()
    y.copy_(s.q)
    y[:, 0] += s.b
    return y


def added_to_one(s, x):
    y = x * 1
    y[:, 0] += s.w.sum(0)
    return y


case("what a parameter was copied into, added to", copied_and_added, (2, 3, 3), q=param(1, 1, 3),
     b=param(3))  # fmt: skip
case("a batch of one that is added to", added_to_one, (1, 2, 6), w=param(6, 6))

# Tables.
case("frequencies of ids that are shared", lambda s, x: x + s.e(torch.tensor([0, 0, 1])), (4, 3, 3),
     e=lambda: nn.Embedding(4, 3, scale_grad_by_freq=True))  # fmt: skip
case("padding of ids that are shared", lambda s, x: x + F.embedding(
    torch.tensor([0, 2, 1]), s.w, padding_idx=-2), (4, 3, 3), w=param(4, 3))  # fmt: skip
case("a table whose columns are the examples'", lambda s, x: (x + s.e(
    torch.arange(3))).permute(2, 0, 1), (2, 3, 4), e=lambda: nn.Embedding(5, 4))  # fmt: skip
for mode in ("mean", "max"):
    case(f"bags of which one is empty, {mode}", lambda s, i, m=mode: F.embedding_bag(
        i, s.w, torch.tensor([0, 2, 2, 7]), mode=m, padding_idx=-1), (9,), ids=4,
         w=param(4, 3))  # fmt: skip
case("padding from the end", lambda s, i: F.embedding(i, s.w, padding_idx=-1), (4, 3), ids=4,
     w=param(4, 3))  # fmt: skip
case("frequencies of ids", lambda s, i: s.e(i), (4, 3), ids=4,
     e=lambda: nn.Embedding(4, 3, scale_grad_by_freq=True))  # fmt: skip
case("bags with frequencies", lambda s, i: s.e(i, torch.tensor([0, 2, 3, 7])), (9,), ids=4,
     e=lambda: nn.EmbeddingBag(4, 3, mode="sum", scale_grad_by_freq=True))  # fmt: skip
case("bags of a norm", lambda s, i: s.e(i, torch.tensor([0, 2, 3, 7])), (9,), ids=4,
     e=lambda: nn.EmbeddingBag(4, 3, mode="sum", max_norm=1.0, norm_type=1.0))  # fmt: skip

# Arguments by name, and in ways that are rare.
case("masked_fill by a parameter", lambda s, x: s.l(x).masked_fill(x[:, :1] > 0, s.p), p=param(),
     l=linear(3, 4))  # fmt: skip
case("a value with ones in front", lambda s, x: (y := s.l(x).clone(), y.__setitem__(
    (slice(None), 0), s.p))[0], (4, 2, 3), p=param(1, 1, 4), l=linear(3, 4))  # fmt: skip
case("attention by names", lambda s, x: F.scaled_dot_product_attention(
    query=s.q, key=x, value=x), (4, 2, 5, 3), q=param(1, 2, 5, 3))  # fmt: skip
case("tile by names", lambda s, x: torch.tile(input=s.q, dims=(len(x), 1)) * x, q=param(1, 3))
case("broadcast_to by names", lambda s, x: torch.broadcast_to(input=s.q, size=(len(x), 3)) * x,
     q=param(3))  # fmt: skip
case("mm by names", lambda s, x: torch.mm(x, mat2=s.w) + torch.mv(x, vec=s.v)[:, None],
     w=param(3, 4), v=param(3))  # fmt: skip
case("bmm with out=None", lambda s, x: torch.bmm(x, s.w, out=None).transpose(0, 1), (2, 4, 3),
     w=param(2, 3, 4))  # fmt: skip
for shape in ((5,), (1, 5), (4, 5), (4, 1), ()):
    case(f"addmm of {shape}", lambda s, x: torch.addmm(s.b, x, s.w), b=param(*shape),
         w=param(3, 5))  # fmt: skip
case("bmm of a weight for each example", lambda s, x: torch.bmm(x, s.w), (4, 2, 3),
     w=param(4, 3, 5))  # fmt: skip
case("bmm of layers", lambda s, x: torch.bmm(s.l(x), s.w).transpose(0, 1), (2, 4, 3),
     l=linear(3, 5), w=param(2, 5, 4))  # fmt: skip
for shape in ((4,), (1, 1, 4), (2, 1, 4), (1, 4, 1), (2, 4, 4)):
    case(f"baddbmm of {shape}", lambda s, x: torch.baddbmm(s.b, x, s.w).transpose(0, 1), (2, 4, 3),
         b=param(*shape), w=param(2, 3, 4))  # fmt: skip
case("numpy's names", lambda s, x: torch.matmul(x, other=s.w).sum(axis=1, keepdims=True), (4, 3),
     w=param(3, 4))  # fmt: skip
case("index_select with out=None", lambda s, x: torch.index_select(s.w, 0, ORDER, out=None) * x,
     w=param(4, 3))  # fmt: skip
case("a wide kernel over as many", lambda s, x: s.c(x), (4, 2, 9), c=lambda: nn.Conv1d(
    2, 3, 3, padding="same", dilation=2))  # fmt: skip
case("a kernel over parts, of one example two", lambda s, x: torch.zeros(4, 3, 4).to(x).index_add(
    0, torch.tensor([0, 0, 1, 2, 3]), s.c(x[[0, 0, 1, 2, 3]])), (4, 2, 6),
     c=lambda: nn.Conv1d(2, 3, 3))  # fmt: skip
case("a kernel over one example at a time", lambda s, x: torch.stack([s.c(e) for e in x]),
     (4, 2, 6), c=lambda: nn.Conv1d(2, 3, 3))  # fmt: skip
