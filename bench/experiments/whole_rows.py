"""Rows of any number of masks from one pass: the whole gradients, and their coordinates."""

from typing import NamedTuple

import torch
from quality_tasks import Task, loader
from torch import Tensor, nn

import dropinf


class WholeRows(NamedTuple):
    """The gradients of all parameters, of training examples and queries."""

    train: Tensor  # [n, P]
    queries: Tensor  # [m, P]
    offsets: dict[str, int]  # of each parameter

    @classmethod
    def of(cls, task: Task, model: nn.Module) -> "WholeRows":
        plan = dropinf.Plan.make(model, dropinf.Full())
        train, queries = (
            dropinf.collect(model, loader(data), task.loss_fn, plan, progress=False).rows
            for data in (task.train, task.queries)
        )
        return cls(train, queries, {slot.name: slot.offset for slot in plan.slots})

    def under(self, plan: dropinf.Plan) -> tuple[dropinf.RowStore, dropinf.RowStore]:
        """(queries, store) as `collect` makes them under a plan of Dropout."""
        queries, store = (
            torch.cat(
                [
                    slot.scaled(rows[:, self.offsets[slot.name] + slot.index])
                    for slot in sorted(plan.slots, key=lambda slot: slot.offset)
                ],
                1,
            )
            for rows in (self.queries, self.train)
        )
        return dropinf.RowStore(queries, plan), dropinf.RowStore(store, plan)
