"""Rows of tokens where data show only whose example a position is."""

import numpy as np
import pytest

from dropinf.capturing.owners import NONE
from dropinf.capturing.rowmap import RowMap, TokensDiffer
from dropinf.capturing.segments import tokens

A, B = -2, -3  # of examples 0 and 1, of tokens that are not known


def rows_of(owners, examples=2):
    owners = np.array(owners)
    return RowMap(examples, tokens(examples, 2)[0]).of(owners, owners.shape).tolist()


def test_positions_are_tokens_in_their_order():
    assert rows_of([[A, A], [B, B]]) == [[0, 1], [2, 3]]
    assert rows_of([[A, B], [A, B]]) == [[0, 2], [1, 3]]  # sequence-first
    assert rows_of([A, A, NONE, B, B, NONE]) == [0, 1, NONE, 2, 3, NONE]
    assert rows_of([[A, NONE], [B, B]]) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    "owners, examples",
    [
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
