"""Two ranks on two cores beside one process, one thread each: collect, fit, topk; and the ceiling,
two processes that know nothing of each other and have half of the work each.

    python bench/bench_ranks.py

Prints seconds, and how many times as fast two are. Seconds are of the slowest rank, from where all
of them begin; CPU seconds, of the one that took most, tell as much on a machine that is not idle.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import NextToken, losses
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dropinf
from dropinf.text_table import Table

T, VOCABULARY = 64, 256
TO_REACH = 1.7


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    (tokens,) = batch
    return losses(model(tokens[:, :-1]), tokens[:, 1:])


class Work:
    """What is timed, each call by its name."""

    def __init__(self, path: Path, examples: int, rows: int, share: int) -> None:
        """A `share`th of the examples and rows, for who is to do a part alone."""
        torch.manual_seed(0)
        self.model = NextToken(VOCABULARY, T, width=128, num_layers=4)
        tokens = torch.randint(VOCABULARY, (examples // share, T + 1))
        self.loader = DataLoader(TensorDataset(tokens), batch_size=8)
        self.plan = dropinf.Plan.make(self.model, dropinf.Dropout(r=512))
        wide = dropinf.Plan.make(
            nn.Sequential(*(nn.Linear(512, 1, bias=False) for _ in range(16))), dropinf.Full()
        )
        generator = torch.Generator().manual_seed(1)
        numbers = torch.randn(rows // share, wide.width, generator=generator)
        self.store = dropinf.RowStore(numbers, wide)
        self.queries = dropinf.RowStore(numbers[:64].clone(), wide)
        self.path, self.number = path, itertools.count()
        self.solver: dropinf.solvers.Cholesky | None = None

    def collect(self) -> None:
        path = self.path / f"rows-{next(self.number)}"
        loader = dropinf.split(self.loader)
        dropinf.collect(self.model, loader, loss_fn, self.plan, path, progress=False)

    def fit(self) -> None:
        with dropinf.over_ranks():
            self.solver = dropinf.solvers.Cholesky().fit(self.store)

    def topk(self) -> None:
        with dropinf.over_ranks():
            dropinf.topk(self.queries, self.store, self.solver)

    def self_influence(self) -> None:
        with dropinf.over_ranks():
            dropinf.self_influence(self.store, self.solver)


CALLS = "collect", "fit", "topk", "self_influence"


def rank_of(
    rank: int, kind: str, world: int, folder: str, size: tuple[int, int], rounds: int
) -> None:
    """One process: its seconds and CPU seconds of each call and round, into a file."""
    torch.set_num_threads(1)
    path = Path(folder)
    if kind == "ranks" and world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/group",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=600),
        )
    together = dist.FileStore(f"{folder}/start", world)
    alone = kind == "apart"
    work = Work(path / f"apart-{rank}" if alone else path, *size, share=world if alone else 1)
    work.path.mkdir(exist_ok=True)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CALLS}
    for number in range(rounds + 1):  # the first one warms up
        for name in CALLS:
            call: Callable[[], None] = getattr(work, name)
            together.add(f"{number}-{name}", 1)
            while together.add(f"{number}-{name}", 0) < world:
                time.sleep(0.001)
            start, cpu = time.perf_counter(), time.process_time()
            call()
            took = time.perf_counter() - start, time.process_time() - cpu
            if number:
                found[name].append(took)
    torch.save(found, path / f"{kind}-{rank}.pt")


def measure(kind: str, world: int, size: tuple[int, int], rounds: int) -> dict[str, Tensor]:
    """Of each call the median seconds, and CPU seconds, of the slowest rank: [2]."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_of, (kind, world, folder, size, rounds), nprocs=world)
        ranks = [torch.load(Path(folder) / f"{kind}-{rank}.pt") for rank in range(world)]
    took = {name: torch.tensor([rank[name] for rank in ranks]) for name in CALLS}
    return {name: of_ranks.amax(0).median(0).values for name, of_ranks in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    size = given.examples, given.rows
    kinds = {"one": ("ranks", 1), "apart": ("apart", 2), "ranks": ("ranks", 2)}
    found = {name: measure(*kind, size, given.rounds) for name, kind in kinds.items()}
    rows = []
    for name in CALLS:
        one, apart, ranks = (found[kind][name] for kind in kinds)
        for i, what in enumerate(("seconds", "CPU seconds")):
            times = (f"{float(took[i]):.2f}" for took in (one, apart, ranks))
            ceiling, ratio = float(one[i] / apart[i]), float(one[i] / ranks[i])
            rows.append((name, what, *times, f"{ceiling:.2f}", f"{ratio:.2f}"))
    columns = ("call", "of", "one", "two apart", "two ranks", "ceiling", "ratio")
    notes = [f"To reach: a ratio of {TO_REACH}."]
    print(Table(columns, rows, right=range(2, 7), notes=notes))


if __name__ == "__main__":
    main()
