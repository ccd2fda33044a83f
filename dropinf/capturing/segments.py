"""Which row each token of a batch has, where rows are tokens or segments."""

from __future__ import annotations

import torch
from torch import Tensor


def tokens(B: int, T: int) -> tuple[Tensor, Tensor]:
    """[B, T] row of each token, and [B * T, 2] the (b, t) of each row."""
    of_token = torch.arange(B * T).reshape(B, T)
    flat = of_token.flatten()
    return of_token, torch.stack([flat // T, flat % T], 1)


def segments(segment_ids: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T] row of each position, -1 for none, and [S, 2] the (b, segment id) of each row."""
    if segment_ids.dim() != 2 or segment_ids.is_floating_point():
        raise ValueError(
            f"rows: segment_ids must be integers [B, T], got {segment_ids.dtype} "
            f"{tuple(segment_ids.shape)}"
        )
    segment_ids = segment_ids.long().cpu()
    b = torch.arange(len(segment_ids))[:, None].expand_as(segment_ids)
    real = segment_ids >= 0
    pairs = torch.stack([b[real], segment_ids[real]], 1)
    origin, rows = pairs.unique(dim=0, return_inverse=True)
    of_token = torch.full_like(segment_ids, -1)
    of_token[real] = rows
    return of_token, origin
