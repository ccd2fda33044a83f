"""A dry run: what runs on the meta device, with the memory and the arithmetic it would take."""

from __future__ import annotations

import contextlib
import os
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_ATEN = torch.ops.aten
_FUSED = _ATEN._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward
_PRODUCTS = {_FUSED: 2, _FUSED_BACKWARD: 5}  # matrix products of queries with keys, or as large
_Kind = tuple[tuple[int, ...], torch.dtype]


class DryRun(TorchDispatchMode):
    """Counts what ops on the meta device would take.

    Attributes:
        now: bytes of the tensors that are there, beyond those from before.
        peak: the most that they were, with what kernels copy meanwhile.
        at_peak: (shape, dtype) -> how many bytes of such tensors there were then.
        flops: of matrix products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # slow to import

        self._flops_of = flop_registry
        self.now = self.peak = self.flops = 0
        self.at_peak: dict[_Kind, int] = {}
        self._live: dict[int, tuple[_Kind, int]] = {}  # of each storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        op, kwargs = func.overloadpacket, kwargs or {}
        if op is _ATEN._local_scalar_dense and _is_meta(args[0]):
            raise NotImplementedError
        given = {_address(t) for t in tree_iter((args, kwargs)) if _is_meta(t)}
        made = func(*args, **kwargs)
        if op in self._flops_of:
            self.flops += self._flops_of[op](*args, **kwargs, out_val=made)
        elif op in _PRODUCTS:
            q, k = args[:2] if op is _FUSED else args[1:3]
            self.flops += 2 * _PRODUCTS[op] * q.numel() * k.shape[-2]
        for t in tree_iter(made):
            if _is_meta(t) and _address(t) not in given and _address(t) not in self._live:
                self._add(t)
        copied = _copied(op, args, made)
        if self.now + copied > self.peak:
            self.peak = self.now + copied
            self.at_peak = {}
            for kind, num_bytes in self._live.values():
                self.at_peak[kind] = self.at_peak.get(kind, 0) + num_bytes
        return made

    def _add(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        self._live[storage._cdata] = (tuple(t.shape), t.dtype), storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, address: int) -> None:
        self.now -= self._live.pop(address)[1]


class _Fused(TorchFunctionMode):
    """Attention in one kernel that keeps no [T, T], as devices run it, and the meta device not."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _fused(*args, **kwargs)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)  # that which is added
    if q.shape[-1] != v.shape[-1] or (attn_mask is not None and attn_mask.requires_grad):
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **options)
    return _FUSED(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextlib.contextmanager
def dry_run(op: str) -> Iterator[DryRun]:
    """Inside, ops on the meta device are counted; `op` is what people called.

    Raises:
        ValueError: a function needs the numbers of a tensor, or fails on the meta device.
    """
    with DryRun() as run, _Fused():
        try:
            yield run
        except (RuntimeError, TypeError) as error:
            why = (
                "goes by the numbers of a tensor, as routing to experts and the last token of a "
                "padded text do, and there are none"
                if isinstance(error, NotImplementedError)
                else f"fails: {str(error).partition(chr(10))[0].rstrip('.')}"
            )
            raise ValueError(
                f"{op}: on the meta device {_function_of(error)} {why}; measure a small batch on "
                "the device itself"
            ) from error


def _function_of(error: Exception) -> str:
    """The innermost function that is neither torch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = list(traceback.walk_tb(error.__traceback__))
    for frame, line in reversed(frames):
        code = frame.f_code
        if not code.co_filename.startswith(ours):
            owner = frame.f_locals.get("self")
            name = code.co_name if owner is None else f"{type(owner).__name__}.{code.co_name}"
            return f"{name} ({os.path.basename(code.co_filename)}:{line})"
    return "the model"


def _is_meta(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_meta


def _copied(op: Any, args: tuple, made: Any) -> int:
    """Bytes of a kernel's copies in the layout of its own blocks, which no op shows."""
    if op is _ATEN.convolution:
        return args[0].nbytes + made.nbytes
    if op is _ATEN.convolution_backward:
        return args[0].nbytes + args[1].nbytes
    return 0


def _address(t: Tensor) -> int:
    return t.untyped_storage()._cdata
