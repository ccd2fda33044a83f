"""A step waits for nothing, so that it can be recorded in a CUDA graph.

On the meta device nothing can be read, and all that is made of data on the host is seen.
"""

import pytest
import torch
import torch.nn.functional as F
from cases import Case, build, squares, tokens_cross_entropy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dropinf import Dropout, Full, Plan, Sketch, capture, collect
from dropinf.capturing import ActivationsTap

# What reads numbers of a tensor, or has a result whose shape depends on them.
READS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "bincount",
    "repeat_interleave",
}


class Waits(TorchDispatchMode):
    """What a device would be waited for, or given from the host."""

    def __init__(self, device):
        super().__init__()
        self.device, self.found = torch.device(device), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = {t.device for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        if name in READS or len(given | made) > 1 or (made and made != {self.device}):
            self.found.append(name)
        return result


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)
        )

    def forward(self, x):
        return self.layers(x).mean((2, 3))


class Language(nn.Module):
    """Embeddings, attention, norms, a head that is tied."""

    def __init__(self):
        super().__init__()
        self.token, self.qkv = nn.Embedding(11, 8, padding_idx=0), nn.Linear(8, 24)
        self.norm, self.scale = nn.LayerNorm(8), nn.RMSNorm(8)

    def forward(self, ids):
        x = self.token(ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = self.scale(x + F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return F.linear(x, self.token.weight)


def mlp():
    return nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 3))


MODELS = [
    Case("perceptron", mlp, lambda: (torch.randn(3, 6),), squares),
    Case("language", Language, lambda: (torch.randint(11, (3, 5)),), tokens_cross_entropy),
    Case("images", lambda: Convolutions().eval(), lambda: (torch.randn(3, 3, 6, 6),), squares),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "compression", [Dropout(r=13), Sketch(r=7, s=3), Full()], ids=["Dropout", "Sketch", "Full"]
)
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_a_step_waits_for_nothing(case, compression, device):
    model, batch = build(case, torch.float32)
    model, batch = model.to(device), tuple(t.to(device) for t in batch)
    plan = Plan.make(model, compression)
    with capture(model, plan) as tap:
        tap.rows(case.loss_fn(model, batch))  # which makes what is kept
        with Waits(device) as waits:
            losses = case.loss_fn(model, batch)
            rows = tap.rows(losses)
    assert rows.shape == (len(batch[0]), plan.width) and rows.device.type == device
    assert not waits.found
    assert set(plan.paths.values()) == {"closed form"}


def test_waiting_is_seen():
    with Waits("meta") as waits:
        torch.ones(3, device="meta") + torch.ones(3).to("meta")
        bool(torch.ones(3).sum() > 1)
    assert {"ones", "_to_copy", "_local_scalar_dense"} <= set(waits.found)


def test_collect_reads_its_flags_behind_the_backward_pass(monkeypatch):
    model, rows_of, between = mlp(), ActivationsTap.rows, []
    plan = Plan.make(model, Dropout(r=13))
    batches = [(torch.randn(3, 6),) for _ in range(3)]
    with Waits("cpu") as waits:

        def loss_fn(model, batch):
            losses = squares(model, batch)
            waits.found.clear()
            return losses

        def rows(tap, losses, **options):
            found = rows_of(tap, losses, **options)
            between.append(list(waits.found))
            return found

        monkeypatch.setattr(ActivationsTap, "rows", rows)
        collect(model, batches, loss_fn, plan, check=False, progress=False)
    assert between[1:] == [[], []]  # the first makes what is kept
    assert "_local_scalar_dense" in waits.found
