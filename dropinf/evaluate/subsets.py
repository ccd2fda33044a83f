"""Which examples a model is trained on anew: random halves, all but some."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from dropinf.compression import draw
from dropinf.evaluate.estimates import kind


def halves(n: int, count: int, seed: int = 0) -> Tensor:
    """[count, n] bool: random halves of n examples, each of n // 2, the same on every machine.

    As `random_subsets`; the first ones stay as they are where more are asked for.

        members = dropinf.evaluate.halves(100, 50)  # [50, 100] bool
    """
    _check("halves", n=(n, 2), count=(count, 1), seed=(seed, 0))
    return _drawn(n, n // 2, count, seed)


def random_subsets(n: int, size: int, count: int, seed: int = 0) -> Tensor:
    """[count, n] bool: `count` random subsets, `size` of n examples each, without replacement.

    Number i is drawn by the counter-based Philox stream keyed by (seed, i), in integers alone, so
    that it is the same on every machine and for every count. For what taking out k at random does:
    `random_subsets(n, n - k, count)`.

        members = dropinf.evaluate.random_subsets(100, 90, 20)  # [20, 100] bool

    Raises:
        ValueError: a number is out of range.
    """
    _check("random_subsets", n=(n, 1), size=(size, 1), count=(count, 1), seed=(seed, 0))
    if size > n:
        raise ValueError(f"random_subsets: size must be 1 to n, {n}, got {size}")
    return _drawn(n, size, count, seed)


def without(n: int, indices: Tensor) -> Tensor:
    """[h, n] bool: all of n examples but those of each row of `indices`.

        members = dropinf.evaluate.without(100, torch.arange(100))  # [100, 100] bool

    Args:
        n: the number of training examples.
        indices: [h, k] int64, as of `dropinf.topk`; [h] leaves out one each, as `torch.arange(n)`
            does for leave-one-out.

    Raises:
        ValueError: an index is not an example, or nothing would be left.
    """
    _check("without", n=(n, 1))
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"without: indices must be a tensor of int64, got {kind(indices)}")
    indices = indices.detach().cpu().long()
    if indices.dim() == 1:
        indices = indices[:, None]
    if indices.dim() != 2 or not indices.numel():
        raise ValueError(f"without: indices must be [h, k] or [h], got {list(indices.shape)}")
    if indices.min() < 0 or indices.max() >= n:
        raise ValueError(
            f"without: indices must be 0 to {n - 1}, got {int(indices.min())} to "
            f"{int(indices.max())}; leave out the rows of invalid queries, which have 2^63 - 1"
        )
    members = torch.ones(len(indices), n, dtype=torch.bool).scatter_(1, indices, False)
    if not members.any(1).all():
        raise ValueError(f"without: nothing would be left of {n} examples; give fewer indices")
    return members


def _drawn(n: int, size: int, count: int, seed: int) -> Tensor:
    members = torch.zeros(count, n, dtype=torch.bool)
    for number, row in enumerate(members):
        row[torch.from_numpy(draw(n, size, seed, number))] = True
    return members


def _check(op: str, **values: tuple[int, int]) -> None:
    """Each (value, least) is an integer of at least that."""
    for name, (value, least) in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or not least <= value < 2**63:
            raise ValueError(f"{op}: {name} must be an integer of at least {least}, got {value!r}")
