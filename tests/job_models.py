"""Tiny models with tokenizers in directories, as jobs take them."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "log",
    "and",
    "then",
    "it",
    "was",
    "good",
    "bad",
    "very",
]
SPECIAL = ["<pad>", "</s>", "<unk>", "<mask>", "<s>"]
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
NAMES = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def tokenizer(ends=False, hyphens=False, **given):
    """One token a word; `ends` puts one at both ends of a text, as BERT's does.

    With `hyphens` a word is split at them.
    """
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    split = pre_tokenizers.Whitespace if hyphens else pre_tokenizers.WhitespaceSplit
    made.pre_tokenizer = split()
    if ends:
        special = [(name, VOCABULARY[name]) for name in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=special
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, **{**NAMES, **given})


def saved(directory, kind, config, ends=False, seed=0, **given):
    """A model of a class of transformers, with a tokenizer, in a directory."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, config)(**given)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():  # biases and norms too, which are all alike in a new model
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(directory)
    if not kind.endswith("ImageClassification"):
        tokenizer(ends).save_pretrained(directory)
    return model


GPT2 = {
    **{"vocab_size": len(VOCABULARY), "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3},
    **{"bos_token_id": 1, "eos_token_id": 1},
}


def gpt2(directory, kind="GPT2LMHeadModel", **given):
    return saved(directory, kind, "GPT2Config", **{**GPT2, **given})


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def sentences(n, seed=0, longest=12):
    """n texts of 2 to `longest` words."""
    draws = torch.Generator().manual_seed(seed)

    def number(most):
        return int(torch.randint(most, (), generator=draws))

    return [
        " ".join(WORDS[number(len(WORDS))] for _ in range(2 + number(longest - 1)))
        for _ in range(n)
    ]
