"""What moves, mixes or writes the examples of a batch; losses that are not they in order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from exact_models import LAYERS, ORDER, collection, every_output, linear, param, two
from torch import nn

CASES, case = collection()


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


def ragged_parameters(s, x):
    parts = (s.c(x[:, None])[:, 0] * s.p + s.q).split(LENGTHS)
    return torch.stack([part.tanh().sum(0) for part in parts])


case("parts of different lengths", ragged, (12, 3), **LAYERS)
case("parts of different lengths that meet parameters", ragged_parameters, (12, 3), p=param(3),
     q=param(3), c=lambda: nn.Conv1d(1, 1, 1))  # fmt: skip
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


def by_a_moving_number(s, x):
    """The number is that of a select, and is changed in place after it."""
    out, i = torch.zeros(4, 4).to(x), torch.tensor(0)
    for example in x:
        out[3 - i] = s.l(example)
        i += 1
    i.zero_()
    return out


case("written at a number that moves on", by_a_moving_number, l=linear(3, 4))
case("joined along axis=", lambda s, x: torch.cat(
    [torch.zeros(4, 6).to(x), s.l(x).T], axis=1)[:, 6:].T, l=linear(3, 4))  # fmt: skip
case("shifted tokens", lambda s, x: s.k(F.pad(s.l(x), (0, 0, 1, -1)).tanh()), (2, 4, 3),
     l=linear(3, 4), k=linear(4, 2))  # fmt: skip
case("gated", lambda s, x: F.glu(s.l(x), 0).repeat(2, 1), l=linear(3, 4))


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
