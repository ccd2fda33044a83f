"""A whole model: what capturing rows costs in time and memory beside the passes it rides on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

import dropinf

WIDTH, HEADS, LAYERS, VOCABULARY, T, B, R = 768, 12, 6, 1000, 128, 8, 1024


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Takes embedded tokens [B, T, width], so that a gradient of the input is one of the layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x):
        return self.head(self.norm(self.layers(x)))


def loss_fn(model, batch):
    x, label = batch
    return F.cross_entropy(model(x).mT, label, reduction="none").sum(1)


def passes() -> dict:
    """Name -> a call without arguments that makes one step over the batch."""
    torch.manual_seed(0)
    model = Model()
    x, label = torch.randn(B, T, WIDTH), torch.randint(VOCABULARY, (B, T))
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=R))
    parameters = dict(model.named_parameters())

    def forward():
        with torch.no_grad():
            return loss_fn(model, (x, label))

    def input_gradient(frozen):
        """Backward to the input alone; frozen parameters let autograd save no layer inputs."""
        model.requires_grad_(not frozen)
        leaf = x.detach().requires_grad_()
        result = torch.autograd.grad(loss_fn(model, (leaf, label)).sum(), leaf)
        model.requires_grad_(True)
        return result

    def ordinary():
        loss_fn(model, (x, label)).sum().backward()
        model.zero_grad(set_to_none=True)

    tap = dropinf.capture(model, plan)

    def capture():
        with tap:
            return tap.rows(loss_fn(model, (x, label)))

    def pick(gradients):  # [B, ...] for each parameter -> rows
        parts = [gradients[s.name].flatten(1)[:, s.index] * s.scale for s in plan.slots]
        return torch.cat(parts, 1)

    def one_loss(parameters, x, label):
        logits = functional_call(model, parameters, (x[None],))
        return F.cross_entropy(logits.mT, label[None], reduction="none").sum()

    def vmap_index():
        detached = {name: p.detach() for name, p in parameters.items()}
        return pick(vmap(grad(one_loss), (None, 0, 0))(detached, x, label))

    def batch_1_loop():
        rows = []
        for b in range(B):
            loss = loss_fn(model, (x[b : b + 1], label[b : b + 1])).sum()
            grads = torch.autograd.grad(loss, list(parameters.values()))
            rows.append(pick({n: g[None] for n, g in zip(parameters, grads, strict=True)}))
        return torch.cat(rows)

    return {
        "dropinf capture": capture,
        "forward": forward,
        "forward + input gradient": lambda: input_gradient(frozen=True),
        "forward + input gradient, inputs saved": lambda: input_gradient(frozen=False),
        "forward + backward": ordinary,
        "vmap(grad) + index": vmap_index,
        "batch-1 loop + index": batch_1_loop,
    }


# Contestant -> smallest and largest allowed of its time over ours.
TO_REACH = {
    "forward + input gradient": (1 / 1.05, None),
    "forward + backward": (1 / 0.85, None),
    "vmap(grad) + index": (2, None),
    "batch-1 loop + index": (1, None),
}


def bench_whole_model(timed):
    contestants = passes()
    rows = contestants["dropinf capture"]()
    for peer in ("vmap(grad) + index", "batch-1 loop + index"):
        assert (contestants[peer]() - rows).norm() <= 1e-4 * rows.norm()
    timed(contestants, "dropinf capture", TO_REACH, rounds=5)


def bench_whole_model_memory(benchmark):
    """Peak resident memory of one step above what the process held before, MB (10⁶ bytes)."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    peaks = {name: peak_in_own_process(name) for name in passes()}
    rows = B * dropinf.Plan.make(Model(), dropinf.Dropout(r=R)).width * 4 / 1e6
    benchmark.extra_info.update(peaks=peaks, rows=rows)
    benchmark.pedantic(lambda: None)


def peak_in_own_process(name: str) -> float:
    # Without these, malloc keeps freed blocks, and the peak says nothing about the step.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, name]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(run.stdout)


def main(name: str) -> None:
    """Print the peak of one pass, in this process of its own."""
    call = passes()[name]
    call()  # libraries allocate their workspaces in the first step
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    call()
    print(resident("VmHWM") - before)


def resident(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(key)


if __name__ == "__main__":
    main(sys.argv[1])
