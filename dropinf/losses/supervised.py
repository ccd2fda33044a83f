"""Losses of inputs with labels; z are a model's logits, y the labels.

Each takes a batch that is a mapping with "labels", as collators of transformers make them (the
model is called with the rest, and its `.logits` are taken), or a pair (x, labels).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dropinf.losses.asking import logits_of, outputs_and_target, target_of, without
from dropinf.losses.likelihoods import (
    IGNORED,
    Bernoulli,
    Categorical,
    Likelihood,
    SquaredError,
    likelihood,
)
from dropinf.losses.packed import refuse_packed

POSITIONS = ("start_positions", "end_positions")


@likelihood
def classification_loss(model: Any, batch: Any) -> Categorical:
    """[B] cross entropies -log softmax(z)[y], as of torch.nn.CrossEntropyLoss.

        losses = dropinf.losses.classification_loss(model, (x, labels))  # [B]

    Args:
        model: gives logits [B, C], or [B, C, ...] of pixels, whose losses are summed.
        batch: with labels [B] or [B, ...] of classes, -100 where there is no loss; or
            probabilities of the logits' shape: -sum_c y_c log softmax(z)[c].
    """
    logits, labels = outputs_and_target(model, batch)
    if logits.dim() > 2:
        logits = logits.movedim(1, -1)
        labels = labels.movedim(1, -1) if labels.is_floating_point() else labels
    return Categorical(logits, labels)


@likelihood
def multilabel_loss(model: Any, batch: Any) -> Bernoulli:
    """[B] means over the C labels of binary cross entropies, as of torch.nn.BCEWithLogitsLoss.

        losses = dropinf.losses.multilabel_loss(model, (x, targets))  # [B]

    Args:
        model: gives logits [B, C].
        batch: with labels [B, C] in [0, 1]; one label an example may be [B].
    """
    logits, labels = outputs_and_target(model, batch)
    return Bernoulli(logits, labels, 1 / logits[0].numel())


@likelihood
def regression_loss(model: Any, batch: Any) -> SquaredError:
    """[B] means over the C outputs of (f - y)², as of torch.nn.MSELoss.

        losses = dropinf.losses.regression_loss(model, (x, targets))  # [B]

    Args:
        model: gives outputs f [B, C], or [B] of one output.
        batch: with labels y [B, C], or [B] of one output.
    """
    outputs, labels = outputs_and_target(model, batch)
    outputs = outputs[:, None] if outputs.dim() == 1 else outputs
    return SquaredError(outputs, labels, 1 / outputs[0].numel())


@likelihood
def causal_lm_loss(model: Any, batch: Any) -> Categorical:
    """[B] next-token losses -sum_t log softmax(z_t)[y_(t+1)], summed over an example's tokens.

    (A sum, where the models of transformers give the mean over the tokens of the whole batch.)

        batch = {"input_ids": ids, "labels": ids}
        losses = dropinf.losses.causal_lm_loss(model, batch)  # [B]

    Args:
        model: gives logits [B, T, vocabulary].
        batch: with labels [B, T], not shifted, -100 where there is no loss.
    """
    target_of(batch)
    refuse_packed(batch)
    logits, labels = outputs_and_target(model, batch)
    check_tokens(logits, labels)
    return Categorical(logits[:, :-1], labels[:, 1:])


@likelihood
def masked_lm_loss(model: Any, batch: Any) -> Categorical:
    """[B] losses at the tokens whose label [B, T] is not -100, summed over each example's.

    Labels are not shifted: a token has its own.

        batch = {"input_ids": ids, "labels": labels}
        losses = dropinf.losses.masked_lm_loss(model, batch)  # [B]
    """
    refuse_packed(batch)
    logits, labels = outputs_and_target(model, batch)
    check_tokens(logits, labels)
    return Categorical(logits, labels)


@likelihood
def token_classification_loss(model: Any, batch: Any) -> Likelihood:
    """[B] losses of the labelled tokens, labels [B, T] of classes, summed over each example's.

    Labels are not shifted: a token has its own.

        batch = {"input_ids": ids, "labels": labels}
        losses = dropinf.losses.token_classification_loss(model, batch)  # [B]
    """
    return masked_lm_loss.predict(model, batch)


@likelihood
def seq2seq_loss(model: Any, batch: Any) -> Categorical:
    """[B] losses of the target tokens, labels [B, T], summed over the tokens of each example.

    The batch is a mapping, all of which the model gets: it makes its decoder's input from the
    labels where there is none.

        batch = {"input_ids": ids, "labels": labels}
        losses = dropinf.losses.seq2seq_loss(model, batch)  # [B]
    """
    labels = target_of(batch)
    logits = logits_of(model(**batch))
    check_tokens(logits, labels)
    return Categorical(logits, labels)


@likelihood
def question_answering_loss(model: Any, batch: Any) -> Categorical:
    """[B] means of the losses of where the answer starts and ends, positions [B] each.

    A position past the end of the text has no part in the loss.

        batch = {"input_ids": ids, "start_positions": first, "end_positions": last}
        losses = dropinf.losses.question_answering_loss(model, batch)  # [B]
    """
    refuse_packed(batch)
    positions = [target_of(batch, name) for name in POSITIONS]
    outputs = model(**without(batch, *POSITIONS))
    logits = torch.stack([outputs.start_logits, outputs.end_logits], 1)
    B, _, T = logits.shape
    at = torch.stack([p.reshape(B) for p in positions], 1).clamp(min=0)
    return Categorical(logits, at.masked_fill(at >= T, IGNORED), 0.5)


def check_tokens(logits: Tensor, labels: Tensor) -> None:
    """Refuse labels of other tokens than the logits'."""
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"loss_fn: logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not have "
            "the same examples and positions; give a loss function of your own"
        )
