"""Rows of random models are the gradients of their losses.

A model is a program drawn from a seed: lines of Python that make [B, T, C] tensors of earlier ones
and parameters. B, T and C are often equal, so that no size tells the batch. Failures print it.
"""

import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint  # noqa: F401 (programs have it)

from dropinf import Dropout, Full, Plan, Sketch, capture, collect

# Of passes, batches that mix, checkpoints; and of CheckpointFunction itself.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

# Drawn where they stand: x is an earlier tensor, most often the last, o any of them; W a parameter,
# or what is made of some, of shape [C, C], v of [C], p what broadcasts against x; STEP a step of y.
DRAWN = {
    "W": """
        m.W; m.V.T; (2 * m.W); (m.W @ m.V); m.V.exp(); m.l.weight; m.K[0]; m.W.flip(0);
        m.W.clone().mul_(2); torch.cat([m.W[:1], m.V[1:]]); (m.W * m.v[:, None]); m.W.detach();
        m.s.expand(C, C); torch.stack([m.v, *m.V[1:]]); (m.W / m.W.norm(dim=1, keepdim=True))""",
    "v": """
        m.v; (2 * m.u); m.l.bias; m.W[0]; m.V[:, 1]; m.W.sum(0); m.pos[0]; m.q[0, 0];
        m.W.diagonal(); m.E.weight[2]; m.s.expand(C); m.v.flip(0)""",
    "p": """
        v; v; m.pos; m.q; m.s; m.bt[..., None]; m.bc[:, None]; m.q.expand(B, T, C);
        m.pos.repeat(B, 1, 1); m.pos[turn]; m.E(ids); m.E.weight[ids[:, :1]]""",
}
STEPS = {
    "layers": """
        m.l(x); m.l(x).tanh(); m.n(x); m.g(x.mT).mT; m.c(x.mT).mT; m.r(x)[0]; m.a(x, x, x)[0];
        m.l(x.flatten(0, 1)).unflatten(0, (B, T)); m.f(x.flatten(1))[:, None] * o;
        m.b(x.permute(1, 2, 0)).permute(2, 0, 1);
        m.l(x.transpose(0, 1).reshape(-1, C)).view(T, B, C).transpose(0, 1); o + m.E(ids);
        o * m.E(ids.T).transpose(0, 1); o + m.E(torch.arange(T)); torch.stack([m.l(e) for e in x]);
        torch.cat([m.l(e) for e in x.split(1)]); torch.stack([m.l(e) for e in x.unbind(1)], 1);
        m.l(x.detach()) + o""",
    "parameters": """
        F.linear(x, W, v); F.linear(x, W); x @ W; (W @ x.mT).mT; x * p; p + x; p - x;
        x / (p ** 2 + 1); torch.maximum(x, p); torch.where(mask[..., None], x, p);
        torch.addcmul(x, p, p); F.layer_norm(x, (C,), v, v); torch.einsum('btc,dc->btd', x, W);
        torch.einsum('btc,tcd->btd', x, m.K); (x @ v)[..., None] * o;
        torch.cat([m.q.expand(B, 1, C), x], 1)[:, 1:]; torch.cat([m.pos[None], x])[:-1];
        torch.cat([x, m.pos.expand(B, T, C)], 2)[..., 1 : C + 1]; m.pos.expand(B, T, C) + p;
        F.scaled_dot_product_attention(m.pos.expand(B, T, C), x, o)""",
    "functions": """
        x.softmax(0); x.softmax(1); x.softmax(2); x.cumsum(0); x.cumsum(1); x + o.mean(0);
        x - o.mean(1, keepdim=True); x * o.sum((0, 2), keepdim=True); x + o.norm(dim=0);
        x + o.logsumexp((1, 2))[:, None, None]; x * o.amax(0); x.sort(0)[0]; x.sort(1)[0];
        (x @ o.mT).softmax(-1) @ x; x + o.var(); F.scaled_dot_product_attention(x, o, x);
        torch.einsum('btc,bsc->bts', x, x) @ o; F.batch_norm(x.mT, None, None, v, training=True).mT;
        F.normalize(x, dim=0); x.masked_fill(mask[..., None], 0.5); torch.lerp(x, o, 0.3);
        x.detach() * o""",
    "views and indices": """
        x.flip(0); x.flip(1); x.roll(1, 0); x.roll(1); x[order]; x[:, turn];
        x[order[:, None], turn]; x.index_select(1, turn); x.gather(0, picks);
        x.gather(1, picks % T); x.mT.reshape(B, T, C); x.transpose(0, 1).reshape(B, T, C);
        x.permute(2, 0, 1).reshape(B, T, C); torch.cat([x, o]).chunk(2)[1];
        torch.cat([x[1:], o[:1]]); torch.stack([x, o]).flip(0)[1];
        x.repeat_interleave(2, 0).view(B, 2, T, C)[:, 1]; x.repeat(2, 1, 1)[B:];
        F.pad(x, (0, 0, 1, 0))[:, :-1]; F.pad(x, (0, 0, 0, 0, 1, 0))[1:] + o;
        x.expand(2, B, T, C).sum(0); o + x.diagonal(0, 0, 1).sum(1); x.unfold(1, 1, 1)[..., 0]""",
    "writes": """
        x.clone().mul_(p); x.clone().add_(p); (1 * x).tanh_(); x.clone().copy_(p);
        put(x, (slice(None), 0), v); put(x, (slice(None), -1), o[:, 0]); put(x, 0, o[-1]);
        put(x, mask, v); put(x, order, 2 * o); put(x, ..., m.l(o.flip(0)));
        put(x, mask, o[mask.flip(0) & mask].sum(0)); put(torch.zeros_like(x), order[1:], o[1:]) + x;
        put(x, (slice(None), turn), o); x.index_add(0, order, m.l(o)); x.index_copy(1, turn, o);
        x.scatter_add(0, picks, o); x.scatter(1, turn.view(1, T, 1).expand(B, T, C), o);
        x.masked_scatter(mask[..., None], m.l(o)); x.index_put((order,), o, accumulate=True);
        written(x, lambda y: y[:, 0].add_(v)); written(x, lambda y: y.view(B, -1)[:, 1].mul_(m.s));
        written(x, lambda y: y[-1:].mul_(2)); written(x, lambda y: y.mT.add_(o.mT.flip(0)))""",
    "experts": """
        experts(x, mask, W, W); experts(x, mask.T.reshape(B, T), m.l.weight, m.W);
        x @ m.K[torch.arange(B) % T]; (x.transpose(0, 1) @ m.K).transpose(0, 1);
        torch.einsum('te,btc,ecd->btd', m.pos[:, :1].softmax(0), x, m.K[:1])""",
    "checkpoints": """
        checkpoint(lambda y: STEP, x, use_reentrant=False);
        checkpoint(lambda y: STEP, x, use_reentrant=True)""",
}
LOSSES = {
    "in order": "each(x); each(x); each(x + o); torch.stack([e.square().sum() for e in x])",
    "permuted": "each(x).flip(0); each(x)[order]; torch.cat([each(e) for e in x.split(1)][::-1])",
    "a subset": "each(x)[order[: max(1, B - 1)]]; each(x)[:1]; each(x[-2:])",
    "sorted, mixed": """
        each(x).sort()[0]; each(x).topk(1)[0]; each(x.transpose(0, 1)); each(x).repeat(2);
        each(x.reshape(-1, C)); each(x).cumsum(0); each(x) + v.square().sum(); each(x) * m.s;
        torch.zeros(B).to(x).index_add(0, order.repeat_interleave(T), each(x.flatten(0, 1)))""",
}


