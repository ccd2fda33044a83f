"""transformers: losses of examples against the model's own, and rows from a Trainer."""

import functools
import gc
import importlib
import sys

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5")

from zoo import GROUPED, IDS, SMALL, build_as  # noqa: E402

import dropinf  # noqa: E402
from dropinf.integrations import transformers_losses, versions  # noqa: E402
from dropinf.integrations.transformers import (  # noqa: E402
    InfluenceCallback,
    causal_lm_loss,
    loss_fn_for,
)
from dropinf.rows import Drawn  # noqa: E402

T5 = {
    "decoder_start_token_id": 0,
    "d_model": 12,
    "d_kv": 4,
    "d_ff": 16,
    "num_layers": 2,
    "num_heads": 3,
}
GPT2 = {"n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3}
BERT = IDS | SMALL


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What is imported is left out of garbage collections.

    Each training collects garbage, which takes longer than the training with so much imported.
    """
    transformers.Trainer  # imports most of it
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tokens():
    ids = torch.randint(1, 23, (5, 8))
    ids[1, 5:] = ids[3, 2:] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def text(keep=1.0):
    """Labels at the real tokens, of which `keep` are kept."""
    batch = tokens()
    ids = batch["input_ids"]
    kept = (ids != 0) & (torch.rand(ids.shape) <= keep)
    return batch | {"labels": ids.masked_fill(~kept, -100)}


def answers():
    """Where answers start and end, of which some are past the end of the text, or before."""
    start, end = torch.tensor([1, 7, 0, 9, -1]), torch.tensor([3, 8, 5, 2, 4])
    return tokens() | {"start_positions": start, "end_positions": end[:, None]}


def bert(kind, **config):
    return build_as(f"BertFor{kind}", "BertConfig", **BERT, **config)


MODELS = {  # name: model, batch, and how many terms the model's mean has of one example
    "GPT-2": (build_as("GPT2LMHeadModel", "GPT2Config", **IDS, **GPT2), text, "shifted"),
    "Llama": (build_as("LlamaForCausalLM", "LlamaConfig", **IDS, **GROUPED), text, "shifted"),
    "BERT": (bert("MaskedLM"), lambda: text(0.4), "tokens"),
    "T5": (build_as("T5ForConditionalGeneration", "T5Config", **IDS, **T5), text, "tokens"),
    "classes": (
        bert("SequenceClassification", num_labels=3),
        lambda: tokens() | {"labels": torch.randint(3, (5,))},
        "one",
    ),
    "regression": (
        bert("SequenceClassification", num_labels=1),
        lambda: tokens() | {"labels": torch.randn(5)},
        "one",
    ),
    "many labels": (
        bert("SequenceClassification", num_labels=3),
        lambda: tokens() | {"labels": torch.randint(2, (5, 3)).float()},
        "one",
    ),
    "token classes": (
        bert("TokenClassification", num_labels=4),
        lambda: (
            tokens()
            | {"labels": torch.randint(4, (5, 8)).masked_fill(torch.rand(5, 8) < 0.4, -100)}
        ),
        "tokens",
    ),
    "answers": (bert("QuestionAnswering"), answers, "one"),
}


def num_terms(terms, batch):
    """Of how many terms the model's loss of one example is the mean."""
    if terms == "one":
        return 1
    labels = batch["labels"][:, 1:] if terms == "shifted" else batch["labels"]
    return int((labels != -100).sum())


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_the_models_own(name):
    """Of each example alone, in float64, times the terms that the model takes a mean of."""
    make, make_batch, terms = MODELS[name]
    torch.manual_seed(0)
    model, batch = make().eval(), make_batch()
    losses = loss_fn_for(model)(model, batch)
    assert losses.shape == (5,) and losses.dtype == torch.float32
    model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    ones = [{k: v[b : b + 1] for k, v in batch.items()} for b in range(5)]
    wanted = torch.stack([model(**one).loss * num_terms(terms, one) for one in ones])
    if name == "answers":  # where one of the two is past the end, the model's mean of it is NaN
        assert wanted.isnan().tolist() == [False, True, False, True, False]
        wanted[1] = -model(**ones[1]).start_logits[0].log_softmax(0)[7] / 2
        wanted[3] = -model(**ones[3]).end_logits[0].log_softmax(0)[2] / 2
    torch.testing.assert_close(losses, wanted.float())
    torch.testing.assert_close(loss_fn_for(model)(model, ones[1]).float(), losses[1:2])


def test_padding_is_not_packed():
    """Where it is, positions repeat."""
    left = {"position_ids": [[1, 1, 0, 1, 2]], "attention_mask": [[0, 0, 1, 1, 1]]}
    transformers_losses.refuse_packed({name: torch.tensor(v) for name, v in left.items()})


def test_losses_refuse():
    model = MODELS["GPT-2"][0]()
    loss_fn = loss_fn_for(model)
    with pytest.raises(ValueError, match="the batch has no 'labels'"):
        loss_fn(model, tokens())
    collator = transformers.DataCollatorWithFlattening()
    packed = collator([{"input_ids": [3, 4, 5]}, {"input_ids": [6, 7]}])
    with pytest.raises(ValueError, match="several examples are packed"):
        loss_fn(model, packed)
    with pytest.raises(ValueError, match="no loss is known for BertModel"):
        loss_fn_for(build_as("BertModel", "BertConfig", **BERT)())
    with pytest.raises(ValueError, match="no loss is known for XLNetLMHeadModel"):
        loss_fn_for(
            transformers.XLNetLMHeadModel(
                transformers.XLNetConfig(vocab_size=23, d_model=12, n_layer=1, n_head=3, d_inner=16)
            )
        )


@pytest.mark.parametrize("found", ["4.57.1", "6.0.0", "50.1"])
def test_another_version_is_refused(found, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: found)
    monkeypatch.delitem(sys.modules, "dropinf.integrations.transformers")
    said = f"transformers {found} is not supported, tested is 5.23; pip install 'transformers==5.*'"
    with pytest.raises(ImportError) as error:
        importlib.import_module("dropinf.integrations.transformers")
    assert said in str(error.value)


class Texts(torch.utils.data.Dataset):
    """Seven texts of different lengths."""

    def __init__(self):
        random = torch.Generator().manual_seed(1)
        lengths = (8, 5, 7, 2, 8, 6, 4)
        self.texts = [torch.randint(1, 23, (n,), generator=random).tolist() for n in lengths]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return {"input_ids": self.texts[i], "labels": self.texts[i]}


class Stream(torch.utils.data.IterableDataset):
    """The same texts, which have no positions."""

    def __iter__(self):
        yield from (Texts()[i] for i in range(7))


def pad(examples):
    width = max(len(e["input_ids"]) for e in examples)
    filled = [e["input_ids"] + [0] * (width - len(e["input_ids"])) for e in examples]
    ids = torch.tensor(filled)
    labels = ids.masked_fill(ids == 0, -100)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def gpt2(lora=False):
    torch.manual_seed(0)
    model = MODELS["GPT-2"][0]()
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"])
        )
    return model


