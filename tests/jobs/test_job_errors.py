"""Directories and data that do not fit: one sentence each."""

import json
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from job_models import CHAT, VOCABULARY, gpt2, lines, saved, tokenizer  # noqa: E402

from dropinf.jobs import Job, prepare  # noqa: E402
from dropinf.jobs import models as job_models_room  # noqa: E402

TEXTS = [{"text": "the cat sat"}, {"text": "a dog ran"}]
BERT = {
    **{"vocab_size": len(VOCABULARY), "hidden_size": 12, "num_hidden_layers": 1},
    **{"num_attention_heads": 3, "intermediate_size": 16, "max_position_embeddings": 16},
}
CLASSES = {"label2id": {"bad": 0, "good": 1}, "id2label": {0: "bad", 1: "good"}}


@pytest.fixture
def said(tmp_path):
    """The sentence that a job ends with; `error` is its type."""

    def of(rows=TEXTS, error=ValueError, **given):
        train = lines(tmp_path / "train.jsonl", rows)
        paths = {"model": str(tmp_path / "model"), "train": str(train), "device": "cpu"}
        with pytest.raises(error) as raised:
            prepare(Job.of(**{**paths, **given}))
        sentence = str(raised.value)
        assert type(raised.value) is error and "\n" not in sentence and len(sentence) < 600
        return sentence.replace(f"{tmp_path}/", "")

    return of


def test_model_directories(tmp_path, said):
    assert said(error=FileNotFoundError).startswith("there is no model directory model; models are")
    assert said(error=FileNotFoundError, model="gpt2").startswith(
        "there is no model directory gpt2"
    )
    (tmp_path / "model").mkdir()
    assert said() == "model is no model directory: it has no config.json or adapter_config.json"
    (tmp_path / "file").touch()
    assert said(model=str(tmp_path / "file")) == "file is not a model directory but a file"
    model = gpt2(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert said().startswith("the weights in model are damaged: ")
    weights.unlink()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    assert said().startswith("model has no weights in safetensors; save the model with")
    (tmp_path / "model" / "other.safetensors").write_bytes(whole)
    assert said().startswith("the weights in model cannot be loaded: ")  # nor is the pickle
    weights.write_bytes(whole)
    for architecture, wanted in (
        ("GPT2Model", "model/config.json names GPT2Model, which is no language model, classifier"),
        ("GPT2ForSequenceClassification", "the weights in model lack 1 of GPT2ForSequenceClassi"),
    ):
        changed = {**config, "architectures": [architecture]}
        (tmp_path / "model" / "config.json").write_text(json.dumps(changed))
        assert said().startswith(wanted)
    changed = {**config, "n_embd": 24}
    (tmp_path / "model" / "config.json").write_text(json.dumps(changed))
    assert said().startswith("the weights in model cannot be loaded: ")
    changed = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(changed))
    (tmp_path / "model" / "mine.py").write_text("raise SystemExit('ran')")
    assert said().startswith("model/config.json cannot be used: ")
    (tmp_path / "model" / "config.json").write_text("{")
    assert said().startswith("model/config.json cannot be used: ")


def test_devices(tmp_path, said):
    gpt2(tmp_path / "model")
    assert said(device="gpu").startswith("device 'gpu' cannot be used: ")
    if not torch.cuda.is_available():
        assert said(device="cuda").startswith("device 'cuda' cannot be used: ")


def test_transformers_is_missing(tmp_path, said, monkeypatch):
    gpt2(tmp_path / "model")
    monkeypatch.setattr(job_models_room.importlib.util, "find_spec", lambda name: None)
    assert said() == "model needs transformers; pip install 'dropinf[transformers]'"


def test_tokenizers(tmp_path, said):
    model = tmp_path / "model"
    gpt2(model)
    rows = [*TEXTS, {"text": "the zebra"}]
    made = tokenizer()
    made.add_tokens(["zebra"])
    made.save_pretrained(model)
    assert said(rows).startswith(
        "train.jsonl, line 3: token 21 ('zebra') has no embedding in the model, which has 21; the"
    )
    assert prepare_works(tmp_path)  # it is in no other text
    (model / "tokenizer.json").write_text("{")
    assert said().startswith("the tokenizer in model cannot be loaded: ")
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert said().startswith("model has no tokenizer (tokenizer.json); save the model's own there")


