"""The quickstart on real data: find the wrong labels in a set of handwritten digits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

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
SHOWN_TOTAL = 1024  # of these, whose most suspicious are drawn
SHOWN = 24


class Digits(NamedTuple):
    """1,200 training digits of 8 x 8 pixels, some with wrong labels, and 200 clean queries."""

    train: TensorDataset
    queries: TensorDataset
    true_labels: Tensor
    flipped: Tensor  # [n] bool


class Scored(NamedTuple):
    """What one method found."""

    on_queries: Tensor  # [m, n]
    on_itself: Tensor  # [n]
    seconds: float
    num_bytes: int  # of the stored training rows


def main(picture: Path, page: Path) -> dict[str, Any]:
    """Train, score with every method, print the table, draw the most suspicious; write a report.

    Returns:
        The table, what was suggested, and where picture and report are.
    """
    digits = load_digits()
    model = train_classifier(digits.train)
    num_parameters = sum(p.numel() for p in model.parameters())
    num_train, num_flipped = len(digits.flipped), int(digits.flipped.sum())
    print(
        f"{num_train} handwritten digits, {num_flipped} of them with a wrong label; "
        f"{len(digits.queries)} clean queries; a network of {num_parameters:,} parameters.\n"
        "How well two numbers find the wrong labels (AUC): an example's influence on itself, large "
        "where\nno other explains it; and its mean influence on the queries, low where it harms "
        "them.\n"
    )
    print(f"{'method':32}{'itself':>8}{'queries':>9}{'seconds':>9}{'bytes stored':>14}")
    methods: list[tuple[str, Compression, solvers.Solver]] = [
        (f"Dropout, r = {total} in all", dropinf.Dropout(total=total), solvers.Cholesky())
        for total in BUDGETS
    ]
    methods += [
        ("Full (every coordinate)", dropinf.Full(), solvers.Cholesky()),
        ("gradient dot product, no inverse", dropinf.Full(), solvers.Identity()),
    ]
    table, found = [], {}
    for method, compression, solver in methods:
        found[method] = score(model, digits, compression, solver)
        table.append(figures(method, digits, found[method]))
        print(line(table[-1]))
    of_loss = auc(digits, losses_of(model, digits.train))
    print(f"{'loss value':32}{of_loss:8.3f}")
    print(
        "\nOn so simple a set the loss finds wrong labels as well as self-influence does; "
        "influence on queries\nalso tells whom each one harms."
    )
    on_queries, on_itself, *_ = found[f"Dropout, r = {SHOWN_TOTAL} in all"]
    draw(model, digits, on_itself, picture)
    suggested = compare_suggestions(model, digits, on_queries)
    show(model, digits, page)
    return {
        "methods": table,
        "AUC of the loss": of_loss,
        "right suggestions": suggested,
        "picture": str(picture.resolve()),
        "report": str(page.resolve()),
    }


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
    solver: solvers.Solver,
) -> Scored:
    """Collect, fit and score."""
    start = time.perf_counter()
    plan = dropinf.Plan.make(model, compression)
    store, queries = (
        dropinf.collect(model, DataLoader(data, batch_size=128), loss_fn, plan, progress=False)
        for data in (digits.train, digits.queries)
    )
    solver.fit(store)
    on_queries = dropinf.scores(queries, store, solver)
    on_itself = dropinf.self_influence(store, solver)
    return Scored(on_queries, on_itself, time.perf_counter() - start, store.num_bytes)


def auc(digits: Digits, suspicion: Tensor) -> float:
    """How well large values [n] find the wrong labels."""
    from sklearn.metrics import roc_auc_score

    return roc_auc_score(digits.flipped, suspicion)


def figures(method: str, digits: Digits, found: Scored) -> dict[str, Any]:
    """What the table says of one method."""
    return {
        "method": method,
        "itself": auc(digits, found.on_itself),
        "queries": auc(digits, -found.on_queries.mean(0)),
        "seconds": found.seconds,
        "bytes": found.num_bytes,
    }


def line(of: dict[str, Any]) -> str:
    """One of the table."""
    return (
        f"{of['method']:32}{of['itself']:8.3f}{of['queries']:9.3f}{of['seconds']:9.2f}"
        f"{of['bytes']:14,}"
    )


def second_thoughts(model: nn.Module, digits: Digits) -> Tensor:
    """[n] the label that the model takes for the likeliest beside the given one."""
    images, given = digits.train.tensors
    with torch.no_grad():
        return model(images).scatter(1, given[:, None], -torch.inf).argmax(1)


def most_harmed(digits: Digits, on_queries: Tensor) -> Tensor:
    """[n] the label, beside the given one, whose queries the example harms most."""
    labels = digits.queries.tensors[1]
    by_label = torch.stack([on_queries[labels == digit].mean(0) for digit in range(10)])
    return by_label.scatter(0, digits.train.tensors[1][None], torch.inf).argmin(0)


def draw(model: nn.Module, digits: Digits, suspicion: Tensor, picture: Path) -> None:
    """Write the most suspicious digits, with the labels given and the model's second thoughts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    images, given = digits.train.tensors
    suggested = second_thoughts(model, digits)
    worst = suspicion.argsort(descending=True)[:SHOWN]

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
        f"\nOf the {SHOWN} with the largest influence on themselves (Dropout, r = {SHOWN_TOTAL}), "
        f"{wrong} have a wrong label,\nand {right} suggestions are the true one. "
        f"Their picture: {picture.resolve()}"
    )


def compare_suggestions(model: nn.Module, digits: Digits, on_queries: Tensor) -> dict[str, float]:
    """Print and return how often each way to correct a wrong label is right."""
    wrong, truth = digits.flipped, digits.true_labels
    ways = {
        "the label that the model takes for the likeliest beside it": second_thoughts(
            model, digits
        ),
        "the label whose queries the example harms most": most_harmed(digits, on_queries),
    }
    print(f"\nOf all {int(wrong.sum())} wrong labels, the true one is")
    shares = {way: float((of == truth)[wrong].double().mean()) for way, of in ways.items()}
    for way, share in shares.items():
        print(f"  {way:60}{share:7.1%}")
    return shares


def show(model: nn.Module, digits: Digits, page: Path) -> None:
    """Write the report of one of the runs above."""
    plan = dropinf.Plan.make(model, dropinf.Dropout(total=SHOWN_TOTAL))
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
