"""fit, scores, topk and self_influence by several ranks together, beside one process."""

import copy
import os
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from rank_runs import refused, run_alone
from survival_cases import tensors
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import dropinf
from dropinf import Dropout, Plan, RowStore, over_ranks, solvers
from dropinf.rows import Together
from dropinf.scoring import query_scores
from dropinf.solvers.primal import Primal
from dropinf.world import RankError

SIZES = (40, 3, 17, 8)  # coordinates of each layer


def plan_of(sizes=SIZES):
    torch.manual_seed(0)
    layers = [nn.Linear(r, 2, bias=False) for r in sizes]
    return Plan.make(nn.Sequential(*layers), Dropout(rate=0.5))


def rows_of(n, plan, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, plan.width, generator=generator)


def stores(path, rank, plan):
    """In memory and on the disk, of many parts and of fewer rows than ranks; some are invalid."""
    yield RowStore(rows_of(61, plan), plan, valid=torch.arange(61) % 7 != 3)
    if rank == 0:
        made = RowStore(rows_of(5, plan), plan, ids=range(5))
        made.save(path)
        for start in range(5, 300, 59):
            made = RowStore.load(path)
            made.append(rows_of(59, plan, start), ids=range(start, start + 59))
    dist.barrier()
    yield RowStore.load(path)
    few = RowStore(rows_of(3, plan), plan, valid=torch.tensor([False, True, True]))
    yield few.to("cpu")
    yield RowStore(rows_of(61, plan), plan, dtype=torch.int8)


def same_everywhere(found):
    """The same bits on all ranks."""
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, found)
    for other in of_ranks:
        assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(found, other))


def assert_near(found, alone, bound=2e-5):
    """To rounding, of the largest."""
    assert found.dtype == alone.dtype and torch.equal(found.isnan(), alone.isnan())
    found, alone = found.nan_to_num(0), alone.nan_to_num(0)
    assert (found - alone).abs().max() <= bound * alone.abs().max()


MADE = {
    "cholesky": solvers.Cholesky,
    "float64": lambda: solvers.Cholesky(dtype=torch.float64),
    "bounded": lambda: solvers.Cholesky({"*": 0.2}, max_bytes=24_000),
    "full": solvers.Full,
    "eigen": solvers.Eigen,
    "rank": lambda: solvers.Eigen(rank=3, max_bytes=200_000),
    "diagonal": solvers.Diagonal,
    "cosine": lambda: solvers.Identity(cosine=True),
}


def all_of(queries, store, solver, k):
    """What is scored, in tensors; within few bytes, which takes long, what it is made of."""
    if solver.max_bytes:
        return [solver.solve(queries.rows)]
    cosine = isinstance(solver, solvers.Identity)
    scored = dropinf.scores(queries, store, solver, relative=not cosine)
    by_layer = dropinf.scores(queries, store, solver, by="layer")
    own = dropinf.self_influence(store, solver)
    top = dropinf.topk(queries, store, solver, k, ids=True)
    least = dropinf.topk(queries, store, solver, k, largest=False)
    return [scored, by_layer, own, *top, *least]


def assert_same_layers(together, alone, solved):
    """Of a Cholesky: forms, and bit by bit the solutions in the n x n form, which a rank made."""
    for one, other, block in zip(
        *(getattr(solver, "layers", ()) for solver in (together, alone)), alone.plan.blocks
    ):
        assert (one.name, one.form, one.r) == (other.name, other.form, other.r)
        if one.form == "n x n" and len(alone.layers) > 1:
            assert torch.equal(*(x[:, block.entries] for x in solved))


def check_results(rank, world, path):
    plan = plan_of()
    queries = RowStore(rows_of(4, plan, 9), plan, valid=torch.tensor([1, 1, 0, 1]).bool())
    for number, store in enumerate(stores(path, rank, plan)):
        names = MADE if number < 2 else ("cholesky", "eigen")
        for name in names:
            alone = MADE[name]().fit(store)
            with over_ranks():
                together = MADE[name]().fit(store)
                k = min(5, int(store.valid.sum()))
                found = all_of(queries, store, together, k)
            assert together.num_rows == alone.num_rows
            same_everywhere(found)
            truth = all_of(queries, store, alone, k)
            for one, other in zip(found, truth, strict=True):
                if one.dtype == torch.int64:
                    assert torch.equal(one, other), name
                else:
                    assert_near(one, other)
            solved = together.solve(queries.rows), alone.solve(queries.rows)
            if name in ("eigen", "rank", "cosine"):
                assert torch.equal(*solved), name  # nothing is added up over ranks
            assert_same_layers(together, alone, solved)


