"""Collections that end too early, in all ways there are, and are gone on with."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
import warnings

import pytest
import survival_cases
import torch
from survival_cases import BATCH, NUM_BATCHES, gather, loss_fn, model, tensors
from torch import nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from dropinf import Dropout, Plan, RowStore, collect
from dropinf.rows import LockedError, RowWriter, part_writer, writing
from dropinf.rows.journal import read_journal
from dropinf.rows.lock import Lock
from dropinf.rows.packing import Packing
from dropinf.rows.part import Part
from dropinf.rows.part_files import new_header

FILES = ("rows.bin", "ids.bin")


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "dropinf"])
    return context


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run gives that nothing stops."""
    path = tmp_path_factory.mktemp("whole") / "rows"
    gather(path)
    return path


def assert_same(path, whole):
    for name in FILES:
        mine, theirs = (p / "part-000000" / name for p in (path, whole))
        assert mine.read_bytes() == theirs.read_bytes(), name
    store, truth = RowStore.load(path), RowStore.load(whole)
    assert store.finished and torch.equal(store.valid, truth.valid) and not truth.valid.all()
    store.verify()
    assert [p.name for p in path.parent.iterdir() if p.name != "log"] == ["rows"]


def at_random_moments(processes, whole, tmp_path, number, flush=0.0):
    """Kill and resume, and how many of them were killed before their end."""
    again = 0
    for seed in range(number):
        folder = tmp_path / str(seed)
        folder.mkdir()
        path, log = folder / "rows", folder / "log"
        wait = random.Random(seed).uniform(0.0, 0.4)
        killed = processes.Process(
            target=gather, args=(path,), kwargs={"log": log, "seconds": 0.002, "flush": flush}
        )
        killed.start()
        while killed.is_alive() and not log.exists():
            time.sleep(0.001)
        time.sleep(wait)
        killed.kill()
        killed.join()
        again += killed.exitcode == -signal.SIGKILL
        before = len(log.read_text().split())
        there = rows_there(path) // BATCH
        options = {"log": log, "flush": flush}
        done = processes.Process(target=gather, args=(path, True), kwargs=options)
        done.start()
        done.join()
        assert done.exitcode == 0
        assert_same(path, whole)
        ran = len(log.read_text().split())
        assert ran == before + NUM_BATCHES - there
        if not flush:
            assert ran <= NUM_BATCHES + 1  # the batch in flight
    return again


def rows_there(path):
    """How many are flushed."""
    part = path / "part-000000"
    return read_journal(part / "journal.jsonl").extent.rows if part.exists() else 0


# A flush a batch, one now and then, and one that is never due again.
@pytest.mark.parametrize("flush, number", [(0.0, 2), (0.05, 2), (5.0, 2)])
def test_kills(processes, whole, tmp_path, flush, number):
    assert at_random_moments(processes, whole, tmp_path, number, flush) >= number // 2


@pytest.mark.more
@pytest.mark.parametrize("flush", [0.0, 0.05, 5.0])
def test_many_kills(processes, whole, tmp_path, flush):
    assert at_random_moments(processes, whole, tmp_path, 30, flush) >= 15


@pytest.mark.parametrize("cut", [1, 60, 0])
def test_torn_ends(whole, tmp_path, monkeypatch, cut):
    """What lies behind the last whole line is not there, for a reader and for the next writer."""
    path = tmp_path / "rows"
    with (
        pytest.raises(OSError, match="gone"),
        pytest.warns(UserWarning, match="the first 63 rows"),
    ):
        gather(path, fails_at=64)
    part = path / "part-000000"
    for name in FILES:
        with (part / name).open("ab") as file:
            file.write(b"what a dying writer left" * 1000)
    journal = part / "journal.jsonl"
    text = journal.read_bytes()
    *_, last = text[:-1].split(b"\n")
    # Half of the next line, of the last one, or a whole line of zeros.
    journal.write_bytes(
        text[: -len(last) + cut] if cut > 1 else text + last[:50] + b"\n" * (not cut)
    )
    with pytest.warns(UserWarning, match="not finished"):
        store = RowStore.load(path)
    assert len(store) == (60 if cut > 1 else 63)
    assert torch.equal(store.rows, RowStore.load(whole).rows[: len(store)])
    assert store.ids.tolist() == list(range(len(store)))
    with pytest.raises(OSError, match="gone"), pytest.warns(UserWarning, match="the first 99 rows"):
        gather(path, True, fails_at=100)
    with pytest.warns(UserWarning, match="not finished"):
        assert torch.equal(RowStore.load(path).rows, RowStore.load(whole).rows[:99])
    gather(path, True)
    assert_same(path, whole)