def train(out, model, *callbacks, kind=None, resume=None, loss=None, data=None, **settings):
    """Two epochs with batches of two, by a Trainer of this kind."""
    collator = settings.pop("collator", pad)
    args = transformers.TrainingArguments(
        **{
            "output_dir": str(out),
            "per_device_train_batch_size": 2,
            "num_train_epochs": 2,
            "learning_rate": 0.05,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
            **settings,
        }
    )
    (kind or transformers.Trainer)(
        model,
        args,
        train_dataset=data or Texts(),
        data_collator=collator,
        callbacks=list(callbacks),
        compute_loss_func=loss,
    ).train(resume_from_checkpoint=resume)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The model that was trained without a callback, and the random numbers after it."""

    @functools.cache
    def trained(lora, accumulated):
        model = gpt2(lora)
        train(tmp_path_factory.mktemp("out"), model, gradient_accumulation_steps=accumulated)
        return model, torch.rand(3)

    return trained


def alone(model, batch, plan, terms="shifted"):
    """Rows of a batch by autograd, one example at a time, in eval mode."""
    named, rows = dict(model.named_parameters()), []
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    for b in range(len(batch["input_ids"])):
        one = {k: v[b : b + 1] for k, v in batch.items()}
        loss = model(**one).loss * num_terms(terms, one)
        grads = torch.autograd.grad(
            loss, [named[slot.name] for slot in plan.slots], materialize_grads=True
        )
        parts = zip(plan.slots, grads, strict=True)
        rows.append(torch.cat([g.flatten()[s.index] * s.scale for s, g in parts]))
    for module, mode in modes:
        module.training = mode
    return torch.stack(rows)


def assert_rows(rows, truth):
    """To the rounding of float32 through a few layers."""
    assert truth.abs().amax(1).gt(0).all()
    torch.testing.assert_close(rows, truth, rtol=0, atol=2e-5 * truth.abs().max().item())


def assert_same_weights(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


CASES = pytest.mark.parametrize(
    "lora, accumulated",
    [(False, 1), (False, 3), (True, 1), (True, 3)],
    ids=["whole model", "whole model, accumulated", "LoRA", "LoRA, accumulated"],
)


@CASES
def test_after(tmp_path, plain, lora, accumulated):
    """The data set's rows in its order, as autograd has them; training as without."""
    model = gpt2(lora)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=20))
    callback = InfluenceCallback(plan, tmp_path / "rows", when="after")
    train(tmp_path / "out", model, callback, gradient_accumulation_steps=accumulated)
    random = torch.rand(3)
    other, random_of_other = plain(lora, accumulated)
    assert_same_weights(model, other)
    assert torch.equal(random, random_of_other)
    store = dropinf.RowStore.load(tmp_path / "rows")
    assert torch.equal(store.rows, callback.store.rows) and len(store) == 7
    batch = pad([Texts()[i] for i in range(7)])
    assert_rows(store.rows, alone(model, batch, plan))
    model.eval()
    whole = dropinf.collect(model, [batch], loss_fn_for(model), plan, progress=False)
    assert_rows(store.rows, whole.rows)


