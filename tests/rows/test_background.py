"""The thread that writes rows: what waits for it, what its errors do, and when it is gone."""

import errno
import itertools
import multiprocessing
import os
import threading
import time
import warnings

import pytest
import torch
from survival_cases import BATCH, NUM_BATCHES, Examples, gather, loss_fn, model
from torch import nn
from torch.utils.data import DataLoader, Subset

from dropinf import Full, Plan, RowStore, collect
from dropinf.rows import RowWriter, part_writer
from dropinf.rows.background import Background

WIDTH = 6
PLAN = Plan.make(nn.Linear(WIDTH, 1, bias=False), Full())
VALID = torch.ones(2, dtype=torch.bool)


def rows_of(number):
    return torch.full((2, WIDTH), float(number))


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "dropinf rows"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not threads()


class Disk:
    """os.fsync as a test wants it: one that waits for `free`, or fails with `error`."""

    def __init__(self):
        self.free, self.error, self.begun = threading.Event(), None, threading.Event()
        self.free.set()
        self.real = os.fsync

    def sync(self, descriptor):
        if threading.current_thread().name == "dropinf rows":
            self.begun.set()
            assert self.free.wait(60)
            if self.error is not None:
                error, self.error = self.error, None  # as a kernel does, once
                raise error
        self.real(descriptor)


@pytest.fixture
def disk(monkeypatch):
    made = Disk()
    monkeypatch.setattr(os, "fsync", made.sync)
    monkeypatch.setattr(part_writer, "_sync_data", made.sync)
    yield made
    made.free.set()


def later(call):
    """A thread that makes a call, and what it has returned."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (call(), done.set()))
    thread.start()
    return thread, done


def test_calls_wait_by_their_bytes():
    free, order = threading.Event(), []
    background = Background(100)
    background.give(free.wait, 60)
    background.give(lambda: order.append(1), 40)
    thread, done = later(lambda: background.give(lambda: order.append(2), 1))
    assert not done.wait(0.2) and not order
    free.set()
    assert done.wait(60)
    thread.join()
    background.give(lambda: order.append(3), 1000)  # more than may wait, and alone
    background.wait()
    assert order == [1, 2, 3]
    background.end()


def test_nothing_is_run_behind_an_error():
    free, order = threading.Event(), []

    def failing():
        free.wait()
        raise ZeroDivisionError

    background = Background(100)
    background.give(failing, 1)
    background.give(lambda: order.append(1), 1)
    free.set()
    background.wait()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            background.give(lambda: order.append(2), 1)
    background.end()
    assert not order


def test_appending_does_not_wait_for_the_disk(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(part_writer, "_FLUSH_SECONDS", 1e9)
    disk.free.clear()
    with RowWriter(PLAN, tmp_path / "rows") as writer:
        for number in range(20):
            rows = rows_of(number)
            writer.append(rows, VALID, ids=torch.tensor([2 * number, 2 * number + 1]))
            rows.fill_(torch.nan)  # the caller's own again
        assert disk.begun.wait(60) and len(threads()) == 1
        # As far as it is flushed, which is nothing; and none of what is not is told of.
        with pytest.raises(ValueError, match="holds no rows yet"):
            RowStore.load(tmp_path / "rows")
        disk.free.set()
        store = writer.finish()
    assert not threads()
    assert torch.equal(store.rows, torch.cat([rows_of(number) for number in range(20)]))
    assert store.ids.tolist() == list(range(40))
    store.verify()


def test_appending_waits_for_a_flush_that_is_late(tmp_path, disk, monkeypatch):
    """Or a kill would lose more and more."""
    monkeypatch.setattr(part_writer, "_FLUSH_SECONDS", 0.05)
    with RowWriter(PLAN, tmp_path / "rows") as writer:
        writer.append(rows_of(0), VALID)
        disk.free.clear()

        def append():
            for number in range(1, 100):
                writer.append(rows_of(number), VALID)
                time.sleep(0.01)

        thread, done = later(append)
        assert disk.begun.wait(60)
        time.sleep(0.5)
        first = writer.num_rows
        time.sleep(0.5)
        second, ended = writer.num_rows, done.is_set()
        disk.free.set()
        assert second == first < 200 and not ended
        thread.join()
        assert len(writer.finish()) == 200


def test_rows_are_flushed_by_the_time_alone(tmp_path, monkeypatch):
    """Those before half of the seconds went, with the batch that comes then."""
    monkeypatch.setattr(part_writer, "_FLUSH_SECONDS", 60.0)
    now = time.monotonic()
    with RowWriter(PLAN, tmp_path / "rows") as writer:
        for number, later in enumerate((0.0, 29.0, 31.0)):
            monkeypatch.setattr(time, "monotonic", lambda t=now + later: t)
            writer.append(rows_of(number), VALID)
            writer._part._thread.wait()
            with pytest.warns(UserWarning, match="is not finished"):
                found = len(RowStore.load(tmp_path / "rows"))
            assert found == (2, 2, 6)[number]
        writer.finish()


@pytest.mark.parametrize("where", ["rows", "sync", "journal"])
@pytest.mark.parametrize("flush", [0.0, 1e9])
def test_errors_of_the_thread(tmp_path, disk, monkeypatch, where, flush):
    """One error, which names the part; what was flushed is there, and nothing else is told of."""
    path, full = tmp_path / "rows", OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(part_writer, "_FLUSH_SECONDS", 0.0)
    writes = {"rows": "part_writer", "journal": "journal"}

    def failing(*args):
        if threading.current_thread().name == "dropinf rows":
            raise full
        return real(*args)

    with (
        pytest.raises(OSError, match=r"No space left on device: .*part-000000") as raised,
        pytest.warns(UserWarning, match="the first 2 rows are in .*rows"),
        RowWriter(PLAN, path) as writer,
    ):
        writer.append(rows_of(0), VALID)
        monkeypatch.setattr(part_writer, "_FLUSH_SECONDS", flush)
        if where == "sync":
            disk.error = full
            monkeypatch.setattr(part_writer, "_SYNC_BYTES", 1)
        else:
            module = f"dropinf.rows.{writes[where]}"
            real = part_writer.write_all
            monkeypatch.setattr(f"{module}.write_all", failing)
        if where == "journal" and flush:
            writer._part._is_due = True
        for number in range(1, 1000):
            writer.append(rows_of(number), VALID)
            time.sleep(0.001)
    assert raised.value.errno == errno.ENOSPC and raised.value.__cause__ is full
    assert not (path / "lock").exists()
    with pytest.warns(UserWarning, match="not finished"):
        store = RowStore.load(path)
    assert torch.equal(store.rows, rows_of(0))
    store.verify()


def test_an_error_shows_at_the_end(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(part_writer, "_FLUSH_SECONDS", 1e9)
    disk.free.clear()
    with (
        pytest.raises(OSError, match="Input/output error"),
        pytest.warns(UserWarning, match="the first 0 rows"),
        RowWriter(PLAN, tmp_path / "rows") as writer,
    ):
        writer.append(rows_of(0), VALID)
        disk.error = OSError(errno.EIO, "Input/output error")
        disk.free.set()
        writer.finish()
    assert not (tmp_path / "rows" / "part-000000" / "part.json").exists()


def test_a_fork_leaves_the_rows_alone(tmp_path, disk, monkeypatch):
    """A child that leaves by the contexts of its parent, while the parent's thread writes."""
    monkeypatch.setattr(part_writer, "_FLUSH_SECONDS", 1e9)
    path = tmp_path / "rows"
    disk.free.clear()
    with RowWriter(PLAN, path) as writer:
        writer.append(rows_of(0), VALID)
        assert disk.begun.wait(60)
        before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of forks and threads
            child = multiprocessing.get_context("fork").Process(target=leave, args=(writer,))
            child.start()
        child.join(60)
        after = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
        disk.free.set()
        assert child.exitcode == 0 and after == before
        writer.append(rows_of(1), VALID)
        store = writer.finish()
    assert torch.equal(store.rows, torch.cat([rows_of(0), rows_of(1)]))


