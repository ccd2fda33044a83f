"""Worked job: a store of parts scored by several processes of Dask, and by one.

    python docs/worked/with_dask.py [--processes 3]

Needs dropinf[demo,dask]. Half a minute on two cores.

Each process collects the rows of a share of the training examples into a store of its own. The
solver is fitted on all of them, joined without a copy, and saved. Then each process scores the
stores that it is handed: scores stand side by side, and the largest k are the largest of each
store's largest k. On a cluster only the address that the client is given changes, and all processes
must see the directory.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from dask.distributed import Client, LocalCluster
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import dropinf

K = 5


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """One loss per example, [B]."""
    x, label, _ = batch
    return nn.functional.cross_entropy(model(x), label, reduction="none")


def ids_of(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Each example's number among all; positions in a share would begin at 0 in each."""
    return batch[2]


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,500 examples to train on and the other 297, each with its number."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    columns = x, y, torch.arange(len(x))
    return TensorDataset(*(c[:1500] for c in columns)), TensorDataset(*(c[1500:] for c in columns))


def train(data: TensorDataset) -> nn.Module:
    """A small MLP."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(10):
        for batch in DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss_fn(model, batch).mean().backward()
            optimizer.step()
    return model.eval()


def collect(model: nn.Module, data: Dataset, plan: dropinf.Plan, path: Path) -> int:
    """Write the rows of a share; says which process did."""
    loader = DataLoader(data, batch_size=50)
    options = {"path": path, "resume": True, "ids": ids_of, "progress": False}
    dropinf.collect(model, loader, loss_fn, plan, **options)
    return os.getpid()


def score(path: Path, queries: Path, solver: Path) -> tuple[Tensor, Tensor, Tensor]:
    """The scores [m, c] of one store, and each query's largest k with their ids."""
    store, asked = dropinf.RowStore.load(path), dropinf.RowStore.load(queries)
    fitted = dropinf.solvers.Cholesky.load(solver)
    values, ids = dropinf.topk(asked, store, fitted, k=K, ids=True)
    return dropinf.scores(asked, store, fitted), values, ids


def merged(values: list[Tensor], ids: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The largest k of the largest k of each store."""
    best, at = torch.cat(values, 1).topk(K)
    return best, torch.cat(ids, 1).gather(1, at)


def main() -> None:
    """Print how what several processes found compares with what one does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=3)
    processes = parser.parse_args().processes
    with tempfile.TemporaryDirectory() as directory:
        run(Path(directory), processes)


def run(directory: Path, processes: int) -> None:
    data, others = digits()
    model = train(data)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=256))
    shares = [Subset(data, part.tolist()) for part in torch.arange(len(data)).chunk(2 * processes)]
    paths = [directory / f"train-{number}" for number in range(len(shares))]
    collect(model, others, plan, directory / "queries")

    # What fails in a task is raised here; logs are of workers that take their time to end.
    quiet = {"dashboard_address": None, "silence_logs": "CRITICAL"}
    cluster = LocalCluster(n_workers=processes, threads_per_worker=1, **quiet)
    with cluster, Client(cluster) as client:
        workers = list(client.ncores())
        tasks = [
            client.submit(collect, model, share, plan, path, workers=workers[i % processes])
            for i, (share, path) in enumerate(zip(shares, paths, strict=True))
        ]
        writers = set(client.gather(tasks))
        store = dropinf.RowStore.join([dropinf.RowStore.load(path) for path in paths])
        dropinf.solvers.Cholesky(damping=0.1).fit(store).save(directory / "solver")
        tasks = [
            client.submit(score, path, directory / "queries", directory / "solver")
            for path in paths
        ]
        scores, values, ids = zip(*client.gather(tasks), strict=True)
    together = torch.cat(scores, 1)  # [m, n], in the order of store.ids
    best, whose = merged(values, ids)
    print(f"{len(store)} rows in {len(paths)} stores, written by {len(writers)} processes")

    alone = dropinf.collect(model, DataLoader(data, 50), loss_fn, plan, ids=ids_of, progress=False)
    asked = dropinf.RowStore.load(directory / "queries")
    solver = dropinf.solvers.Cholesky(damping=0.1).fit(alone)
    one = dropinf.scores(asked, alone, solver)
    one_best, one_whose = dropinf.topk(asked, alone, solver, k=K, ids=True)
    assert torch.equal(store.ids, alone.ids)
    off = float((together - one).abs().max() / one.abs().max())
    same = int((whose == one_whose).all(1).sum())
    print(f"scores beside those of one process: off by {off:.1e} of the largest")
    print(
        f"largest {K}: values off by {float((best - one_best).abs().max() / one.abs().max()):.1e}"
    )
    print(f"the same {K} examples, in the same order, for {same} of {len(asked)} queries")


if __name__ == "__main__":
    main()
