"""transformers: losses of examples against the model's own, and rows from a Trainer."""

import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from zoo import GROUPED, IDS, SMALL, build_as  # noqa: E402

from dropinf.integrations.transformers import loss_fn_for  # noqa: E402

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
    assert "needs transformers 5 (tested: 5.20 and 5.23), got 4.57.1" in done.stderr


def test_import_of_dropinf_alone():
    """It imports neither tool."""
    found = "import sys, dropinf; print({'transformers', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
