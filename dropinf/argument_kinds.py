"""Arguments of another kind than a call takes, such as two that were swapped."""

from __future__ import annotations

from typing import Any


def need(op: str, name: str, given: Any, kind: type, mend: str) -> None:
    """Raise TypeError unless an argument is of a kind; `mend` says the way out."""
    if not isinstance(given, kind):
        raise TypeError(f"{op}: {name} must be a {kind.__name__}, got {_what(given)}; {mend}")


def need_loss_fn(op: str, given: Any) -> None:
    """Raise TypeError unless it may be a loss function, which no loss of torch.nn is."""
    of_torch = type(given).__module__ == "torch.nn.modules.loss"
    if of_torch or not callable(given):
        raise TypeError(
            f"{op}: loss_fn must be a function that is called as loss_fn(model, batch) and returns "
            f"one loss per example, [B], got {_what(given)}; dropinf.losses has some"
        )


def _what(given: Any) -> str:
    return "None" if given is None else f"a {type(given).__name__}"
