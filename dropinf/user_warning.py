"""Warnings that point at the line of the user's that led to them."""

from __future__ import annotations

import sys
import warnings


def warn_user(message: str) -> None:
    """A UserWarning at the innermost call that comes from outside of this package."""
    frame, level = sys._getframe(1), 2  # of the caller
    package = __name__.partition(".")[0]
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
