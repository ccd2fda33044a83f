"""Notes on nodes of autograd's graph: what a torch function did that its node does not say."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from dropinf.capturing.call_args import argument
from dropinf.capturing.graph import HOOKED, LIKE, edge_of
from dropinf.capturing.index_rules import JOINED, WRITTEN, as_index


def hook(args: tuple, kwargs: dict, y: Any) -> None:
    """What a hook does to a gradient is not known; torch's own for shards do nothing to it."""
    t, hook = args[0], args[1] if len(args) > 1 else None
    if (
        not getattr(hook, "__module__", "").startswith("torch.distributed")
        and t.grad_fn is not None
    ):
        t.grad_fn.metadata[HOOKED] = True


def write(args: tuple, kwargs: dict, y: Any) -> None:
    """Where a value was written, which the node of a write into a part does not say."""
    x, index = args[:2]
    if x.requires_grad and type(x.grad_fn).__name__ == "CopySlices":
        x.grad_fn.metadata[WRITTEN] = tree_map(_as_it_is, index)


def _as_it_is(index: Any) -> Any:
    """An index that stays what it is when what it was made of is written to."""
    if isinstance(index, Tensor):
        return as_index(index.detach().clone())
    if isinstance(index, slice):
        ends = index.start, index.stop, index.step
        return slice(*(i if i is None else operator.index(i) for i in ends))
    return index.copy() if isinstance(index, np.ndarray) else index


def lengths(args: tuple, kwargs: dict, y: Tensor) -> None:
    """The shapes of the parts of a cat, which its node does not say of those without a gradient."""
    parts = args[0] if args else kwargs.get("tensors", ())
    if y.requires_grad and y.grad_fn is not None and not all(t.requires_grad for t in parts):
        y.grad_fn.metadata[JOINED] = [tuple(t.shape) for t in parts]


def padded(args: tuple, kwargs: dict, y: Tensor) -> None:
    """Circular padding is written in parts that nobody sees, along the last dimensions alone."""
    x, pad = (argument(args, kwargs, i, name, None) for i, name in enumerate(("input", "pad")))
    edge = edge_of(x) if argument(args, kwargs, 2, "mode", "constant") == "circular" else None
    if edge is not None and y.grad_fn is not None and y.grad_fn is not edge[0]:
        y.grad_fn.metadata[LIKE] = edge, x.dim() - len(pad) // 2


# Function -> the note that is made of a call of it: (args, kwargs, result).
NOTES: dict[Callable, Callable[[tuple, dict, Any], None]] = {
    Tensor.register_hook: hook,
    Tensor.grad_fn.__get__: hook,
    Tensor.__setitem__: write,
    torch.cat: lengths,
    torch.concat: lengths,
    torch.concatenate: lengths,
    F.pad: padded,
}