def test_a_kill_before_the_first_rows(whole, tmp_path):
    """A store without parts, or with one that has nothing yet."""
    for name, keep in (("none", False), ("empty", True)):
        path = tmp_path / name / "rows"
        shutil.copytree(whole, path)
        part = path / "part-000000"
        first = (part / "journal.jsonl").read_bytes().split(b"\n")[0]
        shutil.rmtree(part)
        if keep:
            part.mkdir()
            (part / "journal.jsonl").write_bytes(first + b"\n")
        with pytest.raises(ValueError, match="holds no rows yet; collect"):
            RowStore.load(path)
        gather(path, True)
        assert_same(path, whole)


@pytest.mark.parametrize("flush", [0.0, 0.05, 60.0])
def test_sigterm(processes, whole, tmp_path, flush):
    """Between flushes: what is not flushed yet is, at the end."""
    path, log = tmp_path / "rows", tmp_path / "log"
    options = {"log": log, "seconds": 0.01, "flush": flush}
    stopped = processes.Process(target=gather, args=(path,), kwargs=options)
    stopped.start()
    while not log.exists() or len(log.read_text().split()) < 8:
        time.sleep(0.005)
    stopped.terminate()
    stopped.join()
    assert stopped.exitcode == 128 + signal.SIGTERM
    with pytest.warns(UserWarning, match=r"is not finished; these are its first \d+ rows"):
        store = RowStore.load(path)
    assert not store.finished and len(store) >= 7 * BATCH and not (path / "lock").exists()
    gather(path, True, log=log)
    assert_same(path, whole)
    assert len(log.read_text().split()) == NUM_BATCHES


@pytest.mark.parametrize("flush", [0.0, 60.0])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_in_the_loss(whole, tmp_path, monkeypatch, error, flush):
    path, calls = tmp_path / "rows", []

    def failing(*args, **given):
        calls.append(0)
        if len(calls) == 9:
            raise error
        return loss_fn(*args, **given)

    with monkeypatch.context() as patch:
        patch.setattr(survival_cases, "loss_fn", failing)
        with (
            pytest.raises(error),
            pytest.warns(UserWarning, match=r"the first 24 rows are in .*rows, and .*resume=True"),
        ):
            gather(path, flush=flush)
    gather(path, True)
    assert_same(path, whole)


@pytest.mark.parametrize("num_workers, flush", [(0, 0.0), (1, 0.0), (1, 5.0)])
def test_a_loader_that_fails(whole, tmp_path, num_workers, flush):
    path = tmp_path / "rows"
    with (
        pytest.raises(OSError, match="the data set is gone"),
        pytest.warns(UserWarning, match="the first 63 rows are in"),
    ):
        gather(path, num_workers=num_workers, fails_at=64, flush=flush)
    gather(path, True, num_workers=num_workers)
    assert_same(path, whole)


@pytest.mark.parametrize("flush", [0.0, 5.0])
def test_a_killed_worker(whole, tmp_path, flush):
    path = tmp_path / "rows"
    with (
        # The second where torch fetches what the worker had handed over.
        pytest.raises((RuntimeError, ConnectionError), match=r"worker|reset|refused"),
        pytest.warns(UserWarning, match=r"the first \d+ rows are in"),
    ):
        gather(path, num_workers=1, dies_at=64, flush=flush)
    gather(path, True, num_workers=1)
    assert_same(path, whole)


@pytest.mark.parametrize("step", ["part_paths", "warn_user"])
def test_a_signal_while_it_stops(whole, tmp_path, step, monkeypatch):
    """As of a worker that is found dead while what it left is being counted."""
    path, calls = tmp_path / "rows", []
    own = getattr(writing, step)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("a worker is dead")
        return own(*args)

    with (
        pytest.raises(RuntimeError, match="a worker is dead"),
        pytest.warns(UserWarning, match="the first 63 rows are in"),
    ):
        monkeypatch.setattr(writing, step, interrupted)
        gather(path, fails_at=64, flush=0.0)
    assert len(calls) == 2
    monkeypatch.undo()
    gather(path, True)
    assert_same(path, whole)


