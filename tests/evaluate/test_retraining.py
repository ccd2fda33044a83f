"""Subsets that are the same everywhere, and retraining that goes on where it was ended."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from places import ROOT

from dropinf import LockedError, evaluate

N, H, M = 12, 5, 3


def losses_by_hand(indices, seed):
    """[M] that tell every subset, seed and query apart."""
    return torch.tensor([float(indices.double().square().sum()) + 1e6 * seed + q for q in range(M)])


class Training:
    """`train`, which counts, and stops at a call."""

    def __init__(self, stop_at=None, error=KeyboardInterrupt):
        self.calls, self.stop_at, self.error = [], stop_at, error

    def __call__(self, indices, seed):
        if len(self.calls) == self.stop_at:
            raise self.error
        self.calls.append((tuple(indices.tolist()), seed))
        return losses_by_hand(indices, seed)


def retrain(train, members, path=None, **options):
    return evaluate.retrain(train, members, path, progress=False, **options)


def expected(members, seeds):
    return torch.stack(
        [
            torch.stack([losses_by_hand(row.nonzero()[:, 0], s) for row in members]).double()
            for s in seeds
        ]
    )


def test_halves_are_the_same_everywhere():
    members = evaluate.halves(9, 4, seed=7)
    pinned = [[0, 1, 4, 6], [4, 5, 6, 8], [2, 4, 5, 6], [0, 3, 5, 7]]
    assert members.dtype == torch.bool and members.sum(1).tolist() == [4] * 4
    assert [row.nonzero()[:, 0].tolist() for row in members] == pinned
    assert torch.equal(evaluate.halves(9, 50, seed=7)[:4], members)
    assert not torch.equal(evaluate.halves(9, 4, seed=8), members)


def test_halves_are_uniform():
    """Each example, and each pair, is in as many as it should be."""
    members = evaluate.halves(10, 4000).double().numpy()
    together = members.T @ members / 4000
    own, pair = 1 / 2, (5 * 4) / (10 * 9)
    wanted = np.where(np.eye(10, dtype=bool), own, pair)
    error = (wanted * (1 - wanted) / 4000) ** 0.5
    assert (np.abs(together - wanted) < 4 * error).all()


def test_random_subsets_and_without():
    assert evaluate.random_subsets(9, 7, 3).sum(1).tolist() == [7] * 3
    members = evaluate.without(5, torch.tensor([[0, 4], [2, 1]]))
    assert members.int().tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 1, 1]]
    assert torch.equal(evaluate.without(4, torch.arange(4)), ~torch.eye(4, dtype=torch.bool))


def test_losses_in_memory():
    members, train = evaluate.halves(N, H), Training()
    found = retrain(train, members, seeds=[4, 2])
    assert torch.equal(found, expected(members, [4, 2])) and found.dtype == torch.float64
    assert [seed for _, seed in train.calls] == [4] * H + [2] * H


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
@pytest.mark.parametrize("done", [0, 1, 7])
def test_going_on_trains_what_is_missing(tmp_path, done, error):
    members, first = evaluate.halves(N, H), Training(done, error)
    with pytest.raises(BaseException) as raised:
        retrain(first, members, tmp_path / "runs", seeds=2)
    assert raised.value is error or raised.type is error
    second = Training()
    found = retrain(second, members, tmp_path / "runs", seeds=2)
    assert torch.equal(found, expected(members, [0, 1]))
    whole = [(tuple(row.nonzero()[:, 0].tolist()), s) for s in (0, 1) for row in members]
    assert len(first.calls) == done and first.calls + second.calls == whole
    third = Training()
    assert torch.equal(retrain(third, members, tmp_path / "runs", seeds=2), found)
    assert not third.calls and not (tmp_path / "runs" / "lock").exists()


def test_more_subsets_and_seeds_behind_those_that_are_there(tmp_path):
    retrain(Training(), evaluate.halves(N, 3), tmp_path / "runs")
    members, train = evaluate.halves(N, H), Training()
    found = retrain(train, members, tmp_path / "runs", seeds=2)
    assert torch.equal(found, expected(members, [0, 1])) and len(train.calls) == 2 * H - 3


def test_generators_are_seeded():
    """What a call draws does not depend on those before it, nor does what the caller draws."""
    members = evaluate.halves(N, 3)
    before = torch.random.get_rng_state()
    found = retrain(lambda indices, seed: torch.rand(2), members, seeds=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(found[0, 0], found[0, 2]) and not torch.equal(found[0, 0], found[1, 0])
    torch.manual_seed(1)
    assert torch.equal(found[1, 1], torch.rand(2).double())


def test_losses_come_back_to_the_bit(tmp_path):
    """Also those of a training that diverged, which stays as it is."""
    odd = torch.tensor([1 / 3, torch.nan, torch.inf, 5e-324, -0.0], dtype=torch.float64)
    members = evaluate.halves(N, 2)
    for _ in range(2):
        found = retrain(lambda indices, seed: odd, members, tmp_path / "runs")
    assert found.numpy().tobytes() == torch.stack([odd, odd]).numpy().tobytes()


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_last_line_counts_for_nothing(tmp_path, cut):
    members, path = evaluate.halves(N, H), tmp_path / "runs"
    retrain(Training(), members, path)
    file = path / "losses.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    train = Training()
    assert torch.equal(retrain(train, members, path), expected(members, [0]))
    assert len(train.calls) == 1
    text = file.read_bytes()
    file.write_bytes(text[:-20] + b"0" + text[-19:])  # whole, and other bits
    assert torch.equal(retrain(train, members, path), expected(members, [0]))
    assert len(train.calls) == 2 and file.read_bytes() == text


CHILD = """
import sys, time, torch
from dropinf import evaluate
def train(indices, seed):
    print("trains", flush=True)
    time.sleep(0 if sys.argv[2] == "on" else 0.2)
    return torch.tensor([float(indices.sum()), 1.0])