def noting(plan=None):
    """A Trainer that notes the texts of each batch, and their rows by autograd under a plan."""

    class Noting(transformers.Trainer):
        texts, rows = [], []

        def training_step(self, model, inputs, *args, **kwargs):
            self.texts += [[i for i in ids if i] for ids in inputs["input_ids"].tolist()]
            if plan is not None:
                with torch.random.fork_rng():
                    self.rows.append(alone(model, inputs, plan))
            return super().training_step(model, inputs, *args, **kwargs)

    return Noting


def assert_positions(store, trainer):
    """The rows' examples are the texts that the Trainer had."""
    texts = Texts().texts
    assert torch.equal(store.ids, store.origin[:, 1])
    assert [texts[i] for i in store.origin[:, 1].tolist()] == trainer.texts


@CASES
def test_during(tmp_path, plain, lora, accumulated):
    """Rows of each batch with the weights of its step; training and random numbers as without."""
    model = gpt2(lora)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=20))
    callback, trainer = InfluenceCallback(plan, when="during"), noting(plan)
    train(tmp_path, model, callback, kind=trainer, gradient_accumulation_steps=accumulated)
    random = torch.rand(3)
    other, random_of_other = plain(lora, accumulated)
    assert torch.equal(random, random_of_other)
    assert_same_weights(model, other)
    assert not model._forward_pre_hooks and all(p.grad is None for p in model.parameters())
    store = callback.store
    assert_rows(store.rows, torch.cat(trainer.rows))
    sizes = [2, 2, 2, 1] * 2  # of the batches of two epochs
    steps = range(8) if accumulated == 1 else [0, 0, 0, 1, 2, 2, 2, 3]
    assert store.origin[:, 0].tolist() == [
        s for s, n in zip(steps, sizes, strict=True) for _ in range(n)
    ]
    assert_positions(store, trainer)


