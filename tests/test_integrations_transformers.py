"""transformers: losses of examples against the model's own, and rows from a Trainer."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from zoo import GROUPED, IDS, SMALL, build_as  # noqa: E402

import dropinf  # noqa: E402
from dropinf.integrations.transformers import InfluenceCallback, loss_fn_for  # noqa: E402

T5 = {
    "decoder_start_token_id": 0,
    "d_model": 12,
    "d_kv": 4,
    "d_ff": 16,
    "num_layers": 2,
    "num_heads": 3,
}
GPT2 = {"n_positions": 10, "n_embd": 12, "n_layer": 2, "n_head": 3}
BERT = IDS | SMALL


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


MODELS = {  # name: model, labels, and how many terms the model's mean has
    "GPT-2": (build_as("GPT2LMHeadModel", "GPT2Config", **IDS, **GPT2), text, "shifted"),
    "Llama": (build_as("LlamaForCausalLM", "LlamaConfig", **IDS, **GROUPED), text, "shifted"),
    "BERT": (build_as("BertForMaskedLM", "BertConfig", **BERT), lambda: text(0.4), "tokens"),
    "T5": (build_as("T5ForConditionalGeneration", "T5Config", **IDS, **T5), text, "tokens"),
    "classes": (
        build_as("BertForSequenceClassification", "BertConfig", **BERT, num_labels=3),
        lambda: tokens() | {"labels": torch.randint(3, (5,))},
        "examples",
    ),
    "regression": (
        build_as("BertForSequenceClassification", "BertConfig", **BERT, num_labels=1),
        lambda: tokens() | {"labels": torch.randn(5)},
        "examples",
    ),
    "many labels": (
        build_as("BertForSequenceClassification", "BertConfig", **BERT, num_labels=3),
        lambda: tokens() | {"labels": torch.randint(2, (5, 3)).float()},
        "examples",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_losses_add_up_to_the_models_own(name):
    make, make_batch, terms = MODELS[name]
    torch.manual_seed(0)
    model, batch = make(), make_batch()
    labels = batch["labels"]
    count = {
        "shifted": lambda: (labels[:, 1:] != -100).sum(),
        "tokens": lambda: (labels != -100).sum(),
        "examples": lambda: 5,
    }[terms]()
    losses = loss_fn_for(model)(model, batch)
    assert losses.shape == (5,) and losses.dtype == torch.float32
    torch.testing.assert_close(losses.sum() / count, model(**batch).loss)
    one = {key: value[1:2] for key, value in batch.items()}
    torch.testing.assert_close(loss_fn_for(model)(model, one), losses[1:2])


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


def test_old_transformers_are_refused():
    old = "import transformers; transformers.__version__ = '4.57.1'; "
    done = subprocess.run(
        [sys.executable, "-c", old + "import dropinf.integrations.transformers"],
        capture_output=True,
        text=True,
    )
    assert "needs transformers 5 (tested: 5.23), got 4.57.1" in done.stderr


def test_import_of_dropinf_alone():
    """It imports neither tool."""
    found = "import sys, dropinf; print({'transformers', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


class Texts(torch.utils.data.Dataset):
    """Seven texts of different lengths."""

    def __init__(self):
        torch.manual_seed(1)
        self.texts = [torch.randint(1, 23, (n,)).tolist() for n in (8, 5, 7, 2, 8, 6, 4)]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return {"input_ids": self.texts[i], "labels": self.texts[i]}


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


def train(tmp_path, model, *callbacks, collator=pad, **settings):
    args = transformers.TrainingArguments(
        **{
            "output_dir": str(tmp_path / "out"),
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
    trainer = transformers.Trainer(
        model, args, train_dataset=Texts(), data_collator=collator, callbacks=list(callbacks)
    )
    trainer.train()
    return trainer


def alone(model, batch, plan):
    """Rows of a batch by autograd, one example at a time, in eval mode."""
    named, rows = dict(model.named_parameters()), []
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    for b in range(len(batch["input_ids"])):
        out = model(**{k: v[b : b + 1] for k, v in batch.items()})
        count = (batch["labels"][b, 1:] != -100).sum()
        grads = torch.autograd.grad(
            out.loss * count, [named[slot.name] for slot in plan.slots], materialize_grads=True
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


@pytest.mark.parametrize("lora", [False, True], ids=["whole model", "LoRA"])
def test_after(tmp_path, lora):
    """The data set's rows in its order, as autograd has them; training as without."""
    model = gpt2(lora)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=20))
    callback = InfluenceCallback(plan, tmp_path / "rows", when="after")
    train(tmp_path, model, callback)
    random = torch.rand(3)
    plain = gpt2(lora)
    train(tmp_path, plain)
    assert_same_weights(model, plain)
    assert torch.equal(random, torch.rand(3))
    store = dropinf.RowStore.load(tmp_path / "rows")
    assert torch.equal(store.rows, callback.store.rows) and len(store) == 7
    batch = pad([Texts()[i] for i in range(7)])
    assert_rows(store.rows, alone(model, batch, plan))
    model.eval()
    whole = dropinf.collect(model, [batch], loss_fn_for(model), plan, progress=False)
    assert_rows(store.rows, whole.rows)


