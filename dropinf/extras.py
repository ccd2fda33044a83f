"""Packages of the extras, which who embeds the ops has not."""

from __future__ import annotations

import importlib
from typing import Any


def optional(name: str, extra: str, op: str) -> Any:
    """A module of an extra.

    Raises:
        ImportError: it is not installed; says which extra has it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name.partition(".")[0]:
            raise
        raise ImportError(
            f"{op} needs {name.partition('.')[0]}: pip install 'dropinf[{extra}]'"
        ) from None
