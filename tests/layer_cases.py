"""One small model for every kind of layer and every way to hand a parameter to data."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from cases import Case, squares
from torch import nn


class Layer(NamedTuple):
    case: Case
    paths: set[str]  # that its parameters take

    @property
    def name(self):
        return self.case.name


def layer(name, model, *shapes, paths="closed form", ids=0):
    """A layer whose batch is random tensors of these shapes, or ids below `ids`.

    `paths` are those that its parameters take, of "closed form", "pulled back" and "passes".
    """

    def batch():
        return tuple(torch.randint(ids, s) if ids else torch.randn(s) for s in shapes)

    return Layer(Case(name, model, batch, loss_fn), set(paths.split(", ")))


def loss_fn(model, batch):
    y = model(*batch)
    y = y[0] if isinstance(y, tuple) else y
    return squares(lambda *_: y, batch)


def statistics(model):
    """Running statistics that are not those of a fresh model."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


class SelfAttention(nn.Module):
    def __init__(self, need_weights=False, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.need_weights = need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class CrossAttention(nn.Module):
    def __init__(self, packed):
        super().__init__()
        widths = {} if packed else {"kdim": 5, "vdim": 6}
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **widths)

    def forward(self, x, k, v):
        mask = torch.zeros(k.shape[:2], dtype=torch.bool, device=k.device)
        mask[:, -2:] = True
        return self.attention(x, k, v, key_padding_mask=mask)[0]


class Tokens(nn.Module):
    """Bare parameters as vision models use them."""

    def __init__(self):
        super().__init__()
        self.cls, self.registers = (nn.Parameter(torch.randn(1, n, 8)) for n in (1, 2))
        self.position = nn.Parameter(torch.randn(1, 9, 8))
        self.mask, self.layer_scale = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        B = len(x)
        x = x.clone()
        x[:, 2] = self.mask
        x = torch.cat([self.cls.expand(B, -1, -1), self.registers.repeat(B, 1, 1), x], dim=1)
        x = x + self.position
        x = x + self.layer_scale * torch.tanh(x)
        x += self.mask
        return x * self.temperature.exp()


class Written(nn.Module):
    """Parameters and data that are written into one fresh tensor."""

    def __init__(self):
        super().__init__()
        self.cls, self.out = nn.Parameter(torch.randn(8)), nn.Linear(8, 3)

    def forward(self, x):
        B, T, width = x.shape
        y = x.new_zeros(B, T + 1, width)
        y[:, 0] = self.cls
        y[:, 1:] = x
        z = x.new_zeros(B, T, width)
        z[:, :2] = x[:, 1:3]
        return self.out(torch.cat([y, z * self.cls], 1))


class Masked(nn.Module):
    """A token that takes the place of some positions."""

    def __init__(self):
        super().__init__()
        self.mask, self.out = nn.Parameter(torch.randn(8)), nn.Linear(8, 3)

    def forward(self, x):
        x = x.clone()
        x[x[..., 0] > 0] = self.mask
        return self.out(x)


class ByHand(nn.Module):
    """Products that a model writes itself."""

    def __init__(self):
        super().__init__()
        sizes = {"w": (8, 5), "v": (6, 5), "u": (6,), "q": (4, 6), "both": (2, 6, 6)}
        for name, shape in sizes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        y = torch.tanh(x @ self.w)
        y = torch.tanh(y @ self.v.t())
        first, second = self.both
        y = torch.mm(y.flatten(0, 1), first).unflatten(0, y.shape[:2]) + F.linear(y, second)
        z = self.q @ y.transpose(1, 2)
        return torch.cat([y.flatten(1), z.flatten(1), y @ self.u], 1)


class Views(nn.Module):
    """Parts of parameters: every other column, a transposed table, a reversed slice of a pack."""

    def __init__(self):
        super().__init__()
        self.wide, self.table = nn.Parameter(torch.randn(5, 12)), nn.Parameter(torch.randn(6, 9))
        self.pack = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, ids):
        x = F.embedding(ids, self.table.T)
        x = torch.tanh(F.linear(x, self.wide[:, 1::2]))
        return F.linear(x, self.pack[1:].flatten(0, 1)[2:7]) * self.wide[0, 3:8]


