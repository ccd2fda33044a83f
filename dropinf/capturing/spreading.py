"""Where parameters are expanded over what they meet, so that autograd keeps the examples apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dropinf.capturing.call_args import Meeting, in_place, name_of
from dropinf.capturing.hints import Hints
from dropinf.capturing.rules import ELEMENTWISE
from dropinf.capturing.sources import Lookup, View

_JOIN = {torch.cat, torch.concat, torch.concatenate, torch.stack}
_REPEATS = {"expand", "expand_as", "broadcast_to", "repeat", "tile"}


def spread_shapes(met: Meeting, hints: Hints) -> dict[int, torch.Size]:
    """id of each source -> the shape that it is to be expanded to; empty where that is no use."""
    func = met.func
    if in_place(func) and met.first_is_source():
        return {}
    if name_of(func).startswith("masked_fill"):
        return {}  # which takes a number
    if func in ELEMENTWISE:
        shape = torch.broadcast_shapes(*(t.shape for t in met.tensors))
        if not met.activations and not _grow(met, hints, shape):
            return {}
        return {id(t): shape for t in met.chosen}
    if func is Tensor.__setitem__:
        with torch.no_grad():
            shape = met.args[0].detach()[met.args[1]].shape
        return {id(t): shape for t in met.chosen}
    if not met.activations and not any(map(hints.holds_batch, met.others)):
        return {}
    if func is F.scaled_dot_product_attention:
        return {id(t): _attention_shape(met, t) for t in met.chosen}
    return {id(t): t.shape for t in met.chosen} if func in _JOIN else {}


def expanded_shape(met: Meeting, hints: Hints) -> torch.Size | None:
    """The shape of a source that is expanded or repeated over the batch; None of all else."""
    if name_of(met.func) not in _REPEATS or len(met.sources) != 1 or not met.first_is_source():
        return None
    t = met.args[0]
    with torch.no_grad():
        shape = met.run({id(t): t.detach()}).shape
    own = torch.Size((1,) * (len(shape) - t.dim()) + t.shape)
    grown = {b for a, b in zip(own, shape, strict=True) if a != b}
    whole = all(a in (1, b) for a, b in zip(own, shape, strict=True))
    known = hints.examples not in (None, 1) and hints.examples in grown
    return shape if whole and known else None


def _grow(met: Meeting, hints: Hints, shape: torch.Size) -> bool:
    """Whether a product of sources and data without a gradient is one of the batch."""
    if all(t.shape == shape for t in met.chosen):
        return False
    if any(map(hints.holds_batch, met.others)):
        return True
    direct = all(isinstance(source, (View, Lookup)) for source in met.sources.values())
    return direct and any(hints.plausible(t) and t.dim() == len(shape) for t in met.others)


def _attention_shape(met: Meeting, t: Tensor) -> torch.Size:
    """A mask as large as the products of queries and keys; the rest as it is."""
    q, k, v = (met.argument(i, name) for i, name in enumerate(("query", "key", "value")))
    if t is met.argument(3, "attn_mask"):
        lead = torch.broadcast_shapes(q.shape[:-2], t.shape[:-2])
        return torch.Size((*lead, q.shape[-2], k.shape[-2]))
    B = max(a.shape[0] for a in (q, k, v))
    return torch.Size((B, *t.shape[1:])) if t.shape[0] in (1, B) else t.shape
