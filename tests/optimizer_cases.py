"""Models that torch's optimizers have trained, and their steps on each example, in float64."""

import copy

import torch
from torch import nn

OPTIMIZERS = {
    "Adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "Adam, few steps": (torch.optim.Adam, {"betas": (0.8, 0.9), "eps": 1e-3, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "Nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}
LR = 1e-3


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().sum(1)


def trained(kind, **more):
    """A model after six steps, its optimizer and data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    data = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    make, options = OPTIMIZERS[kind]
    optimizer = make(model.parameters(), lr=LR, **options, **more)
    for b in range(6):
        optimizer.zero_grad()
        loss_fn(model, (data[0][b : b + 3], data[1][b : b + 3])).sum().backward()
        optimizer.step()
    return model, optimizer, data


def steps(model, optimizer, data):
    """(θ - θ') / lr of one step on each example alone: name -> [n, *shape]."""
    rows = {name: [] for name, _ in model.named_parameters()}
    for b in range(len(data[0])):
        own = copy.deepcopy(model)
        mine = type(optimizer)(own.parameters())
        mine.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        mine.zero_grad()
        loss_fn(own, (data[0][b : b + 1], data[1][b : b + 1])).sum().backward()
        mine.step()
        decay = 0.1 if isinstance(optimizer, torch.optim.AdamW) else 0.0
        after = dict(own.named_parameters())
        for name, p in model.named_parameters():
            rows[name].append(((p * (1 - LR * decay) - after[name]) / LR).detach())
    return {name: torch.stack(some) for name, some in rows.items()}
