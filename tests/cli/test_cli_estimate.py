"""`dropinf plan --estimate`: of a config alone, without weights or data; it writes nothing."""

import json
import os

import pytest
import torch

pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 500, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.fixture
def run(tmp_path, monkeypatch, dropinf_):
    """run(...): the exit code of `dropinf plan ...`, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: dropinf_("plan", *arguments)


BERT = {
    **{"vocab_size": 500, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 64, "max_position_embeddings": 64},
}

T5 = {
    **{"vocab_size": 500, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    **{"decoder_start_token_id": 0, "pad_token_id": 0},
}


def config(kind="GPT2LMHeadModel"):
    ends = {"bos_token_id": None, "eos_token_id": None}
    if kind.startswith("GPT2"):
        made = transformers.GPT2Config(architectures=[kind], **SMALL, **ends)
    elif kind.startswith("T5"):
        made = transformers.T5Config(architectures=[kind], **T5)
    else:
        made = transformers.BertConfig(architectures=[kind], **BERT)
    made.save_pretrained("model")


@pytest.mark.parametrize(
    "kind",
    [
        *("GPT2LMHeadModel", "BertForSequenceClassification", "BertForMaskedLM"),
        "T5ForConditionalGeneration",
    ],
)
def test_of_a_config_alone(run, kind):
    config(kind)
    code, printed, said = run("model", "--estimate", "--tokens", 16, "--batch-size", 4, "--json")
    assert code == 0 and not said
    found = json.loads(printed)
    made = getattr(transformers, kind)(transformers.AutoConfig.from_pretrained("model"))
    held = {p.data_ptr(): p.nbytes for p in made.parameters()}
    assert sum(held.values()) <= found["weights"] <= 1.2 * sum(held.values())
    assert found["batch_size"] == 4 and found["peak"] > found["weights"] + found["kept"]
    assert os.listdir() == ["model"]
    more = json.loads(run("model", "--estimate", "--tokens", 32, "--batch-size", 4, "--json")[1])
    assert more["kept"] > 1.8 * found["kept"] and more["flops"] > 1.9 * found["flops"]
    code, printed, _ = run("model", "--estimate")
    assert code == 0 and "H100 SXM 80 GB: fits" in printed and "predicted" in printed


def test_with_an_adapter(run):
    peft = pytest.importorskip("peft")
    config()
    whole = json.loads(run("model", "--estimate", "--tokens", 16, "--batch-size", 4, "--json")[1])
    about = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    about.save_pretrained("adapter")
    options = ("--adapter", "adapter", "--tokens", 16, "--batch-size", 4, "--json")
    code, printed, _ = run("model", "--estimate", *options)
    found = json.loads(printed)
    assert code == 0 and found["rows"] < whole["rows"] and found["weights"] > whole["weights"]


def test_what_it_refuses(run):
    config()
    for arguments, words in (
        (("nowhere", "--estimate"), "there is no nowhere: no job's file"),
        (("--entry", "here:job", "--estimate"), "name the directory of a model"),
        (("model", "--tokens", 16), "--tokens goes with --estimate"),
        (("model", "--estimate", "--tokens", 1), "--tokens"),
    ):
        code, printed, said = run(*arguments)
        assert code == 2 and not printed and words in said and said.count("\n") == 1, said
    assert torch.get_default_device().type == "cpu"


def test_of_images(run):
    """Of the size that the config names; 32 of them, as a job takes, or so many as it says."""
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    more = {"intermediate_size": 16, "image_size": 16, "patch_size": 4}
    named = {"architectures": ["ViTForImageClassification"]}
    transformers.ViTConfig(**named, **sizes, **more).save_pretrained("model")
    found = [
        json.loads(run("model", "--estimate", *options, "--json")[1])
        for options in ((), ("--batch-size", 4), ("--batch-size", 8))
    ]
    assert [one["batch_size"] for one in found] == [32, 4, 8]
    assert found[2]["rows"] == 2 * found[1]["rows"] and found[2]["kept"] > 1.8 * found[1]["kept"]
    about = transformers.ResNetConfig(architectures=["ResNetForImageClassification"])
    about.save_pretrained("other")
    code, printed, said = run("other", "--estimate")
    assert code == 2 and not printed and "does not say how large images are" in said


def test_of_a_classifier_that_looks_for_the_last_token(run):
    """Where that is, no config says."""
    config("GPT2ForSequenceClassification")
    code, printed, said = run("model", "--estimate", "--tokens", 16, "--batch-size", 4)
    assert code == 2 and not printed and said.count("\n") == 1
    assert "the last token of a padded text" in said and "measure a small batch" in said
