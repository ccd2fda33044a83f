"""Loss functions whose rows are of the model's Fisher or Gauss-Newton matrix.

Rows of a loss at the given labels make the *empirical* Fisher matrix, which is neither: it takes
its size from the residuals (Kunstner, Balles and Hennig, arXiv 1905.12558, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dropinf.losses.likelihoods import Likelihood, LikelihoodLoss
from dropinf.losses.noise import Noise

Rows = Callable[[Any, Any], Tensor]  # (model, batch) -> [B], of which only gradients are meant


def sampled(loss_fn: Any, seed: int = 0) -> Rows:
    """A loss function with labels drawn from the model itself: its rows make the Fisher matrix.

    E[rowᵀ row] over the labels is an example's Fisher matrix (Martens, arXiv 1412.1193, section
    5), which for the losses here is its Gauss-Newton matrix too. A weight w of a loss (1 / C of a
    mean) counts once: rows are sqrt(w) times the gradient, since the matrix is of that loss.

        F = dropinf.collect(model, loader, dropinf.losses.sampled(loss_fn), plan)
        solver = dropinf.solvers.Cholesky().fit(F)

    A label is a function of the seed, of what the batch has of the example without its padding, and
    of the position among those that count (whose labels of classes are not -100, from the last one
    on). So it depends neither on the batches and calls before, nor on how long the other texts are,
    nor on which side is padded; equal examples have equal labels. Padding is where the batch's
    "attention_mask" [B, T] is 0; without one, what follows the last label of "labels" [B, T] or of
    a pair (x, labels). In other batches, such as tuples with a mask of their own, it counts as
    content, as does what it alters: positions of tokens that count it in, where a text begins.

    What it returns is no likelihood: only its gradients mean something.

    Args:
        loss_fn: of `dropinf.losses`, or made with `dropinf.losses.likelihood`.
        seed: of the labels; several seeds give several rows an example.
    """
    loss_fn = _known("sampled", loss_fn)

    def rows_of(model: Any, batch: Any) -> Tensor:
        found = loss_fn.predict(model, batch)
        return found.along(found.gradient(_noise(found, batch, seed, loss_fn).uniform))

    return _of_inputs(rows_of, loss_fn)


def gauss_newton(loss_fn: Any, seed: int = 0, output: int | None = None) -> Rows:
    """A loss function whose rows make the Gauss-Newton matrix mean_i J_iᵀ H_i J_i.

    J_i is the derivative of example i's outputs, H_i = S Sᵀ the Hessian of its loss with respect
    to them (Martens, arXiv 1412.1193, section 8). A row is Jᵀ S s with random signs s, so that the
    mean of rowᵀ row is that in expectation, and exactly where an example has one output: for a
    squared error the row is then sqrt(2) times the output's gradient. Signs are as reproducible as
    the labels of `sampled`.

        F = dropinf.collect(model, loader, dropinf.losses.gauss_newton(loss_fn), plan)
        solver = dropinf.solvers.Cholesky().fit(F)

    Args:
        loss_fn: of `dropinf.losses`, or made with `dropinf.losses.likelihood`.
        seed: of the signs.
        output: take column `output` of S alone, times sqrt(C), C the number of outputs: rows of
            the C columns together make the matrix exactly, at C times the cost, where an example
            has one position:

                rows = [collect(model, loader, gauss_newton(loss_fn, output=c), plan).rows
                        for c in range(C)]
                F = dropinf.RowStore(torch.cat(rows), plan)
    """
    loss_fn = _known("gauss_newton", loss_fn)

    def rows_of(model: Any, batch: Any) -> Tensor:
        found = loss_fn.predict(model, batch)
        noise = _noise(found, batch, seed, loss_fn)
        return found.along(found.root(_signs(found, noise, output)))

    return _of_inputs(rows_of, loss_fn)


def _noise(found: Likelihood, batch: Any, seed: int, loss_fn: LikelihoodLoss) -> Noise:
    f = found.outputs
    return Noise(batch, len(f), seed, f.device, loss_fn.inputs)


def _of_inputs(rows_of: Any, loss_fn: LikelihoodLoss) -> Rows:
    rows_of.inputs = loss_fn.inputs  # which `collect` looks for
    return rows_of  # type: ignore[no-any-return]


def _signs(found: Likelihood, noise: Noise, output: int | None) -> Tensor:
    f = found.outputs
    if output is None:
        return noise.signs(found.places(), f.shape[-1]).reshape(f.shape).to(f.dtype)
    C = f.shape[-1]
    if not 0 <= output < C:
        raise ValueError(f"gauss_newton: output must be 0 to {C - 1}, got {output}")
    s = torch.zeros_like(f)
    s[..., output] = C**0.5 * noise.signs(found.places()).reshape(f.shape[:-1]).to(f.dtype)
    return s


def _known(op: str, loss_fn: Any) -> LikelihoodLoss:
    if not isinstance(loss_fn, LikelihoodLoss):
        raise ValueError(
            f"{op}: {loss_fn!r} does not say what the model's outputs are; take a loss of "
            "dropinf.losses, or make yours with dropinf.losses.likelihood"
        )
    return loss_fn
