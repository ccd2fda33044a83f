"""Worked job: an index of neighbours. Train, collect, whiten, index, compare with exact top-k.

    python docs/worked/neighbours.py

Needs dropinf[demo,faiss]. Some seconds on two cores.

Scores are q (F + λ)⁻¹ g. Rows times (F + λ)^(-1/2), on both sides, have them as inner products, so
that any index of inner products finds the training examples of largest score. A flat one looks at
all of them, one with inverted lists (IVF) at those of the `nprobe` lists nearest to the query. Rows
as they are have the same products with solved queries, but stand in other lists.
"""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dropinf

K = 10
LISTS = 32
PROBES = (1, 2, 4, 8, 16, 32)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One loss per example, [B]."""
    x, label = batch
    return nn.functional.cross_entropy(model(x), label, reduction="none")


def train(data: TensorDataset) -> nn.Module:
    """A small MLP."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(20):
        for batch in DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss_fn(model, batch).mean().backward()
            optimizer.step()
    return model.eval()


def add_rows(index: faiss.Index, store: dropinf.RowStore, of: Callable[[Tensor], Tensor]) -> None:
    """Add of(rows) of the valid rows of a store, by their positions, some MB at a time."""
    for first, rows in store.chunks():
        valid = store.valid[first : first + len(rows)].nonzero().flatten()
        index.add_with_ids(of(rows[valid]).numpy(), (first + valid).numpy())


def inverted_lists(rows: Tensor) -> faiss.IndexIVFFlat:
    """An index trained on rows, empty; of a large store some thousands of rows are enough."""
    width = rows.shape[1]
    quantizer = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFFlat(quantizer, width, LISTS, faiss.METRIC_INNER_PRODUCT)
    index.train(rows.numpy())
    return index


def recall(found: np.ndarray, exact: Tensor) -> float:
    """How many of the exact k are found, over all queries."""
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
    return sum(hits) / exact.numel()


def compared(index: faiss.IndexIVFFlat, queries: np.ndarray, nprobe: int) -> float:
    """The share of the rows that are in the lists that a query looks at."""
    _, lists = index.quantizer.search(queries, nprobe)
    sizes = np.array([index.invlists.list_size(i) for i in range(index.nlist)])
    return sizes[lists].sum() / (len(queries) * index.ntotal)


def main() -> None:
    """Print recall beside exact top-k."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.from_numpy(images[order].astype(np.float32) / 16)
    y = torch.from_numpy(labels[order])
    n = 1400
    known, asked = TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:])

    model = train(known)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=256))
    store, queries = (
        dropinf.collect(model, DataLoader(data, 200), loss_fn, plan, progress=False)
        for data in (known, asked)
    )
    solver = dropinf.solvers.Eigen(damping=0.1).fit(store)
    values, exact = dropinf.topk(queries, store, solver, k=K)

    whitened = solver.whiten(queries.rows).numpy()
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(plan.width))
    add_rows(index, store, solver.whiten)
    products, found = index.search(whitened, K)
    off = float(np.abs(products - values.numpy()).max() / values.abs().max())
    print(f"{len(store)} rows of width {plan.width}, {len(queries)} queries, {LISTS} lists")
    print(f"flat: {recall(found, exact):.3f} of the exact top {K}, scores off by {off:.0e}\n")

    print("| nprobe | whitened rows: compared | found | rows as they are: compared | found |")
    print("| --- | --- | --- | --- | --- |")
    ways = [(solver.whiten, whitened), (torch.clone, solver.solve(queries.rows).numpy())]
    indexes = [inverted_lists(of(store.rows)) for of, _ in ways]
    for index, (of, _) in zip(indexes, ways, strict=True):
        add_rows(index, store, of)
    for nprobe in PROBES:
        cells = [str(nprobe)]
        for index, (_, q) in zip(indexes, ways, strict=True):
            index.nprobe = nprobe
            share = 100 * compared(index, q, nprobe)
            cells += [f"{share:.1f} %", f"{recall(index.search(q, K)[1], exact):.3f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
