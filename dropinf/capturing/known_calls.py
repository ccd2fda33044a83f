"""Which calls are run without Python from now on: those that are what they were if they look so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dropinf.capturing.call_args import Meeting, swap
from dropinf.capturing.graph import FormSite
from dropinf.capturing.sources import View

_PLAIN_TENSORS = {Tensor, nn.Parameter}


def add_known(table: Any, met: Meeting, site: FormSite, shared: Any, x: Tensor) -> None:
    """Add a call that was closed to the table of those that are known, if it may be.

    Args:
        table: of C++.
        met: the call.
        site, shared: its site, and what the site's nodes have in common.
        x: its input, which alone differs from call to call.
    """
    whole = all(
        isinstance(source, View) and source.parameter is role.tensor
        for source, role in site.targets
    )
    if not whole or any(type(t) not in _PLAIN_TENSORS for t in met.tensors):
        return
    parameters = [role.tensor for _, role in site.targets]
    values = (*met.args, *met.kwargs.values())
    rest = [v for v in values if v is not x and not any(v is p for p in parameters)]
    once = sum(v is x for v in values) == 1
    # A tensor without dimensions may be read as a number, and be another one later.
    if once and all(v.dim() if isinstance(v, Tensor) else _is_plain(v) for v in rest):
        form = site.form
        features = 0 if form.features is None else form.features[0] + form.experts
        args, kwargs = swap(met.args, {}), swap(met.kwargs, {})  # lists of its own
        table.add(met.func, args, kwargs, x, parameters, features, form.flat, shared)


def _is_plain(value: Any) -> bool:
    """Whether a value is what it was if it compares equal."""
    if type(value) in (tuple, list, torch.Size):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (int, float, str, torch.dtype))
