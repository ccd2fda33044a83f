"""How much memory tensors take at once."""

import weakref
from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Measured(NamedTuple):
    """What `measured` returns."""

    result: Any
    peak: int  # the most bytes that tensors had beyond those there before
    left: int  # at the end


def measured(call):
    """Of every tensor that an op returns; what is within an op is not seen."""
    with _LiveBytes() as live:
        result = call()
    return Measured(result, live.peak, live.now)


class _LiveBytes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.tensors = Counter()  # of each memory
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, Tensor) or any(tensor is t for t in given):
                continue
            memory = tensor.untyped_storage()
            at, size = memory.data_ptr(), memory.nbytes()
            if not self.tensors[at]:
                if not at or any(t.untyped_storage().data_ptr() == at for t in given):
                    continue  # a view of what was there before
                self.now += size
                self.peak = max(self.peak, self.now)
            self.tensors[at] += 1
            weakref.finalize(tensor, self.dropped, at, size)
        return made

    def dropped(self, at, size):
        self.tensors[at] -= 1
        if not self.tensors[at]:
            self.now -= size
