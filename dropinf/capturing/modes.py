"""capture: one backward pass -> rows [B, R], written in place."""

from __future__ import annotations

from typing import Literal, overload

from torch import nn

from dropinf.argument_kinds import need
from dropinf.capturing.activations import ActivationsTap
from dropinf.capturing.gradients import GradsTap
from dropinf.compression import Plan


@overload
def capture(
    model: nn.Module,
    plan: Plan,
    mode: Literal["activations"] = "activations",
    *,
    per: str = "example",
    batch_dim: int | dict[str, int] | None = None,
    closed: bool = True,
    backend: str | None = None,
) -> ActivationsTap: ...
@overload
def capture(
    model: nn.Module, plan: Plan, mode: Literal["grads"], *, backend: str | None = None
) -> GradsTap: ...
@overload
def capture(
    model: nn.Module,
    plan: Plan,
    mode: str,
    *,
    per: str = "example",
    batch_dim: int | dict[str, int] | None = None,
    closed: bool = True,
    backend: str | None = None,
) -> ActivationsTap | GradsTap: ...
def capture(
    model: nn.Module,
    plan: Plan,
    mode: str = "activations",
    *,
    per: str = "example",
    batch_dim: int | dict[str, int] | None = None,
    closed: bool = True,
    backend: str | None = None,
) -> ActivationsTap | GradsTap:
    """A context in which `tap.rows(losses)` turns one loss per example into one row per example.

        with dropinf.capture(model, plan) as tap:
            rows = tap.rows(loss_fn(model, batch))

    Args:
        model: the model that `plan` was made for, or one with the same names and shapes; may be
            compiled, and then stays so where it can, or wrapped in DistributedDataParallel.
        plan: the coordinates to keep.
        mode: "activations" samples inside one batched backward pass, from each layer's input and
            output gradient. "grads" gathers from the gradients of the parameters, one backward pass
            an example, for any layer.
        per: "example"; "token" gives a row for each position of the batch [B, T], whose sum over T
            is the example's; "segment" gives one for each example of a packed sequence (see
            `rows(segment_ids=)`). The last two in mode="activations", for layers that keep
            positions apart.
        batch_dim: the dimension of the model's first input that is the example, 0 or 1; only
            per="token" and choices that cost time depend on it, as whose a position is follows
            from the losses. A dictionary, of patterns of modules' names, is taken for 0.
        closed: take layers in closed form where there is a rule. False leaves all to autograd, by
            a pass for each loss: for gradients of gradients (a PINN, forces, a gradient penalty).
        backend: a name from `dropinf.backends()` for the ops; None takes the first available.

    The model is left as it was: requires_grad flags, hooks, gradients, also after an exception.

    Raises:
        TypeError: the plan is none, but a compression for example.
        ValueError: the mode is unknown, or the plan does not fit the model.
        RuntimeError: the model is in another capture that is open.
    """
    need("capture", "plan", plan, Plan, "make one: dropinf.Plan.make(model, compression)")
    if mode not in ("activations", "grads"):
        raise ValueError(f"capture: mode must be 'activations' or 'grads', got {mode!r}")
    if per not in ("example", "token", "segment"):
        raise ValueError(f"capture: per must be 'example', 'token' or 'segment', got {per!r}")
    dims = batch_dim.values() if isinstance(batch_dim, dict) else [batch_dim]
    if any(dim not in (None, 0, 1) for dim in dims):
        raise ValueError(f"capture: batch_dim must be 0 or 1, got {batch_dim!r}")
    if mode == "activations" and closed:
        dim = batch_dim if isinstance(batch_dim, int) else 0
        return ActivationsTap(model, plan, backend, per, dim)
    if per != "example":
        raise ValueError(
            f"capture: per={per!r} needs mode='activations' and closed=True, not 'grads'"
        )
    return GradsTap(model, plan, backend, unfreeze=mode == "activations")
