"""Hugging Face transformers: one loss for each example, as the models compute theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

from dropinf.compression import unwrap

IGNORED = -100  # the label of what has no part in the loss
_POSITIONS = ("start_positions", "end_positions")
Batch = Mapping[str, Any]
LossFn = Callable[[nn.Module, Batch], Tensor]


def causal_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B] next-token losses, summed over the tokens of each example.

    Args:
        model: gives logits [B, T, vocabulary].
        batch: of a data collator, with labels [B, T], not shifted, -100 where there is no loss.
    """
    labels = _target(batch, "labels")
    refuse_packed(batch)
    logits = _logits(model, batch)
    return _token_losses(logits[:, :-1], labels[:, 1:])


def masked_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B] losses at the tokens whose label [B, T] is not -100, summed over each example's."""
    refuse_packed(batch)
    return _token_losses(_logits(model, batch), _target(batch, "labels"))


def token_classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B] losses of the labelled tokens, labels [B, T] of classes, summed over each example's."""
    return masked_lm_loss(model, batch)


def question_answering_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B] means of the losses of where the answer starts and ends, positions [B] each.

    A position past the end of the text has no part in the loss.
    """
    refuse_packed(batch)
    positions = [_target(batch, name) for name in _POSITIONS]
    outputs = model(**_without(batch, *_POSITIONS))
    losses = []
    for logits, at in zip((outputs.start_logits, outputs.end_logits), positions, strict=True):
        T = logits.shape[1]
        at = at.reshape(len(logits)).clamp(0, T)
        losses.append(F.cross_entropy(_full(logits), at, ignore_index=T, reduction="none"))
    return (losses[0] + losses[1]) / 2


def seq2seq_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B] losses of the target tokens, labels [B, T], summed over the tokens of each example."""
    # The model makes its decoder's input from the labels where the batch does not have it.
    return _token_losses(model(**batch).logits, _target(batch, "labels"))


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B] losses of a classifier or regression of whole examples, by the model's problem type.

    Labels are [B] classes (cross entropy), or [B, num_labels] of zeros and ones (binary cross
    entropy) or numbers (squared error), of which the example's loss is the mean over its labels.
    """
    labels, logits = _target(batch, "labels"), _full(_logits(model, batch))
    problem = _config(model).problem_type
    if problem is None:
        whole = not labels.is_floating_point()
        several = "single_label_classification" if whole else "multi_label_classification"
        problem = "regression" if logits.shape[1] == 1 else several
    if problem == "single_label_classification":
        return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
    losses = {
        "regression": F.mse_loss,
        "multi_label_classification": F.binary_cross_entropy_with_logits,
    }
    wanted = labels.reshape(logits.shape).to(logits.dtype)
    return losses[problem](logits, wanted, reduction="none").mean(1)


_LOSSES = [  # in this order, since some encoder-decoders stand among the masked models too
    (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, seq2seq_loss),
    (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, classification_loss),
    (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, classification_loss),
    (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, causal_lm_loss),
    (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, masked_lm_loss),
    (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, token_classification_loss),
    (auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, question_answering_loss),
]
_OTHERS = {  # model types whose own loss is another one
    causal_lm_loss: {  # does not shift the labels
        *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        *("cpmant", "flaubert", "moshi", "musicgen", "musicgen_melody", "trocr", "whisper"),
        *("xlm", "xlnet"),
    },
    # Leaves out tokens that have a label, by the attention mask or by boxes.
    token_classification_loss: {"biogpt", "bros", "mra", "xlm-roberta-xl", "yoso"},
    question_answering_loss: {"lxmert"},  # chooses among known answers
}


def loss_fn_for(model: nn.Module) -> LossFn:
    """The loss function of this model's class, looked for in the tables of transformers.

    It is the loss that the model computes itself, for each example, without what a mixture of
    experts adds to balance its load, which mixes examples.

    Raises:
        ValueError: the class is not known here.
    """
    model = _base(model)
    names = [cls.__name__ for cls in type(model).__mro__]
    for table, loss_fn in _LOSSES:
        if not any(name in table.values() for name in names):
            continue
        if _config(model).model_type in _OTHERS.get(loss_fn, ()):
            break
        return loss_fn
    raise ValueError(
        f"loss_fn_for: no loss is known for {names[0]}; give loss_fn=, a function (model, batch) "
        "-> one loss per example, [B]"
    )


def target_names(loss_fn: LossFn) -> tuple[str, ...]:
    """What `loss_fn`, of those here, takes from the batch beside the model's inputs."""
    return _POSITIONS if loss_fn is question_answering_loss else ("labels",)


def _target(batch: Batch, name: str) -> Tensor:
    """What the batch says the model should have answered."""
    if batch.get(name) is None:
        raise ValueError(
            f"loss_fn: the batch has no {name!r}, only {sorted(batch)}; use a data collator that "
            "makes them, such as DataCollatorForLanguageModeling, and with a Trainer that takes "
            "them out (compute_loss_func, label smoothing) InfluenceCallback(when='after')"
        )
    return batch[name]


def _without(batch: Batch, *names: str) -> Batch:
    return {name: value for name, value in batch.items() if name not in names}


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Without the labels, so that the model does not compute a loss of its own."""
    return model(**_without(batch, "labels")).logits


def _full(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[B] sums of the losses of logits [B, T, classes] against labels [B, T]."""
    if logits.shape[:2] != labels.shape:
        raise ValueError(
            f"loss_fn: logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not have "
            "the same examples and positions; give a loss function of your own"
        )
    losses = F.cross_entropy(_full(logits).mT, labels, ignore_index=IGNORED, reduction="none")
    return losses.sum(1)


def refuse_packed(batch: Batch) -> None:
    """Refuse rows of the batch that hold several examples each."""
    packed = any(name in batch for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"))
    positions = batch.get("position_ids")
    if positions is not None and positions.dim() == 2:
        mask = batch.get("attention_mask")
        real = torch.ones_like(positions) if mask is None else mask
        both = (real[:, 1:] * real[:, :-1]).bool()
        packed |= bool(((positions[:, 1:] <= positions[:, :-1]) & both).any())
    if packed:
        raise ValueError(
            "loss_fn: several examples are packed into one row of the batch (position_ids begin "
            "anew, or seq_idx or cu_seq_lens are there), so that there is no loss for each; use a "
            "data collator that pads, or dropinf.collect(per='segment')"
        )


def _base(model: nn.Module) -> nn.Module:
    """The model of transformers inside of wrappers and adapters."""
    model = unwrap("loss_fn_for", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _config(model: nn.Module) -> Any:
    return _base(model).config