evaluate.retrain(train, evaluate.halves(12, 40), sys.argv[1], progress=False)
"""


@pytest.mark.parametrize(
    "sent", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.more)]
)
def test_a_kill_loses_the_training_in_flight_alone(tmp_path, sent):
    command = [sys.executable, "-c", CHILD, str(tmp_path / "runs")]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options["env"] = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([*command, "slowly"], **options)
    for _ in range(4):
        assert child.stdout.readline() == "trains\n"
    child.send_signal(sent)
    child.communicate()
    done = (tmp_path / "runs" / "losses.jsonl").read_bytes().count(b"\n") - 1
    assert done in (3, 4)
    ended = subprocess.run([*command, "on"], **{**options, "check": True})
    assert ended.stdout.count("trains") == 40 - done
    members = evaluate.halves(12, 40)
    found = retrain(None, members, tmp_path / "runs")
    sums = [float(row.nonzero().sum()) for row in members]
    assert found.tolist() == [[[s, 1.0] for s in sums]]


def test_one_process_writes(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path / "runs"), "slowly"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert child.stdout.readline() == "trains\n"
        with pytest.raises(LockedError, match=f"written by process {child.pid} on this host"):
            retrain(Training(), evaluate.halves(12, 40), tmp_path / "runs")
    finally:
        child.kill()
        child.communicate()


def test_progress_says_what_is_left(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        retrain(Training(3), evaluate.halves(N, H), tmp_path / "runs")

    def slow(indices, seed):
        time.sleep(0.2)
        return losses_by_hand(indices, seed)

    evaluate.retrain(slow, evaluate.halves(N, H), tmp_path / "runs", progress="again")
    printed = capsys.readouterr().err
    assert "again:  60%" in printed and "3/5" in printed and "5/5" in printed


def refused(match, *args, **options):
    with pytest.raises(ValueError, match=match) as raised:
        retrain(*args, **options)
    assert str(raised.value).startswith("retrain: ") and "\n" not in str(raised.value)


def test_files_of_something_else_are_refused(tmp_path):
    members, path = evaluate.halves(N, H), tmp_path / "runs"
    retrain(Training(), members, path, seeds=2)
    before = (path / "losses.jsonl").read_bytes()
    refused(
        "holds another subset 0; give", Training(), evaluate.halves(N, H, seed=1), path, seeds=2
    )
    refused("holds another subset 4", Training(), members[:4], path, seeds=2)
    refused("subsets of 12 examples, not of 13", Training(), evaluate.halves(13, H), path, seeds=2)
    refused("a model of seed 1, which is not asked for", Training(), members, path)
    assert (path / "losses.jsonl").read_bytes() == before and not (path / "lock").exists()
    (path / "losses.jsonl").write_bytes(before.replace(b"losses", b"lasses", 1))
    refused(
        "is damaged: line 2: its checksum is missing or wrong; remove it", Training(), members, path
    )
    (path / "losses.jsonl").write_bytes(b"")
    refused("is damaged: it has no whole line", Training(), members, path)
    (path / "losses.jsonl").unlink()
    (path / "thesis.tex").write_text("")
    refused("holds something else, such as 'thesis.tex'", Training(), members, path)
    refused("is no directory", Training(), members, path / "thesis.tex")


def test_bad_arguments():
    members = evaluate.halves(N, H)
    for bad in (members.int(), members[0], [[True]], members[:0]):
        refused("members must", Training(), bad)
    refused("each at least one example", Training(), torch.zeros(2, N, dtype=torch.bool))
    for seeds in (0, -1, [], [1, 1], [-1], 1.5, "12", None, [2**63]):
        refused("seeds must be a positive number, or different", Training(), members, seeds=seeds)
    for bad in (3.0, torch.tensor(1.0), torch.ones(2, 2), torch.ones(2, dtype=torch.int64), None):
        refused(r"train must return the losses \[m\]", lambda *args, b=bad: b, members)
    sizes = iter([2, 2, 3])
    refused(
        r"losses \[2\], as before, got torch.float32 \[3\]",
        lambda *a: torch.ones(next(sizes)),
        members,
    )


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("halves: n must be an integer of at least 2, got 1", lambda: evaluate.halves(1, 3)),
        ("halves: count must be an integer of at least 1", lambda: evaluate.halves(9, 0)),
        ("halves: seed must be an integer of at least 0", lambda: evaluate.halves(9, 3, seed=-1)),
        ("halves: n must be an integer", lambda: evaluate.halves(9.0, 3)),
        ("size must be 1 to n, 9, got 10", lambda: evaluate.random_subsets(9, 10, 1)),
        ("size must be an integer of at least 1", lambda: evaluate.random_subsets(9, 0, 1)),
        ("a tensor of int64, got list", lambda: evaluate.without(9, [1])),
        ("a tensor of int64, got torch.float32", lambda: evaluate.without(9, torch.ones(1))),
        (r"\[h, k\] or \[h\], got \[\]", lambda: evaluate.without(9, torch.tensor(1))),
        ("0 to 8, got 3 to 9", lambda: evaluate.without(9, torch.tensor([3, 9]))),
        ("invalid queries", lambda: evaluate.without(9, torch.tensor([[2**63 - 1, 1]]))),
        ("nothing would be left", lambda: evaluate.without(2, torch.tensor([[0, 1]]))),
    ],
)  # fmt: skip
def test_subsets_that_cannot_be(match, call):
    with pytest.raises(ValueError, match=match) as raised:
        call()
    assert "\n" not in str(raised.value)
