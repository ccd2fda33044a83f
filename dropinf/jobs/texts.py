"""Examples of texts: tokens and labels of each, as a model of their kind takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropinf.jobs.chats import rendered
from dropinf.jobs.columns import class_of, classes_of, numbers_of
from dropinf.jobs.data_files import DataFile
from dropinf.jobs.tokenizing import Tokens
from dropinf.losses import IGNORED

_MASKED = 0.15  # of the tokens, as BERT was trained
_SHOWN = 3  # line numbers in an error

Item = dict[str, Any]  # of arrays [T], or a number


@dataclass
class Coded:
    """Examples of texts.

    Attributes:
        items: of each, what the model takes.
        texts: of each, for people.
        cut: how many were longer than the model or the job takes.
    """

    items: list[Item]
    texts: list[str]
    cut: int

    @property
    def lengths(self) -> list[int]:
        """Positions of each, of its longer side."""
        return [max(_sizes(item)) for item in self.items]

    def pieces(self, tokens: Tokens, position: int) -> list[str]:
        """The texts of an example's tokens."""
        return tokens.pieces(self.items[position]["input_ids"].tolist())


def coded(kind: str, tokens: Tokens, data: DataFile, columns: dict[str, str], config: Any) -> Coded:
    """The examples of a data file.

    Args:
        kind: of model, see `Loaded`.
        tokens: its tokenizer.
        data: the file.
        columns: of `columns_of`.
        config: of the model.

    Raises:
        ValueError: a column is missing or holds something else; an example has nothing to predict.
    """
    if kind == "causal_lm":
        return _causal(tokens, data, columns)
    return _OTHERS[kind](tokens, data, columns, config)


def _causal(tokens: Tokens, data: DataFile, columns: dict[str, str]) -> Coded:
    """Next tokens: of a text all of them, else those of spans of its characters.

    A completion is followed by the token that ends a text, if the tokenizer has one, as in
    fine-tuning.
    """
    spans: list[list[tuple[int, int]]] | None = None
    options = {"add_special_tokens": True}
    end = None
    if "messages" in columns:
        texts, spans = rendered(tokens.tokenizer, data, columns["messages"])
        options["add_special_tokens"] = False  # the template has them
    elif "prompt" in columns:
        prompts, completions = _strings(data, columns, "prompt", "completion")
        texts = [a + b for a, b in zip(prompts, completions, strict=True)]
        spans = [
            [(len(a), len(text))] if len(text) > len(a) else []
            for a, text in zip(prompts, texts, strict=True)
        ]
        end = tokens.tokenizer.eos_token_id
    else:
        (texts,) = _strings(data, columns, "text")
    items, cut = [], 0
    for position, encoding, was_cut in tokens.of(data, texts, **options):
        ids = np.array(encoding.ids, np.int32)
        labels = ids.copy()
        if spans is not None:
            inside = [_within(offset, spans[position]) for offset in encoding.offsets]
            if end is not None and spans[position] and not was_cut:
                if ids.size == 0 or ids[-1] != end:
                    ids = np.append(ids, np.int32(end))
                    inside.append(True)
                inside[-1] = True
                if tokens.most is not None and len(ids) > tokens.most:
                    ids, inside, was_cut = ids[:-1], inside[:-1], True
            labels = np.where(inside, ids, IGNORED).astype(np.int32)
        cut += was_cut
        items.append({"input_ids": ids, "labels": labels})
    _refuse_empty(data, tokens, [bool((item["labels"][1:] != IGNORED).any()) for item in items])
    return Coded(items, texts, cut)


def _seq2seq(tokens: Tokens, data: DataFile, columns: dict[str, str], config: Any) -> Coded:
    prompts, completions = _strings(data, columns, "prompt", "completion")
    items, cut = [], 0
    sources = tokens.of(data, prompts)
    targets = tokens.of(data, completions)
    for (_, source, cut_source), (_, target, cut_target) in zip(sources, targets, strict=True):
        cut += cut_source or cut_target
        ids, labels = (np.array(encoding.ids, np.int32) for encoding in (source, target))
        items.append({"input_ids": ids, "labels": labels})
    _refuse_empty(data, tokens, [bool(len(i["input_ids"]) and len(i["labels"])) for i in items])
    return Coded(items, [f"{a}\n{b}" for a, b in zip(prompts, completions, strict=True)], cut)


