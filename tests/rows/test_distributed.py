"""capture on models that are shared between processes: two ranks, each with its own batch."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from cases import CASES, ScaleKernel, Transformer, assert_exact, build, true_rows
from rank_runs import run_rank
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dropinf import Dropout, Plan, capture, collect, energies, verify

RANKS = 2
MODES = ["activations", "grads"]
case = next(case for case in CASES if case.name == "transformer")


def batch_of(rank, seed=0):
    torch.manual_seed(10 * seed + rank)
    return case.batch()


def train(model, batch):
    """One ordinary step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    case.loss_fn(model, batch).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(model):
    """Its parameters, those of a sharded model put together."""
    full = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in full])


def check_capture(rank, model, wrapped):
    """Rows of `wrapped` are those of the plain model, and both still train alike."""
    plan = Plan.make(model, Dropout(r=50), exclude="*norm*.bias")
    same = Plan.make(wrapped, Dropout(r=50), exclude="*norm*.bias")
    assert same.fingerprint == plan.fingerprint
    batches = [batch_of(rank, seed) for seed in (1, 2)]
    for mode in MODES:
        with capture(wrapped, plan, mode) as tap:
            for batch in batches:
                rows = tap.rows(case.loss_fn(wrapped, batch))
                assert_exact(rows, true_rows(case, model, batch, plan))
            case.loss_fn(wrapped, batches[0])  # whose backward pass never comes
        assert all(p.requires_grad and p.grad is None for p in wrapped.parameters())

        together = (torch.cat([batch_of(r, 3)[0] for r in range(RANKS)]),)
        train(model, together)
        train(wrapped, batch_of(rank, 3))
        torch.testing.assert_close(whole(wrapped), whole(model), rtol=0, atol=1e-12)
        with torch.no_grad():
            wrapped(batches[0][0])  # leaves the parameters of a sharded root put together


def check_ddp(rank, world, path):
    for options in ({}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}):
        model, _ = build(case, torch.float64)
        wrapped = DistributedDataParallel(copy.deepcopy(model), **options)
        check_capture(rank, model, wrapped)
        if rank == 0:  # alone: a gradient that was sent would wait for the other rank
            for mode in MODES:
                plan = Plan.make(model, Dropout(r=50))
                with capture(wrapped, plan, mode) as tap:
                    tap.rows(case.loss_fn(wrapped, batch_of(rank)))
        dist.barrier()
        train(wrapped, batch_of(rank))
        mine = whole(wrapped)
        sent = mine.clone()
        dist.broadcast(sent, 0)
        assert torch.equal(mine, sent)


class Borrowing(nn.Module):
    """Uses the parameters of a module whose forward never runs."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Transformer(), nn.Linear(12, 23)
        self.body.head = nn.Identity()

    def forward(self, ids):
        return F.linear(self.body(ids), self.head.weight, self.head.bias)


class WithKernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.scale, self.head = (
            Transformer(),
            nn.Parameter(torch.ones(23)),
            nn.Linear(23, 23),
        )

    def forward(self, ids):
        return self.head(ScaleKernel.apply(self.body(ids), self.scale))


def check_collect(rank, model, wrapped):
    """Rows of a collection, which compares them with autograd on both ranks."""
    plan = Plan.make(model, Dropout(r=50))
    batches = [batch_of(rank, seed) for seed in range(1, 6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = collect(wrapped, batches, case.loss_fn, plan, progress=False)
        truth = torch.cat([true_rows(case, model, batch, plan) for batch in batches])
        assert_exact(store.rows, truth)
        assert store.proof.examples == 2 and store.proof.largest < 1e-10, store.proof
        assert verify(wrapped, batches[0], case.loss_fn, plan).layers == store.proof.layers
    assert all(p.requires_grad and p.grad is None for p in wrapped.parameters())


def check_collections(rank, world, path):
    for make in (Transformer, WithKernel):
        model, _ = build(case._replace(model=lambda make=make: make().eval()), torch.float64)
        check_collect(rank, model, DistributedDataParallel(copy.deepcopy(model)))
        wrapped = copy.deepcopy(model)
        fully_shard(wrapped.head)
        check_collect(rank, model, fully_shard(wrapped))


def check_energies(rank, world, path):
    """Those of rank 0's examples on both, also of a model that is sharded."""
    model, _ = build(case, torch.float64)
    wrapped = fully_shard(copy.deepcopy(model))
    of_both = [energies(m, [batch_of(rank)], case.loss_fn) for m in (model, wrapped)]
    fingerprints = [Plan.make(model, Dropout(r=50, energies=e)).fingerprint for e in of_both]
    gathered = [None] * RANKS
    dist.all_gather_object(gathered, fingerprints)
    assert len({f for fingerprints in gathered for f in fingerprints}) == 1, gathered


def check_fsdp(rank, world, path):
    model, _ = build(case, torch.float64)
    wrapped = copy.deepcopy(model)
    for layer in wrapped.layers:
        fully_shard(layer["attention"])
        fully_shard(layer["mlp"])
    fully_shard(wrapped.head)  # owns the parameters that its own hook swaps
    check_capture(rank, model, fully_shard(wrapped))

    model, _ = build(case._replace(model=lambda: Borrowing().eval()), torch.float64)
    check_capture(rank, model, fully_shard(copy.deepcopy(model)))


@pytest.mark.parametrize(
    "checks",
    [
        [check_ddp],
        pytest.param([check_fsdp, check_collections, check_energies], marks=pytest.mark.more),
    ],
    ids=["DistributedDataParallel", "others"],
)
def test_rows_equal_plain(tmp_path, checks):
    """Under DistributedDataParallel, and the others, in a pair of processes each."""
    mp.spawn(run_rank, (RANKS, tmp_path, checks), nprocs=RANKS)


def test_data_parallel_is_refused():
    model = nn.Linear(3, 2)
    plan = Plan.make(model, Dropout(r=3))
    with pytest.raises(ValueError, match="DataParallel"):
        Plan.make(DataParallel(model), Dropout(r=3))
    with pytest.raises(ValueError, match="DataParallel"):
        capture(DataParallel(model), plan)