def leave(writer):
    with pytest.raises(RuntimeError, match="not by one forked off"):
        writer.append(rows_of(5), VALID)
    writer.__exit__(None, None, None)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:collect")
@pytest.mark.parametrize("flush", [0.0, 0.01, 5.0])
def test_workers_that_start_while_it_writes(tmp_path, monkeypatch, flush):
    """A loader that forks workers again and again."""
    monkeypatch.setattr(part_writer, "_FLUSH_SECONDS", flush)
    data, made = Examples(), model()
    cut = [Subset(data, range(i, i + 4 * BATCH)) for i in range(0, len(data), 4 * BATCH)]
    loaders = [DataLoader(piece, BATCH, num_workers=1) for piece in cut]
    store = collect(
        made,
        itertools.chain.from_iterable(loaders),
        loss_fn,
        Plan.make(made, Full()),
        tmp_path / "rows",
        progress=False,
        on_nonfinite="skip",
        check=False,
    )
    whole = collect(
        made,
        DataLoader(data, BATCH),
        loss_fn,
        store.plan,
        progress=False,
        on_nonfinite="skip",
        check=False,
    )
    assert len(store) == NUM_BATCHES * BATCH and torch.equal(store.rows, whole.rows)


def test_collections_that_end_leave_no_thread(tmp_path):
    gather(tmp_path / "whole", flush=5.0)
    assert not threads()
    with pytest.raises(OSError, match="gone"), pytest.warns(UserWarning, match="first 63 rows"):
        gather(tmp_path / "rows", flush=5.0, fails_at=64)
    assert not threads()
    gather(tmp_path / "rows", True, flush=5.0)
    RowStore.load(tmp_path / "rows").save(tmp_path / "copy")


@pytest.mark.parametrize("name, num_rows", [("start", 0), ("join", 6)])
def test_interrupts_of_the_thread(tmp_path, monkeypatch, name, num_rows):
    """Where it begins and where it ends: what waits for it does not wait for ever."""
    plain, due, found = getattr(threading.Thread, name), [True], []

    def interrupted(thread, *args):
        if thread.name == "dropinf rows" and due:
            due.clear()
            raise KeyboardInterrupt
        plain(thread, *args)

    def write():
        with (
            pytest.raises(KeyboardInterrupt),
            pytest.warns(UserWarning, match=f"stopped; the first {num_rows} rows are in"),
            RowWriter(PLAN, tmp_path / "rows") as writer,
        ):
            for number in range(3):
                writer.append(rows_of(number), VALID)
            writer.finish()
        found.append(os.listdir(tmp_path / "rows"))

    monkeypatch.setattr(threading.Thread, name, interrupted)
    threading.Thread(target=write, name="writes", daemon=True).start()
    for _ in range(600):
        if found:
            break
        time.sleep(0.05)
    assert found and "lock" not in found[0] and not due
