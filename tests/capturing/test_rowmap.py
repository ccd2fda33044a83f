"""Rows of tokens where data show only whose example a position is."""

import warnings

import numpy as np
import pytest
import torch

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


def test_owners_that_are_views_are_not_written_to():
    """As numpy broadcasts them; torch would warn of its view of them."""
    owners = np.broadcast_to(np.array([2, 0, 2])[:, None], (3, 1))
    assert not owners.flags.writeable
    x, dy = torch.randn(3, 1, 4), torch.randn(3, 1, 5)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = list(RowMap(4).split(x, dy, (1, 1), owners))
    finally:
        torch.set_warn_always(before)
    sums = torch.zeros(4, 5, 4)
    for rows, of_x, of_dy in found:
        sums[rows] += of_dy.transpose(1, 2) @ of_x
    each = dy.transpose(1, 2) @ x
    truth = torch.stack([each[1], torch.zeros(5, 4), each[0] + each[2], torch.zeros(5, 4)])
    torch.testing.assert_close(sums, truth)
