"""The probe: whether the rows of a batch are those of its examples.

One example goes through the model alone, and its row is compared with its row in the batch. They
differ if something mixes examples: BatchNorm in train mode, a loss over pairs of examples, a batch
dimension that was taken for another. Dropout is switched off in both, so that it is no difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dropinf.capturing.call_args import argument
from dropinf.capturing.snapshot import Snapshot
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


_ITS_LOSS = "no layer's output differs, but its loss does"


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
    b: int,
    row: Tensor,
    row_of: Callable[[Any, int], Tensor],
    losses_of: Callable[[Any], Tensor],
    plan: Plan,
    batch_dim: int,
    inputs: int = 1,
) -> bool:
    """Compare example b alone with its row in the batch; warn if they differ.

    Rows are exact then, but depend on which examples are in a batch.

    Args:
        model, batch: what made the row, of B examples.
        b: the example.
        row: [R] of it in the batch.
        row_of: (batch, i) -> row [R] of its example i.
        losses_of: batch -> its losses.
        plan: of the row.
        batch_dim: dimension of the examples in the batch's tensors of two dimensions and more.
        inputs: of the model that an example has: 2 of a pair.

    Returns:
        Whether the examples were found to be independent.
    """
    one = one_example(batch, b, B, batch_dim, inputs)
    if one is None:
        warn_user(
            f"collect: could not cut example {b} out of a batch of type {type(batch).__name__}, so "
            "that it was not checked whether the model mixes examples; check=False says you know",
        )
        return False
    with Snapshot(model).again():  # which is left as it is
        with _NoDropout() as mode:
            try:
                alone = row_of(one, 0)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                warn_user(
                    f"collect: the batch goes through the model, example {b} alone does not "
                    f"({_last_layer(model, lambda: losses_of(one))}: {error}), so that it was not "
                    "checked whether the model mixes examples. Call .eval() on a BatchNorm; "
                    "check=False says you know"
                )
                return False
            if mode.met:  # the batch once more, without its dropout
                row = row_of(batch, b)
        block = _differing(alone, row, plan, mode.eps)
        if block is None:
            return True
        with _NoDropout():
            random = _differing(alone, row_of(one, 0), plan, mode.eps) is not None
            layer = _first_difference(model, one, batch, b, B, batch_dim, losses_of, mode.eps)
    if random:
        warn_user(
            "collect: the model is random, so that it was not checked whether it mixes examples; "
            "rows are of the pass that was sampled. check=False says you know",
        )
        return False
    mend = "Give one loss per example" if layer == _ITS_LOSS else "Call .eval() on a BatchNorm"
    warn_user(
        f"collect: example {b} alone has another row than in its batch of {B}: "
        f"{layer or f'the entries of layer {block!r} differ'}; something mixes examples, so that "
        f"rows depend on which are in a batch together. {mend}, or say with batch_dim= where the "
        "examples of the data are; check=False says you know"
    )
    return False


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


def one_example(batch: Any, b: int, B: int, batch_dim: int, inputs: int = 1) -> Any:
    """Example b of a batch, as a batch; None where there is nothing to cut.

    With more inputs than one, all first ones stand before all second ones.
    """
    places = places_of(batch, B, batch_dim)
    several = places_of(batch, inputs * B, batch_dim) if inputs > 1 else []
    if not places and not several:
        return None
    number = iter(range(1 << 62))

    def cut(leaf: Any) -> Any:
        if next(number) not in several or not isinstance(leaf, Tensor):
            return leaf
        return leaf.unflatten(0, (inputs, B))[:, b]

    return example_at(_mapped(batch, cut), b, places, batch_dim)


def places_of(batch: Any, B: int, batch_dim: int) -> list[int]:
    """Which leaves of a batch, in their order, hold B examples."""
    return [i for i, size in enumerate(_sizes(batch, batch_dim)) if size == B]


def size_at(batch: Any, places: Sequence[int], batch_dim: int) -> int | None:
    """How many examples these leaves hold, if they agree."""
    sizes = _sizes(batch, batch_dim)
    found = {sizes[i] if i < len(sizes) else None for i in places}
    return found.pop() if len(found) == 1 else None


def example_at(batch: Any, b: int, places: Sequence[int], batch_dim: int) -> Any:
    """Example b of these leaves of a batch, all else as it is."""
    number = iter(range(1 << 62))

    def cut(leaf: Any) -> Any:
        if next(number) not in places:
            return leaf
        if isinstance(leaf, Tensor):
            return leaf.narrow(batch_dim if leaf.dim() > batch_dim else 0, b, 1)
        return leaf[b : b + 1]

    return _mapped(batch, cut)


def _sizes(batch: Any, batch_dim: int) -> list[int | None]:
    sizes: list[int | None] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            dim = batch_dim if leaf.dim() > batch_dim else 0
            sizes.append(leaf.shape[dim] if leaf.dim() else None)
        else:
            sizes.append(len(leaf) if isinstance(leaf, (list, tuple)) else None)
        return leaf

    _mapped(batch, note)
    return sizes


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same structure with its leaves changed: tensors, lists of what is neither, all else."""
    if isinstance(value, Mapping):
        parts = {key: _mapped(v, change) for key, v in value.items()}
        return parts if type(value) is dict else type(value)(parts)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(v, change) for v in value))
    if isinstance(value, (list, tuple)) and any(
        isinstance(v, (Tensor, Mapping, tuple, list)) for v in value
    ):
        return type(value)(_mapped(v, change) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        changed = {f.name: _mapped(getattr(value, f.name), change) for f in fields}
        return dataclasses.replace(value, **changed)
    return change(value)


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
    b: int,
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
                    part = y.narrow(dim, b * mine.shape[dim], mine.shape[dim])
                    limit = eps**0.5 * mine.double().norm()
                    if not (part.double() - mine.double()).norm() <= limit:
                        found.append(name)
                    return

        with _outputs(model, compare):
            losses = losses_of(batch)
    if found:
        return f"layer {found[0]!r} ({types[found[0]]}) is the first whose output differs"
    if not torch.allclose(loss[0].double(), losses[b].double(), rtol=eps**0.5, atol=0):
        return _ITS_LOSS
    return None
