"""Collection: a store in the making, rows of one batch after the other."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from dropinf.capturing import Proof
from dropinf.compression import Plan
from dropinf.rows.about import proof_of
from dropinf.rows.batches import Batches, CaptureOptions, LossFn
from dropinf.rows.checks import Checks
from dropinf.rows.ids import GivenIds, picked
from dropinf.rows.optimizer_steps import OptimizerSteps
from dropinf.rows.packing import finite_rows
from dropinf.rows.resuming import Source
from dropinf.rows.shared_writing import SharedWriter
from dropinf.rows.store import RowStore
from dropinf.rows.weights import Weights
from dropinf.rows.writing import RowWriter
from dropinf.user_warning import warn_user
from dropinf.world import World


class Collection:
    """A store in the making: rows of one batch after the other, which are checked as they come.

    A context, that leaves a store that can be gone on with. The capture is open inside of
    `capturing` alone, again and again if need be.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        plan: Plan,
        path: str | os.PathLike | None = None,
        expected: int = 0,
        *,
        resume: bool = False,
        trained: bool = False,
        mode: str = "activations",
        segment_ids: str | Callable[[Any], Tensor] | None = None,
        loss_scale: float = 1.0,
        on_nonfinite: str = "raise",
        check: bool = True,
        dtype: torch.dtype | None = None,
        updates: torch.optim.Optimizer | None = None,
        world: World | None = None,
        **options: Unpack[CaptureOptions],
    ) -> None:
        """`expected` rows, 0 if that is not known; all else as of `collect`.

        Of a model that is `trained` meanwhile, weights have no fingerprint. The ranks of `world`
        write one store.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "collect: gradients are disabled; call it outside of torch.no_grad() and "
                "torch.inference_mode()"
            )
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(
                f"collect: on_nonfinite must be 'raise' or 'skip', got {on_nonfinite!r}"
            )
        if (options.get("per", "example") == "segment") != (segment_ids is not None):
            raise ValueError("collect: per='segment' and segment_ids= go together")
        self._steps: OptimizerSteps | None = None
        captured = plan
        if updates is not None:
            _refuse_updates(trained, options.get("per", "example"))
            self._steps = OptimizerSteps("collect", updates, model, plan)
            captured = self._steps.coordinates
        self._batches = Batches(
            model, loss_fn, captured, mode, options, segment_ids, loss_scale, on_nonfinite
        )
        which = (0, 1) if world is None else (world.rank, world.size)
        self._checks = Checks(self._batches, *which) if check else None
        self._writer: RowWriter | SharedWriter
        if world is None:
            self._writer = RowWriter(plan, path, expected, resume=resume, dtype=dtype)
        else:
            self._writer = SharedWriter(
                plan, path, world=world, resume=resume, dtype=dtype, distinct=not trained
            )
        self._weights = None if trained else Weights(model, plan)
        self._options = _shaping(model, mode, segment_ids, loss_scale, dtype, options)
        if self._steps is not None:
            self._options["updates"] = self._steps.said
        self._state: dict[str, Any] | None = None  # as it was written last
        self._unmet = {slot.name for slot in plan.slots}
        self._before = Proof()  # of a store that is gone on with
        self._told = 0, 0
        self._named: bool | None = None  # whether origins tell the ids
        self._number = 0

    def __enter__(self) -> Collection:
        try:
            self._writer.__enter__()
            if self._writer.goes_on:
                self._go_on()
        except BaseException:
            self._writer.leave()
            raise
        return self

    def _go_on(self) -> None:
        about, state = self._writer.about, self._writer.state
        where = self._writer.path
        keys = sorted(self._options.keys() | about.options.keys())
        differ = [key for key in keys if self._options.get(key) != about.options.get(key)]
        if differ:
            key = differ[0]
            raise ValueError(
                f"collect: the rows in {where} were collected with {key}="
                f"{about.options.get(key)!r}, not {self._options.get(key)!r}; resume as they were "
                "collected, or give another path"
            )
        own = None if self._weights is None else self._weights.fingerprint(about.passing)
        if own != about.weights:
            raise ValueError(
                f"collect: the rows in {where} were made with weights {about.weights}, and the "
                f"model has {own}; load those weights, or give another path"
            )
        if not isinstance(self._writer, SharedWriter):
            self._batches.seen = self._writer.past.examples
        if self._writer.unmet is not None:
            self._unmet &= self._writer.unmet
        self._before = proof_of([state])
        if self._checks is not None:
            self._checks.proof = self._before

    def source(self, loader: Iterable, ids: GivenIds | None) -> Source:
        """The batches whose rows are not there yet."""
        if isinstance(self._writer, SharedWriter):
            return self._writer.source(
                loader, ids, self._batches.per, bool(self._batches.tap.sharded)
            )
        return Source(loader, ids, self._writer.past, self._writer.path)

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return self._writer.num_rows

    @contextlib.contextmanager
    def capturing(self) -> Iterator[Batches]:
        """Opens the capture, for `add`."""
        with self._batches.opened():
            yield self._batches

    def add(
        self,
        batch: Any,
        origin: Callable[[int], Tensor] | None = None,
        source: Source | None = None,
    ) -> None:
        """The rows of a batch.

        Args:
            batch: what `loss_fn` takes.
            origin: number of rows -> [n, 2], if it is not the rows' own, and the ids in its second
                column.
            source: what knows the ids.
        """
        checks, batches = self._checks, self._batches
        if isinstance(self._writer, SharedWriter):
            batches.seen = self._writer.next_start() or batches.seen
        if checks is not None:
            checks.before(self._number)
        rows, valid = batches.rows(batch)
        if checks is not None:
            checks.after(batch, rows, valid)
        if self._steps is not None:
            with batches.tap.paused():
                rows = self._updated(self._steps, rows, valid)
        own, ids = batches.origin(), None
        if source is not None:
            with batches.tap.paused():
                ids = source.ids(batches.num_examples)
            if ids is not None and own is not None:
                ids = picked(ids, own[:, 0] - batches.seen)
        elif origin is not None:
            own = origin(len(rows))
            if self._named is None:
                self._named = bool((own[:, 1] >= 0).all())
            ids = own[:, 1] if self._named else None
        if not self._writer.num_rows:
            self._describe(source)
        self._unmet -= batches.met
        self._writer.append(rows, valid, own, ids, batches.num_examples, self._news())
        batches.seen += batches.num_examples
        self._number += 1

    def _updated(self, steps: OptimizerSteps, gradients: Tensor, valid: Tensor) -> Tensor:
        """Rows of updates, from those of gradients at the coordinates."""
        rows = steps.entries(gradients)
        rows[~valid] = 0
        finite = finite_rows(rows)
        if not finite.all():
            at = self._batches.seen + int((~finite).nonzero()[0, 0])
            raise ValueError(
                f"collect: the update of example {at} (in the loader's order) is not finite, as of "
                "an Adam without eps where no gradient was; give its groups an eps"
            )
        return rows

    def _describe(self, source: Source | None) -> None:
        """Know the weights, now that a pass has shown which buffers it changes."""
        about = self._writer.about
        about.options = self._options
        if self._weights is not None:
            with self._batches.tap.paused():
                about.passing = self._weights.passing()
                about.weights = self._weights.fingerprint(about.passing)
        if source is not None:
            about.first = source.first(self._batches.num_examples)

    def _news(self) -> dict[str, Any]:
        """What the journal says of the collection so far, the same object while that stays so."""
        proof = self._before if self._checks is None else self._checks.proof
        now = proof.examples, len(self._unmet)
        if self._state is None or now != self._told:
            self._state = {"unmet": sorted(self._unmet), "proof": proof.saved()}
            self._told = now
        return self._state

    def finish(self) -> RowStore:
        """The store."""
        slots = self._batches.plan.slots
        if isinstance(self._writer, SharedWriter):
            self._unmet = self._writer.unmet_by_all(self._unmet)
        unmet = [slot.name for slot in slots if slot.name in self._unmet]
        if unmet:
            made = "zeros" if self._steps is None else "steps of no gradient"
            warn_user(f"collect: no example had a gradient for {unmet}; their entries are {made}")
        return self._writer.finish(None if self._checks is None else self._checks.proof)


def _refuse_updates(trained: bool, per: str) -> None:
    """Refuse updates of what is no example, or of an optimizer that takes steps meanwhile."""
    if trained:
        raise ValueError(
            "collect: updates= are of one state of the optimizer, which changes while it trains; "
            "collect after training"
        )
    if per != "example":
        raise ValueError(
            f"collect: updates= go with rows of examples, as updates of parts (per={per!r}) do not "
            "add up to that of their sum; leave per= out"
        )


def _shaping(
    model: nn.Module,
    mode: str,
    segment_ids: object,
    loss_scale: float,
    dtype: torch.dtype | None,
    options: CaptureOptions,
) -> dict[str, Any]:
    """The options on which rows depend, as JSON has them."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    shaping = {
        "mode": mode,
        "loss_scale": loss_scale,
        "segments": segment_ids is not None,
        "training": any(module.training for module in model.modules()),
        "autocast": None if cast is None else str(cast),
        "dtype": None if dtype is None else str(dtype),
        **options,
    }
    return json.loads(json.dumps(shaping, default=str))