def check_ties(rank, world, path):
    """Of equal scores the earlier row comes first, whichever rank has it."""
    plan = plan_of()
    rows = torch.ones(7, plan.width)
    rows[3] = 2
    store, queries = RowStore(rows, plan), RowStore(rows[:1], plan)
    with over_ranks():
        solver = solvers.Identity().fit(store)
        for largest, wanted in ((True, [3, 0, 1, 2, 4, 5]), (False, [0, 1, 2, 4, 5, 6])):
            found = dropinf.topk(queries, store, solver, 6, largest=largest)[1]
            assert found.tolist() == [wanted]


def check_hard_layers(rank, world, path):
    """Rows of few directions, beyond the range of their squares, all zero; a raised damping."""
    warnings.simplefilter("ignore")  # in this process, which the checks have for their own
    plan = plan_of()
    rows = rows_of(90, plan)
    first, second, third, last = plan.blocks
    rows[:, first.entries] = rows[:, first.entries][:, :2] @ torch.ones(2, first.r)
    rows[:, second.entries] *= 1e-22
    rows[:, third.entries] = 0
    store = RowStore(rows, plan)
    for made in (
        lambda: solvers.Cholesky(1e-9),
        lambda: solvers.Cholesky(1e-9, dtype=torch.float32),
        lambda: solvers.Cholesky(1e-9, max_bytes=100_000),
    ):
        alone = made().fit(store)
        with over_ranks():
            together = made().fit(store)
        forms = [(one.form, one.retries, one.exponent) for one in alone.layers]
        assert forms == [(one.form, one.retries, one.exponent) for one in together.layers]
        retries = 4 if alone.dtype else 0
        assert forms == [("r x r", retries, 0), ("r x r", 0, -71), ("zero", 0, 0), ("r x r", 0, 0)]
        solved = together.solve(store.rows), alone.solve(store.rows)
        same_everywhere([solved[0]])
        for block in (second, third, last):
            assert_near(*(one[:, block.entries] for one in solved))
    found = [(len(group.blocks), group.setting.dtype) for group in alone._groups]
    assert found == [(4, torch.float32), (1, torch.float64)]  # one was left for more digits
    rows[:, last.entries] = 1
    with refused((ValueError, RankError), "is singular at damping=0"), over_ranks():
        solvers.Cholesky(0.0).fit(RowStore(rows, plan))