class Noting(transformers.Trainer):
    """Computes the rows of each batch itself, by autograd."""

    def training_step(self, model, inputs, *args, **kwargs):
        with torch.random.fork_rng():
            self.truth.append(alone(model, inputs, self.plan))
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("lora", [False, True], ids=["whole model", "LoRA"])
def test_during(tmp_path, monkeypatch, lora, accumulated):
    """Rows of each batch with the weights of its step; training and random numbers as without."""
    settings = {"gradient_accumulation_steps": accumulated}
    plain = gpt2(lora)
    train(tmp_path, plain, **settings)
    random = torch.rand(3)

    model = gpt2(lora)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=20))
    callback = InfluenceCallback(plan, when="during")
    truth = []
    monkeypatch.setattr(Noting, "truth", truth, raising=False)
    monkeypatch.setattr(Noting, "plan", plan, raising=False)
    monkeypatch.setattr(transformers, "Trainer", Noting)
    train(tmp_path, model, callback, **settings)
    assert torch.equal(random, torch.rand(3))
    assert_same_weights(model, plain)
    assert not model._forward_pre_hooks and all(p.grad is None for p in model.parameters())
    store = callback.store
    assert_rows(store.rows, torch.cat(truth))
    sizes = [2, 2, 2, 1] * 2  # of the batches of two epochs
    steps = range(8) if accumulated == 1 else [0, 0, 0, 1, 2, 2, 2, 3]
    assert store.origin[:, 0].tolist() == [
        s for s, n in zip(steps, sizes, strict=True) for _ in range(n)
    ]
    first = [0, 1] if accumulated == 1 else [0, 1, 2, 3, 4, 5]
    assert store.origin[: len(first), 1].tolist() == first


@pytest.mark.parametrize("when", ["after", "during"])
def test_callback_refuses(tmp_path, when):
    model = gpt2()
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=20))
    callback = InfluenceCallback(plan, tmp_path / "rows", when=when)
    with pytest.raises(ValueError, match="joins the examples of a batch into one row"):
        train(tmp_path, model, callback, collator=transformers.DataCollatorWithFlattening())
    with pytest.raises(ValueError, match="the labels are smoothed"):
        train(tmp_path, model, callback, label_smoothing_factor=0.1)

    def wrong(model, batch):
        return model(**batch).loss

    callback = InfluenceCallback(plan, tmp_path / "rows", wrong, when)
    with pytest.raises(ValueError, match="need one loss per example"):
        train(tmp_path, model, callback)
    assert not list(tmp_path.glob("rows*")) and not model._forward_pre_hooks
    with pytest.raises(ValueError, match="when must be 'after' or 'during', got 'before'"):
        InfluenceCallback(plan, when="before")


def test_readme_example(tmp_path, monkeypatch):
    """The README's lines before and after run as they stand."""
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    args = transformers.TrainingArguments(
        "out", report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    texts = Texts()
    namespace = {"transformers": transformers, "dropinf": dropinf, "args": args, "texts": texts}
    namespace |= {"model": gpt2(), "collator": pad, "queries": [texts[i] for i in range(3)]}
    ours = [block for block in blocks if "transformers.Trainer(" in block]
    assert len(ours) == 2
    for block in ours:
        exec(block, namespace)
    assert namespace["scores"].shape == (3, 7) and namespace["scores"].isfinite().all()