def each(y):
    """To the loss of y[b], every element of it adds in another way."""
    weight = torch.linspace(0.5, 1.5, y[0].numel()).to(y).view(y.shape[1:])
    return (y * weight).sin().flatten(1).sum(1)


def written(x, write):
    y = x.clone(memory_format=torch.contiguous_format)
    write(y)
    return y


def put(x, at, value):
    return written(x, lambda y: y.__setitem__(at, value))


def experts(x, mask, W, V):
    flat, y = x.reshape(-1, x.shape[-1]), torch.zeros_like(x).flatten(0, 1)
    for here, weight in (mask, W), (~mask, V):
        at = here.flatten().nonzero()[:, 0]
        y = y.index_add(0, at, F.linear(flat[at], weight))
    return y.view_as(x)


def draw(seed):
    """Shape [B, T, C], compression, parameters left out, and the program itself."""
    r = random.Random(seed)
    B = r.choice([1, 2, 3, 3, 3, 4])
    T = r.choice([max(B, 2), max(B, 2), 2, 3])
    C = r.choice([max(B, 2), T, T, 4])
    lines = ["h0 = m.l(x)"]
    for n in range(1, r.randint(3, 6)):
        step = fill(r, pick(r, STEPS), n)
        lines.append(f"h{n} = " + (f"torch.tanh({step})" if r.random() < 0.5 else step))
    lines.append("losses = " + fill(r, pick(r, LOSSES), len(lines)))
    how = r.choice([Full(), Full(), Dropout(r=7), Sketch(r=5, s=3)])
    return (B, T, C), how, r.choice([[], [], [], ["c", "E"], ["W"]]), "\n".join(lines)


