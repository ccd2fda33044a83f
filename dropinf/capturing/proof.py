"""The proof: rows of a capture beside plain autograd of the same batch, on the user's own data."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dropinf.capturing.activations import ActivationsTap
from dropinf.capturing.contents import Contents
from dropinf.capturing.passes import Used, only_these_require_grad, taken
from dropinf.capturing.snapshot import Snapshot
from dropinf.compression import ParamPlan, Plan, unwrap
from dropinf.user_warning import warn_user

# A difference may be so many times plain autograd's own error, which is that of one backward pass
# beside another whose every sum is rounded elsewhere; or so many roundings, as sums in another
# order differ by: 3e-5 in float32, where a missing token of a thousand makes 1e-3.
_TIMES, _ROUNDINGS = 8, 256
_FACTOR = 3.0


class ProofError(RuntimeError):
    """Rows that are not what plain autograd gives.

    `collect` raises it at the first difference beyond rounding.

        try:
            store = dropinf.collect(model, loader, loss_fn, plan)
        except dropinf.ProofError as error:
            print(error)  # which layer differs, and by how much
    """


@dataclass
class Proof:
    """What was compared with plain autograd.

    Attributes:
        examples: how many examples, each over all layers.
        layers: names of the layers that had a gradient in some of them.
        largest: the largest relative difference of a layer's entries.
    """

    examples: int = 0
    layers: set[str] = field(default_factory=set)
    largest: float = 0.0

    def __str__(self) -> str:
        if not self.examples:
            return "not compared with autograd"
        many = "example" if self.examples == 1 else "examples"
        return (
            f"compared with autograd on {self.examples} {many}, {len(self.layers)} layers, "
            f"largest relative difference {self.largest:.1e}"
        )

    def saved(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "examples": self.examples,
            "layers": sorted(self.layers),
            "largest": self.largest,
        }

    @classmethod
    def load(cls, saved: dict[str, Any]) -> Proof:
        """From what `saved` gave."""
        return cls(int(saved["examples"]), set(saved["layers"]), float(saved["largest"]))


def plain_rows(
    given: nn.Module,
    plan: Plan,
    losses_of: Callable[[], Tensor],
    b: int,
    factors: Sequence[float],
) -> tuple[Tensor, list[Tensor]]:
    """The losses, and the row of loss b by plain autograd, once for each factor that is taken out.

    A parameter's gradient is freed as soon as its entries are taken. Only the parameters of the
    plan require grad inside, as under a capture.
    """
    contents = Contents(given, "verify")
    parameters = [contents.parameters[slot.name] for slot in plan.slots]
    with contextlib.ExitStack() as undo:
        contents.unsynchronised(undo)
        only_these_require_grad(parameters, contents.everything(), undo)
        used = Used(contents, undo)
        losses = losses_of()
        slot_of = dict(zip(map(id, used.of(parameters)), plan.slots, strict=True))
        dtype = torch.promote_types(losses.dtype, torch.float32)
        rows = []
        row = torch.empty(0)

        def take(p: Tensor) -> None:
            if id(p) in slot_of:
                slot = slot_of[id(p)]
                row[slot.entries] += entries_of(slot, p.grad, factor).to(row)

        for number, factor in enumerate(factors):
            row = torch.zeros(plan.width, dtype=dtype, device=losses.device)
            loss = losses[b].sum() * factor
            with taken(used.everything(), take):
                loss.backward(retain_graph=number + 1 < len(factors))
            rows.append(row)
    return losses.detach(), rows


def entries_of(slot: ParamPlan, grad: Tensor, factor: float) -> Tensor:
    """The entries of one gradient of a parameter, of which `factor` is taken out."""
    values = grad.reshape(1, -1)[:, slot.index.to(grad.device)]
    wide = torch.promote_types(grad.dtype, torch.float32)
    values = slot.scaled(values.to(wide) / factor)
    return (values if slot.entry_map is None else slot.entry_map(values))[0]


def compare(
    plan: Plan, row: Tensor, plain: Tensor, own: float, proof: Proof, paths: dict[str, str]
) -> None:
    """Add a comparison of one example's row to `proof`.

    Args:
        plan: of the rows.
        row, plain: [R] of the capture, and of plain autograd.
        own: relative error of plain autograd itself.
        proof: what was compared so far.
        paths: parameter -> how it was captured.

    Raises:
        ProofError: the entries of a layer differ by more than rounding.
    """
    eps = torch.finfo(row.dtype).eps
    row, plain = row.double(), plain.double().to(row.device)
    if not plain.isfinite().all():  # as where another example's infinity is multiplied by zero
        return
    whole = plain.norm()
    allowed = max(_TIMES * own, _ROUNDINGS * eps)
    proof.examples += 1
    for block in plan.blocks:
        mine, right = row[block.entries], plain[block.entries]
        size, off = right.norm(), (mine - right).norm()
        if not size and not off:
            continue
        proof.layers.add(block.name)
        relative = float(off / size) if size else float("inf")
        # A layer whose gradient cancels has the rounding of what cancelled.
        if not off <= allowed * max(size, 1e-3 * whole):
            raise ProofError(_report(block, mine, right, relative, own, paths))
        if size >= 1e-3 * whole:
            proof.largest = max(proof.largest, relative)


def own_error(plan: Plan, one: Tensor, other: Tensor) -> float:
    """Relative error of plain autograd: two passes that round differently, in the worst layer."""
    one, other = one.double(), other.double()
    least = 1e-3 * one.norm()
    layers = [(one[b.entries], other[b.entries]) for b in plan.blocks]
    errors = [float((a - c).norm() / a.norm()) for a, c in layers if a.any() and a.norm() >= least]
    return max(errors, default=0.0)


def _report(
    block: Any, mine: Tensor, right: Tensor, relative: float, own: float, paths: dict[str, str]
) -> str:
    at = int((mine - right).abs().argmax())
    how = sorted({paths.get(slot.name, "not met") for slot in block.slots})
    return (
        f"the rows of layer {block.name!r} are not those of plain autograd: entry {at} is "
        f"{mine[at].item():.6g} where autograd has {right[at].item():.6g} (relative difference of "
        f"the layer {relative:.2g}, autograd's own error {own:.1g}). Use mode='grads' or "
        "closed=False, and report it with these lines:\n"
        f"  path: {'; '.join(how)}\n"
        f"  parameters: {[(slot.name, slot.shape) for slot in block.slots]}\n"
        f"  torch {torch.__version__}, Python {platform.python_version()}"
    )


def alone_in_its_row(
    tap: ActivationsTap, losses: Tensor, rows: Tensor, b: int, loss_scale: float = 1.0
) -> None:
    """One more backward pass, of the loss of example b alone: no other row may get anything.

    That shows a wrong owner in any layer, without any memory. `rows` are those of all losses, whose
    graph is still there.

    Raises:
        ProofError: another row is not zero, or row b is not what it was.
    """
    only = torch.zeros_like(losses)
    only[b] = 1
    paths = dict(tap.plan.paths)
    alone = tap.rows(losses * only, loss_scale=loss_scale)
    if not alone.isfinite().all():  # where zero times infinity is one step of a gradient
        return
    eps = torch.finfo(alone.dtype).eps
    for block in tap.plan.blocks:
        here, before = alone[:, block.entries], rows[b, block.entries]
        off = (here[b] - before).norm() > eps**0.5 * before.norm()
        moved = [i for i, row in enumerate(here) if i != b and row.any()]
        if off or moved:
            how = sorted({paths.get(slot.name, "not met") for slot in block.slots})
            what = f"reaches row {moved[0]}" if moved else "gives another row than in the batch"
            raise ProofError(
                f"the loss of example {b} alone {what} in layer {block.name!r}: what was taken for "
                "one example is another's. Use mode='grads' or closed=False, and report it with "
                f"these lines:\n  path: {'; '.join(how)}\n  torch {torch.__version__}"
            )


class Prover:
    """Compares batches of one collection with plain autograd.

    Attributes:
        proof: what was compared so far.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], plan: Plan) -> None:
        self.proof = Proof()
        self._model, self._loss_fn, self._plan = model, loss_fn, plan
        self._own: float | None = None

    def prove(
        self,
        batch: Any,
        losses: Tensor,
        row: Tensor,
        b: int,
        before: Snapshot,
        paths: dict[str, str],
        loss_scale: float = 1.0,
        good: bool = True,
    ) -> None:
        """Compare row b of a batch, which ran from the state `before`.

        The passes run on all ranks; `good` says whether this one has anything to compare.

        Raises:
            ProofError: they differ.
        """
        factors = (1.0,) if self._own is not None else (1.0, _FACTOR)
        with before.again():
            again, rows = plain_rows(
                self._model,
                self._plan,
                lambda: self._loss_fn(self._model, batch),
                b,
                factors,
            )
        if not good:
            return
        eps = torch.finfo(losses.dtype).eps
        if again.shape != losses.shape or not torch.allclose(
            again.double(), losses.double(), rtol=eps**0.5, atol=eps**0.5, equal_nan=True
        ):
            warn_user(
                "collect: the loss function gives other losses in a second call of the same batch, "
                "so that rows were not compared with autograd; check=False says you know"
            )
            return
        if len(rows) == 2:
            # A gradient in half precision has at least the roundings of its own dtype.
            trained = [p for p in self._model.parameters() if p.requires_grad]
            coarsest = max((torch.finfo(p.dtype).eps for p in trained), default=0.0)
            self._own = max(own_error(self._plan, *rows), coarsest)
        compare(self._plan, row, rows[0] / loss_scale, self._own, self.proof, paths)


