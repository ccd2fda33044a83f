"""Rows [n, R] of a data set: how they are collected, kept and read."""

from dropinf.rows.batches import LossFn
from dropinf.rows.collecting import collect
from dropinf.rows.collection import Collection
from dropinf.rows.drawn import Drawn
from dropinf.rows.energy_pass import energies
from dropinf.rows.ids import Ids, digest_of_ids, listed
from dropinf.rows.loaders import refuse_shuffling
from dropinf.rows.lock import Lock, LockedError
from dropinf.rows.optimizer_steps import OptimizerSteps
from dropinf.rows.packing import finite_rows, take
from dropinf.rows.row_passes import (
    PART_BYTES,
    device_of,
    kept_beside,
    mark_invalid,
    mean_squares,
    merged,
    products,
    put,
    solved_for,
    valid_rows,
)
from dropinf.rows.shares import split
from dropinf.rows.store import RowStore
from dropinf.rows.stretches import identity_of
from dropinf.rows.together import Together, over_ranks, ranks_together
from dropinf.rows.watching import passes_watched
from dropinf.rows.weights import Weights
from dropinf.rows.writing import RowWriter

__all__ = [
    "PART_BYTES",
    "Collection",
    "Drawn",
    "Ids",
    "Lock",
    "LockedError",
    "LossFn",
    "OptimizerSteps",
    "RowStore",
    "RowWriter",
    "Together",
    "Weights",
    "collect",
    "device_of",
    "digest_of_ids",
    "energies",
    "finite_rows",
    "identity_of",
    "kept_beside",
    "listed",
    "mark_invalid",
    "mean_squares",
    "merged",
    "over_ranks",
    "passes_watched",
    "products",
    "put",
    "ranks_together",
    "refuse_shuffling",
    "solved_for",
    "split",
    "take",
    "valid_rows",
]