def pick(r, table, kind=None):
    return r.choice(table[kind or r.choice(list(table))].split(";")).strip()


def fill(r, line, n, own=None):
    """The line with what is drawn in it, of h0 to h{n-1}; in a checkpoint, of y alone."""
    x = own or (f"h{n - 1}" if r.random() < 0.8 else f"h{r.randrange(n)}")

    def drawn(match):
        name = match[1]
        if name in "xo":
            return x if name == "x" else own or f"h{r.randrange(n)}"
        if name == "STEP":
            return fill(r, pick(r, STEPS), n, "y")
        return fill(r, pick(r, DRAWN, name), n, own)

    return re.sub(r"(?<![.\w])([xoWvp]|STEP)\b", drawn, line)


class Model(nn.Module):
    def __init__(self, B, T, C, program):
        super().__init__()
        self.program = program
        self.l, self.n, self.g = nn.Linear(C, C), nn.LayerNorm(C), nn.GroupNorm(1, C)
        self.f, self.b, self.E = nn.Linear(T * C, C), nn.Linear(B, B), nn.Embedding(5, C)
        self.c, self.r = nn.Conv1d(C, C, 3, padding=1), nn.LSTM(C, C, batch_first=True)
        self.a = nn.MultiheadAttention(C, 1, batch_first=True)
        shapes = {"W": (C, C), "V": (C, C), "v": (C,), "u": (C,), "s": (), "pos": (T, C)}
        shapes |= {"q": (1, 1, C), "K": (T, C, C), "bt": (B, T), "bc": (B, C)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x, ids):
        g = torch.Generator().manual_seed(0)
        (B, T, C), m = x.shape, self
        order, turn = torch.randperm(B, generator=g), torch.randperm(T, generator=g)
        mask = torch.rand(B, T, generator=g) > 0.4
        picks = torch.randint(B, x.shape, generator=g)
        exec(self.program, names := {**globals(), **locals()})
        return names["losses"]


def true_rows(model, batch, plan):
    """Row b: the gradient of losses[b], by plain autograd, in a forward pass of its own."""
    rows, found = (
        torch.zeros(len(model(*batch)), plan.width).double(),
        dict(model.named_parameters()),
    )
    for b, row in enumerate(rows):
        model.zero_grad()
        model(*batch)[b].backward()
        for slot in plan.slots:
            p = found[slot.name]
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            values, own = grad.flatten()[slot.index] * slot.scale, row[slot.entries]
            if slot.entry_map is None:
                own += values
            else:  # of a Sketch
                own.index_add_(0, slot.entry_map.entry, values * slot.entry_map.sign)
    return rows


SEEDS = {seed: [pytest.mark.more] * (seed >= 80) for seed in range(880)}


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=marks) for seed, marks in SEEDS.items()])
def test_rows_of_a_random_model(seed):
    shape, compression, exclude, program = draw(seed)
    print(f"{shape=} {compression=} {exclude=}\n{program}")  # shown where a test fails
    torch.manual_seed(seed)
    model = Model(*shape, program).double()
    batch = torch.randn(shape).double(), torch.randint(5, shape[:2])
    plan = Plan.make(model, compression, exclude=exclude)
    truth = true_rows(model, batch, plan)
    bound = 1e-12 * truth.abs().max().item()
    with capture(model, plan) as tap:
        rows = tap.rows(model(*batch))
    torch.testing.assert_close(rows, truth, rtol=0, atol=bound)
    if seed % 10 == 0:
        store = collect(model, [batch], lambda m, b: m(*b), plan, progress=False)
        torch.testing.assert_close(store.rows, truth, rtol=0, atol=bound)