@pytest.mark.parametrize("flush, free", [(0.0, 28), (5.0, 24), (5.0, 28)])
def test_a_full_disk(whole, tmp_path, flush, free):
    """On a tmpfs of 64 KiB, so many of them free, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        filler = disk / "filler"
        filler.write_bytes(bytes((64 - free) << 10))
        with (
            pytest.raises(OSError, match="No space left"),
            pytest.warns(UserWarning, match=r"the first \d+ rows are in"),
        ):
            gather(disk / "rows", flush=flush)
        assert not RowStore.load(disk / "rows").finished
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        gather(disk / "rows", True)
        assert_same(disk / "rows", whole)
    finally:
        subprocess.run(["umount", disk], check=True)


def gather_small(path, flush):
    """Collect with files that may have 4 KiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match=r"File too large: .*part-000000"):
        gather(path, flush=flush)


@pytest.mark.parametrize("flush", [0.0, 5.0])
def test_files_that_may_not_grow(processes, whole, tmp_path, flush):
    """Of the journal where each batch has a line of it, else of the rows."""
    path = tmp_path / "rows"
    stopped = processes.Process(target=gather_small, args=(path, flush))
    stopped.start()
    stopped.join()
    assert stopped.exitcode == 0
    with pytest.warns(UserWarning, match="not finished"):
        store = RowStore.load(path)
    store.verify()
    assert len(store) < 64 * BATCH and not (path / "lock").exists()
    gather(path, True)
    assert_same(path, whole)


