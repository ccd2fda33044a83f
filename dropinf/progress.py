"""A bar with the time left, where tqdm is."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any


def progress_bar(**options: Any) -> Any:
    """tqdm's; without tqdm none, since `make gpu` runs beside what a CUDA build of torch brings."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return contextlib.nullcontext(SimpleNamespace(update=lambda done: None))
    return tqdm(**options)
