"""Functions whose inside is not seen, declared to keep the examples of a batch apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Declared = TypeVar("Declared", bound=Callable)

# autograd Functions of packages that people use, as module.name; none is imported for that.
_KNOWN = {
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.RegisterPostBackwardFunction",
    "torch.nn.parallel.distributed._DDPSink",
    "bitsandbytes.autograd._functions.MatMul4Bit",
    "bitsandbytes.autograd._functions.MatMul8bitLt",
    "bitsandbytes.autograd._functions.MatMul8bitFp",
    "flash_attn.flash_attn_interface.FlashAttnFunc",
    "flash_attn.flash_attn_interface.FlashAttnQKVPackedFunc",
    "flash_attn.flash_attn_interface.FlashAttnKVPackedFunc",
    "flash_attn.ops.triton.layer_norm.LayerNormFn",
    "flash_attn.layers.rotary.ApplyRotaryEmb",
    "liger_kernel.ops.rms_norm.LigerRMSNormFunction",
    "liger_kernel.ops.layer_norm.LigerLayerNormFunction",
    "liger_kernel.ops.rope.LigerRopeFunction",
    "liger_kernel.ops.swiglu.LigerSiLUMulFunction",
    "liger_kernel.ops.geglu.LigerGELUMulFunction",
    "mamba_ssm.ops.selective_scan_interface.SelectiveScanFn",
    "causal_conv1d.causal_conv1d_interface.CausalConv1dFn",
}
_KNOWN_OPS: set[str] = set()  # as ns_name_overload


def keeps_examples(function: Declared) -> Declared:
    """Declare that a function's result has its examples where its arguments have them.

        dropinf.keeps_examples(MyAttention)            # a torch.autograd.Function
        dropinf.keeps_examples(torch.ops.mine.scan)    # an op of torch.library

    A capture does not see inside of a kernel of one's own, and would take a batch that goes through
    one by passes of one loss each. Declared, its gradients are taken to stay with their example:
    block b of an argument as long as the result reaches block b of it alone. `collect` and
    `verify` compare rows with plain autograd, and so notice a declaration that is not true.

    Args:
        function: a subclass of torch.autograd.Function, or an op of torch.library with a backward.

    Returns:
        The function, so that it serves as a decorator.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        _KNOWN.add(_qualified(function))
        return function
    if isinstance(function, torch._library.custom_ops.CustomOpDef):
        overloads = [function._opoverload]
    elif isinstance(function, torch._ops.OpOverloadPacket):
        overloads = [getattr(function, name) for name in function.overloads()]
    elif isinstance(function, torch._ops.OpOverload):
        overloads = [function]
    else:
        raise TypeError(
            f"keeps_examples: {function!r} is neither a torch.autograd.Function nor an op of "
            "torch.library; declare the Function that it calls"
        )
    names = (overload.name().replace("::", "_").replace(".", "_") for overload in overloads)
    _KNOWN_OPS.update(names)
    return function


def keeps(node: Any) -> bool:
    """Whether the function of a node of the graph was declared."""
    function = getattr(type(node), "_forward_cls", None)
    if function is not None and _qualified(function) in _KNOWN:
        return True
    op = type(node).__name__.removeprefix("GeneratedBackwardFor_").removesuffix("Backward")
    return op in _KNOWN_OPS or op.removesuffix("_default") in _KNOWN_OPS


def _qualified(function: type) -> str:
    return f"{function.__module__}.{function.__qualname__}"