class StepEnds(transformers.TrainerCallback):
    """How many hooks the model has at the end of each step."""

    def __init__(self):
        self.hooks = []

    def on_step_end(self, args, state, control, model=None, **given):
        self.hooks.append(len(model._forward_pre_hooks))


class Stopping(transformers.TrainerCallback):
    """Ends each epoch after its first step."""

    def on_step_end(self, args, state, control, **given):
        control.should_epoch_stop = True

    def on_train_end(self, args, state, control, **given):
        self.sampler = given["train_dataloader"].batch_sampler


@pytest.mark.parametrize("case", ["workers", "workers, stopped epochs", "stopped epochs"])
def test_positions_of_batches_that_are_fetched_ahead(tmp_path, case):
    model = gpt2()
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=2))
    callback, trainer = InfluenceCallback(plan, when="during"), noting()
    others = [Stopping()] if "stopped" in case else []
    workers = {"dataloader_num_workers": 2} if "workers" in case else {}
    train(tmp_path, model, callback, *others, kind=trainer, **workers)
    assert len(trainer.texts) == (4 if others else 14)
    for other in others:  # the sampler is as it was
        assert type(other.sampler) is torch.utils.data.BatchSampler
    assert_positions(callback.store, trainer)


@pytest.mark.parametrize(
    "accumulated, ignored, num_examples",
    [(1, False, 1 + 7), (3, False, 1 + 7), (1, True, 7 + 2), (3, True, 7 + 6)],
    ids=["one batch a step", "three", "one, ignore_data_skip", "three, ignore_data_skip"],
)
def test_positions_of_a_training_that_is_resumed(tmp_path, accumulated, ignored, num_examples):
    """In the middle of an epoch, after three batches, from whose start the sampler draws again."""
    model = gpt2()
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=2))
    settings = {"gradient_accumulation_steps": accumulated, "ignore_data_skip": ignored}
    step = 3 // accumulated
    saving = {"save_strategy": "steps", "save_steps": step, "max_steps": step}
    train(tmp_path, model, **saving, **settings)
    callback, trainer = InfluenceCallback(plan, when="during"), noting()
    checkpoint = str(tmp_path / f"checkpoint-{step}")
    train(tmp_path, model, callback, kind=trainer, resume=checkpoint, **settings)
    assert len(trainer.texts) == num_examples
    assert_positions(callback.store, trainer)


def test_positions_that_are_not_known(tmp_path):
    """-1: of a stream, and where a collator makes other examples of what it is given."""
    model = gpt2()
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=2))
    callback = InfluenceCallback(plan, when="during")
    train(tmp_path, model, callback, data=Stream(), max_steps=3)
    assert len(callback.store) == 6 and (callback.store.origin[:, 1] == -1).all()
    train(tmp_path, model, callback, collator=lambda texts: pad([*texts, texts[0]]), max_steps=1)
    assert callback.store.origin.tolist() == [[0, -1]] * 3


def test_positions_of_keys():
    """-1: of a data set whose examples have names."""

    class Keys(torch.utils.data.Sampler):
        def __iter__(self):
            yield from (["a", "b"], ["c", "d"])

    loader = torch.utils.data.DataLoader(dict(zip("abcd", range(4))), batch_sampler=Keys())
    drawn = Drawn(loader)
    for batch, wanted in zip(loader, ([0, 1], [2, 3])):
        drawn.next()
        assert batch.tolist() == wanted and drawn.positions(2) == [-1, -1]
    drawn.close()
    assert type(loader.batch_sampler) is Keys


def doubled(outputs, labels, num_items_in_batch=None):
    """A loss that a Trainer is given, twice the model's own."""
    return 2 * nn.functional.cross_entropy(outputs.logits[:, :-1].mT, labels[:, 1:])


