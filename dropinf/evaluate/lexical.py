"""BM25: what words in common say, the floor that scores of texts must be above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dropinf.extras import optional

# As of bm25s itself, which are named here so that no version changes them.
_WORDS = {"lower": True, "token_pattern": r"(?u)\b\w\w+\b", "stopwords": "english", "stemmer": None}


def bm25(queries: Sequence[str], texts: Sequence[str]) -> Tensor:
    """BM25 of each text for each query, [m, n] float32: the sum, over a query's words, of

        log(1 + (n - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * length / mean length))

    with k1 = 1.5 and b = 0.75 (Lucene's form, as in the package bm25s), where df texts have the
    word and this one has it tf times. A query's word counts as often as it stands there; words are
    two letters, digits or underscores and more, in lower case, without 33 frequent English ones and
    not stemmed. 0 where no word is in common.

        scores = dropinf.evaluate.bm25(["a black cat"], ["the cat sat", "two dogs"])  # [1, 2]

    Args:
        queries, texts: strings; of anything else than strings of words, as of ids, it says nothing.

    Raises:
        ImportError: bm25s is not installed.
        ValueError: an argument is no list of strings, or empty.
    """
    for name, given in (("queries", queries), ("texts", texts)):
        if isinstance(given, str) or not all(isinstance(text, str) for text in given) or not given:
            raise ValueError(f"bm25: {name} must be a list of strings, with at least one")
    bm25s = optional("bm25s", "text", "bm25")
    found = torch.zeros(len(queries), len(texts))
    known = _words(bm25s, texts, return_ids=True)
    if not known.vocab:
        return found
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene", backend="numpy")
    index.index(known, show_progress=False)
    for row, words in zip(found, _words(bm25s, queries, return_ids=False), strict=True):
        if words:
            row.copy_(torch.from_numpy(index.get_scores(words)))
    return found


def _words(bm25s: Any, texts: Sequence[str], return_ids: bool) -> Any:
    return bm25s.tokenize(list(texts), **_WORDS, return_ids=return_ids, show_progress=False)
