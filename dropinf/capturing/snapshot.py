"""What a forward pass leaves changed beside its result, kept so that it can be run again alike."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Snapshot:
    """Random states and buffers from before a forward pass, so that it can be run again alike."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [(b, b.detach().clone()) for b in model.buffers()]
        self._random = _random_state()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, all is as it was then; afterwards, as it was before."""
        buffers = [(b, b.detach().clone()) for b, _ in self._buffers]
        state = _random_state()
        _put_back(self._random, self._buffers)
        try:
            yield
        finally:
            _put_back(state, buffers)


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _put_back(state: tuple[Any, ...], buffers: Sequence[tuple[Tensor, Tensor]]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    for device, cuda in enumerate(state[3]):
        torch.cuda.set_rng_state(cuda, device)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
