"""Losses that people train with, one for each example, and the rows of their curvature."""

from dropinf.losses.asking import target_of
from dropinf.losses.curvature import gauss_newton, sampled
from dropinf.losses.distillation import distillation_loss
from dropinf.losses.likelihoods import (
    IGNORED,
    Bernoulli,
    Categorical,
    Likelihood,
    SquaredError,
    likelihood,
)
from dropinf.losses.packed import refuse_packed
from dropinf.losses.pairs import dpo_loss, reward_loss
from dropinf.losses.supervised import (
    POSITIONS,
    causal_lm_loss,
    classification_loss,
    masked_lm_loss,
    multilabel_loss,
    question_answering_loss,
    regression_loss,
    seq2seq_loss,
    token_classification_loss,
)

__all__ = [
    "IGNORED",
    "POSITIONS",
    "Bernoulli",
    "Categorical",
    "Likelihood",
    "SquaredError",
    "causal_lm_loss",
    "classification_loss",
    "distillation_loss",
    "dpo_loss",
    "gauss_newton",
    "likelihood",
    "masked_lm_loss",
    "multilabel_loss",
    "question_answering_loss",
    "refuse_packed",
    "regression_loss",
    "reward_loss",
    "sampled",
    "seq2seq_loss",
    "target_of",
    "token_classification_loss",
]