def prepare_works(tmp_path, rows=TEXTS, **given):
    train = lines(tmp_path / "train.jsonl", rows)
    return prepare(Job.of(model=str(tmp_path / "model"), train=str(train), device="cpu", **given))


def test_no_pad_token(tmp_path):
    """Batches are padded by the end of a text, or by anything: the mask covers it."""
    gpt2(tmp_path / "model")
    rows = [{"text": "the cat sat"}, {"text": "a dog"}]
    for names, pad in (({"pad_token": None}, 1), ({"pad_token": None, "eos_token": None}, 0)):
        tokenizer(**names).save_pretrained(tmp_path / "model")
        (batch,) = prepare_works(tmp_path, rows).train.loader
        assert batch["input_ids"][1].tolist() == [VOCABULARY["a"], VOCABULARY["dog"], pad]
        assert batch["attention_mask"][1].tolist() == [1, 1, 0]
        assert batch["labels"][1].tolist()[2] == -100


def test_adapters(tmp_path, said):
    peft = pytest.importorskip("peft")

    def adapter(name, base, **config):
        made = peft.LoraConfig(task_type="CAUSAL_LM", **config)
        tuned = peft.get_peft_model(base, made)
        tuned.peft_config["default"].base_model_name_or_path = "someone/else"
        tuned.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    wider = gpt2(tmp_path / "wider", n_embd=24)
    deeper = gpt2(tmp_path / "deeper", n_layer=1)
    gpt2(tmp_path / "model")
    wrong = adapter("wide", wider, r=2, target_modules=["c_attn"])
    start = "does not fit the model in model: "
    assert said(adapter=wrong).startswith(f"the adapter wide {start}")
    shallow = adapter("shallow", deeper, r=2, target_modules=["c_attn"])
    assert said(adapter=shallow).startswith(f"the adapter shallow {start}")
    nowhere = json.loads((tmp_path / "wide" / "adapter_config.json").read_text())
    nowhere["target_modules"] = ["q_proj"]
    (tmp_path / "wide" / "adapter_config.json").write_text(json.dumps(nowhere))
    assert said(adapter=wrong).startswith(f"the adapter wide {start}")
    assert said(error=FileNotFoundError, model=shallow).startswith(
        "shallow is an adapter of 'someone/else', which is no directory here; name that of its"
    )
    assert said(model=shallow, adapter=wrong).startswith("shallow is an adapter itself")
    (tmp_path / "shallow" / "adapter_model.safetensors").unlink()
    assert said(adapter=shallow) == "the adapter shallow has no adapter_model.safetensors"
    missing = said(error=FileNotFoundError, adapter=str(tmp_path / "none"))
    assert missing.startswith("there is no adapter directory none")
    assert said(adapter=str(tmp_path / "model")).startswith("model is no adapter directory")


def test_columns_of_a_language_model(tmp_path, said):
    gpt2(tmp_path / "model")
    assert said([{"body": "x", "n": 1}]) == (
        "train.jsonl has no columns messages or prompt and completion or text, which a causal "
        "language model learns from; it has 'body', 'n'; name them in [data]"
    )
    assert said(text="body").startswith("train.jsonl, line 1 has no column 'body' ([data] text)")
    assert said([{"prompt": "a"}], prompt="prompt").endswith("it has 'prompt'")
    assert said(label="text").startswith("data of a causal language model has columns messages or")
    assert said([*TEXTS, {"text": 3}]) == "train.jsonl, line 3: column 'text' must be a text, got 3"
    assert said(max_tokens=17).startswith("[data] max_tokens is 17, more than the 16 that the")
    queries = lines(tmp_path / "queries.jsonl", [{"txt": "a"}])
    assert said(queries=str(queries)).startswith("queries.jsonl has no columns")


def test_nothing_to_predict(tmp_path, said):
    gpt2(tmp_path / "model")
    assert said([*TEXTS, {"text": ""}, {"text": "the"}]) == (
        "train.jsonl, line 3 has nothing to predict in its first 16 tokens, nor has line 4; mend "
        "or remove it"
    )
    many = said([{"text": ""}] * 9)
    assert "line 1 has nothing" in many and "nor has line 2, 3, 4 and 5 more;" in many
    long = {"prompt": "the " * 20, "completion": "cat"}
    assert said([long]).startswith("train.jsonl, line 1 has nothing to predict in its first 16")
    none = {"prompt": "the cat", "completion": ""}
    assert said([none]).startswith("train.jsonl, line 1 has nothing to predict")


