"""Random numbers of each example: a function of what is in it and of a seed, and of nothing else.

A generator's next numbers would depend on the batches, and on how often the loss function is
called: `collect` calls it again to check rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dropinf.losses.likelihoods import IGNORED

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the step of splitmix64, as a signed number
_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Noise:
    """Random numbers for the B examples of a batch.

    Padding does not count: of tensors [B, T, ...], positions where the batch's "attention_mask"
    [B, T] is 0, and everywhere labels that are ignored. A text has the same numbers at its tokens
    on whichever side, and however far, it is padded.
    """

    def __init__(
        self,
        batch: Any,
        B: int,
        seed: int,
        device: torch.device,
        inputs: int = 1,
        positions: int = 1,
    ) -> None:
        """From every tensor in the batch that holds B examples; or B pairs, with two inputs.

        `positions` are those of the outputs that the numbers are for, [B, positions, ...].

        Raises:
            ValueError: there is none.
        """
        self._key, found = torch.full((B,), seed, dtype=torch.int64, device=device), False
        real, ranks = _real(batch, (B, inputs * B), device)
        for t in _tensors(batch):
            if not (t.dim() and len(t) in (B, inputs * B)) or t.is_complex():
                continue
            found = True
            t = t.detach().to(device)
            own = _bits(t).reshape(len(t), -1)  # [N, k]
            counts = own != IGNORED if not t.is_floating_point() else torch.ones_like(own).bool()
            at = torch.arange(1, own.shape[1] + 1, device=device).expand_as(own)
            if real is not None and ranks is not None and t.shape[:2] == real.shape:
                each = own.shape[1] // t.shape[1]  # numbers at a position
                counts = counts & real.repeat_interleave(each, 1)
                at = _numbered(ranks, each)
            # The second input of a pair is behind the first.
            at = at + (torch.arange(len(t), device=device) // B << 32)[:, None]
            # A sum modulo 2^64 of mixed numbers: in any order the same.
            mixed = _mixed(own + _mixed(at * _GOLDEN)).where(counts, 0).sum(1)
            self._key = _mixed(self._key + mixed.reshape(-1, B).sum(0))
        if not found:
            raise ValueError(
                f"sampled: the batch, a {type(batch).__name__}, holds no tensor of {B} examples "
                "that labels could be drawn for; give batches of tensors"
            )
        # Of outputs at each position, or at each but the last.
        fits = ranks is not None and len(ranks) == B and 0 <= ranks.shape[1] - positions <= 1
        self._positions, self._ranks = positions, ranks[:, :positions] if fits else None

    def uniform(self, k: int) -> Tensor:
        """[B, k] float64 in (0, 1)."""
        # 53 bits, and half of the last one so that 0 is not among them.
        return ((self._raw(k) >> 11 & (1 << 53) - 1).double() + 0.5) * 2.0**-53

    def signs(self, k: int) -> Tensor:
        """[B, k] float32 of 1 and -1."""
        return torch.where(self._raw(k) < 0, -1.0, 1.0)

    def _raw(self, k: int) -> Tensor:
        at = torch.arange(1, k + 1, device=self._key.device)
        if self._ranks is not None and k % self._positions == 0:
            at = _numbered(self._ranks, k // self._positions)
        return _mixed(self._key[:, None] + at * _GOLDEN)


def _real(
    batch: Any, sizes: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """[N, T] which positions are no padding, and the rank of each: those that are none first."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) not in sizes:
        return None, None
    real = mask.to(device) != 0
    order = real.cumsum(1) - 1
    return real, order.where(real, real.sum(1, keepdim=True) + (~real).cumsum(1) - 1)


def _numbered(ranks: Tensor, each: int) -> Tensor:
    """[N, T * each] from 1 on: of `each` numbers at the position of each rank."""
    return (ranks[:, :, None] * each + torch.arange(1, each + 1, device=ranks.device)).flatten(1)


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
