"""Models of next to no arithmetic, for bench_host: what is left is what a pass costs the host."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from embed_case import need
from models import losses
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
PLAIN, FLOOR = "forward + backward", "forward + input gradient"
OPEN, OPENED = "dropinf rows, in an open capture", "dropinf capture, opened each time"
OF_PLAIN, OF_FLOOR = f"of {PLAIN}", f"of {FLOOR}"
A_LAYER = "µs a layer over the input gradient's"


class Given(NamedTuple):
    """A model that is there, and a batch for it."""

    model: nn.Module
    batch: Batch

    def copied(self) -> "Given":
        return Given(copy.deepcopy(self.model), self.batch)

    @property
    def leaf(self) -> Tensor:
        """Where the input gradient is taken: the input, or the embeddings of tokens."""
        x = self.batch[0]
        return x if x.is_floating_point() else self.model.get_input_embeddings()(x)

    def linear(self) -> list[str]:
        """The names of the layers x -> x Wᵀ + b that are trained."""
        return [
            name
            for name, module in self.model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and module.weight.requires_grad
        ]


def image_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B]; of logits [B, classes], or [B, 1, classes] where a tool takes three dimensions only."""
    return losses(model(batch[0]), batch[1])


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B] of the next tokens; of ids, or of their embeddings."""
    x, ids = batch
    found = model(inputs_embeds=x) if x.is_floating_point() else model(input_ids=x)
    return losses(found.logits[:, :-1], ids[:, 1:])


class HostCase(NamedTuple):
    """A model, its loss, and what must hold: contestant -> (measure, at most)."""

    make: Callable[[], Given]
    loss_fn: Callable[[nn.Module, Batch], Tensor]
    bars: dict[str, tuple[str, float]] | None = None


def narrow(num_blocks: int, B: int = 16) -> Given:
    model = nn.Sequential()
    for _ in range(num_blocks):
        model.extend([nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU()])
    return given(model.append(nn.Linear(64, 10)), torch.randn(B, 64))


def mlp(B: int, width: int) -> Given:
    """Three layers."""
    hidden = nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    return given(nn.Sequential(*hidden, nn.Linear(width, 10)), torch.randn(B, 784))


def cnn(B: int = 16) -> Given:
    """Three convolutions and a head, of images of 16 x 16."""
    layers = [m for I, O in ((3, 16), (16, 32), (32, 32)) for m in (convolution(I, O), nn.ReLU())]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    return given(nn.Sequential(*layers, *head), torch.randn(B, 3, 16, 16))


def convolution(I: int, O: int) -> nn.Module:
    return nn.Conv2d(I, O, 3, stride=2, padding=1)


def given(model: nn.Module, x: Tensor) -> Given:
    return Given(model, (x, torch.randint(10, (len(x),))))


def gpt2(num_layers: int) -> Given:
    """GPT-2 of transformers, of width 64; 4 texts of 16 tokens."""
    need("transformers")
    import transformers

    sizes = {"n_embd": 64, "n_layer": num_layers, "n_head": 2, "vocab_size": 100, "n_positions": 32}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    ids = torch.randint(100, (4, 16))
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **rates, **ends))
    return Given(model, (ids, ids))


def lora(num_layers: int) -> Given:
    need("peft")
    import peft

    model, batch = gpt2(num_layers)
    config = peft.LoraConfig(
        r=8,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        init_lora_weights=False,
    )  # not zeros, of which half of the gradients would be zero
    return Given(peft.get_peft_model(model, config), batch)


def cases(quick: bool) -> dict[str, HostCase]:
    """Title -> case; tiny ones if `quick`."""
    blocks, width, layers = (2, 16, 1) if quick else (30, 256, 12)
    most = {OPENED: (OF_PLAIN, 1.5)}
    return {
        f"MLP of width 64, {2 * blocks + 1} layers, B=16": HostCase(
            lambda: narrow(blocks), image_loss, {OPEN: (A_LAYER, 40)}
        ),
        **{
            f"MLP of width {width}, 3 layers, B={B}": HostCase(
                lambda B=B: mlp(B, width), image_loss
            )
            for B in ((1, 16) if quick else (1, 16, 128, 1024))
        },
        "CNN, 3 convolutions and a head, B=16": HostCase(cnn, image_loss),
        f"GPT-2 of width 64, {layers} layers, B=4, T=16": HostCase(
            lambda: gpt2(layers), text_loss, most
        ),
        f"LoRA on a GPT-2 of width 64, {layers} layers, B=4, T=16": HostCase(
            lambda: lora(layers), text_loss, most
        ),
    }
