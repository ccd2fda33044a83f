"""dattri's attributors from `cache` to scores, with its projections and with dropinf's.

Its influence functions by conjugate gradients and DataInf need the gradients of all parameters;
LoGra and FactGraSS keep r numbers of each linear layer, with hooks that dattri compiles once.
"""

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from embed_case import (
    SIZE,
    B,
    Call,
    Case,
    Examples,
    M,
    N,
    assert_near,
    assert_scores,
    at,
    at_plan,
    cross_entropy,
    examples,
    formed_rows,
    influence,
    need,
)
from embed_compress import coordinates
from embed_trak import num_parameters, probabilities
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, default_collate

import dropinf
from dropinf import DropoutProjector
from dropinf.tools.microbenchmark.peers import only_trainable

TOTAL = 256  # of a projection of the whole gradient
R = 256  # of a layer, a square, as 4 r is
DAMPING = 0.1  # relative, by the same rule in LoGra, FactGraSS and dropinf
LAMBDA = 1e-5
NORMAL, MASK = "dattri TRAKAttributor, normal", "dattri TRAKAttributor, random_mask"
DROPOUT = 'dattri TRAKAttributor, projection("dropout")'
OURS = "DropinfAttributor"
CG, DATAINF = "dattri IFAttributorCG", "dattri IFAttributorDataInf"
LOGRA, FACTGRASS = "dattri LoGra", "dattri FactGraSS"