@pytest.mark.parametrize("when", ["after", "during"])
def test_another_loss_of_the_trainer(tmp_path, when):
    """It is refused before a step is made, and after training it can be given."""
    model = gpt2()
    before = [p.clone() for p in model.parameters()]
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=20))
    callback = InfluenceCallback(plan, tmp_path / "rows", when=when)
    with pytest.raises(ValueError, match=r"the model without 'labels'.*give that loss .* loss_fn="):
        train(tmp_path / "out", model, callback, loss=doubled)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not model._forward_pre_hooks and not list(tmp_path.glob("rows*"))
    if when == "during":
        callback = InfluenceCallback(plan, tmp_path / "rows", causal_lm_loss, when)
        with pytest.raises(ValueError, match=r"no 'labels'.*InfluenceCallback\(when='after'\)"):
            train(tmp_path / "out", model, callback, loss=doubled)
        return
    callback = InfluenceCallback(plan, loss_fn=lambda m, b: 2 * causal_lm_loss(m, b))
    train(tmp_path / "out", model, callback, loss=doubled)
    batch = pad([Texts()[i] for i in range(7)])
    assert_rows(callback.store.rows, 2 * alone(model, batch, plan))


def test_answers(tmp_path):
    """A training without labels, which has start and end positions."""
    torch.manual_seed(0)
    model, batch = MODELS["answers"][0](), answers()
    batch |= {"start_positions": torch.tensor([1, 7, 0, 2, 3]), "end_positions": torch.arange(5)}
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=20))
    callback = InfluenceCallback(plan)
    examples = [{k: v[b] for k, v in batch.items()} for b in range(5)]
    collator = transformers.default_data_collator
    ends = StepEnds()
    train(tmp_path, model, callback, ends, data=examples, collator=collator)
    assert ends.hooks == [0] * 6  # the first batch alone was looked at
    assert_rows(callback.store.rows, alone(model, batch, plan, "one"))


class PaddingFree:
    """As other libraries say it of their collators."""

    padding_free = True


def two_in_a_row(texts):
    """Packed by a collator that does not say so."""
    first, second = (text["input_ids"] for text in texts)
    positions = torch.tensor([[*range(len(first)), *range(len(second))]])
    return pad([{"input_ids": first + second}]) | {"position_ids": positions}


@pytest.mark.parametrize("when", ["after", "during"])
def test_callback_refuses(tmp_path, when):
    model = gpt2()
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=20))
    callback = InfluenceCallback(plan, tmp_path / "rows", when=when)
    for collator in (transformers.DataCollatorWithFlattening(), PaddingFree()):
        said = f"{type(collator).__name__} joins the examples of a batch into one row"
        with pytest.raises(ValueError, match=said):
            train(tmp_path / "out", model, callback, collator=collator)
    ends = StepEnds()
    with pytest.raises(ValueError, match="several examples are packed into one row"):
        train(tmp_path / "out", model, callback, ends, collator=two_in_a_row)
    assert not ends.hooks  # before the first step ends
    for loss_fn in (None, causal_lm_loss) if when == "during" else (None,):
        smoothed = InfluenceCallback(plan, tmp_path / "rows", loss_fn, when)
        with pytest.raises(ValueError, match=r"the labels are smoothed.*when='after'"):
            train(tmp_path / "out", model, smoothed, label_smoothing_factor=0.1)

    def wrong(model, batch):
        return model(**batch).loss

    callback = InfluenceCallback(plan, tmp_path / "rows", wrong, when)
    with pytest.raises(ValueError, match="need one loss per example"):
        train(tmp_path / "out", model, callback, max_steps=1)
    assert not list(tmp_path.glob("rows*")) and not model._forward_pre_hooks
    with pytest.raises(ValueError, match="when must be 'after' or 'during', got 'before'"):
        InfluenceCallback(plan, when="before")
