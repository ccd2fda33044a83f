"""From a model and two loaders to scores, in one call."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from dropinf import losses
from dropinf.compression import Compression, Dropout, Plan
from dropinf.rows import LossFn, RowStore, collect, energies, refuse_shuffling
from dropinf.scoring.query_scores import scores
from dropinf.solvers import Cholesky


def influence(
    model: nn.Module,
    train_loader: Iterable,
    query_loader: Iterable,
    loss_fn: LossFn,
    compression: Compression | None = None,
    damping: float = 0.1,
    *,
    mode: str = "activations",
    progress: bool = True,
    fisher: str = "empirical",
) -> Tensor:
    """All of it in one call: plan, collect both loaders, fit `solvers.Cholesky`, score.

        scores = dropinf.influence(model, train, queries, loss_fn)  # [m, n]

    Args:
        model: its trainable parameters are tracked.
        train_loader, query_loader: in a fixed order; batches of any type that `loss_fn` takes.
        loss_fn: (model, batch) -> [B], one loss per example.
        compression: None is Dropout(r=1024, energies=energies(model, train_loader, loss_fn)); of a
            train_loader that is gone after one pass (an iterator), Dropout(r=1024).
        damping: relative, see `solvers.Cholesky`.
        mode: see `capture`.
        progress: show a bar for each loader.
        fisher: what F is made of: "empirical", the training rows themselves; "sampled", rows of
            labels drawn from the model (`losses.sampled`), the Fisher matrix in expectation;
            "gauss-newton", rows of the outputs (`losses.gauss_newton`), the Gauss-Newton matrix,
            which for a squared error of one output is exact. These two need a loss_fn of
            `dropinf.losses`, or made with `losses.likelihood`, and read train_loader twice.

    Returns:
        scores [m, n], see `scores`.

    Raises:
        ValueError: a loader shuffles; `fisher` is none of these, or loss_fn does not say what the
            outputs are.
    """
    curvature = _curvature_loss(fisher, loss_fn)
    for name, loader in (("train_loader", train_loader), ("query_loader", query_loader)):
        refuse_shuffling("influence", name, loader)
    if compression is None:
        once = hasattr(train_loader, "__next__")
        found = None if once else energies(model, train_loader, loss_fn, mode=mode)
        compression = Dropout(r=1024, energies=found)
    plan = Plan.make(model, compression)

    def rows(loader: Iterable, loss: LossFn, label: str) -> RowStore:
        return collect(model, loader, loss, plan, mode=mode, progress=progress and label)

    store = rows(train_loader, loss_fn, "train rows")
    fitted = store if curvature is None else rows(train_loader, curvature, "curvature rows")
    queries = rows(query_loader, loss_fn, "query rows")
    return scores(queries, store, Cholesky(damping).fit(fitted))


def _curvature_loss(fisher: str, loss_fn: LossFn) -> LossFn | None:
    """What makes the rows of F; None for the training rows."""
    kinds = {"empirical": None, "sampled": losses.sampled, "gauss-newton": losses.gauss_newton}
    if fisher not in kinds:
        raise ValueError(f"influence: fisher must be one of {list(kinds)}, got {fisher!r}")
    return None if kinds[fisher] is None else kinds[fisher](loss_fn)
