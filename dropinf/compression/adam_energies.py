"""Energies from the second moments that Adam keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, NAdam, Optimizer, RAdam

from dropinf.compression.energy import Energies, sides
from dropinf.compression.tracking import tracked, unwrap

_OP = "energies_from_adam"
_KNOWN = (Adam, AdamW, NAdam, RAdam)


def energies_from_adam(optimizer: Optimizer, model: nn.Module) -> Energies:
    """Energies for `Dropout` and `Sketch` from an optimizer's state, which costs no pass at all.

    Of a parameter, exp_avg_sq / (1 - beta2 ^ step) (arXiv 1412.6980, section 3) is a mean of
    squares of its gradient. Its matrix [a, b] (see `energies`) becomes rows[o] columns[i] with the
    same sums of rows and columns, as in Adafactor (arXiv 1804.04235, section 3). The squares are of
    gradients of batches, of the last 1 / (1 - beta2) steps, with whatever loss and weight decay
    were trained with: where that is not what influence is asked of, `energies` is nearer.

        energies = dropinf.energies_from_adam(optimizer, model)
        plan = dropinf.Plan.make(model, dropinf.Dropout(r=1024, energies=energies))

    Args:
        optimizer: Adam, AdamW, NAdam or RAdam of torch.optim, which has trained `model` or was
            loaded with the state of one that has; or what Accelerate wraps around it.
        model: its trainable parameters that the optimizer has get energies; what has had no
            gradient has none, and a layer of such is named in a warning.

    Raises:
        TypeError: the optimizer is another one.
        ValueError: it has no state, or its state is sharded, flattened, not finite or negative.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # inside of Accelerate's
    if not isinstance(optimizer, _KNOWN):
        known = ", ".join(kind.__name__ for kind in _KNOWN)
        raise TypeError(
            f"{_OP}: the optimizer must be {known} of torch.optim, got {type(optimizer).__name__}; "
            "measure energies with dropinf.energies"
        )
    layers, _ = tracked(_OP, model)
    inside = unwrap(_OP, model)
    beta2 = {id(p): group["betas"][1] for group in optimizer.param_groups for p in group["params"]}
    names = [name for _, params in layers for name, _ in params]
    mine = {name: inside.get_parameter(name) for name in names}
    mine = {name: p for name, p in mine.items() if id(p) in beta2}
    if not mine:
        raise ValueError(
            f"{_OP}: the optimizer has no parameter of this model; give the model that it trains, "
            "or, if it trains flattened or sharded copies, measure energies with dropinf.energies"
        )
    if not any("exp_avg_sq" in optimizer.state.get(p, ()) for p in mine.values()):
        raise ValueError(
            f"{_OP}: the optimizer has no state yet; train, or load the state of one that has"
        )
    found = {}
    for name, p in mine.items():
        a, b = sides(p.shape)
        state = optimizer.state.get(p, {})
        rows, columns = np.zeros(a), np.zeros(b)
        if "exp_avg_sq" in state:
            v = _whole(name, p, state["exp_avg_sq"]).reshape(a, b)
            correction = 1 - beta2[id(p)] ** _step(name, state.get("step"))
            rows = v.sum(1, dtype=torch.float64).cpu().numpy() / correction
            columns = v.sum(0, dtype=torch.float64).cpu().numpy() / correction
            columns /= rows.sum() or 1
        found[name] = tuple(p.shape), rows, columns
    energies = Energies.of(_OP, found)
    energies.warn_of_zeros(_OP, layers)
    return energies


def _step(name: str, step: Any) -> float:
    numbers = isinstance(step, Tensor) and step.numel() == 1 and not step.is_meta
    if not (numbers or isinstance(step, int | float)) or not 1 <= float(step) < float("inf"):
        raise ValueError(
            f"{_OP}: step of {name!r} must be a number from 1, got {step!r}; load a state that is "
            "sound, or measure energies with dropinf.energies"
        )
    return float(step)


def _whole(name: str, p: Tensor, v: Any) -> Tensor:
    if not isinstance(v, Tensor) or not v.is_floating_point() or v.is_meta:
        what = f"{v.dtype} on {v.device.type}" if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(
            f"{_OP}: exp_avg_sq of {name!r} must be a tensor of floating-point numbers, got "
            f"{what}; load a state that has them, or measure energies with dropinf.energies"
        )
    if hasattr(v, "full_tensor") or v.shape != p.shape:
        raise ValueError(
            f"{_OP}: the state of {name!r} is sharded or flattened, {type(v).__name__} of shape "
            f"{tuple(v.shape)}; load the whole state into an optimizer of the whole model, or "
            "measure energies with dropinf.energies"
        )
    least, most = float(v.amin()), float(v.amax())
    if not (least >= 0 and most < float("inf")):  # which NaN is not either
        raise ValueError(
            f"{_OP}: exp_avg_sq of {name!r} must be finite and not negative, got {least} to "
            f"{most}; load a state that is sound, or measure energies with dropinf.energies"
        )
    return v
