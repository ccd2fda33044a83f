"""Models whose collection takes a few hundred MB, and the peak that it takes of them.

    python estimate_cases.py NAME

prints the MB that `collect` needs for two batches beyond what the process held before.
"""

import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dropinf import Dropout, Plan, collect
from dropinf.losses import causal_lm_loss, classification_loss
from dropinf.tools.measuring import peak


class Case(NamedTuple):
    make: Callable  # -> a model in eval mode, on the device that is the default
    batch: Callable  # -> what loss_fn takes
    loss_fn: Callable


def gpt2(width=256, num_layers=4, vocabulary=4000):
    import transformers

    sizes = {"n_embd": width, "n_layer": num_layers, "n_head": 4, "vocab_size": vocabulary}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=256, **sizes, **ends))


def llama():
    """Eight heads of queries for two of keys."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=3000,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def bert():
    import transformers

    config = transformers.BertConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=3000,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def vit():
    import transformers

    config = transformers.ViTConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=96,
        patch_size=8,
        num_labels=10,
    )
    return transformers.ViTForImageClassification(config)


def cnn():
    layers = []
    for I, O, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
        layers += [nn.Conv2d(I, O, 3, stride, 1), nn.BatchNorm2d(O), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def wide_cnn():
    """Groups, kernels of other sizes, pooling."""
    return nn.Sequential(
        *(nn.Conv2d(3, 48, 5, padding=2), nn.GELU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(48, 96, 1), nn.GroupNorm(8, 96), nn.GELU()),
        *(nn.Conv2d(96, 96, 3, padding=1, groups=4), nn.GELU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(96, 192, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(192, 10)),
    )


def mlp():
    layers = []
    for _ in range(12):
        layers += [nn.Linear(512, 512), nn.LayerNorm(512), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def texts(B, T, padded=False, vocabulary=3000):
    def batch():
        ids = torch.randint(vocabulary, (B, T))
        mask = torch.ones_like(ids)
        mask[:, T - 9 :] = 0
        return {"input_ids": ids, "labels": ids, **({"attention_mask": mask} if padded else {})}

    return batch


def classified_texts(B, T):
    def batch():
        return {**texts(B, T, padded=True)(), "labels": torch.randint(3, (B,))}

    return batch


def images(B, size):
    def batch():
        return {"pixel_values": torch.randn(B, 3, size, size), "labels": torch.randint(10, (B,))}

    return batch


def numbers(*shape):
    def batch():
        return torch.randn(*shape), torch.randint(10, shape[:1])

    return batch


def pair_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


CASES = {
    "gpt2": Case(gpt2, texts(8, 256), causal_lm_loss),
    "gpt2, padded": Case(gpt2, texts(8, 256, padded=True), causal_lm_loss),
    "logits": Case(lambda: gpt2(64, 1, 9000), texts(12, 256), causal_lm_loss),
    "llama": Case(llama, texts(8, 256), causal_lm_loss),
    "bert": Case(bert, classified_texts(12, 256), classification_loss),
    "vit": Case(vit, images(32, 96), classification_loss),
    "cnn": Case(cnn, numbers(64, 3, 64, 64), pair_loss),
    "wide cnn": Case(wide_cnn, numbers(48, 3, 64, 64), pair_loss),
    "mlp": Case(mlp, numbers(4096, 512), pair_loss),
    "weights": Case(lambda: nn.Linear(8000, 8000), numbers(8, 8000), pair_loss),
}


def case_of(name, device):
    torch.manual_seed(0)
    make, batch, loss_fn = CASES[name]
    with torch.device(device):
        model = make().eval()
    return model, Plan.make(model, Dropout(r=64)), loss_fn, batch


def measured(name):
    model, plan, loss_fn, batch = case_of(name, "cpu")

    warnings.filterwarnings("ignore", "collect: generator does not say")

    def call():
        collect(model, (batch() for _ in range(2)), loss_fn, plan, progress=False)

    return peak(call, torch.device("cpu"))


if __name__ == "__main__":
    print(measured(sys.argv[1]))
