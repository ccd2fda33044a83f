"""collect by several ranks into one store, beside one process."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rank_runs import refused, run_alone, run_rank
from survival_cases import tensors
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from dropinf import Dropout, Plan, RowStore, collect, split
from dropinf.rows import listed, part_writer
from dropinf.world import RankError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def losses(model, batch):
    return model(batch[0]).pow(2).sum(1)


def plan_of(model):
    return Plan.make(model, Dropout(r=6))


def gather(loader, path=None, loss_fn=losses, model=None, **options):
    model = net() if model is None else model
    return collect(model, loader, loss_fn, plan_of(model), path, progress=False, **options)


def assert_same(store, whole):
    assert store.finished and listed(store.ids) == listed(whole.ids)
    assert torch.equal(store.rows, whole.rows) and torch.equal(store.valid, whole.valid)
    assert (store.origin is None) == (whole.origin is None)
    assert store.origin is None or torch.equal(store.origin, whole.origin)
    assert store.weights == whole.weights and store.plan.fingerprint == whole.plan.fingerprint
    store.verify()


# Each check runs on all ranks, with a path that they share.


def check_same(rank, world, path):
    """Rows bit by bit and in order, of uneven splits, and of ranks that have nothing."""
    for n in (11, 3):
        loader = DataLoader(tensors(n), batch_size=3)
        store = gather(split(loader), f"{path}-{n}")
        assert_same(store, gather(loader))
        assert len(store.parts) == min(world, -(-n // 3))
        assert store.proof.examples >= len(store.parts)
    batches = [(x, [f"e{i}" for i in at.tolist()]) for x, at in loader]
    assert_same(
        gather(split(batches), f"{path}-list", ids=lambda batch: batch[1]),
        gather(batches, ids=lambda batch: batch[1]),
    )


def check_tokens(rank, world, path):
    """Origins say the number of an example among those of all ranks."""
    torch.manual_seed(0)
    texts = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(torch.randint(9, (7, 3), generator=generator), batch_size=2)

    def loss(model, ids):
        return model(ids).flatten(1).square().sum(1)

    options = {"model": texts, "loss_fn": loss, "per": "token"}
    whole = gather(loader, **options)
    assert_same(gather(split(loader), path, **options), whole)


def check_sampler(rank, world, path):
    """Padding is left out; rank after rank, and by ids the rows of one process."""
    data = tensors(11)
    whole = gather(DataLoader(data, batch_size=1), check=False)
    for shuffle in (False, True):
        sampler = DistributedSampler(data, shuffle=shuffle)
        store = gather(DataLoader(data, batch_size=2, sampler=sampler), f"{path}-{shuffle}")
        assert sorted(store.ids.tolist()) == list(range(11))
        torch.testing.assert_close(store.rows, whole.rows[store.ids])
        own = list(sampler)[: len(range(rank, 11, world))]
        assert store.parts[rank].ids.tolist() == own


def changed(really):
    model = net()
    with torch.no_grad():
        model[0].weight += float(really)
    return model


def check_wrapped(rank, world, path):
    """A DDP model where a rank has no batch; a sharded one, which is refused such a share."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    loader = DataLoader(tensors(12), batch_size=12)
    whole = gather(loader, model=model)
    ddp = DistributedDataParallel(copy.deepcopy(model))
    assert_same(gather(split(loader), f"{path}-ddp", model=ddp), whole)
    sharded = fully_shard(copy.deepcopy(model))
    with refused((ValueError, RankError), "fully_shard"):
        gather(split(loader), f"{path}-few", model=sharded)
    loader = DataLoader(tensors(12), batch_size=3)
    assert_same(
        gather(split(loader), f"{path}-sharded", model=sharded), gather(loader, model=model)
    )


class Twice(Sampler):
    def __iter__(self):
        return iter([4, 2])

    def __len__(self):
        return 2


def check_refused(rank, world, path):
    loader = DataLoader(tensors(), batch_size=2)
    with refused(ValueError, "dropinf.split(loader)"):
        gather(loader, f"{path}-plain")
    last = world - 1
    kind = (ValueError, RankError)
    with refused(kind, "weights", "give all ranks the same"):
        gather(split(loader), f"{path}-weights", model=changed(rank == last))
    with refused(kind, "example 2 was given to two ranks", "" if rank == 0 else "rank 0 failed"):
        gather(DataLoader(tensors(), sampler=Twice()), f"{path}-twice")
    assert not RowStore.load(f"{path}-twice").finished
    gather(split(loader), f"{path}-there")
    with refused(FileExistsError, "exists"):
        gather(split(loader), f"{path}-there")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tensors())