def test_chats(tmp_path, said):
    gpt2(tmp_path / "model")
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    rows = [{"messages": chat}]
    assert said(rows).startswith("train.jsonl has chats, and the tokenizer has no chat template")
    tokenizer(chat_template=CHAT).save_pretrained(tmp_path / "model")
    assert prepare_works(tmp_path, rows)
    assert said([{"messages": chat[:1]}]).startswith("train.jsonl, line 1 has nothing to predict")
    assert said([{"messages": ["the cat"]}]) == (
        "train.jsonl, line 1: a message must have a role and a content, both texts"
    )
    changing = "{% for m in messages %}{{ messages | length }} {{ m.content }} {% endfor %}"
    tokenizer(chat_template=changing).save_pretrained(tmp_path / "model")
    assert said(rows).startswith("train.jsonl, line 1: the chat template changes messages when")
    failing = "{{ raise_exception('no system prompt') }}"
    tokenizer(chat_template=failing).save_pretrained(tmp_path / "model")
    assert said(rows) == "train.jsonl, line 1: the chat template fails: no system prompt"


def test_labels(tmp_path, said):
    saved(tmp_path / "model", "BertForSequenceClassification", "BertConfig", **BERT, **CLASSES)

    def of(label):
        return said([{"text": "a", "label": "bad"}, {"text": "b", "label": label}])

    for label in ("fine", 2, -1, "2"):
        assert of(label) == (
            f"train.jsonl, line 2: label {label!r} is unknown to the model; it has 'bad', 'good' "
            "(0 to 1)"
        )
    assert of(1.5) == (
        "train.jsonl, line 2: column 'label' must be a class, a whole number or a name, got 1.5"
    )
    assert said(TEXTS).startswith("train.jsonl has no columns text and label, which a classific")
    assert prepare_works(tmp_path, [{"text": "a", "label": "1"}])  # as a CSV file has it


def test_token_labels(tmp_path, said):
    saved(tmp_path / "model", "BertForTokenClassification", "BertConfig", **BERT, **CLASSES)
    assert said([{"text": ["a", "cat"], "label": ["bad"]}]) == (
        "train.jsonl, line 1: there must be a label for each word, got 1 for 2"
    )
    assert said([{"text": ["a"], "label": ["worse"]}]).startswith(
        "train.jsonl, line 1: label 'worse' is unknown to the model"
    )
    assert said([{"text": "a cat", "label": [0, 1]}]).endswith("a list of words, got 'a cat'")


def test_images(tmp_path, said):
    pytest.importorskip("PIL")
    config = {k: v for k, v in BERT.items() if k not in ("vocab_size", "max_position_embeddings")}
    config |= {"image_size": 8, "patch_size": 4, **CLASSES}
    saved(tmp_path / "model", "ViTForImageClassification", "ViTConfig", **config)
    rows = [{"image": "x.png", "label": 0}]
    assert said(rows).startswith("model has no image processor (preprocessor_config.json); save")
    size = {"height": 8, "width": 8}
    transformers.ViTImageProcessor(size=size).save_pretrained(tmp_path / "model")
    missing = said(rows, error=FileNotFoundError)
    assert missing == "train.jsonl, line 1: there is no image x.png"
    (tmp_path / "x.png").write_text("no image")
    ready = prepare_works(tmp_path, rows)
    with pytest.raises(ValueError, match=r"x\.png cannot be read as an image: cannot identify"):
        list(ready.train.loader)
    assert said([{"image": "x.png", "label": 2}]).startswith("train.jsonl, line 1: label 2 is un")


def test_a_masked_model_without_a_mask(tmp_path, said):
    saved(tmp_path / "model", "BertForMaskedLM", "BertConfig", **BERT)
    tokenizer(mask_token=None).save_pretrained(tmp_path / "model")
    assert said() == "the tokenizer has no mask token, which a masked language model needs"


def test_nothing_is_fetched(tmp_path, said, monkeypatch):
    """No connection is opened for what is not there."""
    import socket

    def refuse(*args, **given):
        raise AssertionError("a connection")

    gpt2(tmp_path / "model")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert prepare_works(tmp_path)
    shutil.rmtree(tmp_path / "model")
    assert "there is no model directory" in said(error=FileNotFoundError)
