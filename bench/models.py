"""Models that people know, for bench_collect: real widths, random weights, small batches.

Each splits in two: `embed`, to where the input gradient is taken, and `body`, from there to the
logits. They keep to layers, without bare parameters: ViT's class token is a mean over patches here.
`earliest` is a small parameter before or in the first linear layer, whose gradient passes them all.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One loss per example, [B]."""
    x, label = batch
    return losses(model(x), label)


def losses(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy of logits [B, ..., classes], summed over what an example has several of."""
    each = F.cross_entropy(logits.flatten(0, -2), label.flatten(), reduction="none")
    return each.view(len(label), -1).sum(1)


class Block(nn.Module):
    """A layer of a transformer, normalised first, as in GPT-2 and ViT."""

    def __init__(self, width: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class NextToken(nn.Module):
    """A small transformer of four heads: tokens [B, T] -> logits of the next [B, T, vocabulary]."""

    def __init__(self, vocabulary: int, T: int, width: int = 32, num_layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(T, width)
        self.blocks = nn.Sequential(*(Block(width, 4, causal=True) for _ in range(num_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        self.register_buffer("at", torch.arange(T)[None], persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(self.at)
        return self.head(self.norm(self.blocks(x)))


class GPT2(nn.Module):
    """GPT-2 small: ids [B, T] -> logits [B, T, 50257], the head tied to the token embedding."""

    def __init__(self, num_layers: int, T: int) -> None:
        super().__init__()
        width, vocabulary = 768, 50257
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(T, width)
        self.blocks = nn.Sequential(*(Block(width, 12, causal=True) for _ in range(num_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("at", torch.arange(T)[None], persistent=False)
        small_weights(self)
        self.earliest = self.positions.weight

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions(self.at)

    def body(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.embed(ids))


class ViT(nn.Module):
    """ViT-B/16: images [B, 3, 224, 224] in 196 patches -> logits [B, 1, 1000]."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        width, self.side = 768, 16
        self.patches, self.positions = nn.Linear(3 * 16 * 16, width), nn.Embedding(196, width)
        self.blocks = nn.Sequential(*(Block(width, 12, causal=False) for _ in range(num_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)
        self.register_buffer("at", torch.arange(196)[None], persistent=False)
        small_weights(self)
        self.earliest = self.patches.bias

    def embed(self, images: Tensor) -> Tensor:
        rows = images.unflatten(3, (-1, self.side)).unflatten(2, (-1, self.side))
        patches = rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, 196, 768]
        return self.patches(patches) + self.positions(self.at)

    def body(self, x: Tensor) -> Tensor:
        # The mean keeps its dimension, since Bergson takes inputs of three dimensions only.
        return self.head(self.norm(self.blocks(x)).mean(1, keepdim=True))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.embed(images))


class Residual(nn.Module):
    """A basic block of ResNet-18: two convolutions of 3 x 3, each normalised."""

    def __init__(self, I: int, O: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(I, O, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(O, O, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(O), nn.BatchNorm2d(O)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.extend([nn.Conv2d(I, O, 1, stride, bias=False), nn.BatchNorm2d(O)])

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18, its BatchNorm in eval mode: images [B, 3, H, W] -> logits [B, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(64)
        stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        self.blocks = nn.Sequential()
        for I, O, stride in stages:
            self.blocks.extend([Residual(I, O, stride), Residual(O, O, 1)])
        self.head = nn.Linear(512, 1000)
        self.eval()

    def embed(self, images: Tensor) -> Tensor:
        return images

    def body(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(images))), 3, stride=2, padding=1)
        return self.head(self.blocks(x).mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def small_weights(model: nn.Module) -> None:
    """As GPT-2 and ViT begin; torch's embeddings of variance 1 would saturate the softmax."""
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02)


def gpt2(B: int, T: int, num_layers: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return GPT2(num_layers, T), tuple(torch.randint(50257, (2, B, T)))


def vit(B: int, num_layers: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return ViT(num_layers), (torch.randn(B, 3, 224, 224), torch.randint(1000, (B, 1)))


def resnet18(B: int, side: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return ResNet18(), (torch.randn(B, 3, side, side), torch.randint(1000, (B,)))


# Title -> a call that makes the model and a batch. Fewer layers than the real ones, so that a round
# of all contestants takes some seconds on two cores.
MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, Tensor]]]] = {
    "GPT-2 small, 4 of its 12 layers, T=128, B=4": lambda: gpt2(B=4, T=128, num_layers=4),
    "ViT-B/16, 4 of its 12 layers, 224 x 224, B=4": lambda: vit(B=4, num_layers=4),
    "ResNet-18, BatchNorm in eval mode, 224 x 224, B=4": lambda: resnet18(B=4, side=224),
}
