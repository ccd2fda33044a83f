"""Worked job: what taught a language model. Fine-tune, collect, look, remove, retrain, compare.

    python docs/worked/what_taught.py [--seeds 3]

Needs dropinf[transformers]. Two minutes on two cores.

A small GPT-2 knows Python's documentation of some topics and is fine-tuned on others. Which texts
taught it what it knows about mail? If scores are right, training without the texts of highest score
raises the loss on texts about mail more than training without as many others does, and training
without the texts of lowest score does not.
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import tokenizers
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

import dropinf
from dropinf.losses import causal_lm_loss
from dropinf.tools.demo_text import TOPICS, docstrings

ASKED = "mail"
BASE = ("windows", "network")


def texts_of(topics: tuple[str, ...]) -> list[str]:
    return sorted({text for topic in topics for name in TOPICS[topic] for text in docstrings(name)})


def tokenizer_of(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Byte pairs of these texts, 1,500 of them."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    model.decoder = tokenizers.decoders.ByteLevel()
    special = ["<pad>", "<end>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<end>", bos_token="<end>"
    )


def base_model(vocab_size: int) -> nn.Module:
    """A GPT-2 of two layers."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_positions=128,
        n_embd=96,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config)


class Batches:
    """Texts to batches of ids, attention mask and labels."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> dict[str, torch.Tensor]:
        ended = ["<end>" + text + "<end>" for text in texts]
        found = self.tokenizer(
            ended, padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        labels = found.input_ids.masked_fill(found.attention_mask == 0, -100)
        return {
            "input_ids": found.input_ids,
            "attention_mask": found.attention_mask,
            "labels": labels,
        }


def fit(model: nn.Module, texts: list[str], batches: Batches, epochs: int, seed: int) -> nn.Module:
    """AdamW on the mean loss; leaves the model in eval mode."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in DataLoader(texts, batch_size=32, shuffle=True, collate_fn=batches):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    return model.eval()


def loss_of(model: nn.Module, texts: list[str], batches: Batches) -> float:
    """Mean over texts of the mean loss over tokens."""
    with torch.no_grad():
        found = []
        for batch in DataLoader(texts, batch_size=64, collate_fn=batches):
            tokens = (batch["labels"][:, 1:] != -100).sum(1)
            found.append(causal_lm_loss(model, batch) / tokens)
    return float(torch.cat(found).mean())


def main() -> None:
    """Print what was found, and what training without it does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    seeds = parser.parse_args().seeds
    topic_of = {text: topic for topic in TOPICS for text in texts_of((topic,))}
    texts = sorted(text for text in topic_of if topic_of[text] not in BASE)
    rng = np.random.default_rng(0)
    rng.shuffle(texts)
    queries = [text for text in texts if topic_of[text] == ASKED][:40]
    train = [text for text in texts if text not in queries]
    known = texts_of(BASE)

    tokenizer = tokenizer_of(known + train)
    batches = Batches(tokenizer)
    base = fit(base_model(len(tokenizer)), known, batches, epochs=4, seed=0)
    model = fit(copy.deepcopy(base), train, batches, epochs=3, seed=0)
    before, after = (loss_of(which, queries, batches) for which in (base, model))
    print(
        f"{len(train)} texts to fine-tune on; {len(queries)} others, about {ASKED}, have a loss of "
        f"{before:.2f} a token before it and {after:.2f} after it.\n"
    )

    loader, asked = (
        DataLoader(some, batch_size=32, collate_fn=batches) for some in (train, queries)
    )
    energies = dropinf.energies(model, loader, causal_lm_loss)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=512, energies=energies))
    store = dropinf.collect(model, loader, causal_lm_loss, plan, progress=False)
    rows = dropinf.collect(model, asked, causal_lm_loss, plan, progress=False)
    solver = dropinf.solvers.Cholesky(damping=0.1).fit(store)
    scores = dropinf.scores(dropinf.mean_query(rows), store, solver)[0]

    order = scores.argsort(descending=True).tolist()
    for what, some in (("most", order[:4]), ("least", order[:-5:-1])):
        print(f"What taught {what}:")
        for i in some:
            print(f"  {scores[i]:9.1f}  {topic_of[train[i]]:8} {train[i][:70]}")

    k = len(train) // 10
    print(f"\nloss of the queries, trained anew without {k} of the texts ({seeds} seeds)")
    for what, gone in (
        ("none left out", []),
        ("at random", rng.choice(len(train), k, replace=False).tolist()),
        ("the highest", order[:k]),
        ("the lowest", order[-k:]),
    ):
        kept = [text for i, text in enumerate(train) if i not in gone]
        found = [
            loss_of(fit(copy.deepcopy(base), kept, batches, 3, seed), queries, batches)
            for seed in range(seeds)
        ]
        mail = sum(topic_of[train[i]] == ASKED for i in gone)
        of_them = f", {mail} of them about {ASKED}" if gone else ""
        print(f"{what:16}{np.mean(found):.3f} +- {np.std(found, ddof=1):.3f}{of_them}")


if __name__ == "__main__":
    main()
