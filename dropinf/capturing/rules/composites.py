"""Functions that hide others inside, written in terms of those.

Under a capture they run with the mode on, so that what is inside meets its parameters there.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropinf.capturing.rules.recurrent import RECURRENT


def opened(func: Any) -> Callable:
    """A Python function of torch, with its question for overrides answered no.

    Called under a TorchFunctionMode, the mode then sees the functions inside of it.
    """
    questions = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    return types.FunctionType(
        func.__code__,
        {**func.__globals__, **dict.fromkeys(questions, lambda *tensors: False)},
        argdefs=func.__defaults__,
    )


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Bags as rows of ids [B, n], looked up one by one and then reduced."""
    if max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    real = torch.ones_like(input, dtype=torch.bool)
    if input.dim() == 1:
        ends = offsets[1:] if include_last_offset else F.pad(offsets[1:], (0, 1), value=len(input))
        starts = offsets[:-1] if include_last_offset else offsets
        step = torch.arange(int((ends - starts).max()) if len(starts) else 0, device=input.device)
        real = step < (ends - starts)[:, None]
        at = (starts[:, None] + step).where(real, 0)
        input = input[at]
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights[at]
    if padding_idx is not None:
        real = real & (input != padding_idx % len(weight))
    entries = F.embedding(input, weight)  # [B, n, width]
    real = real[..., None]
    if mode == "max":
        largest = entries.masked_fill(~real, -torch.inf).max(1).values
        return largest.where(real.any(1), 0)
    if per_sample_weights is not None:
        entries = entries * per_sample_weights[..., None]
    total = entries.where(real, 0).sum(1)
    return total if mode == "sum" else total / real.sum(1).clamp(min=1)


def _grouped_mm(
    input: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """input [n, I], rows sorted by expert, and weight [E, I, O]: a product for each expert."""
    if offs is None or bias is not None or (input.dim(), weight.dim()) != (2, 3):
        return NotImplemented
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    parts = [
        torch.mm(input[start:end], weight[e])
        for e, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    rest = input.new_zeros(len(input) - ends[-1], weight.shape[2])
    return torch.cat([*parts, rest]).to(out_dtype or input.dtype)


# A function that does not take a call returns NotImplemented.
COMPOSITES: dict[Callable, Callable] = {
    F.multi_head_attention_forward: opened(F.multi_head_attention_forward),
    F.embedding_bag: _embedding_bag,
    torch._grouped_mm: _grouped_mm,
    **RECURRENT,
}