class WithLoss(nn.Module):
    """As transformers' models, which is the form of batch that those two take whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, label: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=F.cross_entropy(self.model(x), label))


def keywords(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return dict(zip(("x", "label"), default_collate(examples), strict=True))


def task_of(given: Examples, batch_of_one: bool) -> Any:
    from dattri.task import AttributionTask

    model = given.model

    def loss(params, data):
        x, label = data if batch_of_one else (part[None] for part in data)
        return F.cross_entropy(functional_call(model, params, x), label)

    return AttributionTask(loss, model, model.state_dict())


def trak(projection: Callable[[], Any], **proj_type: str) -> Callable[[Examples], Call]:
    """Made in each call: attributors share the arguments of the one that was made last."""

    def contestant(given: Examples) -> Call:
        need("dattri")
        from dattri.algorithm.trak import TRAKAttributor

        task, (train, queries) = task_of(given, batch_of_one=False), given.loaders()

        def correct(params, data):
            return torch.exp(-task.get_loss_func(flatten=False)(params, data))

        def call() -> Tensor:
            with projection():
                attributor = TRAKAttributor(
                    task,
                    correct,
                    projector_kwargs={"proj_dim": TOTAL, **proj_type},
                    regularization=LAMBDA,
                )
                attributor.cache(train)
                return attributor.attribute(queries)

        return call

    return contestant


def dropped_out() -> Any:
    from dropinf.integrations.dattri import projection

    return projection("dropout")


def attributor(make: Callable[[Any], Any]) -> Callable[[Examples], Call]:
    def contestant(given: Examples) -> Call:
        need("dattri")
        task, (train, queries) = task_of(given, batch_of_one=True), given.loaders()

        def call() -> Tensor:
            made = make(task)
            made.cache(train)
            return made.attribute(train, queries).detach()

        return call

    return contestant


def cg(task: Any) -> Any:
    from dattri.algorithm.influence_function import IFAttributorCG

    return IFAttributorCG(task, max_iter=10, regularization=1e-2)


def datainf(task: Any) -> Any:
    from dattri.algorithm.influence_function import IFAttributorDataInf

    return IFAttributorDataInf(task, regularization=1e-2)


def dropinf_attributor(task: Any) -> Any:
    from dropinf.integrations.dattri import DropinfAttributor

    return DropinfAttributor(
        task, dropinf.Dropout(r=R), lambda: dropinf.solvers.Cholesky(damping=DAMPING)
    )


def hooked(method: str) -> Callable[[Examples], Call]:
    """Made once, since it compiles; weights frozen, so that no weight gradient is formed twice."""

    def contestant(given: Examples) -> Call:
        need("dattri")
        from dattri.algorithm.factgrass import FactGraSSAttributor
        from dattri.algorithm.logra import LoGraAttributor
        from dattri.task import AttributionTask

        # dattri compiles its compression for each layer; torch would give up after eight.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        wrapped = WithLoss(given.model)
        train, queries = (
            DataLoader(data, B, collate_fn=keywords) for data in (given.train, given.queries)
        )
        task = AttributionTask(
            loss_func=lambda model, batch, device: model(**batch).loss,
            model=wrapped,
            checkpoints=wrapped.state_dict(),
        )
        folder = tempfile.TemporaryDirectory()  # for its metadata, some lines of JSON
        kind = {LOGRA: LoGraAttributor, FACTGRASS: FactGraSSAttributor}[method]
        options = {"proj_dim": R, "offload": "none", "cache_dir": folder.name}
        made = kind(task, hessian="eFIM", damping=DAMPING, **options)

        def call() -> Tensor:
            with only_trainable(given.model, given.model[0].bias):
                made.cache(train)
                return made.attribute(train, queries)

        call.folder = folder  # which goes when nothing holds it
        return call

    return contestant


def check_trak(given: Examples, calls: dict[str, Call]) -> None:
    """Coordinates against the formula of gradients that are formed."""
    from dattri.func.projection import random_project

    D = num_parameters(given)
    scale = (D / TOTAL) ** 0.5
    drawn = DropoutProjector(D, TOTAL, dtype=torch.float64).project
    masked = random_project(
        torch.empty(1, D, dtype=torch.float64), 1, TOTAL, 32, proj_type="random_mask"
    )
    wanted = {
        DROPOUT: at(coordinates(drawn, D, scale), scale),
        MASK: at(coordinates(masked, D, 1.0), 1.0),
    }
    for name, chosen in wanted.items():
        loaders, model = given.loaders(), given.model
        g, q = (formed_rows(model, data, cross_entropy, chosen) / D**0.5 for data in loaders)
        XX = g.T @ g + LAMBDA * torch.eye(TOTAL)
        truth = torch.linalg.solve(XX, g.T).T @ q.T * (1 - probabilities(given))[:, None]
        assert_near(calls[name](), truth, name, 1e-2)
    assert_scores(calls[NORMAL](), (N, M), NORMAL)


def check_attributors(given: Examples, calls: dict[str, Call]) -> None:
    plan = dropinf.Plan.make(given.model, dropinf.Dropout(r=R))
    rows, queries = (
        formed_rows(given.model, data, cross_entropy, at_plan(plan)) for data in given.loaders()
    )
    assert_near(calls[OURS](), influence(queries, rows, plan, DAMPING).T, OURS, 1e-2)
    for name in calls.keys() - {OURS}:
        first = calls[name]()
        assert_scores(first, (len(given.train), len(given.queries)), name)
        assert_near(calls[name](), first.double(), name)  # a second call is the whole work again


TRAK_CASE = Case(
    examples,
    {
        DROPOUT: trak(dropped_out),
        NORMAL: trak(nullcontext, proj_type="normal"),
        MASK: trak(nullcontext, proj_type="random_mask"),
    },
    DROPOUT,
    {NORMAL: (1, None), MASK: (1, None)},
    check_trak,
    (N + M) * TOTAL * 4 / 1e6,
)
HESSIANS = Case(
    examples,
    {
        OURS: attributor(dropinf_attributor),
        DATAINF: attributor(datainf),
        CG: attributor(cg),
    },
    OURS,
    dict.fromkeys((DATAINF, CG), (1, None)),
    check_attributors,
    (N + M) * 3 * R * 4 / 1e6,
)
MORE = 16  # times as many examples, so that checks of the first batch are no large part
HOOKS = Case(
    lambda: examples(MORE * N, MORE * M),
    {OURS: attributor(dropinf_attributor), LOGRA: hooked(LOGRA), FACTGRASS: hooked(FACTGRASS)},
    OURS,
    dict.fromkeys((LOGRA, FACTGRASS), (1, None)),
    check_attributors,
    MORE * (N + M) * 3 * R * 4 / 1e6,
)
CASES = {
    f"dattri's TRAK from beginning to end, r={TOTAL}: {SIZE}": TRAK_CASE,
    f"dattri's influence functions from beginning to end, r={R} a layer: {SIZE}": HESSIANS,
    f"dattri's LoGra and FactGraSS from beginning to end, r={R} a layer: a perceptron of 2.0 M "
    f"parameters, n={MORE * N}, m={MORE * M}, B={B}": HOOKS,
}
