"""BM25 against its formula, written by hand."""

import math
import re
import sys
from collections import Counter

import pytest
import torch

from dropinf import evaluate

FREQUENT = re.findall(
    r"\w+",
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with",
)
TEXTS = [
    "The cat sat on the mat, and the cat slept.",
    "A dog chased the CAT; the dog barked!",
    "",
    "x y z",
    "Birds of 2 feathers, feathers_2: feathers.",
    "naïve Ünïcode cat café café",
    "it is what it was",
]
QUERIES = ["cat", "dog dog cat", "the of and", "", "unheard words", "FEATHERS feathers_2 café?"]


def words(text):
    return [w for w in re.findall(r"\w{2,}", text.lower()) if w not in FREQUENT]


def by_hand(query, texts, k1=1.5, b=0.75):
    found = [words(text) for text in texts]
    mean = sum(map(len, found)) / len(found)
    scores = []
    for own in found:
        score = 0.0
        for word in words(query):
            df = sum(word in other for other in found)
            tf = Counter(own)[word]
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            score += idf * tf / (tf + k1 * (1 - b + b * len(own) / mean))
        scores.append(score)
    return scores


def test_bm25():
    pytest.importorskip("bm25s")
    found = evaluate.bm25(QUERIES, TEXTS)
    truth = torch.tensor([by_hand(query, TEXTS) for query in QUERIES])
    assert found.dtype == torch.float32 and found.shape == (6, 7)
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-7)
    assert found[0].count_nonzero() == 3 and not found[2:5].any()


def test_bm25_of_texts_without_a_word():
    pytest.importorskip("bm25s")
    assert not evaluate.bm25(["cat"], ["", "the"]).any()


def test_bm25_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"^bm25 needs bm25s: pip install 'dropinf\[text\]'$"):
        evaluate.bm25(["cat"], ["dog"])


@pytest.mark.parametrize("bad", ["cat", [], [1], ["cat", None], torch.ones(2)])
@pytest.mark.parametrize("name", ["queries", "texts"])
def test_bm25_of_anything_else(name, bad):
    given = {"queries": ["cat"], "texts": ["dog"], name: bad}
    with pytest.raises(ValueError, match=f"^bm25: {name} must be a list of strings"):
        evaluate.bm25(**given)
