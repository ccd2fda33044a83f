"""Models with a batch and a loss: what capture must take, and the truth to compare it with.

transformers is imported where it is needed: it takes longer than a rank of a distributed test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Case(NamedTuple):
    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, ...]]  # dimension 0 is the example
    loss_fn: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]


def cross_entropy(model, batch):
    x, label = batch
    return F.cross_entropy(model(x), label, reduction="none")


def squares(model, batch):
    return model(*batch).flatten(1).pow(2).sum(1)


def tokens_cross_entropy(model, batch):
    """Next-token loss summed over the real tokens of each example; 0 is padding."""
    (ids,) = batch
    logits = model(ids)
    logits = getattr(logits, "logits", logits)
    losses = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    return (losses * (ids[:, 1:] != 0)).sum(1)


class ScaleKernel(torch.autograd.Function):
    """x [..., C] * w [C], by a kernel of one's own: capture does not see inside of it."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return dy * w, (dy * x).flatten(0, -2).sum(0)


class Flipping(torch.autograd.Function):
    """Goes through the examples in the other order, which its node does not say."""

    @staticmethod
    def forward(ctx, x):
        return x.flip(0)

    @staticmethod
    def backward(ctx, dy):
        return dy.flip(0)


class Twice(nn.Module):
    """One layer called twice, and one whose output is changed in place."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 4)

    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x, real):
        B, T, width = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        mask = (causal & real[:, None, None, :]) | torch.eye(T, dtype=torch.bool, device=x.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(B, T, width))


class Transformer(nn.Module):
    """Two layers with padding, and position ids that the batch shares ([1, T])."""

    def __init__(self, vocabulary=23, width=12, positions=10):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width, padding_idx=0)
        self.position = nn.Embedding(positions, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "attention": Attention(width, 3),
                    "norm2": nn.LayerNorm(width, bias=False),
                    "mlp": nn.Sequential(
                        nn.Linear(width, 20), nn.GELU(), nn.Dropout(0.1), nn.Linear(20, width)
                    ),
                }
            )
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids):
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device)[None])
        for layer in self.layers:
            x = x + layer["attention"](layer["norm1"](x), ids != 0)
            x = x + layer["mlp"](layer["norm2"](x))
        return self.head(self.norm(x))


class Bag(nn.Module):
    """Padding that reaches the loss, through a looked-up row that has no gradient."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(23, 6, padding_idx=-23), nn.Linear(6, 3)

    def forward(self, ids):
        return torch.tanh(self.out(self.embed(ids))).sum(1)


class ImageNorm(nn.Module):
    """Inputs of four dimensions, a norm over two of them, and partly frozen layers."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm((4, 5)), nn.Linear(5, 6), nn.Linear(6, 3)
        self.out.weight.requires_grad_(False)
        self.mix.bias.requires_grad_(False)

    def forward(self, x):
        return self.out(torch.sigmoid(self.mix(self.norm(x))))


def padded_ids():
    ids = torch.randint(1, 23, (5, 8))
    ids[1, 5:] = 0
    ids[3, 2:] = 0
    ids[4, :4] = ids[4, 4:].clone()  # a token looked up more than once
    return (ids,)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=23, n_positions=10, n_embd=12, n_layer=2, n_head=3, attn_implementation="eager"
    )
    return GPT2LMHeadModel(config).eval()


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(7, 5), nn.GELU(), Conv1D(3, 7))


CASES = [
    Case(
        "mlp",
        lambda: nn.Sequential(nn.Linear(6, 11), nn.ReLU(inplace=True), nn.Linear(11, 4)),
        lambda: (torch.randn(7, 6), torch.randint(4, (7,))),
        cross_entropy,
    ),
    Case(
        "mlp, one layer called twice",
        Twice,
        lambda: (torch.randn(7, 6), torch.randint(4, (7,))),
        cross_entropy,
    ),
    Case("transformer", lambda: Transformer().eval(), padded_ids, tokens_cross_entropy),
    Case("Conv1D", conv1d, lambda: (torch.randn(4, 6, 5),), squares),
    Case("embedding with padding", Bag, padded_ids, squares),
    Case("GPT-2, tied", gpt2, padded_ids, tokens_cross_entropy),
    Case("[B, H, W, I], partly frozen", ImageNorm, lambda: (torch.randn(3, 2, 4, 5),), squares),
    Case(
        "flattened to [B * T, I]",
        lambda: nn.Sequential(
            nn.Flatten(0, 1), nn.Linear(5, 4), nn.LayerNorm(4), nn.Unflatten(0, (-1, 6))
        ),
        lambda: (torch.randn(4, 6, 5),),
        squares,
    ),
]


def build(case: Case, dtype: torch.dtype, seed: int = 0):
    """The case's model and batch in `dtype`."""
    torch.manual_seed(seed)
    model = case.model().to(dtype)
    for p in model.parameters():  # so that no gradient is zero by construction
        p.data += 0.1 * torch.randn_like(p)
    batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in case.batch())
    return model, batch


def example(batch, b):
    """Example b of a batch, or several by a slice, as a batch."""
    part = b if isinstance(b, slice) else slice(b, b + 1)
    return tuple(t[part] for t in batch)


def true_rows(case: Case, model, batch, plan) -> Tensor:
    """Each example alone through ordinary autograd, then the plan's coordinates and scale."""
    named = dict(model.named_parameters())
    rows = []
    for b in range(len(batch[0])):
        loss = case.loss_fn(model, example(batch, b)).sum()
        # A parameter may have no part in one example's loss: an expert that no token went to.
        parameters = [named[slot.name] for slot in plan.slots]
        grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
        parts = []
        for block in plan.blocks:
            scale = (block.P / block.r) ** 0.5
            names = [slot.name for slot in block.slots]
            for slot, grad in zip(plan.slots, grads, strict=True):
                if slot.name in names:
                    parts.append(grad.flatten()[slot.index] * scale)
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def assert_exact(rows, truth, size=1e-13):
    """Equal to float64's rounding, and the truth is not a row of zeros."""
    assert rows.dtype == torch.float64
    assert truth.abs().amax(0).gt(0).float().mean() > 0.5
    torch.testing.assert_close(rows, truth, rtol=0, atol=size * truth.abs().max().item())
