"""Rows of tokens where data show only whose example a position is."""

import numpy as np
import pytest

from dropinf.capturing.owners import NONE
from dropinf.capturing.rowmap import RowMap, TokensDiffer
from dropinf.capturing.segments import tokens

A, B = -2, -3  # of examples 0 and 1, of tokens that are not known


def rows_of(owners, examples=2, T=2):
    owners = np.array(owners)
    return RowMap(examples, tokens(examples, T)[0]).of(owners, owners.shape).tolist()


def test_positions_are_tokens_in_their_order():
    assert rows_of([[A, A], [B, B]]) == [[0, 1], [2, 3]]
    assert rows_of([[A, B], [A, B]]) == [[0, 2], [1, 3]]  # sequence-first
    assert rows_of([A, A, NONE, B, B, NONE]) == [0, 1, NONE, 2, 3, NONE]
    assert rows_of([[A, NONE], [B, B]]) == [[0, 1], [2, 3]]


def test_ends_of_texts_that_reach_no_loss():
    """As the last token of a language model, where a layer flattened [B, T]."""
    assert rows_of([A, NONE], 1) == [0, 1]
    assert rows_of([NONE, A, A, NONE, B, B], T=3) == [0, 1, 2, 3, 4, 5]
    assert rows_of([NONE, NONE, NONE, B, B, NONE], T=3) == [0, 1, 2, 3, 4, 5]
    for hole in ([A, NONE, A, B, B, B], [A, A, B, B, B, NONE], [A, A, NONE, B, B]):
        with pytest.raises(TokensDiffer):
            rows_of(hole, T=3)


@pytest.mark.parametrize(
    "owners, examples",
    [
        ([[A, NONE], [NONE, B]], 2),  # either dimension may be the examples
        ([[NONE, NONE], [A, NONE]], 2),  # too few
        ([[A, B, NONE], [NONE, NONE, NONE]], 3),
        ([[NONE, B], [A, NONE]], 2),  # either dimension may be the examples
        ([0, A, A], 2),  # a token and an example
    ],
    ids=str,
)
def test_positions_that_may_be_other_tokens(owners, examples):
    with pytest.raises(TokensDiffer):
        rows_of(owners, examples)
