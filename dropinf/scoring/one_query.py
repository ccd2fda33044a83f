"""One query in place of many."""

from __future__ import annotations

import dataclasses

import torch

from dropinf.rows import RowStore


def mean_query(queries: RowStore) -> RowStore:
    """One row, the mean of the valid ones: its scores are the mean of theirs, at the price of one.

    Its loss is the mean of the queries' losses. (Not with `Identity(cosine=True)`, which divides by
    lengths, nor for the largest k of each.)

        scores = dropinf.scores(dropinf.mean_query(asked), store, solver)  # [1, n]

    Raises:
        ValueError: no query is valid.
    """
    n = int(queries.valid.sum())
    if n == 0:
        raise ValueError(f"mean_query: none of the {len(queries)} queries is valid")
    total = torch.zeros(queries.plan.width, dtype=torch.float64, device=queries.device)
    for start, rows in queries.chunks():
        total += rows[queries.valid[start : start + len(rows)]].double().sum(0)
    mean = RowStore((total / n).to(queries.read_dtype)[None], queries.plan)
    mean.about = dataclasses.replace(queries.about, first=None)
    return mean
