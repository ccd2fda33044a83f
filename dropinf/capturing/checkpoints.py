"""Whether what runs is inside of torch's activation checkpointing, as the Python stack shows it."""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

Region = Any  # what torch keeps of one run under checkpoint(use_reentrant=False)

_FILE = torch.utils.checkpoint.__file__
_TORCH = os.path.dirname(torch.__file__)


def region() -> Region | None:
    """The one whose forward pass runs now, for the first time."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    code = None if hooks is None else getattr(hooks[0], "__code__", None)
    if code is None or code.co_filename != _FILE or "frame" not in code.co_freevars:
        return None
    return hooks[0].__closure__[code.co_freevars.index("frame")].cell_contents


def reentrant(stop: CodeType) -> FrameType | None:
    """The frame of a reentrant checkpoint's backward that calls, if one does before `stop`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not stop:
        if frame.f_code is CheckpointFunction.backward.__code__:
            return frame
        frame = frame.f_back
    return None


def cut_off() -> bool:
    """Whether a reentrant checkpoint runs its forward pass, given nothing that has a gradient."""
    frame: FrameType | None = sys._getframe(1)
    outermost = None  # what is inside of another runs without gradients anyway
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            outermost = frame
        frame = frame.f_back
    if outermost is None:
        return False
    given = outermost.f_locals["args"]
    return not any(t.requires_grad for t in given if isinstance(t, Tensor))


def runs_again(stop: CodeType) -> tuple[bool, Region | None]:
    """Whether a checkpoint runs a forward pass again, from a backward pass; and which it was.

    A Function of one's own may do so too, which then is to see the parameters themselves.
    """
    frame: FrameType | None = sys._getframe(1)
    again, unpacks, found = False, False, None
    while frame is not None and frame.f_code is not stop:
        code = frame.f_code
        if code.co_filename == _FILE:
            unpacks = code.co_name == "unpack_hook"
            again |= unpacks or code is CheckpointFunction.backward.__code__
            if unpacks and found is None:
                found = frame.f_locals.get("frame")
        elif code.co_name == "backward" and not unpacks and not code.co_filename.startswith(_TORCH):
            return False, None
        elif code.co_name == "backward":
            unpacks = False  # of the Function that asked for what it had saved
        frame = frame.f_back
    return again, found
