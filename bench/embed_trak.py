"""TRAKer from its making to its scores: with its own projector, with dropinf's, with its rows."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from embed_case import (
    SIZE,
    Call,
    Case,
    Examples,
    M,
    N,
    assert_near,
    assert_scores,
    at,
    at_plan,
    examples,
    formed_rows,
    margin,
    need,
)
from embed_compress import coordinates
from torch import Tensor

import dropinf
from dropinf import DropoutProjector

R = 256
LAMBDA = 1e-5  # of the size of the eigenvalues of XᵀX here, of which at most n are not zero
OWN, KEPT = "TRAK, BasicProjector", "TRAK, BasicProjector, its matrix of 2.0 GB made once and kept"
PROJECTOR, FUSED = "TRAK, projector=DropoutProjector", "TRAK, fused(plan)"


def scores(given: Examples, **arguments: Any) -> Call:
    from trak import TRAKer

    def call() -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            traker = TRAKer(
                given.model,
                "image_classification",
                train_set_size=N,
                save_dir=folder,
                device="cpu",
                use_half_precision=False,
                lambda_reg=LAMBDA,
                logging_level=50,
                **arguments,
            )
            state = given.model.state_dict()
            train, queries = given.loaders()
            traker.load_checkpoint(state, model_id=0)
            for batch in train:
                traker.featurize(batch, num_samples=len(batch[0]))
            traker.finalize_features()
            traker.start_scoring_checkpoint("queries", state, model_id=0, num_targets=M)
            for batch in queries:
                traker.score(batch, num_samples=len(batch[0]))
            return torch.tensor(traker.finalize_scores("queries"))

    return call


def num_parameters(given: Examples) -> int:
    return sum(p.numel() for p in given.model.parameters())


def own(given: Examples) -> Call:
    need("traker")
    return scores(given, proj_dim=R)


def kept(given: Examples) -> Call:
    """TRAK's best form where the matrix fits: one block, which is not given back in between."""
    need("traker")
    from trak.projectors import BasicProjector

    class Kept(BasicProjector):
        def free_memory(self) -> None:
            pass

    projector = Kept(num_parameters(given), R, 0, "normal", "cpu", block_size=R)
    return scores(given, projector=projector)


def with_projector(given: Examples) -> Call:
    need("traker")
    return scores(given, projector=DropoutProjector(num_parameters(given), R))


def with_rows(given: Examples) -> Call:
    need("traker")
    from dropinf.integrations.trak import fused

    return scores(given, **fused(plan_of(given)))


def plan_of(given: Examples) -> dropinf.Plan:
    return dropinf.Plan.make(given.model, dropinf.Dropout(total=R))


def check(given: Examples, calls: dict[str, Call]) -> None:
    """Dropout against TRAK's formulas of formed gradients, in float64 (arXiv 2303.14186)."""
    D, plan = num_parameters(given), plan_of(given)
    scale = (D / R) ** 0.5
    index = coordinates(DropoutProjector(D, R, dtype=torch.float64).project, D, scale)
    for name, chosen in {PROJECTOR: at(index, scale), FUSED: at_plan(plan)}.items():
        assert_near(calls[name](), truth(given, chosen), name, 1e-2)
    for name in (OWN, KEPT):
        assert_scores(calls[name](), (N, M), name)


def truth(given: Examples, chosen: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
    D = num_parameters(given)
    g, q = (formed_rows(given.model, data, margin, chosen) / D**0.5 for data in given.loaders())
    inverse = torch.linalg.inv(g.T @ g + LAMBDA * torch.eye(g.shape[1]))
    inverse /= inverse.abs().mean()
    return (g @ inverse @ q.T) * (1 - probabilities(given))[:, None]


def probabilities(given: Examples) -> Tensor:
    """[n] of the labels of the training examples."""
    x, label = given.train.tensors
    with torch.no_grad():
        return given.model(x).double().softmax(1).gather(1, label[:, None])[:, 0]


CONTESTANTS = {FUSED: with_rows, PROJECTOR: with_projector, OWN: own, KEPT: kept}
TO_REACH = dict.fromkeys((OWN, KEPT), (1, None))
CASES = {
    f"TRAK from beginning to end, r={R}: {SIZE}": Case(
        examples, CONTESTANTS, PROJECTOR, TO_REACH, check, (N + M) * R * 4 / 1e6
    )
}
