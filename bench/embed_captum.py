"""captum's TracInCP and DropoutInfluence, from their making to the scores of all queries."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from embed_case import (
    SIZE,
    B,
    Call,
    Case,
    Examples,
    M,
    N,
    assert_near,
    at_plan,
    cross_entropy,
    examples,
    formed_rows,
    influence,
    need,
)
from torch import Tensor, nn

import dropinf

R = 256
DAMPING = 0.1
OURS, PRODUCTS = "DropoutInfluence", "DropoutInfluence, solver=Identity()"
TRACIN = "captum TracInCP, one checkpoint"


def tracin(given: Examples) -> Call:
    """In its best form, which makes the gradients of all examples of a batch at once."""
    need("captum")
    from captum.influence import TracInCP

    folder = tempfile.TemporaryDirectory()
    path = str(Path(folder.name) / "1.pt")
    torch.save(given.model.state_dict(), path)

    def call() -> Tensor:
        attribution = TracInCP(
            given.model,
            given.train,
            [path],
            loss_fn=nn.CrossEntropyLoss(reduction="sum"),
            batch_size=B,
            sample_wise_grads_per_batch=True,
        )
        return attribution.influence(given.queries.tensors)

    call.folder = folder  # which goes when nothing holds it
    return call


def ours(solver: Callable[[], Any]) -> Callable[[Examples], Call]:
    def contestant(given: Examples) -> Call:
        need("captum")
        from dropinf.integrations.captum import DropoutInfluence

        def call() -> Tensor:
            attribution = DropoutInfluence(
                given.model,
                given.train,
                nn.CrossEntropyLoss(reduction="sum"),
                dropinf.Dropout(r=R),
                solver=solver(),
                batch_size=B,
            )
            return attribution.influence(given.queries.tensors)

        return call

    return contestant


def check(given: Examples, calls: dict[str, Call]) -> None:
    """Each against gradients that are formed: all coordinates, or those of the plan."""
    plan = dropinf.Plan.make(given.model, dropinf.Dropout(r=R))
    everything = dropinf.Plan.make(given.model, dropinf.Full())
    train, queries = given.loaders()

    def rows(data, plan):
        return formed_rows(given.model, data, cross_entropy, at_plan(plan))

    g, q = rows(train, plan), rows(queries, plan)
    assert_near(calls[OURS](), influence(q, g, plan, DAMPING), OURS, 1e-2)
    assert_near(calls[PRODUCTS](), q @ g.T, PRODUCTS)
    asked = rows(queries, everything)
    truth = torch.cat([asked @ rows([batch], everything).T for batch in train], 1)
    assert truth.shape == (M, N)
    assert_near(calls[TRACIN](), truth, TRACIN)


CONTESTANTS = {
    OURS: ours(lambda: dropinf.solvers.Cholesky(damping=DAMPING)),
    PRODUCTS: ours(dropinf.solvers.Identity),
    TRACIN: tracin,
}
CASES = {
    f"captum from beginning to end, r={R} a layer: {SIZE}": Case(
        examples, CONTESTANTS, OURS, {TRACIN: (1, None)}, check, (N + M) * 3 * R * 4 / 1e6
    )
}
