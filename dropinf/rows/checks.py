"""What `collect` checks as it goes: rows beside plain autograd, an example beside itself alone."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from dropinf.capturing import (
    ActivationsTap,
    Proof,
    Prover,
    Snapshot,
    alone_in_its_row,
    check_examples,
    places_of,
)
from dropinf.rows.batches import Batches

# Of the time of a collection, for comparisons beyond the first ones, of layers that no example so
# far had a gradient for; a comparison costs about two batches.
_SHARE, _COST = 0.01, 2.0


def compared(rank: int, world_size: int, most: int) -> list[int]:
    """Numbers up to `most` of a rank's batches that are to be compared with plain autograd.

    The first; and once all ranks together have had 4, 8, 16, ... batches, one of one rank, which is
    another one each time: more ranks do not compare more often, but for their first.
    """
    powers = range(2, (max(1, most) * world_size).bit_length() + 1)
    return [0, *(-(-(1 << e) // world_size) for e in powers if e % world_size == rank)]


class Checks:
    """The checks of one collection, or of what a rank has of it."""

    def __init__(self, batches: Batches, rank: int = 0, world_size: int = 1) -> None:
        self._batches = batches
        # The ranks of a sharded model run the same passes.
        self._rank, self._size = (0, 1) if batches.tap.sharded else (rank, world_size)
        self._prover = Prover(batches.model, batches.loss_fn, batches.plan)
        self._due: Snapshot | None = None
        self._alone = False  # an example was compared with itself alone
        self._random = random.Random(0)

    @property
    def proof(self) -> Proof:
        """What was compared with plain autograd."""
        return self._prover.proof

    @proof.setter
    def proof(self, before: Proof) -> None:
        self._prover.proof = before

    def before(self, number: int) -> None:
        """Batch `number` of this rank comes next: whether it is to be compared."""
        tap, per = self._batches.tap, self._batches.per
        due = self._is_due(number) and isinstance(tap, ActivationsTap) and per != "segment"
        self._due = Snapshot(self._batches.model) if due else None
        self._batches.keep_graph = due and per == "example"

    def after(self, batch: Any, rows: Tensor, valid: Tensor) -> None:
        """Check the batch that became these rows.

        Raises:
            ProofError: rows are not what plain autograd gives.
        """
        batches = self._batches
        per_example = batches.per == "example"
        good = (
            valid.nonzero().flatten().tolist() if per_example else list(range(batches.num_examples))
        )
        b = self._random.choice(good) if good else 0
        if self._due is not None and batches.losses is not None:
            self._compare(batch, rows, b, bool(good))
        batches.kept = None
        if not self._alone and batches.num_examples > 1 and bool(valid.all()):
            self._alone = True
            inputs = getattr(batches.loss_fn, "inputs", 1)  # 2 of a loss of pairs
            independent = check_examples(
                batches.model,
                batch,
                batches.num_examples,
                b,
                batches.of_example(rows, b),
                batches.row_of,
                lambda one: batches.loss_fn(batches.model, one),
                batches.plan,
                batches.batch_dim,
                inputs,
            )
            if independent and inputs == 1:
                batches.places = places_of(batch, batches.num_examples, batches.batch_dim)

    def _is_due(self, number: int) -> bool:
        if number in compared(self._rank, self._size, number):
            return True
        missing = len(self.proof.layers) < len(self._batches.plan.blocks)
        return missing and _COST * (self.proof.examples + 1) <= _SHARE * number

    def _compare(self, batch: Any, rows: Tensor, b: int, good: bool) -> None:
        batches, before = self._batches, self._due
        paths = dict(batches.plan.paths)
        row = batches.of_example(rows, b)
        if batches.kept is not None and isinstance(batches.tap, ActivationsTap):
            alone_in_its_row(batches.tap, batches.kept, rows, b, batches.loss_scale)
        batches.kept = None
        with batches.tap.paused(), torch.enable_grad():
            self._prover.prove(
                batch, batches.losses, row, b, before, paths, batches.loss_scale, good
            )
        batches.plan.paths.update(paths)