class Arithmetic(nn.Module):
    """Parameters in every place of elementwise functions."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Parameter(torch.rand(5) + 0.5) for _ in range(4))
        self.frozen = nn.Parameter(torch.rand(5), requires_grad=False)

    def forward(self, x):
        y = (1 - self.a) / (x.exp() + self.b) + self.frozen * self.c
        y = torch.where(x > 0, y, self.d * 2)
        y = torch.maximum(y, self.a.neg()[None]) ** self.c.double().to(x.dtype)
        return torch.addcmul(y, self.b.expand_as(x[0]), x).sub_(self.c.detach())


class Positions(nn.Module):
    """Positions that the batch shares, looked up in every shape that models use."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(9, 6)
        self.flat, self.shared, self.each = (nn.Embedding(9, 6) for _ in range(3))
        self.relative = nn.Embedding(9, 2)
        self.norm = nn.LayerNorm(6)
        self.register_buffer("types", torch.zeros(1, 9, dtype=torch.long))

    def forward(self, ids):
        B, T = ids.shape
        at = torch.arange(T, device=ids.device)
        x = self.token(ids) + self.flat(at) + self.norm(self.shared(at[None]))
        x = x + self.each(self.types[:, :T].expand(B, T))
        relative = self.relative((at[:, None] - at).clamp(min=0))  # [T, T, 2]
        bias = relative.permute(2, 0, 1)[None]
        q = x.unflatten(2, (2, 3)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=bias)


class Experts(nn.Module):
    """Tokens routed to two of three experts each, as lists of layers have it."""

    def __init__(self, style):
        super().__init__()
        self.style, self.router = style, nn.Linear(8, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 8))
            for _ in range(3)
        )

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, k = torch.where(chosen == e)
            if self.style == "index_add":
                part = expert(flat[None, token].reshape(-1, flat.shape[-1]))
                out.index_add_(0, token, part * weights[token, k, None])
            elif self.style == "mask":
                mask = (chosen == e).any(-1)
                out[mask] += expert(flat[mask])
            else:  # sorted, then split
                part = expert(flat.index_select(0, token))
                out = out.index_add(0, token, part)
        if self.style == "sorted":
            order = torch.argsort(chosen[:, 0], stable=True)
            sizes = torch.bincount(chosen[:, 0], minlength=3).tolist()
            parts = flat[order].split(sizes)
            parts = [expert(p) for expert, p in zip(self.experts, parts, strict=True)]
            out = torch.cat(parts)[torch.argsort(order)]
        return out.view_as(x) + x


class TwoViews(nn.Module):
    """Two views of a batch through one encoder, joined along the batch dimension."""

    def __init__(self, stacked):
        super().__init__()
        self.stacked, self.encoder = stacked, nn.Linear(8, 5)

    def forward(self, x):
        if self.stacked:
            one, other = self.encoder(torch.stack([x, x.flip(1)])).unbind(0)
        else:
            one, other = self.encoder(torch.cat([x, x.flip(1)])).chunk(2)
        return one * other


class Turned(nn.Module):
    """The batch in other orders on its way through two layers, and back."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.other(self.one(x.flip(0)).roll(1, 0)).roll(-1, 0).flip([0, 1])


class Merged(nn.Module):
    """Windows of every example merged with the batch, as in Swin."""

    def __init__(self):
        super().__init__()
        self.mix, self.bias, self.out = (
            nn.Linear(4, 4),
            nn.Parameter(torch.randn(2, 4)),
            nn.Linear(4, 3),
        )

    def forward(self, x):  # [B, T, 4]
        windows = x.unflatten(1, (-1, 2)).flatten(0, 1)  # [B * T / 2, 2, 4]
        windows = torch.tanh(self.mix(windows) + self.bias)
        return self.out(windows).unflatten(0, (len(x), -1))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(8, 6, batch_first=True, **options)
        self.out = nn.Linear(12 if options.get("bidirectional") else 6, 3)

    def forward(self, x):
        y, state = self.rnn(x)
        state = state[0] if isinstance(state, tuple) else state
        return torch.cat([self.out(y).flatten(1), state.transpose(0, 1).flatten(1)], 1)


class OwnCell(nn.Module):
    """A recurrence written out: T calls of one layer, stacked."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRUCell(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        h, states = x.new_zeros(len(x), 6), []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            states.append(h)
        states = torch.stack(states)  # [T, B, 6]
        return self.out(states).transpose(0, 1) + self.out(states.transpose(0, 1).tanh())


class Bag(nn.Module):
    def __init__(self, mode, offsets=False, **options):
        super().__init__()
        self.bag, self.offsets = nn.EmbeddingBag(4, 5, mode=mode, **options), offsets

    def forward(self, ids, weights=None):
        if not self.offsets:
            return self.bag(ids, per_sample_weights=weights)
        offsets = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
        return self.bag(ids.flatten(), offsets)


def conv(*layers):
    return lambda: statistics(nn.Sequential(*(make() for make in layers)))


