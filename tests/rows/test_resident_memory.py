"""What a process holds that writes, or reads, more than its memory should."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dropinf
from dropinf.rows import RowWriter

pytestmark = [
    pytest.mark.more,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc"),
]
BATCHES, EARLY = 10_000, 2_000
N, R, K = 100_000, 4096, 10


def megabytes(key):
    """VmRSS or VmHWM, 10⁶ bytes: what is mapped from files is among it."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 977


def in_own_process(name, path):
    """The numbers that a function of this file prints."""
    command = [sys.executable, __file__, name, str(path)]
    where = os.pathsep.join(
        [str(Path(dropinf.__file__).parents[1]), str(Path(__file__).parents[1])]
    )
    environment = {**os.environ, "PYTHONPATH": where}
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return list(map(float, run.stdout.split()))


def many_batches(path):
    """Resident MB at an early batch and at the end, and the largest journal, in bytes."""
    dropinf.rows.part_writer._FLUSH_SECONDS = 0.0  # more flushes than a journal may have lines
    os.fsync = lambda descriptor: None  # of which the disk is no part
    model, seen, sizes = nn.Linear(16, 1), [], []
    data = TensorDataset(torch.randn(2 * BATCHES, 16))

    def loss_fn(model, batch):
        sizes.append(0)
        if len(sizes) % 100 == 0 and (Path(path) / "part-000000").exists():
            seen.append((Path(path) / "part-000000" / "journal.jsonl").stat().st_size)
        if len(sizes) in (EARLY, BATCHES):
            print(megabytes("VmRSS"))
        return model(batch[0])[:, 0].square()

    plan = dropinf.Plan.make(model, dropinf.Full())
    loader = DataLoader(data, 2)
    dropinf.collect(model, loader, loss_fn, plan, path, progress=False, check=False)
    print(max(seen))


def test_many_batches(tmp_path):
    """8,000 batches more: 4 MB are 500 bytes each, less than one object that is kept of a batch."""
    early, late, journal = in_own_process("many_batches", tmp_path / "rows")
    print(early, late, journal)
    assert late - early < 4
    assert journal < 400_000  # 1024 lines
    assert len(dropinf.RowStore.load(tmp_path / "rows")) == 2 * BATCHES


def many_rows(path):
    """Peak MB once the rows are written, and after each pass over them."""
    torch.set_num_threads(1)
    plan = dropinf.Plan.make(nn.Linear(R, 1, bias=False), dropinf.Full())
    rows, valid = torch.randn(N // 100, R), torch.ones(N // 100, dtype=torch.bool)
    with RowWriter(plan, path) as writer:
        for number in range(100):
            writer.append(rows * (1 + number / 100), valid)
        store = writer.finish()
    print(megabytes("VmHWM"))
    identity = dropinf.solvers.Identity().fit(store)
    for m in (1, 16):
        queries = dropinf.RowStore(rows[:m].clone(), plan)
        _, indices = dropinf.topk(queries, store, identity, K)
        assert indices[:, 0].tolist() == [99 * len(rows) + i for i in range(m)]
        print(megabytes("VmHWM"))
    assert (
        dropinf.scores(dropinf.RowStore(rows[:1], plan), store, identity).argmax() == indices[0, 0]
    )
    print(megabytes("VmHWM"))
    dropinf.solvers.Diagonal().fit(store)
    print(megabytes("VmHWM"))


def test_many_rows(tmp_path):
    """1.6 GB of rows, written and read within 500 MB, of which torch's own libraries take half."""
    peaks = in_own_process("many_rows", tmp_path / "rows")
    print(peaks)
    assert len(peaks) == 5 and max(peaks) < 500


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
