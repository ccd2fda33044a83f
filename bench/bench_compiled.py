"""Rows of compiled models, beside the compiled model's own forward and input gradient, and both
uncompiled: `python bench/bench_compiled.py`, in some minutes, most of which torch.compile takes.

Frozen parameters let plain autograd form no weight gradient and keep no layer inputs, as capture
does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf

R, ROUNDS = 256, 15


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer(width: int, layers: int) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*(Block(width, 4) for _ in range(layers))).eval(), torch.randn(
        4, 64, width
    )


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [m for _ in range(20) for m in (nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(16, 64)


MODELS = {
    "4 transformer layers of width 256, [4, 64]": lambda: transformer(256, 4),
    "12 transformer layers of width 64, [4, 64]": lambda: transformer(64, 12),
    "an MLP of 40 layers of width 64, [16]": mlp,
}


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1)


def input_gradient(model: nn.Module, given: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(losses(given, leaf).sum(), leaf)[0]

    return call


def measure(make: Callable[[], tuple[nn.Module, Tensor]]) -> dict[str, float]:
    """Milliseconds of the one thread: medians of rounds in which all alternate."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = make()
    compiled = torch.compile(model, fullgraph=True)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=R))
    taps = {
        "compiled rows": (compiled, dropinf.capture(compiled, plan)),
        "rows": (model, dropinf.capture(model, plan)),
    }
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Tensor], rounds: int) -> None:
        call()
        for _ in range(rounds):
            start = time.process_time()
            call()
            times.setdefault(name, []).append((time.process_time() - start) * 1e3)

    for _ in range(ROUNDS):
        model.requires_grad_(False)
        for name, given in (
            ("compiled forward + input gradient", compiled),
            ("forward + input gradient", model),
        ):
            timed(name, input_gradient(model, given, x), 3)
        model.requires_grad_(True)
        for name, (given, tap) in taps.items():
            with tap:
                timed(name, lambda given=given, tap=tap: tap.rows(losses(given, x)), 3)
    return {name: statistics.median(some) for name, some in times.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, dropinf {dropinf.__version__}, one thread, r = {R} a layer")
    for name, make in MODELS.items():
        times = measure(make)
        ratio = times["compiled rows"] / times["compiled forward + input gradient"]
        eager = times["rows"] / times["forward + input gradient"]
        shown = "; ".join(f"{k} {v:.2f} ms" for k, v in times.items())
        print(f"{name}: {shown}; ratio {ratio:.2f} compiled, {eager:.2f} uncompiled", flush=True)
