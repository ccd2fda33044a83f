"""The tasks of quality.py: real data with some examples spoiled, a model, and how it is trained."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parent.parent))

import models
import quality_minilm
from models import NextToken

from dropinf.tools import demo

T = 64  # characters that a window asks for
VOCABULARY = 96  # printable ASCII, and one for everything else


@dataclass(frozen=True)
class Task:
    """What to train, what to spoil, and whom to ask.

    Attributes:
        train: (x, label) of n examples.
        queries: of m clean ones.
        spoiled: [n] bool, which training examples have a wrong label or garbled characters.
        make: a model before its training.
        halves: how many are retrained for LDS.
        rounds: in which the time is taken.
        losses: (output, label) -> [B].
        seed: of the first weights and the order of the examples.
    """

    name: str
    about: str
    train: TensorDataset
    queries: TensorDataset
    spoiled: Tensor
    make: Callable[[], nn.Module]
    epochs: int
    batch_size: int
    lr: float
    halves: int = 100
    rounds: int = 5
    losses: Callable[[Tensor, Tensor], Tensor] = models.losses
    seed: int = 0

    def description(self) -> dict[str, Any]:
        """What results of it depend on."""
        return {
            "about": self.about,
            "n": len(self.train),
            "spoiled": int(self.spoiled.sum()),
            "m": len(self.queries),
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "halves": self.halves,
            "rounds": self.rounds,
        }

    def loss_fn(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One loss per example, [B]."""
        x, label = batch
        return self.losses(model(x), label)

    def half(self, number: int) -> Tensor:
        """[n / 2] int64: the training examples of a random half."""
        n = len(self.train)
        return torch.randperm(n, generator=torch.Generator().manual_seed(1 + number))[: n // 2]

    def trained(self, half: int | None = None) -> nn.Module:
        """The model of all examples, or of one half; all begin with the same weights.

        What the choice of a half does is then not buried in what the choice of weights does.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = self.make()
        kept = torch.arange(len(self.train)) if half is None else self.half(half)
        order = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.01)
        for _ in range(self.epochs):
            shuffled = kept[torch.randperm(len(kept), generator=order)]
            for indices in shuffled.split(self.batch_size):
                optimizer.zero_grad()
                self.loss_fn(model, self.train[indices]).mean().backward()
                optimizer.step()
        return model.eval()

    def query_losses(self, model: nn.Module) -> Tensor:
        """[m] float32."""
        with torch.no_grad():
            return self.loss_fn(model, self.queries.tensors)

    def tiny(self, n: int = 60, m: int = 8) -> "Task":
        """For --quick: the first n training examples and m queries alone."""
        return replace(
            self,
            train=TensorDataset(*self.train[:n]),
            queries=TensorDataset(*self.queries[:m]),
            spoiled=self.spoiled[:n],
            epochs=3,
            halves=6,
            rounds=1,
        )


def loader(data: TensorDataset) -> DataLoader:
    return DataLoader(data, batch_size=200)


def small_tasks() -> list[Task]:
    """Those that take no package beyond the demo's."""
    digits = demo.load_digits()
    of_digits = digits.train, TensorDataset(*digits.queries[:100]), digits.flipped
    windows, questions, garbled = text_windows(n=800, m=100)
    return [
        Task(
            "digits-mlp",
            "scikit-learn's digits, a fifth of the labels wrong; an MLP 64-128-64-10",
            *of_digits,
            make=mlp,
            epochs=20,
            batch_size=64,
            lr=1e-3,
        ),
        Task(
            "digits-cnn",
            "scikit-learn's digits, a fifth of the labels wrong; three convolutions and two linear "
            "layers",
            *of_digits,
            make=cnn,
            epochs=20,
            batch_size=64,
            lr=1e-3,
        ),
        Task(
            "chars",
            f"Python's documentation (pydoc_data) in windows of {T} characters, a fifth with half "
            "of their characters replaced; a transformer of 2 layers and width 32 that predicts "
            "the next one",
            windows,
            questions,
            garbled,
            make=lambda: NextToken(VOCABULARY, T),
            epochs=20,
            batch_size=32,
            lr=3e-3,
        ),
        Task(
            "diabetes",
            "scikit-learn's diabetes, a regression: ten measurements and the progression a year "
            "later, a fifth of the targets exchanged among each other; an MLP 10-96-96-1, squared "
            "loss",
            *patients(n=342),
            make=regressor,
            epochs=20,
            batch_size=32,
            lr=1e-3,
            losses=squared_losses,
        ),
    ]


def make_tasks() -> list[Task]:
    """All of them, or without the one whose packages are missing."""
    tasks = small_tasks()
    missing = quality_minilm.missing_packages()
    if missing:
        print(f"minilm-lora is left out: no {', '.join(missing)}; see docs/developing/measuring.md")
        return tasks
    # A half takes as long as some tens of the others'.
    return [
        *tasks,
        Task(
            "minilm-lora",
            "opening lines of chatterbot-corpus in English, whose category is to be told (ai, "
            "emotion, psychology, trivia, coding), a fifth of the labels wrong; all-MiniLM-L6-v2 "
            "(6 layers of width 384) with LoRA of rank 4 on queries and values, the mean of its "
            "outputs and a linear head; LoRA and head alone are trained and tracked",
            *quality_minilm.opening_lines(n=240, m=50),
            make=quality_minilm.SentenceClassifier,
            epochs=6,
            batch_size=16,
            lr=2e-3,
            halves=25,
            rounds=1,
        ),
    ]


def text_windows(n: int, m: int) -> tuple[TensorDataset, TensorDataset, Tensor]:
    """n training windows, m queries, and which of the former are garbled.

    Disjoint windows of the longest topics, so that training windows and queries are of one text.
    """
    text = "".join(sorted(topics.values(), key=len, reverse=True))[: (n + m) * (T + 1)]
    codes = torch.tensor([ord(c) - 32 for c in text])
    codes[(codes < 0) | (codes >= VOCABULARY - 1)] = VOCABULARY - 1
    generator = torch.Generator().manual_seed(0)
    windows = codes.view(n + m, T + 1)[torch.randperm(n + m, generator=generator)]
    train, queries = windows[:n].clone(), windows[n:]
    garbled = torch.zeros(n, dtype=torch.bool)
    garbled[torch.randperm(n, generator=generator)[: int(demo.FLIPPED * n)]] = True
    # By characters of other windows, so that their frequencies give nothing away.
    others = codes[torch.randint(len(codes), train.shape, generator=generator)]
    replaced = torch.rand(train.shape, generator=generator) < 0.5
    train = torch.where(garbled[:, None] & replaced, others, train)
    return (
        TensorDataset(train[:, :-1], train[:, 1:]),
        TensorDataset(queries[:, :-1], queries[:, 1:]),
        garbled,
    )


def patients(n: int) -> tuple[TensorDataset, TensorDataset, Tensor]:
    """n training patients, the others as queries, and which of the former have another's target.

    Measurements and targets have mean 0 and variance 1 over all.
    """
    from sklearn.datasets import load_diabetes

    x, y = (torch.from_numpy(a).double() for a in load_diabetes(return_X_y=True))
    x, y = (((a - a.mean(0)) / a.std(0)).float() for a in (x, y))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order], y[order]
    given = y[:n].clone()
    exchanged = torch.randperm(n, generator=generator)[: int(demo.FLIPPED * n)]
    given[exchanged] = given[exchanged.roll(1)]  # by a random cycle, so that none keeps its own
    spoiled = torch.zeros(n, dtype=torch.bool)
    spoiled[exchanged] = True
    return TensorDataset(x[:n], given), TensorDataset(x[n:], y[n:]), spoiled


def squared_losses(output: Tensor, target: Tensor) -> Tensor:
    """Of outputs [B, 1] and targets [B]."""
    return (output[:, 0] - target) ** 2


def regressor() -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 1)
    )


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    )