def _masked(tokens: Tokens, data: DataFile, columns: dict[str, str], config: Any) -> Coded:
    """The tokens behind masks, at 15 % of the places, which an example's position draws."""
    (texts,) = _strings(data, columns, "text")
    mask = tokens.tokenizer.mask_token_id
    if mask is None:
        raise ValueError("the tokenizer has no mask token, which a masked language model needs")
    items, cut = [], 0
    for position, encoding, was_cut in tokens.of(data, texts):
        cut += was_cut
        ids = np.array(encoding.ids, np.int32)
        labels = np.full_like(ids, IGNORED)
        plain = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
        if plain.size:
            drawn = np.random.default_rng([0, position])
            chosen = drawn.choice(plain, max(1, round(_MASKED * plain.size)), replace=False)
            labels[chosen] = ids[chosen]
            ids[chosen] = mask
        items.append({"input_ids": ids, "labels": labels})
    _refuse_empty(data, tokens, [bool((item["labels"] != IGNORED).any()) for item in items])
    return Coded(items, texts, cut)


def _classes(tokens: Tokens, data: DataFile, columns: dict[str, str], config: Any) -> Coded:
    (texts,) = _strings(data, columns, "text")
    if config.problem_type == "multi_label_classification":
        raise ValueError(
            "the model gives several labels to a text, for which a column has no place; give "
            "model, data and loss by a function ([model] entry)"
        )
    regression = config.problem_type == "regression" or config.num_labels == 1
    labels = (
        numbers_of(data, columns["label"])
        if regression
        else classes_of(data, columns["label"], config)
    )
    items, cut = [], 0
    for position, encoding, was_cut in tokens.of(data, texts):
        cut += was_cut
        items.append({"input_ids": np.array(encoding.ids, np.int32), "labels": labels[position]})
    _refuse_empty(data, tokens, [len(item["input_ids"]) > 0 for item in items])
    return Coded(items, texts, cut)


def _token_classes(tokens: Tokens, data: DataFile, columns: dict[str, str], config: Any) -> Coded:
    """The class of each word, at its first token."""
    words = data.column(columns["text"], "text", list, "a list of words")
    labels = data.column(columns["label"], "label", list, "a list of labels, one a word")
    for position, (given, classes) in enumerate(zip(words, labels, strict=True)):
        if len(given) != len(classes) or not all(isinstance(word, str) for word in given):
            raise ValueError(
                f"{data.where(position)}: there must be a label for each word, got "
                f"{len(classes)} for {len(given)}"
            )
    items, cut = [], 0
    for position, encoding, was_cut in tokens.of(data, words, is_split_into_words=True):
        cut += was_cut
        of_tokens = np.full(len(encoding.ids), IGNORED, np.int32)
        before = None
        for t, word in enumerate(encoding.word_ids):
            if word is not None and word != before:
                of_tokens[t] = class_of(labels[position][word], config, data, position)
            before = word
        items.append({"input_ids": np.array(encoding.ids, np.int32), "labels": of_tokens})
    _refuse_empty(data, tokens, [bool((item["labels"] != IGNORED).any()) for item in items])
    return Coded(items, [" ".join(given) for given in words], cut)


_OTHERS: dict[str, Callable[[Tokens, DataFile, dict[str, str], Any], Coded]] = {
    "seq2seq": _seq2seq,
    "masked_lm": _masked,
    "classification": _classes,
    "token_classification": _token_classes,
}


def padded(items: Sequence[Item], pad: int) -> dict[str, Tensor]:
    """Tensors [B, T] of a batch, padded on the right, and the attention mask."""
    ids = [item["input_ids"] for item in items]
    labels = [item["labels"] for item in items]
    batch = {
        "input_ids": _stacked(ids, pad),
        "attention_mask": _stacked([np.ones_like(one) for one in ids], 0),
    }
    one = labels[0]
    batch["labels"] = _stacked(labels, IGNORED) if np.ndim(one) else torch.tensor(labels)
    return batch


def _stacked(rows: Sequence[np.ndarray], fill: int) -> Tensor:
    whole = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for row, values in zip(whole, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(whole)


def _sizes(item: Item) -> list[int]:
    return [len(value) for value in item.values() if np.ndim(value)]


def _strings(data: DataFile, columns: dict[str, str], *keys: str) -> list[list[str]]:
    return [data.column(columns[key], key, str, "a text") for key in keys]


def _within(offset: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    """Whether a token has a character inside of a span."""
    start, end = offset
    return end > start and any(start < last and end > first for first, last in spans)


def _refuse_empty(data: DataFile, tokens: Tokens, something: Sequence[bool]) -> None:
    """Refuse examples without a token to predict."""
    empty = [position for position, some in enumerate(something) if not some]
    if not empty:
        return
    first, others = data.where(empty[0]), [data.lines[i] for i in empty[1:]]
    also = ""
    if others:
        shown = ", ".join(map(str, others[:_SHOWN]))
        also = f", nor has {data.unit} {shown}" + (
            f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        )
    bound = "" if tokens.most is None else f" in its first {tokens.most} tokens"
    raise ValueError(f"{first} has nothing to predict{bound}{also}; mend or remove it")
