"""The quickstart on real data: find the wrong labels in a set of handwritten digits."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dropinf
from dropinf import solvers
from dropinf.compression import Compression

FLIPPED = 0.2  # share of the training labels that are made wrong
BUDGETS = (64, 256, 1024, 4096)  # coordinates kept of the whole gradient
SHOWN = 24


class Digits(NamedTuple):
    """1,200 training digits of 8 x 8 pixels, some with wrong labels, and 200 clean queries."""

    train: TensorDataset
    queries: TensorDataset
    true_labels: Tensor
    flipped: Tensor  # [n] bool


def main(picture: Path, page: Path) -> None:
    """Train, score with every method, print the table, draw the most suspicious; write a report."""
    digits = load_digits()
    model = train_classifier(digits.train)
    num_parameters = sum(p.numel() for p in model.parameters())
    num_train, num_flipped = len(digits.flipped), int(digits.flipped.sum())
    print(
        f"{num_train} handwritten digits, {num_flipped} of them with a wrong label; "
        f"{len(digits.queries)} clean queries; a network of {num_parameters:,} parameters.\n"
        "A wrong label hurts the queries: the lower its mean influence, the more suspicious.\n"
    )
    print(f"{'method':32}{'AUC':>7}{'seconds':>10}{'bytes stored':>15}")
    suspects = {}
    for total in BUDGETS:
        method = f"Dropout, r = {total} in all"
        compression = dropinf.Dropout(total=total)
        suspects[total] = report(method, digits, lambda c=compression: score(model, digits, c))
    report("Full (every coordinate)", digits, lambda: score(model, digits, dropinf.Full()))
    report(
        "gradient dot product, no inverse",
        digits,
        lambda: score(model, digits, dropinf.Full(), solvers.Identity()),
    )
    report("loss value", digits, lambda: (-losses_of(model, digits.train)[None], 0))
    print(
        "\nOn so simple a set the loss alone finds wrong labels best; influence also tells whom "
        "each one hurts,\nand so what its label should be."
    )
    draw(digits, suspects[1024], picture)
    show(model, digits, page)


def load_digits() -> Digits:
    """scikit-learn's digits, which ship inside the package."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    images, labels = images[order].astype(np.float32) / 16, labels[order]
    n, m = 1200, 200
    flipped = np.zeros(n, dtype=bool)
    flipped[rng.choice(n, int(FLIPPED * n), replace=False)] = True
    given = np.where(flipped, (labels[:n] + rng.integers(1, 10, n)) % 10, labels[:n])
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    return Digits(
        TensorDataset(x[:n], torch.from_numpy(given)),
        TensorDataset(x[n : n + m], y[n : n + m]),
        y[:n],
        torch.from_numpy(flipped),
    )


def train_classifier(data: TensorDataset) -> nn.Module:
    """An MLP, trained on the labels as they are given."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(20):
        for batch in DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss_fn(model, batch).mean().backward()
            optimizer.step()
    return model


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One loss per example, [B]: what dropinf asks of its user."""
    x, label = batch
    return F.cross_entropy(model(x), label, reduction="none")


def losses_of(model: nn.Module, data: TensorDataset) -> Tensor:
    with torch.no_grad():
        return loss_fn(model, data.tensors)


def score(
    model: nn.Module,
    digits: Digits,
    compression: Compression,
    solver: solvers.Cholesky | solvers.Identity | None = None,
) -> tuple[Tensor, int]:
    """Scores [m, n] of the queries, and the bytes of the stored training rows."""
    plan = dropinf.Plan.make(model, compression)
    store, queries = (
        dropinf.collect(model, DataLoader(data, batch_size=128), loss_fn, plan, progress=False)
        for data in (digits.train, digits.queries)
    )
    solver = (solver or solvers.Cholesky(damping=0.1)).fit(store)
    return dropinf.scores(queries, store, solver), store.num_bytes


def report(method: str, digits: Digits, run: Callable[[], tuple[Tensor, int]]) -> Tensor:
    """Print one line of the table; return the scores [m, n]."""
    from sklearn.metrics import roc_auc_score

    start = time.perf_counter()
    scores, num_bytes = run()
    seconds = time.perf_counter() - start
    auc = roc_auc_score(digits.flipped, -scores.mean(0))
    print(f"{method:32}{auc:7.3f}{seconds:10.2f}{num_bytes:15,}")
    return scores


def draw(digits: Digits, scores: Tensor, picture: Path) -> None:
    """Write the most suspicious digits with their given and suggested labels.

    The suggestion is the digit whose queries the example hurts most.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    images, given = digits.train.tensors
    query_labels = digits.queries.tensors[1]
    by_label = torch.stack([scores[query_labels == digit].mean(0) for digit in range(10)])
    by_label.scatter_(0, given[None], torch.inf)  # anything but the given label
    suggested = by_label.argmin(0)
    worst = scores.mean(0).argsort()[:SHOWN]

    figure, axes = plt.subplots(3, 8, figsize=(12, 5.6), layout="constrained")
    for axis, i in zip(axes.flat, worst.tolist(), strict=True):
        axis.imshow(images[i].reshape(8, 8).numpy(), cmap="gray_r")
        color = "tab:green" if suggested[i] == digits.true_labels[i] else "tab:red"
        axis.set_title(f"given {given[i]}, suggested {suggested[i]}", color=color, fontsize=9)
        axis.set_axis_off()
    figure.suptitle(
        f"The {SHOWN} most suspicious of {len(given)} labels "
        "(green: the suggestion is the true label)"
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    wrong = int(digits.flipped[worst].sum())
    right = int((suggested == digits.true_labels)[worst].sum())
    print(
        f"\nOf the {SHOWN} most suspicious (Dropout, r = 1024), {wrong} have a wrong label, and "
        f"{right} suggestions are the true one.\nTheir picture: {picture.resolve()}"
    )


def show(model: nn.Module, digits: Digits, page: Path) -> None:
    """Write the report of one of the runs above."""
    plan = dropinf.Plan.make(model, dropinf.Dropout(total=1024))
    store, queries = (
        dropinf.collect(model, DataLoader(data, batch_size=128), loss_fn, plan, progress=False)
        for data in (digits.train, digits.queries)
    )
    solver = solvers.Cholesky(damping=0.1).fit(store)
    layers = dropinf.scores(queries, store, solver, by="layer")
    given, asked = (data.tensors for data in (digits.train, digits.queries))
    dropinf.write_report(
        page,
        dropinf.attribute(queries, store, solver, k=5),
        texts=[f"labelled {label}" for label in given[1].tolist()],
        query_texts=[f"a {label}" for label in asked[1].tolist()],
        images=1 - given[0].reshape(-1, 8, 8),
        query_images=1 - asked[0].reshape(-1, 8, 8),
        self_influence=dropinf.self_influence(store, solver),
        scores=layers.sum(0),
        layers=dict(zip((block.name for block in plan.blocks), layers, strict=True)),
        truth=digits.flipped,
        title="Wrong labels in handwritten digits",
    )
    print(f"What helps and harms each query, and every suspicious label: {page.resolve()}")
