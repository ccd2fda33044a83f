"""Training in the Trainer of transformers and of Lightning: alone, with the callback that keeps
rows, and followed by the loop over examples that one writes without it.

The callback adds passes of its own to a training, so it is compared with training alone to show
what it costs, and with the loop to show what it saves.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_collect import pick
from embed_case import (
    Call,
    Case,
    Examples,
    N,
    assert_near,
    at_plan,
    cross_entropy,
    examples,
    formed_rows,
    only_if,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset

import dropinf

R = 256  # of a layer
NUM_TEXTS, T, BATCH, VOCABULARY = 32, 64, 8, 8000


class Trained(NamedTuple):
    model: nn.Module
    rows: Tensor | None  # [n, R]


def names(tool: str) -> tuple[str, str, str, str]:
    own = f"{tool} Trainer"
    return (
        f"{own} with InfluenceCallback, after",
        f"{own} with InfluenceCallback, during",
        f"{own} alone",
        f"{own}, then a loop over examples + index",
    )


class Texts(NamedTuple):
    model: nn.Module
    plan: dropinf.Plan
    data: StackDataset  # of input_ids and labels [T]


def texts() -> Texts:
    """A small GPT-2, without dropout, so that the loop needs no other mode."""
    import transformers

    torch.manual_seed(0)
    sizes = {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": T, "vocab_size": VOCABULARY}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **rates, **ends))
    ids = torch.randint(VOCABULARY, (NUM_TEXTS, T))
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=R))
    return Texts(model, plan, StackDataset(input_ids=ids, labels=ids))


def transformers_training(when: str | None, loop: bool = False) -> Callable[[Texts], Call]:
    def contestant(given: Texts) -> Call:
        import transformers

        from dropinf.integrations.transformers import InfluenceCallback

        args = transformers.TrainingArguments(
            tempfile.gettempdir(),
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )

        def call() -> Trained:
            model = copy.deepcopy(given.model)
            callback = InfluenceCallback(given.plan, when=when) if when else None
            trainer = transformers.Trainer(
                model,
                args,
                train_dataset=given.data,
                callbacks=[callback] if when else [],
            )
            trainer.train()
            rows = text_rows(model, given, NUM_TEXTS) if loop else None
            return Trained(model, callback.store.rows if when else rows)

        return call

    return only_if("transformers", contestant)


def text_rows(model: nn.Module, given: Texts, n: int) -> Tensor:
    """[n, R] of autograd, one example at a time, whose loss the model averages over its tokens."""
    parameters, rows = dict(model.named_parameters()), []
    for i in range(n):
        one = {name: part[None] for name, part in given.data[i].items()}
        grads = torch.autograd.grad(model(**one).loss * (T - 1), list(parameters.values()))
        rows.append(pick(given.plan, {k: g[None] for k, g in zip(parameters, grads, strict=True)}))
    return torch.cat(rows)


def lightning_training(when: str | None, loop: bool = False) -> Callable[[Examples], Call]:
    def contestant(given: Examples) -> Call:
        import lightning

        from dropinf.integrations.lightning import InfluenceCallback

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = copy.deepcopy(given.model).train()

            def training_step(self, batch: Any, _: int) -> Tensor:
                return F.cross_entropy(self.net(batch[0]), batch[1])

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.Adam(self.parameters())

        def loss_fn(module: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")

        plan = dropinf.Plan.make(Module(), dropinf.Dropout(r=R))

        def call() -> Trained:
            module = Module()
            callbacks = [InfluenceCallback(plan, loss_fn, when=when)] if when else []
            with warnings.catch_warnings():  # advice about loaders
                warnings.simplefilter("ignore")
                lightning.Trainer(
                    default_root_dir=tempfile.gettempdir(),
                    accelerator="cpu",
                    max_epochs=1,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    callbacks=callbacks,
                ).fit(module, given.loaders()[0])
            rows = image_rows(module, given, plan) if loop else None
            return Trained(module, callbacks[0].store.rows if when else rows)

        return call

    return only_if("lightning", contestant)


def image_rows(module: nn.Module, given: Examples, plan: dropinf.Plan) -> Tensor:
    """[n, R] of autograd, one example at a time."""
    parameters, rows = dict(module.named_parameters()), []
    for x, label in DataLoader(given.train, 1):
        loss = F.cross_entropy(module.net(x), label)
        grads = torch.autograd.grad(loss, list(parameters.values()))
        rows.append(pick(plan, {k: g[None] for k, g in zip(parameters, grads, strict=True)}))
    return torch.cat(rows)


def check(tool: str, first_rows: Callable[[Any, Trained], Tensor]) -> Callable:
    """Training is the same with and without, to the bit; rows are those of gradients formed."""

    def checked(given: Any, calls: dict[str, Call]) -> None:
        after, during, alone, loop = (calls[name]() for name in names(tool))
        for other in (after, during, loop):
            for p, q in zip(alone.model.parameters(), other.model.parameters(), strict=True):
                assert torch.equal(p, q), tool
        truth = first_rows(given, after)
        assert_near(after.rows[: len(truth)], truth, tool)
        assert_near(loop.rows[: len(truth)], truth, tool)
        assert during.rows.shape == after.rows.shape and during.rows.isfinite().all()

    return checked


def first_texts(given: Texts, trained: Trained) -> Tensor:
    """[2, R] from logits and a cross entropy of its own, summed over the tokens."""
    rows, parameters = [], dict(trained.model.named_parameters())
    for ids in (given.data[i]["input_ids"] for i in range(2)):
        logits = trained.model(input_ids=ids[None]).logits[0, :-1]
        loss = -logits.log_softmax(1).gather(1, ids[1:, None]).sum()
        grads = torch.autograd.grad(loss, list(parameters.values()))
        rows.append(pick(given.plan, {k: g[None] for k, g in zip(parameters, grads, strict=True)}))
    return torch.cat(rows).double()


def all_images(given: Examples, trained: Trained) -> Tensor:
    net = trained.model.net
    plan = dropinf.Plan.make(net, dropinf.Dropout(r=R))  # the same coordinates, whatever its name
    return formed_rows(net, given.loaders()[0], cross_entropy, at_plan(plan))


def case(tool: str, make: Callable, training: Callable, first_rows: Callable, mb: float) -> Case:
    after, during, alone, loop = names(tool)
    contestants = {
        after: training("after"),
        during: training("during"),
        alone: training(None),
        loop: training(None, loop=True),
    }
    return Case(make, contestants, after, {loop: (1, None)}, check(tool, first_rows), mb)


TEXT_ROWS = NUM_TEXTS * (4 * 6 + 3) * R * 4 / 1e6
SIZES = f"{NUM_TEXTS} x {T} tokens, r={R} a layer"
CASES = {
    f"training of a GPT-2 of 5.2 M parameters, {SIZES}: transformers": case(
        "transformers", texts, transformers_training, first_texts, TEXT_ROWS
    ),
    f"training of a perceptron (2.0 M), {N} examples, r={R} a layer: Lightning": case(
        "Lightning", examples, lightning_training, all_images, N * 3 * R * 4 / 1e6
    ),
}
