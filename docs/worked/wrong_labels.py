"""Worked job: wrong labels among images. Train, collect, look, correct, retrain, compare.

    python docs/worked/wrong_labels.py

Needs dropinf[demo]. A quarter of a minute on two cores.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dropinf

SHARE = 0.1  # of the training labels are made wrong
LOOKED_AT = 0.12  # of the examples somebody looks at, the most suspicious first


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One loss per example, [B]."""
    x, label = batch
    return nn.functional.cross_entropy(model(x), label, reduction="none")


def train(images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """A small CNN."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(30):
        for batch in DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss_fn(model, batch).mean().backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def suspicion(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """[n] self-influence of the training examples: large where no other explains an example."""
    loader = DataLoader(TensorDataset(images, labels), batch_size=256)
    energies = dropinf.energies(model, loader, loss_fn)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=512, energies=energies))
    store = dropinf.collect(model, loader, loss_fn, plan, progress=False)
    return dropinf.self_influence(store, dropinf.solvers.Cholesky(damping=0.1).fit(store))


def corrected(given: Tensor, true: Tensor, looked_at: Tensor) -> Tensor:
    """The labels after somebody has looked at some of them."""
    labels = given.clone()
    labels[looked_at] = true[looked_at]
    return labels


def main() -> None:
    """Print what was found, and what correcting it was worth."""
    images, true = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    x = torch.from_numpy(images[order].astype(np.float32) / 16).view(-1, 1, 8, 8)
    y = torch.from_numpy(true[order])
    n = 1200
    wrong = torch.zeros(n, dtype=torch.bool)
    wrong[torch.from_numpy(rng.choice(n, int(SHARE * n), replace=False))] = True
    others = (y[:n] + torch.from_numpy(rng.integers(1, 10, n))) % 10
    given = torch.where(wrong, others, y[:n])

    model = train(x[:n], given, seed=0)
    own = suspicion(model, x[:n], given)
    most = int(LOOKED_AT * n)
    suspects = own.argsort(descending=True)[:most]
    fits = accuracy(model, x[:n], given)
    print(f"{n} digits, {int(wrong.sum())} with a wrong label; the model fits {fits:.3f} of them.")
    print(f"AUC of self-influence: {roc_auc_score(wrong, own):.3f}")
    print(f"Of the {most} most suspicious, {int(wrong[suspects].sum())} have a wrong label.\n")

    at_random = torch.from_numpy(rng.choice(n, most, replace=False))
    print(f"accuracy on {len(x) - n} other digits, after training anew (three seeds)")
    for what, labels in (
        ("labels as given", given),
        (f"{most} looked at, at random", corrected(given, y[:n], at_random)),
        (f"{most} looked at, by self-influence", corrected(given, y[:n], suspects)),
        ("all labels right", y[:n]),
    ):
        found = [accuracy(train(x[:n], labels, seed), x[n:], y[n:]) for seed in range(3)]
        print(f"{what:36}{np.mean(found):.3f} +- {np.std(found, ddof=1):.3f}")


if __name__ == "__main__":
    main()
