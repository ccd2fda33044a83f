"""What is inside of a model, by one look at it: a capture that is opened often must not search."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dropinf.compression import peeled, refuse_replicas


class Contents:
    """The modules of a model, and what they hold.

    Attributes:
        model: without what wraps it.
        modules: each once.
        parameters: by each name that leads to one.
        sharded: those that fully_shard was called on, each of which swaps the parameters below it.
    """

    def __init__(self, given: nn.Module, op: str = "capture") -> None:
        self._given = given
        model = self.model = peeled(op, given)
        places: list[tuple[str, nn.Module]] = []
        waiting = [("", model)]
        while waiting:
            prefix, module = waiting.pop()
            places.append((prefix, module))
            for name, child in module._modules.items():
                if child is not None:
                    waiting.append((f"{prefix}{name}.", child))
        self.modules = list(dict.fromkeys([module for _, module in places]))
        self._kinds = set(map(type, self.modules))
        refuse_replicas(op, self._kinds)
        fsdp = sys.modules.get("torch.distributed.fsdp")  # without it there are none
        self.sharded: list[Any] = self._of_kind(fsdp.FSDPModule) if fsdp else []
        self.reshard()
        self.parameters = {
            prefix + name: p
            for prefix, module in places
            if module._parameters
            for name, p in module._parameters.items()
            if p is not None
        }

    def _of_kind(self, kind: type) -> list[Any]:
        if not any(issubclass(k, kind) for k in self._kinds):
            return []
        return [module for module in self.modules if isinstance(module, kind)]

    def everything(self) -> list[Tensor]:
        """The parameters, each once."""
        return list({id(p): p for p in self.parameters.values()}.values())

    def buffers(self) -> list[Tensor]:
        """The buffers."""
        holders = [m._buffers for m in self.modules if m._buffers]
        return [b for buffers in holders for b in buffers.values() if b is not None]

    def refuse_offloaded(self) -> None:
        """Raise if weights are elsewhere; a model that is on the meta device as a whole will do.

        Raises:
            ValueError: some are on the meta device, as those of a model that accelerate offloads.
        """
        away = [name for name, p in self.parameters.items() if p.is_meta]
        whole = len(away) == len(self.parameters)
        if away and not (whole and not any("_hf_hook" in m.__dict__ for m in self.modules)):
            raise ValueError(
                f"capture: {away[0]!r} is on the meta device, as the weights of a model are that "
                "accelerate offloads; load the model onto a device whole"
            )

    def reshard(self) -> None:
        """Put a sharded model's own parameters in place, whose flags and identity last.

        A forward pass without a backward leaves those of the root put together from all ranks.
        """
        for module in self.sharded:
            module.reshard()

    def unsynchronised(self, undo: contextlib.ExitStack) -> None:
        """Have no gradient of an example averaged with those of other ranks, until `undo`."""
        around, module = [], self._given
        while module is not self.model:
            around.append(module)
            module = (
                module.module if isinstance(module, DistributedDataParallel) else module._orig_mod
            )
        inside = self._of_kind(DistributedDataParallel)
        for module in (*around, *inside):
            if isinstance(module, DistributedDataParallel):
                undo.enter_context(module.no_sync())
