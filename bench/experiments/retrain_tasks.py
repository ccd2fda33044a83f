"""The tasks of retrain.py: real data, a model, how it is trained anew, and what it is asked."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import quality_tasks
import tokenizers

sys.path.append(str(Path(__file__).parent.parent))

import retrain_smollm
import torch
from models import NextToken
from quality_contestants import DOT
from quality_tasks import loader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from dropinf.tools.demo_text import load_texts

T, VOCABULARY, PAD = 24, 600, -100
FROM, TO = 10, 15  # tokens of a text for SmolLM2: alike, as what is padded costs as much


@dataclass(frozen=True)
class Task:
    """What to train, and which queries are asked about together.

    Attributes:
        groups: indices of queries; a group's loss is their mean.
        texts, query_texts: what BM25 reads; None if examples are no texts.
        removed: how many training examples are taken out.
        total: r over all layers of a compression.
        own: settings that it has in place of retrain.py's: seeds, random, methods.
    """

    name: str
    about: str
    train: TensorDataset
    queries: TensorDataset
    groups: Sequence[Sequence[int]]
    make: Callable[[], nn.Module]
    losses: Callable[[Tensor, Tensor], Tensor]
    epochs: int
    batch_size: int
    lr: float
    removed: Sequence[int]
    total: int
    texts: Sequence[str] | None = None
    query_texts: Sequence[str] | None = None
    own: Mapping[str, Any] = field(default_factory=dict)

    def description(self) -> dict[str, Any]:
        """What results of it depend on."""
        return {
            "about": self.about,
            "n": len(self.train),
            "m": len(self.queries),
            "groups": len(self.groups),
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "removed": list(self.removed),
            "r": self.total,
            **self.own,
        }

    def loss_fn(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One loss per example, [B]."""
        x, label = batch
        return self.losses(model(x), label)

    def trained(self, indices: Tensor, seed: int) -> nn.Module:
        """On these examples; the seed fixes its first weights and their order."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make()
        order = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.01)
        for _ in range(self.epochs):
            shuffled = indices[torch.randperm(len(indices), generator=order)]
            for some in shuffled.split(self.batch_size):
                optimizer.zero_grad()
                self.loss_fn(model, self.train[some]).mean().backward()
                optimizer.step()
        return model.eval()

    def losses_of(self, indices: Tensor, seed: int) -> Tensor:
        """[groups] of a model of these examples: what `dropinf.evaluate.retrain` calls."""
        model = self.trained(indices, seed)
        with torch.no_grad():
            losses = torch.cat([self.loss_fn(model, batch) for batch in loader(self.queries)])
        return torch.stack([losses[list(group)].mean() for group in self.groups])

    def tiny(self) -> "Task":
        """For --quick: the first examples, two groups and one epoch."""
        n = 60
        return replace(
            self,
            train=TensorDataset(*self.train[:n]),
            texts=self.texts and self.texts[:n],
            groups=self.groups[:2],
            epochs=1,
            removed=[6],
            total=256,
        )


def make_tasks(quick: bool = False) -> list[Task]:
    tasks = [digits(), sentences()]
    missing = retrain_smollm.missing_packages()
    if quick:
        print("smollm2-lora is left out of --quick: to read the model takes too long")
        return [task.tiny() for task in tasks]
    if missing:
        names = ", ".join(missing)
        print(f"smollm2-lora is left out: no {names}; see docs/developing/measuring.md")
        return tasks
    return [*tasks, smollm()]


def digits() -> Task:
    """Groups are queries of their own, evenly over the test set."""
    known = next(task for task in quality_tasks.small_tasks() if task.name == "digits-cnn")
    return Task(
        "digits-cnn",
        "scikit-learn's digits, a fifth of the labels wrong; three convolutions and two linear "
        "layers, the first 600 training images; each group is one query",
        TensorDataset(*known.train[:600]),
        known.queries,
        [[query] for query in range(0, 60, 10)],
        known.make,
        known.losses,
        epochs=15,
        batch_size=64,
        lr=1e-3,
        removed=[60],
        total=1024,
    )


def sentences() -> Task:
    """A group is all queries of one topic."""
    texts = load_texts()
    generator = torch.Generator().manual_seed(0)
    kept = torch.randperm(len(texts.train), generator=generator)[:240].tolist()
    train = [texts.train[i] for i in kept]
    tokenizer = tokenizer_of(train)
    encoded = [encode(tokenizer, some) for some in (train, texts.queries)]
    topics = texts.query_topics
    return Task(
        "sentences",
        "first sentences of the standard library's docstrings, of six topics, in byte pairs; a "
        "transformer of 2 layers and width 32 that predicts the next one; a group is the held-out "
        "sentences of one topic",
        *encoded,
        groups=[(topics == topic).nonzero()[:, 0].tolist() for topic in topics.unique()],
        make=lambda: NextToken(VOCABULARY, T),
        losses=token_losses,
        epochs=6,
        batch_size=32,
        lr=4e-3,
        removed=[24],
        total=1024,
        texts=train,
        query_texts=texts.queries,
    )


def smollm() -> Task:
    """The same texts, those of about one length; a model some thousand times as large."""
    texts, tokenizer = load_texts(), retrain_smollm.tokenizer()

    def first_of_each(some: Sequence[str], topics: Tensor, each: int) -> list[int]:
        fits = torch.tensor([FROM <= len(x.ids) <= TO for x in tokenizer.encode_batch(some)])
        mine = [(fits & (topics == topic)).nonzero()[:each, 0] for topic in topics.unique()]
        return torch.cat(mine).tolist()

    kept = first_of_each(texts.train, texts.topics, 20)
    asked = first_of_each(texts.queries, texts.query_topics, 4)
    train, queries = [texts.train[i] for i in kept], [texts.queries[i] for i in asked]
    topics = texts.query_topics[asked]
    return Task(
        "smollm2-lora",
        "first sentences of the standard library's docstrings, 20 of each of six topics, of "
        f"{FROM} to {TO} tokens; SmolLM2-135M-Instruct (30 layers of width 576, read from "
        "weights in 4 bits) with LoRA of rank 4 on queries and values, which alone is trained and "
        "tracked; a group is the held-out sentences of one topic",
        encode(tokenizer, train, TO + 1),
        encode(tokenizer, queries, TO + 1),
        groups=[(topics == topic).nonzero()[:, 0].tolist() for topic in topics.unique()],
        make=retrain_smollm.SmolLM,
        losses=token_losses,
        epochs=1,
        batch_size=4,
        lr=3e-3,
        removed=[12],
        total=4096,
        texts=train,
        query_texts=queries,
        own={"seeds": 2, "random": 3, "methods": ["Dropout", DOT, "BM25"]},  # half an hour
    )


def tokenizer_of(texts: Sequence[str]) -> tokenizers.Tokenizer:
    """Byte pairs of these texts, `VOCABULARY` of them."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], T: int = T) -> TensorDataset:
    """(ids, next ids) [n, T]: a text between two ends; what is behind has no loss."""
    ids = torch.zeros(len(texts), T + 1, dtype=torch.int64)
    following = torch.full((len(texts), T), PAD)
    for number, text in enumerate(texts):
        found = torch.tensor([0, *tokenizer.encode(text).ids, 0])[: T + 1]
        ids[number, : len(found)] = found
        following[number, : len(found) - 1] = found[1:]
    return TensorDataset(ids[:, :-1], following)


def token_losses(logits: Tensor, following: Tensor) -> Tensor:
    """[B]: the mean over an example's tokens."""
    flat = logits.flatten(0, 1), following.flatten()
    each = cross_entropy(*flat, ignore_index=PAD, reduction="none").view(following.shape)
    return each.sum(1) / (following != PAD).sum(1)
