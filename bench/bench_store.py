"""Collecting into a directory beside into memory; top-k over a store beside one read of it, and
beside torch.mm and topk; top-k of rows that are kept in few bits."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dropinf
from dropinf import ops
from dropinf.rows import part_writer

N, R = 50_000, 1024  # 205 MB
EXAMPLES = 32_768  # 100 MB of rows


def mlp():
    torch.manual_seed(0)
    sizes = [784, 2048, 1024, 10]
    layers = [(nn.Linear(i, o), nn.ReLU()) for i, o in itertools.pairwise(sizes)]
    return nn.Sequential(*itertools.chain.from_iterable(layers))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("seconds", [5.0, 0.0], ids=["a flush every 5 s", "a flush a batch"])
def bench_collect_into_a_directory(timed, tmp_path, monkeypatch, seconds):
    """To reach: 0.97 of the speed of memory, with the journal and what waits for the disk.

    Some seconds of collecting: what opens and finishes a store waits for the disk a dozen times.
    """
    monkeypatch.setattr(part_writer, "_FLUSH_SECONDS", seconds)
    model = mlp()
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=256))
    data = TensorDataset(torch.randn(EXAMPLES, 784), torch.randint(10, (EXAMPLES,)))
    paths = (tmp_path / str(i) for i in itertools.count())

    def collect(path=None):
        loader = DataLoader(data, batch_size=128)
        return dropinf.collect(model, loader, loss_fn, plan, path, progress=False)

    contestants = {"directory": lambda: collect(next(paths)), "memory": collect}
    to_reach = {"memory": (0.97, None)} if seconds else {}
    timed(contestants, "directory", to_reach, rounds=5, settle=True)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A store of N rows on disk, in the page cache, verified."""
    plan = dropinf.Plan.make(nn.Linear(R, 1, bias=False), dropinf.Full())
    path = tmp_path_factory.mktemp("store") / "rows"
    dropinf.RowStore(torch.randn(N, R), plan).save(path)
    store = dropinf.RowStore.load(path)
    _ = store.rows
    return store


@pytest.mark.parametrize("m", [1, 256])
def bench_topk_over_a_store(timed, stored, m):
    """To reach: 0.8 of the bandwidth of one read at one query, level with torch at 256."""
    queries = dropinf.RowStore(torch.randn(m, R), stored.plan)
    solver, rows = dropinf.solvers.Identity().fit(stored), stored.rows
    contestants = {
        "dropinf.topk": lambda: dropinf.topk(queries, stored, solver, 10),
        "torch.mm and topk": lambda: torch.mm(queries.rows, rows.T).topk(10),
    }
    to_reach = {"torch.mm and topk": (1, None)}
    if m == 1:
        contestants["one read (sum)"] = rows.sum
        to_reach = {"one read (sum)": (0.8, None)}
    timed(contestants, "dropinf.topk", to_reach, rounds=5)


@pytest.mark.parametrize("m", [1, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bfloat16", "int8"])
def bench_topk_of_few_bits(timed, dtype, m):
    """To reach at one query: 0.8 of what the fewer bytes promise; at 256, level with torch."""
    rows, queries, scales = torch.randn(N, R), torch.randn(m, R), None
    kept = rows.to(dtype)
    if dtype == torch.int8:
        scales = rows.abs().amax(1, keepdim=True) / 127
        kept = (rows / scales).round().to(dtype)

    def topk(rows, scales=None):
        values, indices = torch.full((m, 10), -torch.inf), torch.full((m, 10), -1)
        return ops.score_topk(queries, rows, values, indices, scales=scales, offsets=(0, R))

    contestants = {
        "ops.score_topk": lambda: topk(kept, scales),
        "the same of float32 rows": lambda: topk(rows),
        "torch.mm and topk of float32 rows": lambda: torch.mm(queries, rows.T).topk(10),
        "one read of float32 rows (sum)": rows.sum,
    }
    to_reach = {"torch.mm and topk of float32 rows": (1, None)}
    if m == 1:
        to_reach = {"the same of float32 rows": (0.8 * 4 / dtype.itemsize, None)}
    timed(contestants, "ops.score_topk", to_reach, rounds=5)
