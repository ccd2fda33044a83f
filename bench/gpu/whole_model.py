"""Whole models of the Pythia suite with random weights: passes, and what capture adds to them.

Plain torch, bfloat16. Parallel residual blocks with rotary embeddings, LayerNorm and biases as in
GPT-NeoX (arXiv 2204.06745); sizes as in Pythia (arXiv 2304.01373).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf
from dropinf.ops import dispatch
from gpu.ratios import Case, Contestant, Setup, Target
from gpu.timing import Bench, relative_error

INPUT_GRADIENT, ORDINARY = "forward + input gradient", "forward + backward"
RS = (64, 1024, 8192)
ROTARY = 4  # a quarter of a head is rotated


class Sizes(NamedTuple):
    width: int
    num_layers: int
    num_heads: int
    inner: int
    vocabulary: int
    B: int
    T: int


MODELS = {
    "Pythia-1.4B": Sizes(2048, 24, 16, 8192, 50304, B=8, T=1024),
    "Pythia-6.9B": Sizes(4096, 32, 32, 16384, 50432, B=4, T=1024),
}
QUICK = {"Pythia-1.4B": 1024, "Pythia-6.9B": 8192}  # the r of the quick choice
TINY = Sizes(32, 2, 4, 64, 97, B=2, T=16)


def captured(r: int) -> str:
    return f"capture, r={r}"


TARGETS = [
    Target(f"{model}, r={r}: {what}", f"{model}, r={r}", (over,), **limit)
    for model in MODELS
    for r in RS
    for what, over, limit in (
        ("≤ 1.05x forward + input gradient", INPUT_GRADIENT, {"at_most": 1.05}),
        ("≥ 1.3x ordinary backward's throughput", ORDINARY, {"at_least": 1.3}),
    )
]


class Block(nn.Module):
    """Attention and MLP side by side."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.num_heads = sizes.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, sizes.inner), nn.Linear(sizes.inner, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(2, (self.num_heads, 3, -1))
        q, k, v = heads.permute(3, 0, 2, 1, 4).unbind()  # [B, heads, T, width of a head]
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.out(y.transpose(1, 2).flatten(2))
        return x + y + self.down(F.gelu(self.up(self.norm2(x))))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, still = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, still], -1)


class NeoX(nn.Module):
    """ids [B, T] -> logits [B, T, vocabulary]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.tokens = nn.Embedding(sizes.vocabulary, width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, sizes.vocabulary, bias=False)
        dims = max(2, width // sizes.num_heads // ROTARY)
        speed = 10000.0 ** -(torch.arange(0, dims, 2).float() / dims)
        angle = torch.arange(sizes.T).float()[:, None] * speed.repeat(2)
        self.register_buffer("cos", angle.cos().to(self.head.weight.dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(self.head.weight.dtype), persistent=False)

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.tokens(ids))


def built(sizes: Sizes, device: str) -> NeoX:
    """Random bfloat16 weights, small as at the start of training."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = NeoX(sizes)
    finally:
        torch.set_default_dtype(before)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02)
    return model


def losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Next-token loss of each example, [B]."""
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).float().sum(1)


def cases() -> list[Case]:
    """One for each model and r: contestants alternate, so each r has its passes beside it."""
    return [
        Case(f"{model}, r={r}", partial(make, model=model, r=r), model, quick=r == QUICK[model])
        for model in MODELS
        for r in RS
    ]


_built: dict[str, NeoX] = {}


def make(bench: Bench, model: str, r: int) -> Setup:
    sizes = TINY if bench.rehearsal else MODELS[model]
    r = max(8, r // 256) if bench.rehearsal else r
    if model not in _built:
        _built.clear()
        bench.forget()
        _built[model] = built(sizes, bench.device)
    net = _built[model]
    net.requires_grad_(True)
    ids = torch.randint(sizes.vocabulary, (sizes.B, sizes.T), device=bench.device)

    def forward(i: int) -> Tensor:
        with torch.no_grad():
            return losses(net(ids), ids)

    def input_gradient(i: int) -> Tensor:
        net.requires_grad_(False)
        try:
            x = net.tokens(ids).requires_grad_()
            return torch.autograd.grad(losses(net.body(x), ids).sum(), x)[0]
        finally:
            net.requires_grad_(True)

    def ordinary(i: int) -> None:
        try:
            losses(net(ids), ids).sum().backward()
        finally:
            net.zero_grad(set_to_none=True)

    plan = dropinf.Plan.make(net, dropinf.Dropout(r=r))
    take_unverified()
    contestants: dict[str, Contestant] = {}

    def passes(call: Callable[[int], object]) -> Contestant:
        return Contestant(call, tokens=ids.numel(), graph=False)

    contestants["forward"] = passes(forward)
    contestants[INPUT_GRADIENT] = passes(input_gradient)
    contestants[ORDINARY] = passes(ordinary)
    for backend in (None,) if bench.quick else (None, "reference"):
        name = captured(r) if backend is None else f"{captured(r)}, {backend}"
        contestants[name] = Contestant(
            capture(net, plan, ids, backend),
            error=partial(rows_error, net, plan, ids),
            tolerance=5e-2,  # bfloat16 products round otherwise in another batch, layer by layer
            ours=backend is None,
            tokens=ids.numel(),
            graph=False,
        )
    return Setup(contestants)


def capture(
    net: NeoX, plan: dropinf.Plan, ids: Tensor, backend: str | None
) -> Callable[[int], Tensor]:
    tap = dropinf.capture(net, plan, backend=backend)

    def call(i: int) -> Tensor:
        with tap:
            return tap.rows(losses(net(ids), ids))

    return call


def rows_error(net: NeoX, plan: dropinf.Plan, ids: Tensor, rows: Tensor) -> float:
    """From the gradients that autograd gives the first example alone."""
    one = ids[:1]
    names = [slot.name for slot in plan.slots]
    named = dict(net.named_parameters())
    try:
        losses(net(one), one).sum().backward()
        truth = [
            named[n].grad.flatten()[s.index.to(ids.device)].float() * s.scale
            for n, s in zip(names, plan.slots, strict=True)
        ]
    finally:
        net.zero_grad(set_to_none=True)
    return relative_error(rows[0], torch.cat(truth))


def take_unverified() -> None:
    """Let None pick every GPU kernel there is; their verification is another part of this run."""
    for op, kernels in dispatch.KERNELS.items():
        for backend in kernels:  # of which only those for GPUs have to be verified
            dispatch.VERIFIED.setdefault((backend, op), "this run")
    dispatch.kernel.cache_clear()
