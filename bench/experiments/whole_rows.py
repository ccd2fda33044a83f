"""Rows of any compression out of whole gradients that were collected once."""

from typing import NamedTuple

import torch
from quality_tasks import Task, loader
from torch import nn

import dropinf


class WholeRows(NamedTuple):
    """Whole gradients of a task's training examples and queries."""

    train: dropinf.RowStore
    queries: dropinf.RowStore

    @classmethod
    def of(cls, task: Task, model: nn.Module) -> "WholeRows":
        plan = dropinf.Plan.make(model, dropinf.Full())
        return cls(
            *(
                dropinf.collect(model, loader(data), task.loss_fn, plan, progress=False)
                for data in (task.train, task.queries)
            )
        )

    def under(self, plan: dropinf.Plan) -> tuple[dropinf.RowStore, dropinf.RowStore]:
        """(queries, store) under a plan of the model."""
        return rows_under(plan, self.queries), rows_under(plan, self.train)


def rows_under(plan: dropinf.Plan, whole: dropinf.RowStore) -> dropinf.RowStore:
    """The rows that collecting under `plan` would give, but for rounding.

    Many masks of one model then cost one pass.

    Args:
        whole: rows of `dropinf.Full()` of the same model.
    """
    columns = {slot.name: slot.entries for slot in whole.plan.slots}
    parts = []
    for _, gradients in whole.chunks():
        rows = torch.zeros(len(gradients), plan.width)
        for slot in plan.slots:
            values = slot.scaled(gradients[:, columns[slot.name]][:, slot.index])
            entries = values if slot.entry_map is None else slot.entry_map(values)
            rows[:, slot.entries] += entries  # parameters of a layer may share some
        parts.append(rows)
    return dropinf.RowStore(torch.cat(parts), plan)