def begun(tmp_path, loader=None, plan=None, net=None, stop_after=2, **options):
    """A store of some batches of a loader, and what it was made with."""
    net = model() if net is None else net
    plan = Plan.make(net, Dropout(r=8)) if plan is None else plan
    loader = DataLoader(tensors(), BATCH) if loader is None else loader
    calls = []

    def stopping(net, batch):
        calls.append(0)
        if len(calls) > stop_after:
            raise InterruptedError
        return losses(net, batch)

    options = {"progress": False, "check": False, **options}
    with pytest.raises(InterruptedError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collect(net, loader, stopping, plan, tmp_path / "rows", **options)
    return net, plan


def losses(net, batch):
    x = batch["x"] if isinstance(batch, dict) else batch[0]
    return net(x).square().sum(1)


def go_on(tmp_path, net, plan, loader=None, **options):
    loader = DataLoader(tensors(), BATCH) if loader is None else loader
    options = {"progress": False, "check": False, "resume": True, **options}
    return collect(net, loader, losses, plan, tmp_path / "rows", **options)


def test_what_must_be_as_it_was(tmp_path):
    net, plan = begun(tmp_path)
    before = {p: p.read_bytes() for p in (tmp_path / "rows").rglob("*") if p.is_file()}
    other = model()
    with torch.no_grad():
        other[0].bias[3] += 1e-3
    with pytest.raises(ValueError, match=r"were made with weights \w+, and the model has \w+"):
        go_on(tmp_path, other, plan)
    with pytest.raises(ValueError, match=r"were made under plan \w+, not \w+; resume with Plan"):
        go_on(tmp_path, net, Plan.make(net, Dropout(r=8, seed=1)))
    with pytest.raises(ValueError, match=r"collected with loss_scale=1\.0, not 2\.0"):
        go_on(tmp_path, net, plan, loss_scale=2.0)
    with pytest.raises(ValueError, match="collected with mode='activations', not 'grads'"):
        go_on(tmp_path, net, plan, mode="grads")
    with pytest.raises(ValueError, match="collected with training=True, not False"):
        go_on(tmp_path, model().eval(), plan)
    with pytest.raises(ValueError, match=r"collected with dtype=None, not 'torch\.int8'"):
        go_on(tmp_path, net, plan, dtype=torch.int8)
    changed = tensors()
    changed.tensors[0][1, 2] += 1
    with pytest.raises(ValueError, match="the first batch holds something else than when"):
        go_on(tmp_path, net, plan, DataLoader(changed, BATCH))
    with pytest.raises(ValueError, match="1 of the examples whose rows are there, such as 5"):
        go_on(tmp_path, net, plan, DataLoader(Subset(tensors(), range(5)), BATCH))
    with pytest.raises(FileExistsError, match="go on with it with resume=True"):
        go_on(tmp_path, net, plan, resume=False)
    with pytest.raises(ValueError, match="resume=True goes on with a directory; give path="):
        collect(net, [], losses, plan, resume=True)
    after = {p: p.read_bytes() for p in (tmp_path / "rows").rglob("*") if p.is_file()}
    assert after == before
    assert len(go_on(tmp_path, net, plan)) == 12
    assert len(go_on(tmp_path, net, plan)) == 12  # nothing is left to do
    assert len(go_on(tmp_path, net, plan, DataLoader(tensors(14), BATCH))) == 14  # it has grown


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        yield from (self.data[i] for i in range(len(self.data)))


def loaders():
    data = tensors()
    ordered = {"batch_size": BATCH}

    def seeded(kind, **options):
        return lambda: DataLoader(
            data, sampler=kind(generator=torch.Generator().manual_seed(3), **options), **ordered
        )

    def distributed():
        return DataLoader(data, sampler=DistributedSampler(data, 2, 1, shuffle=True), **ordered)

    subset = [7, 2, 9, 11, 0, 4, 1]
    cases = {
        "in order": (lambda: DataLoader(data, **ordered), range(12)),
        "with workers": (lambda: DataLoader(data, num_workers=1, **ordered), range(12)),
        "shuffled": (lambda: DataLoader(data, shuffle=True, **ordered), None),
        "seeded": (seeded(lambda **o: RandomSampler(data, **o)), None),
        "subset": (lambda: DataLoader(Subset(data, subset), **ordered), range(7)),
        "subset sampler": (seeded(lambda **o: SubsetRandomSampler(subset, **o)), subset),
        "distributed": (distributed, None),
        "stream": (lambda: DataLoader(Stream(data), **ordered), range(12)),
        "generator": (lambda: (batch for batch in DataLoader(data, **ordered)), range(12)),
        "list": (lambda: list(DataLoader(data, **ordered)), range(12)),
    }
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.filterwarnings("ignore:collect")
@pytest.mark.parametrize("make, expected", loaders())
def test_whose_rows_they_are(tmp_path, make, expected):
    """Each id once, and the row of an id is that of its example."""
    net, plan = begun(tmp_path, make(), stop_after=1)
    store = go_on(tmp_path, net, plan, make())
    rows = collect(net, DataLoader(make_data(make), 1), losses, plan, progress=False, check=False)
    ids = store.ids.tolist()
    if expected is not None:
        assert sorted(ids) == sorted(expected)
    assert len(set(ids)) == len(ids) == len(store)
    torch.testing.assert_close(store.rows, rows.rows[store.ids])
    memory = collect(net, make(), losses, plan, progress=False, check=False)
    assert len(memory) == len(store)


def make_data(make):
    data = getattr(make(), "dataset", None)
    return tensors() if data is None or isinstance(data, Stream) else data


def test_the_order_of_a_seeded_loader_is_kept(processes, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gather(tmp_path / "whole" / "rows", seed=5)
        with pytest.raises(OSError, match="gone"):
            gather(tmp_path / "a" / "rows", seed=5, fails_at=64)
    gather(tmp_path / "a" / "rows", True, seed=5)
    assert_same(tmp_path / "a" / "rows", tmp_path / "whole" / "rows")


def named(i):
    return f"example \u00e9 {i}\n"


@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_ids_that_are_given(tmp_path, strings, stream):
    def collate(examples):
        x, i = zip(*examples, strict=True)
        return {"x": torch.stack(x), "id": [named(int(j)) if strings else 100 + int(j) for j in i]}

    def loader(data=None):
        data = tensors() if data is None else data
        return DataLoader(Stream(data) if stream else data, BATCH, collate_fn=collate)

    net, plan = begun(tmp_path, loader(), ids="id")
    by_function = {"ids": lambda batch: batch["id"]}
    order = [0, 1, 2, 4, 3, 5, *range(6, 12)]
    with pytest.raises(ValueError, match="batch 1 has other ids than the rows in"):
        go_on(tmp_path, net, plan, loader(Subset(tensors(), order)), **by_function)
    store = go_on(tmp_path, net, plan, loader(), **by_function)
    expected = [named(i) if strings else 100 + i for i in range(12)]
    assert (store.ids if strings else store.ids.tolist()) == expected
    part = store[[expected[7], expected[2]]]
    assert torch.equal(part.rows, store.rows[[7, 2]])
    assert (part.ids if strings else part.ids.tolist()) == [expected[7], expected[2]]
    with pytest.raises(KeyError, match="no row has the id"):
        store["nobody" if strings else 3]
    with pytest.raises(ValueError, match="one id for each of 3 examples, got 2"):
        collect(net, loader(), losses, plan, progress=False, ids=lambda batch: batch["id"][:2])
    with pytest.raises(ValueError, match="ids must be integers of 64 bits, or strings"):
        collect(net, loader(), losses, plan, progress=False, ids=lambda batch: batch["x"][:, 0])
    with pytest.raises(ValueError, match=r"a key of the batch, .* got 'key'; the batch has \['id'"):
        collect(net, loader(), losses, plan, progress=False, ids="key")
    with pytest.raises(ValueError, match="got 'key'; the batch is a list"):
        collect(
            net,
            [[torch.zeros(1)]],
            lambda net, batch: losses(net, {"x": torch.zeros(1, 5)}),
            plan,
            progress=False,
            ids="key",
        )


def test_ids_of_tokens(tmp_path):
    net = nn.Linear(5, 1)
    data = tensors()
    data.tensors = (torch.randn(12, 4, 5), data.tensors[1])
    plan = Plan.make(net, Dropout(r=3))

    def token_losses(net, batch):
        return net(batch[0])[..., 0].square().sum(1)

    def seeded():
        return DataLoader(
            data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(3), drop_last=False
        )

    options = {"progress": False, "per": "token", "check": False}
    whole = collect(net, seeded(), token_losses, plan, **options)
    calls = []

    def stopping(net, batch):
        calls.append(0)
        if len(calls) > 2:
            raise InterruptedError
        return token_losses(net, batch)

    with pytest.raises(InterruptedError), pytest.warns(UserWarning, match="the first 24 rows"):
        collect(net, seeded(), stopping, plan, tmp_path / "rows", **options)
    store = collect(net, seeded(), token_losses, plan, tmp_path / "rows", resume=True, **options)
    assert torch.equal(store.rows, whole.rows) and torch.equal(store.origin, whole.origin)
    assert torch.equal(store.ids, whole.ids) and sorted(set(store.ids.tolist())) == list(range(12))
    example = collect(net, [data[5:6]], token_losses, plan, **options)
    torch.testing.assert_close(store[5].rows, example.rows)


def test_a_finished_store_is_gone_on_with(whole, tmp_path, recwarn):
    """Nothing is left to do, and no parameter is said to have had no gradient."""
    shutil.copytree(whole, tmp_path / "rows")
    gather(tmp_path / "rows", True)
    assert_same(tmp_path / "rows", whole)
    assert not [str(said.message) for said in recwarn if "no example had" in str(said.message)]


def test_what_is_said():
    net = model()
    plan = Plan.make(net, Dropout(r=8))

    def said(loader):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            collect(net, loader, losses, plan, progress=False)
        return [str(w.message) for w in found]

    data = tensors(11)
    assert said(DataLoader(data, 4)) == said(list(DataLoader(data, 4))) == []
    (dropped,) = said(DataLoader(data, 4, drop_last=True))
    assert "drop_last=True leaves the last 3 of 11 examples without rows" in dropped
    assert said(DataLoader(tensors(12), 4, drop_last=True)) == []
    for loader in (DataLoader(Stream(data), 4), iter(DataLoader(data, 4))):
        (unknown,) = said(loader)
        assert "does not say which examples it draws" in unknown and "ids=" in unknown


def test_a_lock_without_links(tmp_path, monkeypatch):
    def no_links(*paths):
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    locks = [Lock(tmp_path) for _ in range(2)]
    locks[0].acquire("test")
    with pytest.raises(LockedError, match=f"process {os.getpid()} on this host"):
        locks[1].acquire("test")
    locks[0].release()
    locks[1].acquire("test")
    locks[1].release()
    assert not list(tmp_path.iterdir())


def test_two_writers(tmp_path):
    net, plan = begun(tmp_path)
    path = tmp_path / "rows"
    lock = Lock(path)
    lock.acquire("test")
    me = rf"process {os.getpid()} on this host \({socket.gethostname()}\)"
    with pytest.raises(LockedError, match=me):
        go_on(tmp_path, net, plan)
    with pytest.warns(UserWarning, match="not finished"):
        store = RowStore.load(path)  # readers are free to
    with pytest.raises(LockedError, match=me):
        store.append(store.rows[:1].clone(), ids=[77])
    with pytest.raises(FileExistsError, match=rf"being written by process {os.getpid()} on host"):
        go_on(tmp_path, net, plan, resume=False)
    lock.release()

    begin = [RowWriter(plan, tmp_path / "new") for _ in range(2)]
    rows, valid = torch.zeros(1, plan.width), torch.ones(1, dtype=torch.bool)
    with begin[0] as first, begin[1] as second:  # neither has made anything yet
        first.append(rows, valid)
        with pytest.raises(FileExistsError, match=rf"being written by process {os.getpid()} on"):
            second.append(rows, valid)
        assert len(first.finish()) == 1

    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    for stale in (
        f'{{"host": "{host}", "pid": {dead.pid}, "start": 12}}',
        f'{{"host": "{host}", "pid": {os.getpid()}, "start": 12}}',  # the number went to another
    ):
        (path / "lock").write_text(stale)
        with pytest.warns(UserWarning, match=r"process \d+ on this host, .* is gone; its lock"):
            assert len(go_on(tmp_path, net, plan)) == 12
        assert not (path / "lock").exists()
    for held, match in (
        (f'{{"host": "{host}x", "pid": 1, "start": 1}}', "on host .*x; if that process is gone"),
        ("", "does not say who holds it"),
        ("[" * 5000, "does not say who holds it"),
        ('{"host": 3, "pid": 1, "start": 1}', "does not say who holds it"),
    ):
        (path / "lock").write_text(held)
        with pytest.raises(LockedError, match=match):
            go_on(tmp_path, net, plan)
        assert (path / "lock").read_text() == held


def test_ten_thousand_batches(tmp_path, monkeypatch):
    """A journal of bounded size; their memory is looked at in test_resident_memory.py."""
    monkeypatch.setattr(part_writer, "_FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    plan = Plan.make(nn.Linear(4, 1, bias=False), Dropout(r=4))
    rows, valid = torch.randn(2, 4), torch.ones(2, dtype=torch.bool)
    largest = 0
    header = new_header(Packing.of(plan, torch.float32), torch.zeros(2), None)
    path = tmp_path / "part-000000"
    writer = part_writer.PartWriter.begin(path, header)
    for number in range(10_000):
        ids = torch.tensor([2 * number, 2 * number + 1])
        writer.append(rows, valid, ids, state={"proof": {"layers": ["a" * 1000]}})
        if number % 100 == 0:
            largest = max(largest, (path / "journal.jsonl").stat().st_size)
    assert largest < 300_000 and (path / "journal.jsonl").stat().st_size < 300_000
    assert len(writer.extent.chunks) == 1 and not writer.extent.invalid
    writer.finish()
    assert (path / "journal.jsonl").stat().st_size < 3000
    part = Part.open(path, plan.width)
    assert torch.equal(part.ids, torch.arange(20_000)) and len(list(part.chunks())) == 1


def test_an_interrupt_leaves_no_lock(whole, tmp_path, monkeypatch):
    """Where a lock was just made, or its directory just appeared: by a process that lives on."""
    path, plain = tmp_path / "rows", {"link": os.link, "replace": os.replace}
    for name in ("replace", "link"):  # of a new store, and of one that is gone on with

        def interrupted(source, target, name=name):
            plain[name](source, target)
            raise KeyboardInterrupt

        monkeypatch.setattr(os, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            gather(path, resume=name == "link")
        monkeypatch.setattr(os, name, plain[name])
        assert (path / "store.json").exists() and not (path / "lock").exists()
    gather(path, resume=True)
    assert_same(path, whole)


def test_release_leaves_the_lock_of_another(tmp_path):
    one, other = Lock(tmp_path), Lock(tmp_path)
    one.acquire("collect")
    with pytest.raises(LockedError, match="is being written by process"):
        other.acquire("collect")
    other.release()
    assert (tmp_path / "lock").exists()
    one.release()
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("at", [1, 5])
def test_examples_without_rows(tmp_path, at):
    """Of no segment, they are done and nothing tells so: refused, not taken once more."""

    def segments(batch):
        return torch.where(batch[1] == at, -1, 0)[:, None].expand(-1, 2)

    def losses(net, batch):
        if fails and 7 in batch[1]:
            raise OSError("the data set is gone")
        return net(batch[0].unflatten(1, (2, 5))).square().sum((1, 2))

    made, fails = model(), True
    options = {"per": "segment", "segment_ids": segments, "check": False, "progress": False}
    for resume in (False, True):
        fails = not resume
        error, said = (ValueError, "1 of the examples done in .* have no row") if resume else (
            OSError, "gone")  # fmt: skip
        loader = DataLoader(tensors(features=10), 3)
        plan = Plan.make(made, Dropout(r=8))
        with pytest.raises(error, match=said):
            collect(made, loader, losses, plan, tmp_path / "rows", resume=resume, **options)
    assert not (tmp_path / "rows" / "lock").exists()
