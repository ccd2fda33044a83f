"""Rows of the steps that an optimizer would take: influence on what Adam makes of gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from dropinf.compression import ParamPlan, unwrap
from dropinf.rows import RowStore, Weights

_KNOWN = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


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
        scores = dropinf.scores(queries, updates, solver)

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
        A store in memory under the same plan.

    Raises:
        ValueError: the optimizer is not known, is sharded, or has no state of a parameter; rows
            are of other weights; or entries are sums or projections of coordinates (`Sketch`,
            `Gaussian`, ...).
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # inside of Accelerate's
    if type(optimizer) not in _KNOWN:
        raise ValueError(
            f"optimizer_updates: {type(optimizer).__name__} is not known; Adam, AdamW and SGD of "
            "torch.optim are"
        )
    plan = store.plan
    if plan.has_entry_maps:
        raise ValueError(
            f"optimizer_updates: an entry of {type(plan.compression).__name__} is made of several "
            "coordinates, each of which has a step of its own; collect rows under Dropout, "
            "FactoredDropout or Full"
        )
    if weights not in ("same", "any"):
        raise ValueError(f"optimizer_updates: weights must be 'same' or 'any', got {weights!r}")
    model = unwrap("optimizer_updates", model)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    slots = [(slot, *_state(optimizer, group_of, model, slot)) for slot in plan.slots]
    if weights != "any":
        _refuse_others(store, model)
    rows = torch.empty(len(store), plan.width, dtype=store.read_dtype)
    for start, chunk in store.chunks():
        for slot, group, state, θ in slots:
            g = chunk[:, slot.entries].double() / slot.scale
            step = _linear if linear else _adam if "betas" in group else _sgd
            rows[start : start + len(chunk), slot.entries] = (
                step(g, group, state, θ) * slot.scale
            ).to(rows.dtype)
    rows[~store.valid] = 0
    updates = RowStore(rows, plan, store.valid.clone(), store.origin, store.ids)
    updates.about = dataclasses.replace(store.about, first=None)
    return updates


def _refuse_others(store: RowStore, model: nn.Module) -> None:
    """Refuse rows of weights that this model does not have (any more)."""
    own = Weights(model, store.plan).fingerprint(store.about.passing)
    if store.weights not in (None, own):
        raise ValueError(
            f"optimizer_updates: the rows were made with weights {store.weights}, the model has "
            f"{own}; load the checkpoint that they are of, with its optimizer, or say weights='any'"
        )


def _state(
    optimizer: Any, group_of: dict[int, dict[str, Any]], model: nn.Module, slot: ParamPlan
) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """The optimizer's group of a parameter, its state and the weights at the kept coordinates."""
    name = f"{slot.name!r}"
    try:
        p = model.get_parameter(slot.name)
    except AttributeError:
        p = None
    if p is None or tuple(p.shape) != slot.shape:
        raise ValueError(
            f"optimizer_updates: the model has no parameter {name} of shape {list(slot.shape)}, "
            "which the rows are of; give the model that the store was collected of"
        )
    if id(p) not in group_of:
        raise ValueError(
            f"optimizer_updates: the optimizer does not have {name}; give the one that trained "
            "this model, or leave the parameter out of the plan (exclude=)"
        )
    group, state = group_of[id(p)], dict(optimizer.state.get(p, {}))
    if group["maximize"]:
        raise ValueError(
            "optimizer_updates: the optimizer has maximize=True; give losses to minimise"
        )
    needed = ["exp_avg", "exp_avg_sq", "step"] if "betas" in group else ["momentum_buffer"]
    if "betas" not in group and not group["momentum"]:
        needed = []
    missing = [key for key in needed if state.get(key) is None]
    if missing:
        raise ValueError(
            f"optimizer_updates: the optimizer has no {missing[0]!r} of {name}; give it as it is "
            "after training, or load its checkpoint (load_state_dict)"
        )
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and k != "step"}
    for t in (p, *tensors.values()):
        if hasattr(t, "device_mesh") or t.shape != p.shape:  # a DTensor, or ZeRO's
            raise ValueError(
                f"optimizer_updates: {name} or its state is sharded; gather the whole state, with "
                "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict and "
                "full_state_dict=True, and load it into an optimizer of one process"
            )
    at = {k: _at(t, slot) for k, t in tensors.items()}
    return group, {**at, "step": float(state.get("step", 0))}, _at(p, slot)


def _at(t: Tensor, slot: ParamPlan) -> Tensor:
    return t.detach().flatten()[slot.index.to(t.device)].double().cpu()


def _adam(g: Tensor, group: dict[str, Any], state: dict[str, Any], θ: Tensor) -> Tensor:
    β1, β2 = map(float, group["betas"])
    if not group["decoupled_weight_decay"]:  # AdamW's is beside the gradient
        g = g + group["weight_decay"] * θ
    m = β1 * state["exp_avg"] + (1 - β1) * g
    v = β2 * state["exp_avg_sq"] + (1 - β2) * g.square()
    if group["amsgrad"]:
        v = torch.maximum(v, state["max_exp_avg_sq"])
    t = state["step"] + 1
    return m / (1 - β1**t) / ((v / (1 - β2**t)).sqrt() + group["eps"])


def _sgd(g: Tensor, group: dict[str, Any], state: dict[str, Any], θ: Tensor) -> Tensor:
    g = g + group["weight_decay"] * θ
    if not group["momentum"]:
        return g
    step = group["momentum"] * state["momentum_buffer"] + (1 - group["dampening"]) * g
    return g + group["momentum"] * step if group["nesterov"] else step


def _linear(g: Tensor, group: dict[str, Any], state: dict[str, Any], θ: Tensor) -> Tensor:
    if "betas" not in group:
        return g
    v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    β2 = float(group["betas"][1])
    return g / ((v / (1 - β2 ** state["step"])).sqrt() + group["eps"])
