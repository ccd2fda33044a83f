"""Hugging Face transformers: rows from a `Trainer`, and one loss per example."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from dropinf.compression import Plan
from dropinf.integrations.training import TrainingRows, in_order, rows_after, why_not_ranks
from dropinf.integrations.versions import tested
from dropinf.rows import Drawn, RowStore

with tested("transformers", "5", release="5.23"):
    from transformers import DataCollatorWithFlattening, TrainerCallback
    from transformers.trainer_utils import has_length

    from dropinf.integrations.transformers_losses import (
        Batch,
        LossFn,
        causal_lm_loss,
        classification_loss,
        loss_fn_for,
        masked_lm_loss,
        question_answering_loss,
        refuse_packed,
        seq2seq_loss,
        target_names,
        token_classification_loss,
    )

__all__ = [
    "InfluenceCallback",
    "causal_lm_loss",
    "classification_loss",
    "loss_fn_for",
    "masked_lm_loss",
    "question_answering_loss",
    "seq2seq_loss",
    "token_classification_loss",
]


# Of accelerate's distributed types, those where each process has all weights.
_WHOLE_MODELS = ("NO", "MULTI_CPU", "MULTI_GPU")
# What Trainers hand to the model beside the batch; TRL's asks for losses in place of logits.
_OF_TRAINERS = ("num_items_in_batch", "fused_lm_head")


class InfluenceCallback(TrainerCallback):
    """Rows of the training examples of a `transformers.Trainer`.

        callback = InfluenceCallback(plan, path="rows")
        Trainer(..., callbacks=[callback]).train()
        callback.store

    Rows are of each example's own loss, unscaled by gradient accumulation, in eval mode (without
    dropout), in a pass of their own. Training goes on as without the callback, to the bit.

    Args:
        plan: of the model that is trained; with adapters of peft, of the whole PeftModel.
        path: a directory to make for the rows; None keeps them in memory. Several processes
            (torchrun, `accelerate launch`) need one, in a file system that all see, and write one
            store.
        loss_fn: (model, batch) -> [B]; None takes `loss_fn_for(model)`, the model's own loss. A
            Trainer with another one (compute_loss_func) needs it, with when="after"; TRL's
            DPOTrainer and RewardTrainer need `losses.dpo_loss(reference)` and `losses.reward_loss`.
        when: "after" collects every example of the training data set once, in its order, when
            training has ended; "during" collects each batch as it comes, with the weights of that
            step, and `store.origin` [n, 2] says the step and the example, as its position in the
            data set. That is -1 where it is not known: an `IterableDataset`, a collator that
            makes more or fewer examples; where it is known, it is the row's id too. Of a training
            that stops with an error, `path` has the rows so far; `close` takes the callback off its
            model then.
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
        self._drawn: Drawn | None = None
        self._due = False  # in a training step whose batch has not come yet
        self._step = 0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **given: Any
    ) -> None:
        """Refuse what gives no rows before training, and look for the batches."""
        self.close()
        self.store = None
        loader = given["train_dataloader"]
        _refuse_training(args, loader, self.loss_fn, self.when)
        if args.world_size > 1:
            _refuse_ranks(args, loader, self.when, self.path)
        self._loss = self.loss_fn or loss_fn_for(model)
        if self.when == "during":
            self._rows = TrainingRows(model, self.plan, self.path, self._loss, self.options)
            self._drawn = Drawn(loader, _num_skipped(args, state, loader))
        if not args.torch_compile:  # it would compile the hook into the model
            self._hook = model.register_forward_pre_hook(self._on_batch, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The first batch of a step comes next."""
        self._step = state.global_step
        self._expect()

    def on_substep_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Another batch of the same step comes next."""
        self._expect()

    def _expect(self) -> None:
        self._due = True
        if self._drawn is not None:
            self._drawn.next()

    def _on_batch(self, model: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        if not self._due or not model.training:
            return
        self._due = False  # first, since the rows call the model too
        try:
            batch = {k: v for k, v in inputs.items() if k not in _OF_TRAINERS}
            if self.loss_fn is None:
                _refuse_other_loss(self._loss, batch)
                refuse_packed(batch)
            if self.when == "during":
                self._rows.add(batch, self._step, self._drawn.positions)
            else:
                self.close()  # one batch is enough, since looking at it waits for the device
        except BaseException:
            self.close()
            raise

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **given: Any
    ) -> None:
        """Put the rows in `store`."""
        rows, self._rows = self._rows, None
        self.close()
        if self.when == "during":
            self.store = rows.finish()
            return

        def to_device(batch: Batch) -> Batch:
            return {k: v.to(args.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

        loader = in_order(given["train_dataloader"], to_device, args.train_batch_size)
        self.store = rows_after(model, loader, self._loss, self.plan, self.path, self.options)

    def close(self) -> None:
        """Take the callback off the model; rows in memory that are not finished are dropped."""
        if self._hook is not None:
            self._hook.remove()
        if self._rows is not None:
            self._rows.close()
        if self._drawn is not None:
            self._drawn.close()
        self._hook = self._rows = self._drawn = None
        self._due = False


def _refuse_training(args: Any, loader: Any, loss_fn: LossFn | None, when: str) -> None:
    """Refuse a Trainer whose examples or weights the callback cannot reach."""
    kind = getattr(args.distributed_state, "distributed_type", None)  # of accelerate
    spread = "DATA_PARALLEL" if args.n_gpu > 1 else getattr(kind, "value", kind)
    collator = loader.collate_fn
    collator = getattr(collator, "data_collator", collator)  # inside of what drops columns
    flattening = isinstance(collator, DataCollatorWithFlattening)
    if flattening or getattr(collator, "padding_free", False):
        why = (
            f"{type(collator).__name__} joins the examples of a batch into one row; use a data "
            "collator that pads"
        )
    elif spread not in _WHOLE_MODELS:
        why = (
            f"under {spread} no process has the whole model as its own, only one device or "
            "DistributedDataParallel is taken; load the trained model on one device and call "
            "dropinf.collect"
        )
    elif args.label_smoothing_factor and (loss_fn is None or when == "during"):
        why = (
            "the labels are smoothed, which the model's own loss is not, and the Trainer keeps "
            "them from the model; give loss_fn= with when='after'"
        )
    elif loss_fn is None and "ForPreference" in type(collator).__name__:
        why = (
            "the training is on preference pairs, whose loss is not the model's own; give "
            "loss_fn=dropinf.losses.dpo_loss(reference, beta=) or dropinf.losses.reward_loss"
        )
    elif loss_fn is None and getattr(args, "loss_type", None) == "dft":
        why = "loss_type='dft' is not the model's own loss; give that of each example as loss_fn="
    elif args.torch_compile and when == "during":
        why = "a compiled model does not show its batches; use when='after'"
    else:
        return
    raise ValueError(f"InfluenceCallback: {why}")


def _refuse_ranks(args: Any, loader: Any, when: str, path: str | os.PathLike | None) -> None:
    """Refuse several processes whose rows could not be told, or that have no place for them."""
    from accelerate.data_loader import DataLoaderDispatcher  # which losses do without

    why = why_not_ranks(loader, when, path)
    streamed = isinstance(loader.dataset, IterableDataset)
    if why is None and args.parallelism_config is not None:
        why = (
            "parallelism_config= shares a model or its texts out; load the trained model on one "
            "device and call dropinf.collect"
        )
    if why is None and isinstance(loader, DataLoaderDispatcher) and not streamed:
        why = (
            "dispatch_batches=True draws all batches in one process, so that it is not known which "
            "examples are whose; leave it out of accelerator_config"
        )
    if why is not None:
        raise ValueError(f"InfluenceCallback: {why}")


def _refuse_other_loss(loss_fn: LossFn, batch: Batch) -> None:
    """Refuse a training with a loss of its own, whose Trainer keeps the labels from the model."""
    missing = [name for name in target_names(loss_fn) if batch.get(name) is None]
    if missing:
        raise ValueError(
            f"InfluenceCallback: the training's loss is not the model's own, since its batches "
            f"reach the model without {missing[0]!r}, as with compute_loss_func; give that loss "
            "of each example as loss_fn=, with when='after'"
        )


def _num_skipped(args: Any, state: Any, loader: Any) -> int:
    """Batches of its first epoch that a resumed training has seen before."""
    if not state.global_step or args.ignore_data_skip:
        return 0
    accumulated, steps = args.gradient_accumulation_steps, state.max_steps  # of an epoch
    if has_length(loader):
        steps = max(-(-len(loader) // accumulated), 1)
    return state.global_step % steps * accumulated
