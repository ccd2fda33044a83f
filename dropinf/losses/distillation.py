"""Distillation: a student is to give the probabilities of a teacher."""

from __future__ import annotations

from typing import Any

import torch

from dropinf.losses.likelihoods import IGNORED, Categorical, LikelihoodLoss, likelihood
from dropinf.losses.supervised import classification_loss


def distillation_loss(
    teacher: Any, loss_fn: LikelihoodLoss = classification_loss, temperature: float = 1.0
) -> LikelihoodLoss:
    """A loss function: [B] losses τ² Σ KL(softmax(teacher / τ) ‖ softmax(z / τ)) + a constant.

    Hinton, Vinyals and Dean, arXiv 1503.02531, section 2: the cross entropy, which is the KL
    divergence plus the teacher's entropy, so that rows are the same. With labels too, a sum
    a · hard + b · soft has rows a · rows(hard) + b · rows(soft).

        loss_fn = dropinf.losses.distillation_loss(teacher, temperature=2.0)
        losses = loss_fn(model, batch)  # [B]

    Args:
        teacher: a model that is called with the same batch, without gradient, as it is (eval).
        loss_fn: one of cross entropies, which says where logits are and which positions count
            (their labels are not -100): `classification_loss`, `causal_lm_loss`, ...
        temperature: τ.

    Raises:
        ValueError: the temperature is not positive, or loss_fn no cross entropy.
    """
    if not temperature > 0:
        raise ValueError(f"distillation_loss: temperature must be positive, got {temperature}")
    if not isinstance(loss_fn, LikelihoodLoss):
        raise ValueError(
            "distillation_loss: loss_fn must be a cross entropy of dropinf.losses, or made with "
            f"dropinf.losses.likelihood, got {loss_fn!r}"
        )

    @likelihood
    def loss(model: Any, batch: Any) -> Categorical:
        student = loss_fn.predict(model, batch)
        with torch.no_grad():
            taught = loss_fn.predict(teacher, batch)
        if not isinstance(student, Categorical) or not isinstance(taught, Categorical):
            raise ValueError(
                f"distillation_loss: {loss_fn!r} is a {type(student).__name__}, and distillation "
                "needs a Categorical"
            )
        if student.outputs.shape != taught.outputs.shape:
            raise ValueError(
                f"distillation_loss: the teacher's logits are {list(taught.outputs.shape)}, the "
                f"student's {list(student.outputs.shape)}; give models of the same classes"
            )
        q = (taught.outputs / temperature).softmax(-1)
        if not student.soft:
            q = q * (student.labels != IGNORED)[..., None]
        return Categorical(student.outputs / temperature, q, temperature**2 * student.weight)

    return loss
