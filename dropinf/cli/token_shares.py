"""Which tokens of a training text make its score: its row, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dropinf
from dropinf.cli.terminal import Terminal
from dropinf.extras import optional
from dropinf.jobs import Ready
from dropinf.results import Attribution
from dropinf.rows import RowStore, Weights
from dropinf.solvers import Solver

Shares = Callable[[Any, Any], list[tuple[str, float]] | None]


def shares_of_tokens(
    terminal: Terminal, ready: Ready, found: Attribution, asked: RowStore, solver: Solver
) -> Shares | None:
    """(query id, example id) -> (token, its part of the score) of the examples that are found.

    The parts add up to the score. None, which is said, where a layer of the model keeps no tokens
    apart, or the model has other weights by now.
    """
    examples = ready.train
    if examples.tokens is None:
        return None
    if asked.weights not in (
        None,
        Weights(ready.model, asked.plan).fingerprint(asked.about.passing),
    ):
        terminal.note("texts are not shaded by token: the model has other weights than the rows")
        return None
    wanted: dict[Any, list[Any]] = {}  # example -> queries
    for ranked in (found.top, found.bottom):
        for query, ids in zip(found.query_ids, ranked.ids, strict=True):
            for id_ in ids:
                if id_ is not None:
                    wanted.setdefault(id_, []).append(query)
    try:
        parts = _parts(terminal, ready, wanted, found.query_ids, solver.solve(asked.rows), asked)
    except ValueError as error:
        terminal.note(f"texts are not shaded by token: {error}")
        return None

    def shares(query: Any, id_: Any) -> list[tuple[str, float]] | None:
        own = parts.get((query, id_))
        return own and list(zip(examples.tokens(examples.position(id_)), own, strict=True))

    return shares


def _parts(
    terminal: Terminal,
    ready: Ready,
    wanted: dict[Any, list[Any]],
    queries: list[Any],
    solved: Tensor,
    asked: RowStore,
) -> dict[tuple[Any, Any], list[float]]:
    """Of each (query, example) the products of its tokens' rows with the solution."""
    examples = ready.train
    positions = {examples.position(id_): id_ for id_ in wanted}
    row_of = {query: q for q, query in enumerate(queries)}
    tqdm = optional("tqdm.auto", "cli", "report").tqdm
    parts = {}
    with (
        dropinf.capture(ready.model, asked.plan, per="token") as tap,
        tqdm(total=len(wanted), desc="tokens", unit="ex", disable=not terminal.progress) as bar,
    ):
        # One by one, since rows of all tokens are that many times as many.
        for batch, position in zip(
            examples.only(list(positions), one_by_one=True), positions, strict=True
        ):
            rows = tap.rows(ready.loss_fn(ready.model, batch))  # [T, R]
            id_ = positions[position]
            at = torch.tensor([row_of[query] for query in wanted[id_]])
            found = solved[at].to(rows) @ rows.T
            for query, own in zip(wanted[id_], found.tolist(), strict=True):
                parts[query, id_] = own
            bar.update()
    return parts
