"""Small models whose rows must be the gradients of the losses, whatever they do with the batch.

Each is a kind of thing that a capture cannot know of data: functions along the batch, setters,
hooks, writes through views, functions of one's own, losses in another order, parameters met in ways
that no rule has. Row b is the gradient of losses[b], and nothing else is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Exact(NamedTuple):
    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, ...]]
    loss_fn: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]


class Own(nn.Module):
    """A forward function, and the parameters and layers that it uses."""

    def __init__(self, function, **own):
        super().__init__()
        self.function = function
        for name, value in own.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            else:
                setattr(self, name, nn.Parameter(value))

    def forward(self, *inputs):
        return self.function(self, *inputs)


def every_output(model, batch):
    """A loss to which every element of an example's output adds in another way."""
    y = model(*batch)
    weight = torch.linspace(0.5, 1.5, max(1, y[0].numel())).to(y).view(y.shape[1:])
    return (y * weight).square().flatten(1).sum(1)


def collection():
    """A list of cases, and the function that adds one to it.

    `case(name, function, *shapes, **own)` is of `function(model, *batch)`: a batch of random
    tensors of these shapes, or of ids below `ids`; `own` makes what the model has.
    """
    cases: list[Exact] = []

    def case(name, function, *shapes, loss_fn=every_output, ids=0, **own):
        def model():
            return Own(function, **{key: make() for key, make in own.items()})

        def batch():
            sizes = shapes or [(4, 3)]
            return tuple(torch.randint(ids, s) if ids else torch.randn(s) for s in sizes)

        cases.append(Exact(name, model, batch, loss_fn))

    return cases, case


def linear(*widths, **options):
    return lambda: nn.Linear(*widths, **options)


def param(*shape):
    return lambda: torch.randn(shape)


def two(middle):
    """Two layers, [4, 3] -> [4, 4] -> [4, 2], with something between."""
    return lambda s, x: s.k(middle(s.l(x).tanh()))


LAYERS = {"l": linear(3, 4), "k": linear(4, 2)}
# An order of the examples.
ORDER = torch.tensor([2, 0, 3, 1])
