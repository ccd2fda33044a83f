"""Losses of preference pairs: one row a pair.

A batch is a mapping as the collators of TRL (1.x) make them: the chosen texts, then the rejected
ones, [2 B, T] of input_ids and attention_mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropinf.losses.asking import logits_of, without
from dropinf.losses.likelihoods import IGNORED, Bernoulli, LikelihoodLoss, Predict, full

_REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")


def _of_pairs(predict: Predict) -> LikelihoodLoss:
    return LikelihoodLoss(predict, inputs=2)


def dpo_loss(reference: Any = None, beta: float = 0.1) -> LikelihoodLoss:
    """A loss function: [B] losses -log sigmoid(β (log π(c)/ρ(c) - log π(r)/ρ(r))) of pairs.

    Rafailov et al., arXiv 2305.18290, equation 7: c is the chosen and r the rejected text, π(·)
    the product of the probabilities of its completion's tokens, ρ that of the reference model.

    The function takes a mapping with input_ids [2 B, T] and either completion_mask [2 B, T] or
    labels [2 B, T] (-100 outside of the completion), and what else the model takes.

        loss_fn = dropinf.losses.dpo_loss(reference, beta=0.1)
        losses = loss_fn(model, {"input_ids": ids, "labels": ids})  # [B] of 2 B texts

    Args:
        reference: a model, called without gradient as it is (eval); None takes ref_chosen_logps
            and ref_rejected_logps [B] of the batch.
        beta: β.

    Raises:
        ValueError: beta is not positive.
    """
    if not beta > 0:
        raise ValueError(f"dpo_loss: beta must be positive, got {beta}")

    @_of_pairs
    def loss(model: Any, batch: Mapping[str, Any]) -> Bernoulli:
        labels = _completions(batch)
        inputs = without(batch, "completion_mask", "labels", *_REFERENCES)
        chosen, rejected = _logps(model, inputs, labels).chunk(2)
        if reference is not None:
            with torch.no_grad():
                ref_chosen, ref_rejected = _logps(reference, inputs, labels).chunk(2)
        else:
            missing = [name for name in _REFERENCES if batch.get(name) is None]
            if missing:
                raise ValueError(
                    f"dpo_loss: the batch has no {missing[0]!r}, only {sorted(batch)}; give "
                    "reference=, a model, or batches with the reference's log probabilities"
                )
            ref_chosen, ref_rejected = (_like(batch[n], chosen, n) for n in _REFERENCES)
        z = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        return Bernoulli(z[:, None], torch.ones_like(z))

    return loss


@_of_pairs
def reward_loss(model: Any, batch: Any) -> Bernoulli:
    """[B] losses -log sigmoid(f(c) - f(r) - margin) of pairs, f the reward (Bradley and Terry).

    As of TRL's RewardTrainer, without what its center_rewards_coefficient adds.

        losses = dropinf.losses.reward_loss(model, {"input_ids": ids})  # [B] of 2 B texts

    Args:
        model: gives one number a text, [2 B, 1].
        batch: a mapping with what the model takes, of chosen and then rejected texts, and maybe
            margin [B]; or a pair (chosen, rejected) of inputs, for which the model is called twice.

    Raises:
        ValueError: the batch is neither, or its texts are no pairs.
    """
    if isinstance(batch, Mapping):
        rewards = logits_of(model(**without(batch, "margin", "labels")))
        margin = batch.get("margin")
        if len(rewards) % 2:
            raise _no_pairs("reward_loss", rewards)
        chosen, rejected = _numbers(rewards).chunk(2)
    elif isinstance(batch, Sequence) and len(batch) == 2:
        chosen, rejected = (_numbers(logits_of(model(x))) for x in batch)
        margin = None
    else:
        raise ValueError(
            "reward_loss: the batch must be a mapping of chosen and then rejected texts, or a pair "
            f"(chosen, rejected), got a {type(batch).__name__}"
        )
    z = full(chosen - rejected)
    if margin is not None:
        z = z - _like(margin, z, "margin")
    return Bernoulli(z[:, None], torch.ones_like(z))


def _completions(batch: Mapping[str, Any]) -> Tensor:
    """[2 B, T] labels of the completions."""
    if not isinstance(batch, Mapping) or batch.get("input_ids") is None:
        raise ValueError(
            "dpo_loss: the batch must be a mapping with input_ids [2 B, T], chosen texts and then "
            f"rejected ones, got {sorted(batch) if isinstance(batch, Mapping) else type(batch)}"
        )
    ids: Tensor = batch["input_ids"]
    mask, labels = batch.get("completion_mask"), batch.get("labels")
    if len(ids) % 2:
        raise _no_pairs("dpo_loss", ids)
    if mask is not None:
        return ids.masked_fill(mask == 0, IGNORED)
    if not isinstance(labels, Tensor):
        raise ValueError(
            "dpo_loss: the batch has neither 'completion_mask' nor 'labels', which say where the "
            "completions are"
        )
    return labels


def _logps(model: Any, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """[2 B] log probabilities of the completions."""
    logits = full(logits_of(model(**inputs)))[:, :-1]
    losses = F.cross_entropy(
        logits.movedim(-1, 1), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    return -losses.sum(1)


def _like(given: Tensor, pairs: Tensor, name: str) -> Tensor:
    if given.shape != pairs.shape:
        raise ValueError(
            f"loss_fn: {name!r} must be [{len(pairs)}], one number a pair, got {list(given.shape)}"
        )
    return given.to(pairs)


def _numbers(rewards: Tensor) -> Tensor:
    """[B] of [B] or [B, 1]."""
    if rewards.dim() == 2 and rewards.shape[1] == 1:
        return rewards[:, 0]
    if rewards.dim() != 1:
        raise ValueError(
            f"reward_loss: the model must give one number a text, got {list(rewards.shape)}; "
            "num_labels=1 makes such a model"
        )
    return rewards


def _no_pairs(op: str, texts: Tensor) -> ValueError:
    return ValueError(
        f"{op}: a batch has chosen texts and then as many rejected ones, got {len(texts)} in all"
    )
