"""What the page draws: histograms, shares, curves; and how well suspicion finds what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropinf.evaluate import mislabeled_auc
from dropinf.reporting.page_contents import list_of
from dropinf.scoring import Stability
from dropinf.solvers import DampingChoice

_BINS = 40
_MOST_LAYERS = 30


def histogram(values: Sequence[float | None], title: str, label: str) -> dict[str, Any]:
    """Of what is finite, in equal bins."""
    known = np.array([v for v in values if v is not None], dtype=np.float64)
    counts, edges = np.histogram(known, bins=_BINS) if len(known) else (np.zeros(1), np.arange(2.0))
    missing = len(values) - len(known)
    without = f" {missing:,} are not known." if missing else ""
    return {
        "kind": "histogram",
        "title": title,
        "label": label,
        "edges": edges.tolist(),
        "counts": counts.astype(int).tolist(),
        "note": f"Heights are square roots of counts, so that few are seen beside many.{without}",
    }


def means(scores: Tensor) -> list[float | None]:
    """[n] over the queries that are valid."""
    return list_of(scores.detach().double().nanmean(0))


def finding(
    truth: Sequence[bool] | Tensor, own: Tensor | None, mean: Sequence[float | None] | None
) -> dict[str, Any]:
    """A table: the probability that a wrong example comes before a right one."""
    wrong = torch.tensor([bool(t) for t in truth])
    rows = [("known to be wrong", f"{int(wrong.sum()):,} of {len(wrong):,}")]
    for what, values in (
        ("AUC of a high self-influence", None if own is None else list_of(own)),
        ("AUC of a low mean score", None if mean is None else [v and -v for v in mean]),
    ):
        if values is not None:
            rows.append((what, _area(wrong, values)))
    return {"title": "Finding what is wrong", "rows": rows}


def _area(wrong: Tensor, values: Sequence[float | None]) -> str:
    known = torch.tensor([torch.nan if v is None else v for v in values], dtype=torch.float64)
    if not (wrong & ~known.isnan()).any() or not (~wrong & ~known.isnan()).any():
        return "not known"
    return f"{mislabeled_auc(known, wrong).value:.3f}"


def shares(layers: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of each layer in the sum over layers of mean |part of a score|."""
    sizes = {
        name: float(torch.as_tensor(part).double().abs().nanmean()) for name, part in layers.items()
    }
    whole = sum(sizes.values()) or 1.0
    kept = sorted(sizes, key=lambda name: -sizes[name])[:_MOST_LAYERS]
    more = f" The largest {len(kept)} of {len(sizes)}." if len(kept) < len(sizes) else ""
    return {
        "kind": "bars",
        "title": "Share of each layer",
        "names": [name or "(model)" for name in kept],
        "values": [sizes[name] / whole for name in kept],
        "note": f"Mean size of a layer's part of a score, of all layers' together.{more}",
    }


def agreements(found: Stability) -> dict[str, Any]:
    """Both measures against the size."""
    series = [
        {
            "name": name,
            "y": list_of([getattr(each, field) for each in found.agreements]),
            "error": [
                e or 0 for e in list_of([getattr(a, f"{field}_error") for a in found.agreements])
            ],
        }
        for field, name in (
            ("correlation", "rank correlation"),
            ("overlap", f"top-{found.k} overlap"),
        )
    ]
    return {
        "kind": "lines",
        "title": f"Agreement of two of {found.masks} masks",
        "label": "entries of a row",
        "y_label": "agreement",
        "x": list(found.widths),
        "series": series,
        "note": "Bars are standard errors over queries.",
    }


def dampings(choice: DampingChoice) -> dict[str, Any]:
    """What each damping is worth."""
    tried = choice.dampings
    order = sorted((i for i in range(len(tried)) if tried[i] > 0), key=lambda i: tried[i])
    errors = [e or 0 for e in list_of(choice.errors)]
    values = list_of(choice.values)
    return {
        "kind": "lines",
        "title": "Damping",
        "label": "damping",
        "y_label": "worth",
        "x": [tried[i] for i in order],
        "series": [
            {
                "name": "worth",
                "y": [values[i] for i in order],
                "error": [errors[i] for i in order],
            }
        ],
        "chosen": choice.damping,
        "note": f"Chosen: {choice.damping:g}. Worth: {choice.worth}.",
    }