x = (4, 6, 8)
LAYERS = [
    layer("attention", lambda: SelfAttention(batch_first=True), x),
    layer(
        "attention with weights, bias_kv, zeros",
        lambda: SelfAttention(True, batch_first=True, add_bias_kv=True, add_zero_attn=True),
        x,
    ),
    layer("cross attention, packed", lambda: CrossAttention(True), x, (4, 7, 8), (4, 7, 8)),
    layer("cross attention", lambda: CrossAttention(False), x, (4, 7, 5), (4, 7, 6)),
    layer(
        "nn.TransformerEncoder",
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
        ).eval(),
        x,
    ),
    layer("bare tokens", Tokens, x, paths="closed form, pulled back"),
    layer("mask token", Masked, x),
    layer("written into a fresh tensor", Written, x),
    layer("products by hand", ByHand, x),
    layer("views", Views, (4, 6), ids=9),
    layer("arithmetic", Arithmetic, (4, 3, 5), paths="pulled back"),
    layer("positions", Positions, (4, 6), ids=9, paths="closed form, pulled back"),
    layer(
        "as many positions as examples",
        Positions,
        (6, 6),
        ids=9,
        paths="closed form, passes, pulled back",
    ),
    layer("experts, index_add", lambda: Experts("index_add"), x),
    layer("experts, masks", lambda: Experts("mask"), x),
    layer("experts, sorted", lambda: Experts("sorted"), x),
    layer("two views joined", lambda: TwoViews(False), (4, 8)),
    layer("two views stacked", lambda: TwoViews(True), (4, 8)),
    layer("another order of the batch", Turned, x),
    layer("merged windows", Merged, (4, 6, 4)),
    layer(
        "LSTM",
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        x,
    ),
    layer(
        "LSTM with projection",
        lambda: nn.LSTM(8, 6, proj_size=3, batch_first=True),
        x,
    ),
    layer("GRU", lambda: Recurrent(nn.GRU), x),
    layer("RNN", lambda: Recurrent(nn.RNN, nonlinearity="relu"), x),
    layer("a cell of its own", OwnCell, x),
    layer("Bilinear", lambda: nn.Bilinear(8, 5, 3), (4, 8), (4, 5), paths="passes"),
    layer(
        "weight_norm",
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 5)),
        x,
        paths="closed form, pulled back",
    ),
    layer(
        "spectral_norm",
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 5)).eval(),
        x,
        paths="closed form, pulled back",
    ),
    layer("PReLU", lambda: nn.Sequential(nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 6)), x),
    layer("PReLU of channels", lambda: nn.Sequential(nn.Linear(8, 8), nn.PReLU(6)), x),
    layer("RMSNorm", lambda: nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8)), x),
    layer("EmbeddingBag, sum", lambda: Bag("sum"), (4, 7), ids=4),
    layer("EmbeddingBag, mean, padding", lambda: Bag("mean", padding_idx=1), (4, 7), ids=4),
    layer("EmbeddingBag, max", lambda: Bag("max"), (7, 3), ids=4),
    layer("EmbeddingBag, offsets", lambda: Bag("mean", True), (4, 7), ids=4),
    layer(
        "Conv2d, BatchNorm2d, GroupNorm, InstanceNorm2d",
        conv(
            lambda: nn.Conv2d(3, 4, 3, padding=1),
            lambda: nn.BatchNorm2d(4),
            lambda: nn.ReLU(inplace=True),
            lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2),
            lambda: nn.GroupNorm(2, 6),
            lambda: nn.Conv2d(6, 6, 2, padding="same", groups=6, bias=False),
            lambda: nn.InstanceNorm2d(6, affine=True),
            lambda: nn.PReLU(6),
        ),
        (4, 3, 12, 11),
    ),
    layer(
        "Conv2d, padding modes",
        conv(
            *(
                lambda mode=mode: nn.Conv2d(3, 3, 3, padding=1, padding_mode=mode)
                for mode in ("reflect", "circular", "replicate")
            )
        ),
        (4, 3, 7, 7),
    ),
    layer(
        "Conv1d, ConvTranspose1d",
        conv(
            lambda: nn.Conv1d(3, 4, 3, stride=2),
            lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2),
            lambda: nn.BatchNorm1d(6),
        ),
        (4, 3, 9),
    ),
    layer(
        "Conv3d, ConvTranspose3d",
        conv(
            lambda: nn.Conv3d(2, 4, (2, 3, 1)),
            lambda: nn.BatchNorm3d(4),
            lambda: nn.ConvTranspose3d(4, 2, 2, padding=1, dilation=2),
            lambda: nn.InstanceNorm3d(2, affine=True, track_running_stats=True),
        ),
        (3, 2, 5, 6, 4),
    ),
    layer("ConvTranspose2d", conv(lambda: nn.ConvTranspose2d(3, 4, 3, stride=2)), (4, 3, 5, 4)),
    layer(
        "BatchNorm1d of [B, C]", conv(lambda: nn.Linear(8, 5), lambda: nn.BatchNorm1d(5)), (4, 8)
    ),
]
