"""Cholesky on a store far larger than its memory bound: 100,000 rows, r from 1 to 8192."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from dropinf import Full, Plan, RowStore
from dropinf.rows import RowWriter
from dropinf.solvers import Cholesky

N, M = 100_000, 16
SIZES = [8192, 4096, 1024, *(1 + l % 3 for l in range(997))]
MAX_BYTES = (
    None,
    910_000_000,
)  # the factors take 340 MB, a thread packs the widest layer once more


def write_store(path):
    """Random rows, without ever holding them."""
    with torch.device("meta"):
        plan = Plan.make(nn.Sequential(*(nn.Linear(r, 1, bias=False) for r in SIZES)), Full())
    generator = torch.Generator().manual_seed(0)
    valid = torch.ones(1000, dtype=torch.bool)
    with RowWriter(plan, path) as writer:
        for _ in range(N // len(valid)):
            writer.append(torch.randn(len(valid), plan.width, generator=generator), valid)
        writer.finish()


def bench_streamed_fit(benchmark, tmp_path):
    """Peak of the memory that belongs to the process, MB (10⁶ bytes), and seconds."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the memory of a process is read from Linux's /proc")
    write_store(tmp_path / "rows")
    runs = []
    for max_bytes in MAX_BYTES:
        command = [sys.executable, __file__, str(tmp_path / "rows"), str(max_bytes or "")]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peak, fit, solve, residual = map(float, run.stdout.split())
        bound = None if max_bytes is None else max_bytes / 1e6
        runs.append(
            {"bound": bound, "peak": peak, "fit": fit, "solve": solve, "residual": residual}
        )
    rows = N * sum(SIZES) * 4 / 1e6
    factors = sum(r * r for r in SIZES) * 4 / 1e6
    benchmark.extra_info.update(streamed=runs, rows=rows, factors=factors)
    benchmark.pedantic(lambda: None)


def main(path: str, max_bytes: str) -> None:
    """Print peak, seconds of fit and solve, and the largest relative residual of three layers."""
    store = RowStore.load(path)
    queries = store.rows[:M].clone()
    for r in (8, 300):  # libraries allocate their workspaces
        torch.linalg.cholesky(torch.eye(r))
    peak, done = anonymous_memory(), threading.Event()
    before = peak

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    solver = Cholesky(max_bytes=int(max_bytes) if max_bytes else None).fit(store)
    fit = time.perf_counter() - start
    start = time.perf_counter()
    solved = solver.solve(queries)
    solve = time.perf_counter() - start
    done.set()
    watcher.join()
    worst = max(residual(store, solver, queries, solved, l) for l in (2, 500, 999))
    print(peak - before, fit, solve, worst)


def residual(store, solver, queries, solved, l):
    """|(F + λ) x - q| / |q| of layer l in float64."""
    part = store.plan.blocks[l].entries
    product = solver.layers[l].λ * solved[:, part].double()
    for _, chunk in store.chunks():
        G = chunk[:, part].double()
        product += (solved[:, part].double() @ G.T) @ G / len(store)
    return float((product - queries[:, part]).norm() / queries[:, part].norm())


def anonymous_memory() -> float:
    """What the process cannot give back, MB: without the pages of files that it has mapped."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError("RssAnon")


if __name__ == "__main__":
    main(*sys.argv[1:])
