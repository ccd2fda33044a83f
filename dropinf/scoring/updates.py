"""Rows of the steps that an optimizer would take: influence on what Adam makes of gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from dropinf.rows import OptimizerSteps, RowStore, Weights


def optimizer_updates(
    store: RowStore,
    optimizer: Any,
    model: nn.Module,
    *,
    linear: bool = False,
    weights: str = "same",
) -> RowStore:
    """Each row's gradient made the update of the optimizer, the part of θ_t - θ_(t+1) over η.

    For Adam that is Γ of LESS (Xia et al., arXiv 2402.04333, section 2 and definition 3.1):

        m' = β₁ m + (1 - β₁) g,   v' = β₂ v + (1 - β₂) g²,
        Γ = m' / (1 - β₁^(t+1)) / (sqrt(v' / (1 - β₂^(t+1))) + ε)

    with ε where torch has it. The score of definition 3.1 is the cosine of the query's gradient
    and Γ, summed over checkpoints with their learning rates (`ensemble(weights=)`):

        updates = dropinf.optimizer_updates(store, optimizer, model)
        solver = dropinf.solvers.Identity(cosine=True).fit(updates)
        scores = dropinf.scores(asked, updates, solver)

    An entry of a row is one coordinate of the gradient, of which the optimizer has m and v: no
    gradient is formed again, O(R) a row. Invalid rows stay so. Queries stay gradients.

    Args:
        store: rows of training examples, collected with the weights that the optimizer is at.
        optimizer: torch's Adam, AdamW (without its decay, which no example changes) or SGD with
            or without momentum, weight decay and Nesterov's; or what Accelerate wraps around it.
            Of groups with other learning rates, the rates are left out.
        model: whose parameters it has.
        linear: the example's part of a step of a large batch, which m and v hardly notice:
            g / (sqrt(v / (1 - β₂^t)) + ε) for Adam, and g for SGD.
        weights: "any" takes rows of other weights than the model's, which are an error otherwise.

    Returns:
        A store in memory under the same plan, on the device of the store's rows.

    Raises:
        ValueError: the optimizer is not known, is sharded, or has no state of a parameter; rows
            are of other weights, or are updates already; or entries are sums or projections of
            coordinates (`Sketch`, `Gaussian`, ...), of which `collect(updates=)` makes updates.
    """
    plan = store.plan
    if store.updates is not None:
        raise ValueError(
            f"optimizer_updates: the rows are updates already (of {store.updates}); give rows of "
            "gradients, collected without updates="
        )
    if plan.has_entry_maps:
        raise ValueError(
            f"optimizer_updates: an entry of {type(plan.compression).__name__} is made of several "
            "coordinates, each of which has a step of its own; collect them as updates, with "
            "collect(updates=optimizer), or rows under Dropout, FactoredDropout or Full"
        )
    if weights not in ("same", "any"):
        raise ValueError(f"optimizer_updates: weights must be 'same' or 'any', got {weights!r}")
    steps = OptimizerSteps("optimizer_updates", optimizer, model, plan, linear)
    if weights != "any":
        _refuse_others(store, model)
    rows = torch.empty(len(store), plan.width, dtype=store.read_dtype, device=store.device)
    scales = [
        torch.as_tensor(slot.scale, dtype=torch.float64, device=store.device) for slot in plan.slots
    ]
    for start, chunk in store.chunks():
        for l, slot in enumerate(plan.slots):
            g = chunk[:, slot.entries].double() / scales[l]
            rows[start : start + len(chunk), slot.entries] = steps.scaled(l, g).to(rows.dtype)
    rows[~store.valid] = 0
    updates = RowStore(rows, plan, store.valid.clone(), store.origin, store.ids)
    options = {**store.about.options, "updates": steps.said}
    updates.about = dataclasses.replace(store.about, options=options, first=None)
    return updates


def _refuse_others(store: RowStore, model: nn.Module) -> None:
    """Refuse rows of weights that this model does not have (any more)."""
    own = Weights(model, store.plan).fingerprint(store.about.passing)
    if store.weights not in (None, own):
        raise ValueError(
            f"optimizer_updates: the rows were made with weights {store.weights}, the model has "
            f"{own}; load the checkpoint that they are of, with its optimizer, or say weights='any'"
        )
