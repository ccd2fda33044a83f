"""split: a rank's share at batch boundaries."""

import warnings

import pytest
import torch
from survival_cases import tensors
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from dropinf import Dropout, Plan, collect, split


def losses(net, batch):
    return net(batch[0]).pow(2).sum(1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("n", [0, 1, 4, 11, 13])
def test_shares_follow_each_other(n, world_size):
    """Each batch once, in order, none cut; of one kind no rank has two more than another."""
    loader = DataLoader(tensors(n)) if n == 0 else DataLoader(tensors(n), batch_size=3)
    whole = [batch[1].tolist() for batch in loader]
    for given in (loader, list(loader)):
        ranks = [split(given, rank=r, world_size=world_size) for r in range(world_size)]
        shares = [[batch[1].tolist() for batch in share] for share in ranks]
        assert [batch for share in shares for batch in share] == whole
        assert [len(share) for share in ranks] == [len(share) for share in shares]
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1 and sizes[0] == max(sizes)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_rows_of_a_share(num_workers):
    """Bits of one process's, known by their positions in the whole data set."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    plan = Plan.make(net, Dropout(r=6))
    loader = DataLoader(tensors(11), batch_size=3, num_workers=num_workers)
    whole = collect(net, loader, losses, plan, progress=False)
    for rank in range(2):
        share = split(loader, rank=rank, world_size=2)
        for _ in range(2):  # it can be gone through again
            store = collect(net, share, losses, plan, progress=False)
            assert store.ids.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10]][rank]
            assert torch.equal(store.rows, whole.rows[store.ids])


def test_options_of_the_loader_stay():
    class Own(DataLoader):
        pass

    loader = Own(tensors(5), batch_size=2, collate_fn=lambda found: [i for _, i in found])
    share = split(loader, rank=1, world_size=2)
    assert type(share) is Own and [[int(i) for i in batch] for batch in share] == [[4]]
    assert len(loader) == 3  # as it was


def test_what_is_dropped_is_said():
    """Beside one process, too, of a share; and of a sampler that gives all ranks as many."""

    def dropping(sampler):
        return DataLoader(tensors(11), batch_size=3, sampler=sampler, drop_last=True)

    net = nn.Linear(5, 2)
    plan = Plan.make(net, Dropout(r=6))
    share = split(DataLoader(tensors(11), batch_size=4, drop_last=True), rank=0, world_size=2)
    whole = DataLoader(tensors(11), sampler=DistributedSampler(tensors(11), 3, 0, drop_last=True))
    both = dropping(DistributedSampler(tensors(11), 2, 0, drop_last=True))
    for loader, left in ((share, 3), (whole, 2), (both, 5)):
        with pytest.warns(UserWarning, match=f"leaves the last {left} of 11 examples"):
            collect(net, loader, losses, plan, progress=False)
    even = DataLoader(tensors(11), batch_size=4, sampler=DistributedSampler(tensors(11), 3, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(net, even, losses, plan, progress=False)


def test_a_time_that_is_none():
    net = nn.Linear(5, 2)
    for timeout in (0, -1, float("nan"), None):
        with pytest.raises(ValueError, match="collect: timeout must be a positive number, got"):
            collect(net, [], losses, Plan.make(net, Dropout(r=6)), timeout=timeout)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tensors())


class Uncounted:
    def __iter__(self):
        return iter([[0, 1]])


def test_what_is_refused():
    data = tensors()
    shared = split(DataLoader(data), rank=0, world_size=2)
    sampled = DataLoader(data, sampler=DistributedSampler(data, 2, 0))
    cases = [
        (data, TypeError, "a Dataset gives examples"),
        (iter(()), TypeError, "needs a DataLoader or a list"),
        (DataLoader(Stream()), TypeError, "cannot be counted"),
        (DataLoader(data, batch_size=None), TypeError, "cannot be counted"),
        (DataLoader(data, batch_sampler=Uncounted()), TypeError, "Uncounted does not say"),
        (DataLoader(data, shuffle=True), ValueError, "shuffle=False"),
        (shared, ValueError, "share already"),
        (sampled, ValueError, "share already"),
    ]
    for given, kind, words in cases:
        with pytest.raises(kind, match=f"split: .*{words}"):
            split(given, rank=0, world_size=2)
    with pytest.raises(ValueError, match="rank must be 0 to 1, got 2"):
        split(DataLoader(data), rank=2, world_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(split(DataLoader(data))) == len(data)  # without a process group: all of it
