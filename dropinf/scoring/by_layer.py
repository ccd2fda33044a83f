"""Scores layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dropinf.rows import RowStore


def layer_products(solved: Tensor, store: RowStore) -> Tensor:
    """[m, R] -> [L, m, n]: each layer's part of the products with every row, valid or not."""
    blocks = store.plan.blocks
    result = solved.new_empty(len(blocks), len(solved), len(store))
    for start, chunk in store.chunks():
        rows = chunk.to(solved)  # its dtype and device
        for block, part in zip(blocks, result, strict=True):
            to = part[:, start : start + len(rows)]
            torch.mm(solved[:, block.entries], rows[:, block.entries].T, out=to)
    return result