def check_unlike(rank, world, path):
    """Ranks that do not give the same: one at least says so, and no store looks finished."""
    other = rank == world - 1
    loader, model = DataLoader(tensors(12), batch_size=2), net()
    batches = list(loader)

    def named(batch):
        return [f"e{i}" for i in batch[1].tolist()] if other else batch[1]

    def collected(name, given, words, **options):
        with refused((ValueError, RankError), words):
            gather(given, f"{path}-{name}", **options)
        dist.barrier()
        assert not [*Path(f"{path}-{name}").glob("*/part.json")]

    with refused((ValueError, RankError), "other plan", "give all ranks the same"):
        plan = Plan.make(model, Dropout(r=6, seed=int(other)))
        collect(model, split(loader), losses, plan, f"{path}-plan", progress=False)
    dist.barrier()
    collected("ids", split(batches), "other kind of ids", ids=named)
    collected("few", split(batches[: 4 if other else 6]), "same batches, in the same order")
    collected("turned", split(batches[:: -1 if other else 1]), "same batches, in the same order")
    collected("some", split(loader) if other else batches, "other batches", ids=lambda b: b[1])
    collected("stream", DataLoader(Stream(), batch_size=2), "does not tell which")
    if other:
        os.mkdir(f"{path}-own")
    place = f"{path}-own/rows" if other else f"{path}-rows"  # as of a disk of its own
    with refused((ValueError, RankError), "does not see", "all of them share"):
        gather(split(batches[:1]), place)
    assert not [*Path(place).glob("*/part.json")]


def check_other_batches(rank, world, path):
    """What was begun is not gone on with in batches of another size, or with fewer."""
    part_writer._FLUSH_SECONDS = 0

    def failing(model, batch):
        if 18 in batch[1]:
            raise OSError("the data set is gone")
        return losses(model, batch)

    def loader(size, n=20):
        return DataLoader(tensors(n), batch_size=size)

    options = {"ids": lambda batch: batch[1]}
    for name, given, options, cases in (
        ("list", list, {}, [(3, 40, "the first batch holds something else")]),
        ("ids", lambda made: made, options, [(3, 40, "other ids")]),
        ("few", lambda made: made, {}, [(2, 8, "counts as done"), (3, 40, "other examples")]),
    ):
        with refused((OSError, RankError), "gone"):
            gather(split(given(loader(2))), f"{path}-{name}", failing, **options)
        dist.barrier()
        options = options | {"resume": True, "check": False}
        for size, n, words in cases:
            with refused((ValueError, RankError), words):
                gather(split(given(loader(size, n))), f"{path}-{name}", **options)
            dist.barrier()
        store = gather(split(given(loader(2))), f"{path}-{name}", **options)
        assert torch.equal(store.rows, gather(loader(2)).rows)


def check_failed(rank, world, path):
    """A rank that fails ends the others; what is there is gone on with, to the same bits."""
    part_writer._FLUSH_SECONDS = 0
    loader = DataLoader(tensors(17), batch_size=2)
    whole, last = gather(loader), world - 1
    ran = []

    def failing(model, batch):
        ran.extend(batch[1].tolist())
        if rank == last and len(ran) > 3:
            raise OSError("the data set is gone")
        return losses(model, batch)

    error = (OSError, "gone") if rank == last else (RankError, f"rank {last} failed: OSError")
    with refused(*error):
        gather(split(loader), f"{path}-again", loss_fn=failing)
    dist.barrier()
    assert not RowStore.load(f"{path}-again").finished
    with refused((ValueError, RankError), "load those weights"):
        gather(split(loader), f"{path}-again", resume=True, model=changed(rank == last))
    ran.clear()

    def noting(model, batch):
        ran.extend(batch[1].tolist())
        return losses(model, batch)

    there = set(RowStore.load(f"{path}-again").ids.tolist())
    dist.barrier()
    store = gather(split(loader), f"{path}-again", loss_fn=noting, resume=True, check=False)
    assert_same(store, whole)
    assert there and not there.intersection(ran)
    assert_same(gather(split(loader), f"{path}-again", resume=True), whole)  # nothing is left
    # One that others are to complete.
    ran.clear()
    with refused(*error):
        gather(split(loader), f"{path}-begun", loss_fn=failing)


