"""What cannot be evaluated is said in one sentence that names the argument."""

import pytest
import torch

from dropinf import evaluate

NAN = torch.nan
S = torch.arange(12.0).view(3, 4) % 5  # scores of 3 queries and 4 examples
MEMBERS = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()
L = torch.arange(9.0).view(3, 3) % 4  # losses by 3 models
WRONG = torch.tensor([1, 0, 0, 1]).bool()
OWN = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0]]).bool()
LEFT = torch.tensor([0, 1, 3])


def odd(tensor, *at, value=NAN):
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


def lds(scores=S, members=MEMBERS, losses=L):
    return evaluate.lds(scores, members, losses)


def auc(values=S[0], wrong=WRONG):
    return evaluate.mislabeled_auc(values, wrong)


def recall(scores=S, relevant=OWN, k=2):
    return evaluate.recall(scores, relevant, k)


def left_out(scores=S, losses=L, baseline=L[0], examples=LEFT):
    return evaluate.leave_one_out(scores, losses, baseline, examples)


def removal(top=L, at_random=L, baseline=L[0]):
    return evaluate.removal(top, at_random, baseline)


CASES = [
    (lds, {"scores": S.tolist()}, "scores must be a tensor of real numbers, got list"),
    (lds, {"scores": S > 1}, "scores must be a tensor of real numbers, got torch.bool"),
    (lds, {"scores": S.to(torch.complex64)}, "real numbers, got torch.complex64"),
    (lds, {"scores": S[0]}, r"scores must be \[m, n\], got \[4\]"),
    (lds, {"scores": S[:0]}, r"scores must be \[m, n\], got \[0, 4\]"),
    (lds, {"scores": odd(S, 1, 2)}, r"scores\[1, 2\] is nan; an invalid query or example"),
    (lds, {"scores": odd(S, 1, 2, value=torch.inf)}, r"scores\[1, 2\] is inf"),
    (lds, {"scores": S * NAN}, "all 3 queries are invalid"),
    (lds, {"members": MEMBERS.int()}, r"members must be \[h, 4\] torch.bool, got torch.int32"),
    (lds, {"members": MEMBERS.tolist()}, r"members must be .*, got list"),
    (lds, {"members": MEMBERS[:, :3]}, r"members must be \[h, 4\], got \[3, 3\]"),
    (lds, {"losses": L[:2]}, "same two subsets or more, got 3 and 2"),
    (lds, {"members": MEMBERS[:1], "losses": L[:1]}, "two subsets or more, got 1 and 1"),
    (lds, {"losses": L[:, :2]}, r"losses must be \[h, 3\] or \[seeds, h, 3\], .* got \[3, 2\]"),
    (lds, {"losses": L[0]}, r"losses must be .* got \[3\]"),
    (lds, {"losses": odd(L, 1, 2)}, r"losses\[0, 1, 2\] is nan, as of a training that diverged"),
    (auc, {"values": S}, r"values must be \[n\].* take -scores.nanmean\(0\)"),
    (auc, {"values": [1.0]}, "values must be a tensor"),
    (auc, {"wrong": WRONG[:3]}, r"wrong must be \[4\], got \[3\]"),
    (auc, {"wrong": WRONG.long()}, r"wrong must be \[4\] torch.bool"),
    (auc, {"wrong": WRONG & False}, "both kinds, got 0 with a wrong label and 4"),
    (auc, {"wrong": WRONG | True}, "both kinds, got 4 with a wrong label and 0"),
    (auc, {"values": S[0] * NAN}, "got 0 with a wrong label and 0 with a right one"),
    (recall, {"k": 0}, "k must be 1 to 4, the number of valid examples, got 0"),
    (recall, {"k": 2.0}, "k must be 1 to 4"),
    (recall, {"k": True}, "k must be 1 to 4"),
    (recall, {"k": 4, "scores": odd(S, slice(None), 1)}, "k must be 1 to 3"),
    (recall, {"relevant": OWN.int()}, r"relevant must be \[3, 4\] torch.bool"),
    (recall, {"relevant": OWN[:2]}, r"relevant must be \[3, 4\], got \[2, 4\]"),
    (recall, {"relevant": ([1, 2, 3], [1, 2, 3])}, r"3 queries and of 4 examples, got \[3, 3\]"),
    (recall, {"relevant": ([1, 2, 3],)}, r"two lists, .* got \[3\]"),
    (recall, {"relevant": (0, 1)}, "relevant must be .* got something else"),
    (recall, {"relevant": ([[1], [2], [3]], [1, 2, 3, 4])}, "got something else"),
    (recall, {"relevant": OWN & False}, "all 3 queries are invalid or have nothing to compare"),
    (left_out, {"losses": L[:2]}, "one model for each of 3 examples, got 2; name those"),
    (left_out, {"examples": None}, "one model for each of 4 examples, got 3"),
    (left_out, {"examples": LEFT.float()}, r"examples must be \[h\] torch.int64, got torch.fl"),
    (left_out, {"examples": [0, 1, 3]}, r"examples must be \[h\] torch.int64, got list"),
    (left_out, {"examples": LEFT + 1}, r"examples must be 0 to 3, got \[1, 2, 4\]"),
    (left_out, {"baseline": L}, r"baseline must be losses of one model, .* got \[3, 3\]"),
    (left_out, {"baseline": 1.0}, "baseline must be a tensor of real numbers, got float"),
    (left_out, {"baseline": odd(L[0], 1)}, r"baseline\[0, 0, 1\] is nan"),
    (left_out, {"losses": L[:1], "examples": LEFT[:1]}, "two valid examples or more, got 1"),
    (removal, {"top": L[:2]}, "a model for each of the 3 queries, or of one for all, got 2"),
    (removal, {"top": 1.0}, "top must be a tensor"),
    (removal, {"top": torch.tensor(1.0)}, r"top must be \[h, 1\].* got \[\]"),
    (removal, {"at_random": L[:, :2]}, r"at_random must be \[h, 3\]"),
    (removal, {"baseline": L}, r"baseline must be losses of one model"),
    (removal, {"top": odd(L, 0, 0)}, r"top\[0, 0, 0\] is nan"),
]


@pytest.mark.parametrize("call", [lds, auc, recall, left_out, removal])
def test_what_the_cases_spoil_is_good(call):
    call()


@pytest.mark.parametrize(("call", "given", "match"), CASES)
def test_errors(call, given, match):
    with pytest.raises(ValueError, match=match) as raised:
        call(**given)
    text = str(raised.value)
    assert "\n" not in text and not text.endswith(".") and ": " in text
