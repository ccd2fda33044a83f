"""The probe: whether the rows of a batch are those of its examples.

One example goes through the model alone, and its row is compared with its row in the batch. They
differ if something mixes examples: BatchNorm in train mode, a loss over pairs of examples, a batch
dimension that was taken for another. Dropout is switched off in both, so that it is no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dropinf.capturing.batch_parts import one_example
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
            if mode.met:
                warn_user(
                    "collect: dropout is on, so that each row is of a random part of the model, "
                    "another one each time; call model.eval() first, unless you mean it "
                    "(check=False)"
                )
                row = row_of(batch, b)  # once more, without dropout
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
