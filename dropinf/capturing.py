"""capture: one backward pass -> rows [B, R], written in place."""

from __future__ import annotations

from torch import nn

from dropinf.activations import ActivationsTap
from dropinf.gradients import GradsTap
from dropinf.plan import Plan


def capture(
    model: nn.Module, plan: Plan, mode: str = "activations", *, backend: str | None = None
) -> ActivationsTap | GradsTap:
    """A context in which `tap.rows(losses)` turns one loss per example into one row per example.

        with dropinf.capture(model, plan) as tap:
            rows = tap.rows(loss_fn(model, batch))

    Args:
        model: the model that `plan` was made for, or one with the same names and shapes.
        plan: the coordinates to keep.
        mode: "activations" samples inside one batched backward pass, from each layer's input and
            output gradient; dimension 0 of every layer's input is the example. "grads" gathers
            from the gradients of the parameters, one backward pass an example, for any layer.
        backend: a name from `dropinf.backends()` for the ops; None takes the first available.

    The model is left as it was: requires_grad flags, hooks, gradients, also after an exception.

    Raises:
        ValueError: the mode is unknown, or the plan does not fit the model.
    """
    taps = {"activations": ActivationsTap, "grads": GradsTap}
    if mode not in taps:
        raise ValueError(f"capture: mode must be 'activations' or 'grads', got {mode!r}")
    return taps[mode](model, plan, backend)
