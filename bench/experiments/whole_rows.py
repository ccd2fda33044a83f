"""Rows of any compression out of whole gradients that were collected once."""

import torch

import dropinf


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