def verify(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    plan: Plan,
    *,
    example: int = 0,
    **options: Any,
) -> Proof:
    """Compare a capture of one batch with plain autograd, as `collect` does by itself.

        print(dropinf.verify(model, batch, loss_fn, plan))

    Args:
        model, plan: as for `capture`.
        batch: what loss_fn takes.
        loss_fn: (model, batch) -> [B], one loss for each example.
        example: whose row is compared over all layers; that it reaches no other row is looked at as
            well.
        options: of `capture`: batch_dim, backend, mode, closed.

    Returns:
        The proof: how many layers had a gradient, and the largest relative difference.

    Raises:
        ProofError: rows are not those of plain autograd; the message names the layer.
        ValueError: `example` is not in the batch.
    """
    from dropinf.capturing.modes import capture

    bare = unwrap("verify", model)
    before = Snapshot(bare)
    with capture(model, plan, **options) as tap:
        losses = loss_fn(model, batch)
        if not 0 <= example < len(losses):
            raise ValueError(f"verify: example {example} is not in a batch of {len(losses)}")
        rows = tap.rows(losses, retain_graph=True)
        paths = dict(plan.paths)
        if isinstance(tap, ActivationsTap):
            alone_in_its_row(tap, losses, rows, example)
    prover = Prover(model, loss_fn, plan)
    prover.prove(batch, losses.detach(), rows[example], example, before, paths)
    return prover.proof
