"""Batches whose rows hold several examples each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def refuse_packed(batch: Any) -> None:
    """Refuse rows of the batch that hold several examples each.

    A loss of each example could not be told there.

        dropinf.losses.refuse_packed({"input_ids": ids})

    Raises:
        ValueError: position_ids [B, T] begin anew within a row, or the batch has what packs it.
    """
    if not isinstance(batch, Mapping):
        return
    packed = any(name in batch for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"))
    positions = batch.get("position_ids")
    if positions is not None and positions.dim() == 2:
        mask = batch.get("attention_mask")
        real = torch.ones_like(positions) if mask is None else mask
        both = (real[:, 1:] * real[:, :-1]).bool()
        packed |= bool(((positions[:, 1:] <= positions[:, :-1]) & both).any())
    if packed:
        raise ValueError(
            "loss_fn: several examples are packed into one row of the batch (position_ids begin "
            "anew, or seq_idx or cu_seq_lens are there), so that there is no loss for each; use a "
            "data collator that pads, or dropinf.collect(per='segment')"
        )
