"""Steps that an optimizer would take of gradients, at the coordinates of a plan.

Γ of LESS (Xia et al., arXiv 2402.04333, section 2 and definition 3.1) for Adam, and the like of
SGD. All in float64.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from dropinf.compression import ParamPlan, Plan, coordinates_of, unwrap
from dropinf.rows.weights import digest_of

_KNOWN = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_PIECE = 1 << 15  # numbers at a time, whose temporaries in float64 stay in a cache
_SHAPING = (  # options of a group that steps depend on; the learning rate is left out
    *("betas", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad"),
    *("momentum", "dampening", "nesterov"),
)


class OptimizerSteps:
    """The steps of an optimizer as it is now, of whose state a copy is kept.

    Attributes:
        plan: of the rows that `entries` makes.
        coordinates: of the rows that it takes.
        said: the optimizer, and a digest of what its steps depend on.
    """

    def __init__(
        self, op: str, optimizer: Any, model: nn.Module, plan: Plan, linear: bool = False
    ) -> None:
        """`op` is what people called; all else as of `optimizer_updates`.

        Raises:
            ValueError: the optimizer is not known, is sharded, or has no sound state of a
                parameter.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside of Accelerate's
        kind = type(optimizer)
        if kind not in _KNOWN:
            raise ValueError(
                f"{op}: {kind.__name__} is not known; Adam, AdamW and SGD of torch.optim are"
            )
        self.plan, self.coordinates = plan, coordinates_of(plan)
        self._linear = linear
        model = unwrap(op, model)
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._of = [_state(op, optimizer, group_of, model, slot) for slot in plan.slots]
        digest = hashlib.sha256()
        for group, state in self._of:
            digest.update(repr([(k, group[k]) for k in _SHAPING if k in group]).encode())
            for key, value in sorted(state.items()):
                own = digest_of(value) if isinstance(value, Tensor) else repr(value).encode()
                digest.update(f"{key} ".encode() + own)
        how = ", linear" if linear else ""
        self.said = f"{kind.__name__}{how}, {digest.hexdigest()[:16]}"

    def scaled(self, l: int, g: Tensor, at: slice = slice(None)) -> Tensor:
        """[n, k] float64: the steps of gradients g at the coordinates `at` of parameter l, times
        their scale in the plan."""
        group, state = self._of[l]
        if any(isinstance(v, Tensor) and v.device != g.device for v in state.values()):
            state = {k: v.to(g.device) if isinstance(v, Tensor) else v for k, v in state.items()}
            self._of[l] = group, state
        here = {k: v[at] if isinstance(v, Tensor) else v for k, v in state.items()}
        step = _linear if self._linear else _adam if "betas" in group else _sgd
        return self.plan.slots[l].scaled(step(g.double(), group, here), at)

    @torch.no_grad()
    def entries(self, gradients: Tensor) -> Tensor:
        """[n, R] of the plan, from gradients [n, C] at the coordinates, which are written over."""
        slots = list(zip(self.plan.slots, self.coordinates.slots, strict=True))
        for l, (_, own) in enumerate(slots):
            values = gradients[:, own.entries]
            for start in range(0, own.r, _PIECE):
                at = slice(start, start + _PIECE)
                part = values[:, at]
                for some in part.split(max(1, _PIECE // part.shape[1])):
                    some.copy_(self.scaled(l, some, at))
        if not self.plan.has_entry_maps:
            return gradients  # whose coordinates stand as the entries do
        rows = gradients.new_zeros(len(gradients), self.plan.width)
        for slot, own in slots:
            if own.r:
                rows[:, slot.entries] += slot.entry_map(gradients[:, own.entries])
        return rows


def _state(
    op: str, optimizer: Any, group_of: dict[int, dict[str, Any]], model: nn.Module, slot: ParamPlan
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A parameter's group, without its tensors, and its state at the kept coordinates, the weights
    θ too if they are in the step."""
    name = f"{slot.name!r}"
    try:
        p = model.get_parameter(slot.name)
    except AttributeError:
        p = None
    if p is None or tuple(p.shape) != slot.shape:
        raise ValueError(
            f"{op}: the model has no parameter {name} of shape {list(slot.shape)}, which the rows "
            "are of; give the model that the store was collected of"
        )
    if id(p) not in group_of:
        raise ValueError(
            f"{op}: the optimizer does not have {name}; give the one that trained this model, or "
            "leave the parameter out of the plan (exclude=)"
        )
    group, state = group_of[id(p)], optimizer.state.get(p, {})
    if group["maximize"]:
        raise ValueError(f"{op}: the optimizer has maximize=True; give losses to minimise")
    group = {k: group[k] for k in _SHAPING if k in group}
    needed = ["momentum_buffer"] if group.get("momentum") else []
    if "betas" in group:
        group["betas"] = tuple(map(float, group["betas"]))  # which may be tensors
        needed = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * group["amsgrad"], "step"]
    missing = [key for key in needed if state.get(key) is None]
    if missing:
        raise ValueError(
            f"{op}: the optimizer has no {missing[0]!r} of {name}; give it as it is after "
            "training, or load its checkpoint (load_state_dict)"
        )
    tensors = {key: state[key] for key in needed if key != "step"}
    if group["weight_decay"] and not group.get("decoupled_weight_decay"):  # AdamW's is beside g
        tensors["parameter"] = p
    for t in (p, *tensors.values()):
        if hasattr(t, "device_mesh") or t.shape != p.shape:  # a DTensor, or ZeRO's
            raise ValueError(
                f"{op}: {name} or its state is sharded; gather the whole state, with "
                "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict and "
                "full_state_dict=True, and load it into an optimizer of one process"
            )
    at = {key: _at(t, slot) for key, t in tensors.items()}
    for key, t in at.items():
        if not t.isfinite().all():
            raise ValueError(
                f"{op}: {key!r} of {name} is not finite; load a checkpoint of before that"
            )
    if "step" not in needed:
        return group, at
    step = float(state["step"])
    if not step >= 1:
        raise ValueError(
            f"{op}: the optimizer has taken {step:g} steps of {name}, so that it has no moments "
            "yet; give it as it is after training, or load its checkpoint (load_state_dict)"
        )
    return group, {**at, "step": step}


def _at(t: Tensor, slot: ParamPlan) -> Tensor:
    return t.detach().flatten()[slot.index.to(t.device)].double().cpu()


def _adam(g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    β1, β2 = group["betas"]
    if "parameter" in state:
        g = g + group["weight_decay"] * state["parameter"]
    m = β1 * state["exp_avg"] + (1 - β1) * g
    v = β2 * state["exp_avg_sq"] + (1 - β2) * g.square()
    if group["amsgrad"]:
        v = torch.maximum(v, state["max_exp_avg_sq"])
    t = state["step"] + 1
    return m / (1 - β1**t) / ((v / (1 - β2**t)).sqrt() + group["eps"])


def _sgd(g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    if "parameter" in state:
        g = g + group["weight_decay"] * state["parameter"]
    if not group["momentum"]:
        return g
    step = group["momentum"] * state["momentum_buffer"] + (1 - group["dampening"]) * g
    return g + group["momentum"] * step if group["nesterov"] else step


def _linear(g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    if "betas" not in group:
        return g
    v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    return g / ((v / (1 - group["betas"][1] ** state["step"])).sqrt() + group["eps"])