def check_models(rank, world, path):
    """A model that is wrapped or sharded, from its batches to the largest scores."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    plan = Plan.make(model, Dropout(r=6))
    loader = DataLoader(tensors(24), batch_size=2)  # as many batches on each of 2 to 4 ranks

    def losses(model, batch):
        return model(batch[0]).pow(2).sum(1)

    def collected(model, loader, path=None):
        return dropinf.collect(model, loader, losses, plan, path, progress=False)

    whole = collected(model, loader)
    truth = dropinf.topk(whole, whole, solvers.Cholesky().fit(whole), 3)
    for kind, wrap in (("ddp", DistributedDataParallel), ("sharded", fully_shard)):
        wrapped = wrap(copy.deepcopy(model))
        store = collected(wrapped, dropinf.split(loader), f"{path}-{kind}")
        queries = collected(wrapped, loader)
        with over_ranks():
            values, indices = dropinf.topk(queries, store, solvers.Cholesky().fit(store), 3)
        assert_near(values, truth[0])
        assert torch.equal(indices, truth[1])


def check_refused(rank, world, path):
    plan, last = plan_of(), world - 1
    store, queries = RowStore(rows_of(20, plan), plan), RowStore(rows_of(2, plan), plan)
    other = RowStore(rows_of(20, plan, 1), plan)
    passes = solvers.CG().fit(store)
    with over_ranks():
        found = dropinf.scores(queries, store, passes)
    assert_near(found, dropinf.scores(queries, store, passes))

    def fit_other():
        solvers.Cholesky().fit(other if rank == last else store)

    def fit_more():
        solvers.Cholesky(0.1 + (rank == last)).fit(store)

    def score_other():
        dropinf.scores(other if rank == last else queries, store, passes)

    fitted = solvers.Cholesky().fit(other if rank == last else store)

    def score_with_other():
        dropinf.scores(queries, store, fitted)

    def take_other():
        dropinf.topk(queries, store, passes, k=1 + (rank == last))

    def one_alone():
        if rank == 0:
            dropinf.self_influence(store, passes)

    def nested():
        with over_ranks():
            pass

    both = (ValueError, RankError)
    for call, kind, words in (
        (lambda: solvers.CG().fit(store), ValueError, "CG.fit: ranks do not fit it together"),
        (fit_other, both, "has other rows than rank 0"),
        (fit_more, both, "has other arguments than rank 0"),
        (score_other, both, "number of rows of the queries than rank 0"),
        (score_with_other, both, "has other rows of the fit than rank 0"),
        (take_other, both, "has other arguments than rank 0"),
        (one_alone, RankError, "make the same calls in the same order"),
        (nested, (RuntimeError, RankError), "leave out the inner one"),
    ):
        with refused(kind, words), over_ranks():
            call()
        dist.barrier()
    with pytest.raises(ValueError, match="must be a positive number, got 0"), over_ranks(0):
        pass
    assert_near(found, dropinf.scores(queries, store, passes))  # outside, it is as it was


def check_lost(rank, world, path):
    """A rank that fails or does nothing ends the others, with its number."""
    plan, last = plan_of(), world - 1
    store = RowStore(rows_of(20, plan), plan)
    error = (OSError, "full") if rank == last else (RankError, f"rank {last} failed: OSError")
    with refused(*error), over_ranks():
        solver = solvers.Cholesky().fit(store)
        if rank == last:
            raise OSError("the disk is full")
        dropinf.self_influence(store, solver)
    dist.barrier()
    start = time.monotonic()
    silent = () if rank == last else (f"rank {last} gave no sign of life for 1.5 seconds",)
    with refused(RankError, "no sign of life", *silent), over_ranks(timeout=1.5):
        if rank == last:
            time.sleep(3)
        solvers.Cholesky().fit(store)
    assert time.monotonic() - start < 20


def test_one_process(tmp_path):
    """Without torch.distributed it does nothing."""
    plan = plan_of()
    store = RowStore(rows_of(20, plan), plan)
    with over_ranks():
        together = solvers.Cholesky().fit(store)
    assert torch.equal(together.solve(store.rows), solvers.Cholesky().fit(store).solve(store.rows))
    with pytest.raises(RuntimeError, match="leave out the inner one"), over_ranks(), over_ranks():
        pass


def die(*given):
    os.kill(os.getpid(), signal.SIGKILL)


def lost_in(rank, world, where):
    """The last rank goes without a word; the others say its number."""
    plan, last = plan_of(), world - 1
    store = RowStore(rows_of(50, plan), plan)
    start = time.monotonic()
    with refused(RankError, f"rank {last}", "is gone"), over_ranks():
        if rank == last and where == "sum":
            Primal.gram = die
        if rank == last and where == "exchange":
            Together._sent = die
        solver = solvers.Cholesky().fit(store)
        if rank == last:
            query_scores._largest_of = die
        dropinf.topk(store, store, solver, 3)
    assert time.monotonic() - start < 30


def killed_in_sum(rank, world, path):
    lost_in(rank, world, "sum")


def killed_in_exchange(rank, world, path):
    lost_in(rank, world, "exchange")


def killed_in_topk(rank, world, path):
    lost_in(rank, world, "topk")


def killed_between(rank, world, path):
    """Found at once by the next call, before the last rank could come to it."""
    with over_ranks():
        pass
    if rank == world - 1:
        die()
    start = time.monotonic()
    with refused(RankError, f"rank {world - 1}", "is gone"), over_ranks():
        pass
    assert time.monotonic() - start < 30


@pytest.mark.more
def test_killed_between_two_calls(tmp_path):
    assert run_alone([killed_between], 3, tmp_path) == [0, 0, -signal.SIGKILL]


RESULTS = check_results, check_ties, check_hard_layers, check_models


@pytest.mark.parametrize(
    ("world", "checks"),
    [
        (2, (*RESULTS, check_refused, check_lost, killed_in_topk)),
        (3, (*RESULTS, killed_in_exchange)),
        pytest.param(4, (*RESULTS, check_lost, killed_in_sum), marks=pytest.mark.more),
    ],
    ids=["two", "three", "four"],
)
def test_ranks_beside_one(world, checks, tmp_path):
    """The last rank is killed in the end, in a topk, in what is sent, in a sum over its rows."""
    assert run_alone(checks, world, tmp_path) == [*[0] * (world - 1), -signal.SIGKILL]
