"""What a batch gives to the model, and what it says the model should have answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def outputs_and_target(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits or numbers of the model, and the labels.

    Args:
        model: called with all of a mapping but its labels, or with x of a pair (x, labels).
        batch: a mapping that has "labels", or a pair.

    Raises:
        ValueError: the batch has no labels.
    """
    target = target_of(batch)
    if isinstance(batch, Mapping):
        # Without the labels, so that the model does not compute a loss of its own.
        return logits_of(model(**without(batch, "labels"))), target
    return logits_of(model(batch[0])), target


def target_of(batch: Any, name: str = "labels") -> Tensor:
    """What the batch says the model should have answered.

    Of a mapping it is the value of `name`, of a pair (x, labels) the second; [B, ...].

        labels = dropinf.losses.target_of((x, labels))

    Raises:
        ValueError: the batch is neither, or has no such name.
    """
    if isinstance(batch, Mapping):
        if batch.get(name) is None:
            raise ValueError(
                f"loss_fn: the batch has no {name!r}, only {sorted(batch)}; use a data collator "
                "that makes them, such as DataCollatorForLanguageModeling, and with a Trainer "
                "that takes them out (compute_loss_func, label smoothing) "
                "InfluenceCallback(when='after')"
            )
        return batch[name]
    if isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[1]
    kinds = [type(each).__name__ for each in batch] if isinstance(batch, Sequence) else []
    of = f" of {', '.join(kinds[:4])}" if kinds else ""
    raise ValueError(
        f"loss_fn: the batch must be a mapping with {name!r} or a pair (x, {name}) of tensors, got "
        f"a {type(batch).__name__}{of}; write a loss function of your own with "
        "dropinf.losses.likelihood"
    )


def without(batch: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The rest of a batch."""
    return {name: value for name, value in batch.items() if name not in names}


def logits_of(outputs: Any) -> Tensor:
    """The tensor, or the logits of what models of transformers return."""
    found = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"loss_fn: the model returned a {type(outputs).__name__}, which is no tensor and has "
            "no logits; write a loss function of your own with dropinf.losses.likelihood"
        )
    return found
