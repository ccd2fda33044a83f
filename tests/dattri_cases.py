"""A small network with dattri's tasks for it, which the tests of the dattri adapter share."""

import torch
import torch.nn.functional as F
from dattri.task import AttributionTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

N, M = 40, 6


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def loader(n, batch_size=16, **options):
    generator = torch.Generator().manual_seed(n)
    data = TensorDataset(
        torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator)
    )
    return DataLoader(data, batch_size=batch_size, **options)


def checkpoints():
    return [{k: v * c for k, v in network().state_dict().items()} for c in (1.0, 1.5)]


def own_losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def own_margins(model, batch):
    """log(p / (1 - p)) of the true class."""
    log_p = F.log_softmax(model(batch[0]), 1).gather(1, batch[1][:, None])[:, 0]
    return log_p - torch.log1p(-log_p.exp())


def as_dattris(model, losses, batch_of_one=True):
    """(params, data) -> scalar of one example, which dattri's functions are."""

    def function(params, data):
        x, label = data if batch_of_one else (t.unsqueeze(0) for t in data)
        return losses(lambda x: torch.func.functional_call(model, params, x), (x, label)).sum()

    return function


def task_of(model, states=None, batch_of_one=True, target=None):
    return AttributionTask(
        as_dattris(model, own_losses, batch_of_one),
        model,
        states or model.state_dict(),
        None if target is None else as_dattris(model, target, batch_of_one),
    )
