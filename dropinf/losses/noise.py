"""Random numbers of each example: a function of what is in it and of a seed, and of nothing else.

A generator's next numbers would depend on the batches, and on how often the loss function is
called: `collect` calls it again to check rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the step of splitmix64, as a signed number
_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Noise:
    """Random numbers for the B examples of a batch."""

    def __init__(
        self, batch: Any, B: int, seed: int, device: torch.device, inputs: int = 1
    ) -> None:
        """From every tensor in the batch that holds B examples; or B pairs, with two inputs.

        Raises:
            ValueError: there is none.
        """
        self._key, found = torch.full((B,), seed, dtype=torch.int64, device=device), False
        for t in _tensors(batch):
            if t.dim() and len(t) in (B, inputs * B) and not t.is_complex():
                found = True
                own = _bits(t.detach().to(device)).reshape(len(t) // B, B, t[0].numel())
                own = own.transpose(0, 1).flatten(1)
                at = torch.arange(1, own.shape[1] + 1, device=device)
                # A sum modulo 2^64 of mixed numbers: in any order the same.
                self._key = _mixed(self._key + _mixed(own + _mixed(at * _GOLDEN)).sum(1))
        if not found:
            raise ValueError(
                f"sampled: the batch, a {type(batch).__name__}, holds no tensor of {B} examples "
                "that labels could be drawn for; give batches of tensors"
            )

    def uniform(self, k: int) -> Tensor:
        """[B, k] float64 in (0, 1)."""
        # 53 bits, and half of the last one so that 0 is not among them.
        return ((self._raw(k) >> 11 & (1 << 53) - 1).double() + 0.5) * 2.0**-53

    def signs(self, k: int) -> Tensor:
        """[B, k] float32 of 1 and -1."""
        return torch.where(self._raw(k) < 0, -1.0, 1.0)

    def _raw(self, k: int) -> Tensor:
        at = torch.arange(1, k + 1, device=self._key.device)
        return _mixed(self._key[:, None] + at * _GOLDEN)


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele, Lea and Flood 2014), in arithmetic modulo 2^64."""
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros."""
    return x >> by & (1 << 64 - by) - 1


def _bits(t: Tensor) -> Tensor:
    t = t.contiguous()
    return (t.view(_INTS[t.element_size()]) if t.is_floating_point() else t).to(torch.int64)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for name in sorted(batch, key=str):
            yield from _tensors(batch[name])
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        for part in batch:
            yield from _tensors(part)
