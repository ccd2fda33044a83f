"""Hugging Face transformers: which loss of `dropinf.losses` a model computes itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

from dropinf import losses
from dropinf.compression import unwrap
from dropinf.losses import (
    causal_lm_loss,
    masked_lm_loss,
    question_answering_loss,
    refuse_packed,
    seq2seq_loss,
    token_classification_loss,
)

__all__ = [
    "Batch",
    "LossFn",
    "causal_lm_loss",
    "classification_loss",
    "loss_fn_for",
    "masked_lm_loss",
    "question_answering_loss",
    "refuse_packed",
    "seq2seq_loss",
    "target_names",
    "token_classification_loss",
]

Batch = Mapping[str, Any]
LossFn = Callable[[nn.Module, Batch], Tensor]


@losses.likelihood
def classification_loss(model: nn.Module, batch: Batch) -> losses.Likelihood:
    """[B] losses of a classifier or regression of whole examples, by the model's problem type.

    Labels are [B] classes (`losses.classification_loss`), or [B, num_labels] of zeros and ones
    (`losses.multilabel_loss`) or numbers (`losses.regression_loss`).
    """
    config, labels = _config(model), losses.target_of(batch)
    problem = config.problem_type
    if problem is None:
        whole = not labels.is_floating_point()
        several = "single_label_classification" if whole else "multi_label_classification"
        problem = "regression" if config.num_labels == 1 else several
    if problem == "single_label_classification":
        batch = {**batch, "labels": labels.flatten()}
    return _BY_PROBLEM[problem].predict(model, batch)


_BY_PROBLEM = {
    "single_label_classification": losses.classification_loss,
    "multi_label_classification": losses.multilabel_loss,
    "regression": losses.regression_loss,
}
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
    return losses.POSITIONS if loss_fn is question_answering_loss else ("labels",)


def _base(model: nn.Module) -> nn.Module:
    """The model of transformers inside of wrappers and adapters."""
    model = unwrap("loss_fn_for", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _config(model: nn.Module) -> Any:
    return _base(model).config
