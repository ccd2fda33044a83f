"""Which sites write their rows by themselves, in C++, without a word of Python."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dropinf import ops
from dropinf.capturing.compiled.sites import SiteCall
from dropinf.capturing.entries import Entries
from dropinf.capturing.extension import CPP
from dropinf.capturing.graph import FormSite
from dropinf.capturing.owners import Owners
from dropinf.capturing.rules import Form
from dropinf.capturing.runs import alone, columns, coordinates, in_one, order, runs
from dropinf.capturing.sources import View
from dropinf.capturing.walk import Found
from dropinf.compression import DenseProjection, ParamPlan

_OPS = {
    "outer": "sampled_outer",
    "layer_norm": "sampled_outer",
    "rms_norm": "sampled_outer",
    "sampled_norm": "sampled_norm",
    "embedding": "sampled_embedding",
    "conv": "sampled_conv",
    "batch_norm": "sampled_conv",
}


def writing_of(
    found: Found, slot_of: Mapping[int, ParamPlan], entries: Entries, nodes: Sequence[Any]
) -> list[Any]:
    """Of each node of a site, what it writes by itself, alone and in the order of the rows.

    None of those for which Python writes.
    """
    if CPP is None or entries.map.T is not None or entries.rows.dtype != torch.float32:
        return [None] * len(nodes)
    writers = Counter(slot.name for node in found.owners for slot in node.site.slots)
    writers.update(slot_of[key].name for key in found.leaves if key in slot_of)
    B = entries.map.num_rows

    def in_order(node: Any, owners: Owners) -> bool:
        form = node.site.form
        if B > 1:
            return _in_order(form, owners, B)
        # Without features, not where one example has several images, or may have.
        inside = isinstance(node, SiteCall)
        return form.features is not None or (not inside and node._input_metadata[0].shape[0] == 1)

    def writes(node: Any) -> Any:
        site, owners = node.site, found.owners.get(node)
        alone = all(writers[slot.name] == 1 for slot in site.slots)
        if owners is None or not alone or not isinstance(site, FormSite):
            return None
        return _prepared(site, node, entries) if in_order(node, owners) else None

    return [writes(node) for node in nodes]


def _in_order(form: Form, owners: Owners, B: int) -> bool:
    """Whether dimension 0 is the examples in order, each as often as the others."""
    if isinstance(owners, str) or not owners.ndim or owners.size != len(owners):
        return False
    k = 1 if form.features is None else len(owners) // B
    return len(owners) == k * B > 0 and np.array_equal(
        owners.reshape(-1), np.arange(len(owners)) // k
    )


def _prepared(site: FormSite, node: Any, entries: Entries) -> Any:
    """What the site's nodes write of gradients like this one's; None if that takes Python."""
    inside = isinstance(node, SiteCall)
    dy = node.dy if inside else node._input_metadata[0]
    if (dy.dtype, dy.device) != site.prepared_for:
        site.prepared_for = dy.dtype, dy.device
        site.writes = _writes(site, node.shape, dy.shape, dy.dtype, dy.device, entries)
        if not inside:
            node.shared.writes = site.writes
    return site.writes


def _writes(
    site: FormSite,
    x_shape: Sequence[int],
    dy_shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    entries: Entries,
) -> Any:
    """What the site's nodes write, or None if that takes Python."""
    form, backend, cache = site.form, entries.backend, entries.cache
    if form.native is None:
        return None
    name, options = form.native
    wide = torch.promote_types(dtype, torch.float32) if name.endswith("norm") else dtype
    if not ops.is_native(_OPS[name], backend, device, wide):
        return None
    x_features, dy_features = form.features or (0, 0)
    last = tuple(
        math.prod(shape[len(shape) - features :])
        for shape, features in ((x_shape, x_features), (dy_shape, dy_features))
    )
    parts = []
    for run in runs(site.targets):
        view, role = run[0]
        if not isinstance(view, View) or not in_one(run, cache):
            return None
        if not any(len(view.at) for view, _ in run):
            continue
        at, entry_map = columns(run), view.slot.entry_map
        if not isinstance(at, slice) or not alone(run) or isinstance(entry_map, DenseProjection):
            return None
        found = coordinates(run, wide, device, cache, weighted=True)
        if found.grid is not None and backend in (None, "reference"):
            return None
        staged = order(found, role.op, *last, wide.itemsize, device, backend)
        parts.append(
            CPP.EntryRun(
                found.o_idx,
                found.i_idx,
                found.weights,
                [] if staged is None else list(staged.tensors),
                at.start,
            )
        )
    return CPP.Writes(
        native=getattr(CPP.Native, name),
        dtype=dtype,
        device=device,
        x_features=x_features,
        dy_features=dy_features,
        runs=parts,
        **options,
    )
