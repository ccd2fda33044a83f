"""Runs in directories for tests of the command line, and how it is called."""

import json
import os
import subprocess
import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

import dropinf
from dropinf import __main__ as command_line


def call(monkeypatch, capsys, *arguments):
    """(exit code, stdout, stderr) of `dropinf` in this process."""
    monkeypatch.setattr(sys, "argv", ["dropinf", *map(str, arguments)])
    code = 0
    try:
        command_line.main()
    except SystemExit as end:
        code = end.code or 0
    told = capsys.readouterr()
    return code, told.out, told.err


def started(*arguments, cwd=None, **options):
    """`dropinf` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dropinf", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "TQDM_MININTERVAL": "0"},
        **options,
    )


def model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def loss_fn(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def loader(n, seed):
    draws = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 6, generator=draws), torch.randint(3, (n,), generator=draws)
    return DataLoader(TensorDataset(x, y), 7)


def make_run(path, seed=0, r=20, ids=None):
    """A run of 30 training examples and 5 queries.

    Where `ids` gives an id for each position, the last one of each is not valid.
    """
    net = model(seed)
    plan = dropinf.Plan.make(net, dropinf.Dropout(r=r))
    for name, n, of in (("train", 30, 1), ("queries", 5, 2)):
        if ids is None:
            dropinf.collect(net, loader(n, of), loss_fn, plan, path / name, progress=False)
            continue
        rows = dropinf.collect(net, loader(n, of), loss_fn, plan, progress=False).rows
        valid = torch.arange(n) < n - 1
        rows[-1] = 0
        dropinf.RowStore(rows, plan, valid, ids=list(map(ids, range(n)))).save(path / name)
    plan.save(path / "plan.json")
    return path


def one_object(text):
    """The JSON object that all of stdout is."""
    found = json.loads(text)
    assert isinstance(found, dict) and text.count("\n") == 1
    return found


def one_sentence(command, text):
    """What is on stderr, which is one line of the command's."""
    assert text.endswith("\n") and text.count("\n") == 1, text
    assert text.startswith(f"{command}: "), text
    return text.removeprefix(f"{command}: ").strip()
