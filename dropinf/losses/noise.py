"""Random numbers of each example: a function of what is in it and of a seed, and of nothing else.

A generator's next numbers would depend on the batches, and on how often the loss function is
called: `collect` calls it again to check rows. What a batch has of an example depends on the
others too, which it is padded for; so padding does not count, where it is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of what has no part in the loss
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
        for t, real in _tensors(batch):
            if t.dim() and len(t) in (B, inputs * B) and not t.is_complex():
                found = True
                content = _content(t.detach().to(device), real)
                for own in content.reshape(len(t) // B, B):
                    self._key = _mixed(self._key + own)
        if not found:
            raise ValueError(
                f"sampled: the batch, a {type(batch).__name__}, holds no tensor of {B} examples "
                "that labels could be drawn for; give batches of tensors"
            )

    def uniform(self, places: Tensor, each: int = 1) -> Tensor:
        """[B, n, each] float64 in (0, 1), of places [B, n] or [n] int64 in the examples."""
        # 53 bits, and half of the last one so that 0 is not among them.
        raw = self._raw(places, each)
        return ((raw >> 11 & (1 << 53) - 1).double() + 0.5) * 2.0**-53

    def signs(self, places: Tensor, each: int = 1) -> Tensor:
        """[B, n, each] float32 of 1 and -1."""
        return torch.where(self._raw(places, each) < 0, -1.0, 1.0)

    def _raw(self, places: Tensor, each: int) -> Tensor:
        of_places = _mixed(self._key[:, None] + (places + 1) * _GOLDEN)
        at = torch.arange(1, each + 1, device=self._key.device)
        return _mixed(of_places[..., None] + at * _GOLDEN)


def _content(t: Tensor, real: Tensor | None) -> Tensor:
    """[len(t)] int64: of the numbers that are real, each with how many there are before it.

    A sum modulo 2^64 of mixed numbers: in any order the same.
    """
    own = _bits(t).flatten(1) if t.dim() > 1 else _bits(t)[:, None]
    if real is None:
        at = torch.arange(own.shape[1], device=own.device)
        return _mixed(own + _mixed((at + 1) * _GOLDEN)).sum(1)
    real = real.to(own.device).reshape(len(own), -1)
    each = own.shape[1] // max(1, real.shape[1])
    own = own.unflatten(1, (real.shape[1], each))
    at = (real.cumsum(1) - 1)[..., None] * each + torch.arange(each, device=own.device)
    return (_mixed(own + _mixed((at + 1) * _GOLDEN)) * real[..., None]).flatten(1).sum(1)


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


def _tensors(batch: Any, real: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The tensors in a batch, and which of their numbers are no padding: bool of their first two
    dimensions, as those are of `real` if they have its sizes; None for all."""
    if isinstance(batch, Tensor):
        belongs = real is not None and batch.shape[:2] == real.shape
        yield batch, real if belongs else None
    elif isinstance(batch, Mapping):
        labels, mask = batch.get("labels"), batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask != 0
        else:
            real, mask = _until_last_label(labels), None
        for name in sorted(batch, key=str):
            if name == "labels" and isinstance(labels, Tensor):
                yield labels, _counted(labels)
            elif labels is not None and str(name).startswith("decoder_"):
                continue  # made of the labels, and padded without a mask
            elif name != "attention_mask" or mask is None:
                yield from _tensors(batch[name], real)
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        if len(batch) == 2 and isinstance(batch[0], Tensor):  # as of `target_of`
            real = _until_last_label(batch[1])
            yield from _tensors(batch[0], real)
            if isinstance(batch[1], Tensor):
                yield batch[1], _counted(batch[1])
            else:
                yield from _tensors(batch[1])
        else:
            for part in batch:
                yield from _tensors(part, real)


def _counted(labels: Tensor) -> Tensor | None:
    return None if labels.is_floating_point() or labels.is_complex() else labels != IGNORED


def _until_last_label(labels: Any) -> Tensor | None:
    """[B, T] of labels [B, T]: without a mask, padding can only be what follows."""
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return None
    counted = _counted(labels)
    return None if counted is None else counted.flip(1).cummax(1).values.flip(1)
