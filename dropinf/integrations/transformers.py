"""Hugging Face transformers: one loss per example, and rows from a `Trainer`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

from dropinf.collecting import collect
from dropinf.integrations.training import TrainingRows, in_order, undisturbed
from dropinf.plan import Plan, unwrap
from dropinf.store import RowStore

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"dropinf.integrations.transformers needs transformers 5 (tested: 5.23), got "
        f"{transformers.__version__}; pip install -U transformers"
    )

IGNORED = -100  # the label of what has no part in the loss
Batch = Mapping[str, Any]
LossFn = Callable[[nn.Module, Batch], Tensor]


def causal_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B] next-token losses, summed over the tokens of each example.

    Args:
        model: gives logits [B, T, vocabulary].
        batch: of a data collator, with labels [B, T], not shifted, -100 where there is no loss.
    """
    labels = _labels(batch)
    _refuse_packed(batch)
    logits = _logits(model, batch)
    return _token_losses(logits[:, :-1], labels[:, 1:])


def masked_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B] losses at the tokens whose label [B, T] is not -100, summed over each example's."""
    _refuse_packed(batch)
    return _token_losses(_logits(model, batch), _labels(batch))


def seq2seq_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B] losses of the target tokens, labels [B, T], summed over the tokens of each example."""
    # The model makes its decoder's input from the labels where the batch does not have it.
    return _token_losses(model(**batch).logits, _labels(batch))


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B] losses of a classifier or regression of whole examples, by the model's problem type.

    Labels are [B] classes (cross entropy), or [B, num_labels] of zeros and ones (binary cross
    entropy) or numbers (squared error), of which the example's loss is the mean over its labels.
    """
    labels, logits = _labels(batch), _full(_logits(model, batch))
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
]
# Decoders among the causal models whose own loss does not shift the labels.
_UNSHIFTED = {
    *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    *("cpmant", "flaubert", "moshi", "musicgen", "musicgen_melody", "trocr", "whisper"),
    *("xlm", "xlnet"),
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
        if loss_fn is causal_lm_loss and _config(model).model_type in _UNSHIFTED:
            break
        return loss_fn
    raise ValueError(
        f"loss_fn_for: no loss is known for {names[0]}; give loss_fn=, a function (model, batch) "
        "-> one loss per example, [B]"
    )


def _labels(batch: Batch) -> Tensor:
    if batch.get("labels") is None:
        raise ValueError(
            f"loss_fn: the batch has no 'labels', only {sorted(batch)}; use a data collator that "
            "makes them, such as DataCollatorForLanguageModeling"
        )
    return batch["labels"]


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Without the labels, so that the model does not compute a loss of its own."""
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


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


def _refuse_packed(batch: Batch) -> None:
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


class InfluenceCallback(transformers.TrainerCallback):
    """Rows of the training examples of a `transformers.Trainer`.

        callback = InfluenceCallback(plan, path="rows")
        Trainer(..., callbacks=[callback]).train()
        callback.store

    Rows are of each example's own loss, unscaled by gradient accumulation, in eval mode (without
    dropout), in a pass of their own. Training goes on as without the callback, to the bit.

    Args:
        plan: of the model that is trained; with adapters of peft, of the whole PeftModel.
        path: a directory to make for the rows; None keeps them in memory.
        loss_fn: (model, batch) -> [B]; None takes `loss_fn_for(model)`.
        when: "after" collects every example of the training data set once, in its order, when
            training has ended; "during" collects each batch as it comes, with the weights of that
            step, and `store.origin` [n, 2] says the step and the place in it. A training that
            stops with an error leaves no rows; `close` takes the callback off its model then.
        options: of `dropinf.collect`: mode, on_nonfinite, check, backend, batch_dim.

    Attributes:
        store: the rows, once training has ended.
    """

    def __init__(
        self,
        plan: Plan,
        path: str | os.PathLike | None = None,
        loss_fn: LossFn | None = None,
        when: str = "after",
        **options: Any,
    ) -> None:
        if when not in ("after", "during"):
            raise ValueError(f"InfluenceCallback: when must be 'after' or 'during', got {when!r}")
        self.plan, self.path, self.loss_fn, self.when = plan, path, loss_fn, when
        self.options = options
        self.store: RowStore | None = None
        self._rows: TrainingRows | None = None
        self._hook: Any = None
        self._due = False  # in a training step whose batch has not come yet
        self._step = 0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **given: Any
    ) -> None:
        """Refuse what gives no rows before training, and look for the batches if "during"."""
        self.close()
        self.store = None
        _refuse_training(args, given["train_dataloader"], self.loss_fn, self.when)
        self._loss = self.loss_fn or loss_fn_for(model)
        if self.when == "during":
            self._rows = TrainingRows(self.plan, self.path, self._loss, self.options)
            self._hook = model.register_forward_pre_hook(self._on_batch, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The first batch of a step comes next."""
        self._due, self._step = True, state.global_step

    def on_substep_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Another batch of the same step comes next."""
        self._due = True

    def _on_batch(self, model: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        if not self._due or not model.training:
            return
        self._due = False  # first, since the rows call the model too
        try:
            batch = {k: v for k, v in inputs.items() if k != "num_items_in_batch"}
            self._rows.add(model, batch, self._step)
        except BaseException:
            self.close()
            raise

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **given: Any
    ) -> None:
        """Put the rows in `store`."""
        if self.when == "during":
            rows, self._rows = self._rows, None
            self.close()
            self.store = rows.finish()
            return

        def to_device(batch: Batch) -> Batch:
            return {k: v.to(args.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

        loader = in_order(given["train_dataloader"], to_device, args.train_batch_size)
        with undisturbed(model):
            self.store = collect(model, loader, self._loss, self.plan, self.path, **self.options)

    def close(self) -> None:
        """Take the callback off the model; rows that are not finished are dropped."""
        if self._hook is not None:
            self._hook.remove()
        if self._rows is not None:
            self._rows.close()
        self._hook = self._rows = None
        self._due = False


def _refuse_training(args: Any, loader: Any, loss_fn: LossFn | None, when: str) -> None:
    """Refuse a Trainer whose examples or weights the callback cannot reach."""
    collator = loader.collate_fn
    collator = getattr(collator, "data_collator", collator)  # inside of what drops columns
    flattening = isinstance(collator, transformers.DataCollatorWithFlattening)
    if flattening or getattr(collator, "padding_free", False):
        why = (
            f"{type(collator).__name__} joins the examples of a batch into one row; use a data "
            "collator that pads"
        )
    elif args.world_size > 1 or args.n_gpu > 1 or args.deepspeed:
        why = (
            "the training is spread over devices, each of which sees a part; load the trained "
            "model on one device and call dropinf.collect"
        )
    elif args.label_smoothing_factor and loss_fn is None:
        why = "the labels are smoothed, which the model's own loss is not; give loss_fn="
    elif args.torch_compile and when == "during":
        why = "a compiled model does not show its batches; use when='after'"
    else:
        return
    raise ValueError(f"InfluenceCallback: {why}")