@pytest.mark.filterwarnings("ignore:RowStore.load", "ignore:collect")
def test_ranks_beside_one(tmp_path):
    """Two, and three, and what three began is completed by two and by one."""
    checks = (check_same, check_tokens, check_sampler, check_refused, check_wrapped)
    checks += check_unlike, check_other_batches, check_failed
    for world in (3, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        mp.spawn(run_rank, (world, folder, checks[:: 1 if world == 2 else 7]), nprocs=world)
    loader = DataLoader(tensors(17), batch_size=2)
    whole = gather(loader)
    begun = tmp_path / "3" / "check_failed-begun"
    mp.spawn(run_rank, (2, tmp_path, [complete]), nprocs=2)
    assert_same(RowStore.load(begun), whole)
    assert_same(gather(loader, tmp_path / "2" / "check_failed-begun", resume=True), whole)


def complete(rank, world, path):
    begun = f"{os.path.dirname(path)}/3/check_failed-begun"
    gather(split(DataLoader(tensors(17), batch_size=2)), begun, resume=True)


JOB = """
import os, signal, sys, time
import torch, torch.distributed as dist
from test_ranks import gather, losses, part_writer, split, tensors
from torch.utils.data import DataLoader

path, dies, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
dist.init_process_group("gloo")
part_writer._FLUSH_SECONDS = 0

def slow(model, batch):
    time.sleep(0.2)
    while dies == -2 and batch[1][0] not in (0, 20) and not os.path.exists(f"{path}-go"):
        time.sleep(0.05)
    if dist.get_rank() == dies and batch[1][0] in (10, 30):
        os.kill(os.getpid(), signal.SIGKILL)
    return losses(model, batch)

loader = DataLoader(tensors(40), batch_size=2)
gather(split(loader), path, slow, resume=resume, check=False, timeout=30)
"""


def launched(tmp_path, number, *arguments):
    """torchrun of so many ranks, as it runs."""
    job = tmp_path / "job.py"
    job.write_text(JOB)
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    here = os.path.dirname(__file__)
    paths = [here, os.path.dirname(here), os.path.dirname(os.path.dirname(here))]
    return subprocess.Popen(
        [sys.executable, *command, str(job), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )


@pytest.mark.more
@pytest.mark.filterwarnings("ignore:RowStore.load", "ignore:collect")
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_is_killed(tmp_path, dies):
    """Under torchrun: what is there is kept, and completed by another number of ranks."""
    path = tmp_path / "rows"
    first = launched(tmp_path, 2, path, dies, "new")
    printed = first.communicate(timeout=200)[0]
    assert first.returncode != 0, printed
    there = RowStore.load(path)
    assert not there.finished and 2 <= len(there) < 40
    again = launched(tmp_path, 3, path, -1, "resume")
    printed = again.communicate(timeout=200)[0]
    assert again.returncode == 0, printed
    assert_same(RowStore.load(path), gather(DataLoader(tensors(40), batch_size=2)))


@pytest.mark.more
@pytest.mark.filterwarnings("ignore:RowStore.load", "ignore:collect")
def test_two_launches_on_one_store(tmp_path):
    """The second one is refused by name, new or resumed; the first one goes on."""
    path = tmp_path / "rows"
    first = launched(tmp_path, 2, path, -2, "new")
    while not (path / "store.json").exists():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    for how, words in (("resume", "is being written by process"), ("new", "exists")):
        second = launched(tmp_path, 2, path, -1, how)
        printed = second.communicate(timeout=200)[0]
        assert second.returncode != 0 and words in printed, printed
    Path(f"{path}-go").touch()
    printed = first.communicate(timeout=200)[0]
    assert first.returncode == 0, printed
    assert_same(RowStore.load(path), gather(DataLoader(tensors(40), batch_size=2)))


def killed(rank, world, path):
    """Rank 1 goes without a word, in the middle; the others say its number."""
    part_writer._FLUSH_SECONDS = 0
    loader = DataLoader(tensors(40), batch_size=2)

    def slow(model, batch):
        time.sleep(0.3)
        if rank == 1 and 16 in batch[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses(model, batch)

    start = time.monotonic()
    with refused(RankError, "rank 1", "is gone"):
        gather(split(loader), path, slow, check=False)
    assert time.monotonic() - start < 60


@pytest.mark.more
@pytest.mark.filterwarnings("ignore:RowStore.load", "ignore:collect")
def test_others_say_who_is_gone(tmp_path):
    """Without a launcher that ends them."""
    assert run_alone([killed], 3, tmp_path) == [0, -signal.SIGKILL, 0]
    store = RowStore.load(tmp_path / "killed")
    assert not store.finished and len(store) >= 12
