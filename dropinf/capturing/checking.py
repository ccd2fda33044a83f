"""The probe: whether the rows of a batch are those of its examples.

Example 0 goes through the model alone, and its row is compared with its row in the batch. They
differ if something mixes examples: BatchNorm in train mode, a loss over pairs of examples, a batch
dimension that was taken for another. Dropout is switched off in both, so that it is no difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dropinf.capturing.call_args import argument
from dropinf.compression import Plan
from dropinf.user_warning import warn_user

_DROPOUT = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
}
# And the place of their dropout_p.
_ATTENTION = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}


class _NoDropout(TorchFunctionMode):
    """Runs dropout as in eval mode; notes whether there was any, and the coarsest dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.met = False
        self.eps = torch.finfo(torch.float64).eps

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUT:
            training = argument(args, kwargs, 2, "training", kwargs.get("train", True))
            if training and argument(args, kwargs, 1, "p", 0.5):
                self.met = True
                return args[0] if args else kwargs["input"]
        for attention, place in _ATTENTION.items():
            if func is attention and argument(args, kwargs, place, "dropout_p", 0.0):
                self.met |= bool(argument(args, kwargs, 13, "training", True))
                if len(args) > place:
                    args = (*args[:place], 0.0, *args[place + 1 :])
                else:
                    kwargs["dropout_p"] = 0.0
        y = func(*args, **kwargs)
        if isinstance(y, Tensor) and y.is_floating_point():
            self.eps = max(self.eps, torch.finfo(y.dtype).eps)
        return y


def check_examples(
    model: nn.Module,
    batch: Any,
    B: int,
    row: Tensor,
    row_of: Callable[[Any], Tensor],
    losses_of: Callable[[Any], Tensor],
    plan: Plan,
    batch_dim: int,
) -> None:
    """Compare example 0 alone with its row in the batch.

    Args:
        model, batch: what made the row, of B examples.
        row: [R] of example 0 in the batch.
        row_of: batch -> row [R] of its example 0.
        losses_of: batch -> its losses.
        plan: of the row.
        batch_dim: dimension of the examples in the batch's tensors of two dimensions and more.

    Raises:
        ValueError: they differ; names the first layer whose output does.
    """
    if B < 2:
        return
    one = first_example(batch, B, batch_dim)
    if one is None:
        warn_user(
            f"collect: could not cut example 0 out of a batch of type {type(batch).__name__}, so "
            "that it was not checked whether the model mixes examples; check=False says you know",
        )
        return
    with _undisturbed(model, row.device):
        with _NoDropout() as mode:
            try:
                alone = row_of(one)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise ValueError(
                    "collect: the batch goes through the model, example 0 alone does not "
                    f"({_last_layer(model, lambda: losses_of(one))}: {error}). Call .eval() on a "
                    "BatchNorm, or use batches of one example; check=False skips this check of "
                    "whether examples are mixed"
                ) from error
            if mode.met:  # the batch once more, without its dropout
                row = row_of(batch)
        block = _differing(alone, row, plan, mode.eps)
        if block is None:
            return
        with _NoDropout():
            random = _differing(alone, row_of(one), plan, mode.eps) is not None
            layer = _first_difference(model, one, batch, B, batch_dim, losses_of, mode.eps)
    if random:
        warn_user(
            "collect: the model is random, so that it was not checked whether it mixes examples; "
            "rows are of the pass that was sampled. check=False says you know",
        )
        return
    raise ValueError(
        f"collect: example 0 alone has another row than in its batch of {B}: "
        f"{layer or f'the entries of layer {block!r} differ'}; something mixes examples. Call "
        ".eval() on a BatchNorm, give one loss per example, say where the examples are with "
        "batch_dim=, or use batches of one example; check=False skips this check"
    )


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put buffers (the statistics of a BatchNorm) and random numbers back."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _last_layer(model: nn.Module, run: Callable[[], object]) -> str:
    """The last layer that a run entered, which is the one that failed if it did."""
    entered = [""]

    def note(name: str) -> Callable:
        return lambda module, args: entered.append(name)

    handles = [m.register_forward_pre_hook(note(n)) for n, m in model.named_modules()]
    try:
        run()
    except (RuntimeError, ValueError, IndexError, TypeError):
        pass
    finally:
        for handle in handles:
            handle.remove()
    module = model.get_submodule(entered[-1])
    return f"layer {entered[-1]!r} ({type(module).__name__})"


def first_example(batch: Any, B: int, batch_dim: int) -> Any:
    """Example 0 of a batch, as a batch; None where there is nothing to cut."""
    cuts = 0

    def cut(value: Any) -> Any:
        nonlocal cuts
        if isinstance(value, Tensor):
            dim = batch_dim if value.dim() > batch_dim else 0
            if value.dim() and value.shape[dim] == B:
                cuts += 1
                return value.narrow(dim, 0, 1)
            return value
        if isinstance(value, Mapping):
            parts = {key: cut(v) for key, v in value.items()}
            return parts if type(value) is dict else type(value)(parts)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(cut, value))
        if isinstance(value, (list, tuple)):
            if len(value) == B and not any(
                isinstance(v, (Tensor, Mapping, tuple, list)) for v in value
            ):
                cuts += 1
                return value[:1]
            return type(value)(map(cut, value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: cut(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        return value

    one = cut(batch)
    return one if cuts else None


def _differing(one: Tensor, other: Tensor, plan: Plan, eps: float) -> str | None:
    """Name of the first block whose entries differ by more than rounding."""
    one, other = one.double(), other.double()
    size = max(one.norm(), other.norm()) / len(plan.blocks) ** 0.5
    for block in plan.blocks:
        a, b = one[block.entries], other[block.entries]
        # Half of the digits, of a block that is not itself a sum that cancels.
        if not (a - b).norm() <= eps**0.5 * max(a.norm(), b.norm(), 0.01 * size):
            return block.name
    return None


@contextmanager
def _outputs(model: nn.Module, note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls note(name, output) for every module that gives a tensor, in their order."""

    def hook(name: str) -> Callable:
        return lambda module, args, y: note(name, y.detach()) if isinstance(y, Tensor) else None

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_difference(
    model: nn.Module,
    one: Any,
    batch: Any,
    B: int,
    batch_dim: int,
    losses_of: Callable[[Any], Tensor],
    eps: float,
) -> str | None:
    alone: list[tuple[str, Tensor]] = []
    found: list[str] = []
    types = {name: type(module).__name__ for name, module in model.named_modules()}
    with torch.no_grad():
        with _outputs(model, lambda name, y: alone.append((name, y.clone()))):
            loss = losses_of(one)
        position = 0

        def compare(name: str, y: Tensor) -> None:
            nonlocal position
            if found or position >= len(alone) or alone[position][0] != name:
                return
            mine = alone[position][1]
            position += 1
            for dim in dict.fromkeys((batch_dim, 0, 1)):
                if y.dim() > dim and y.shape[dim] == B * mine.shape[dim]:
                    part = y.narrow(dim, 0, mine.shape[dim])
                    limit = eps**0.5 * mine.double().norm()
                    if not (part.double() - mine.double()).norm() <= limit:
                        found.append(name)
                    return

        with _outputs(model, compare):
            losses = losses_of(batch)
    if found:
        return f"layer {found[0]!r} ({types[found[0]]}) is the first whose output differs"
    if not torch.allclose(loss[0].double(), losses[0].double(), rtol=eps**0.5, atol=0):
        return "no layer's output differs, but its loss does"
    return None
