"""What is handed out: the package's types, its metadata, and how it is built elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SCRIPT = """
import torch
from torch import Tensor, nn

import dropinf
from dropinf import ops, solvers


def loss_fn(model: nn.Sequential, batch: Tensor) -> Tensor:
    losses: Tensor = model(batch).pow(2).sum(1)
    return losses


model, loader = nn.Sequential(nn.Linear(4, 3)), [torch.randn(5, 4)]
plan = dropinf.Plan.make(model, dropinf.Dropout(r=7), exclude="*.bias")
width: int = plan.width
with dropinf.capture(model, plan) as tap:
    rows: Tensor = tap.rows(loss_fn(model, loader[0]))
with dropinf.capture(model, plan, mode="grads") as grads_tap:
    torch.autograd.backward(loss_fn(model, loader[0][:1]).sum())  # Tensor.backward has no types
    row: Tensor = grads_tap.row()
store = dropinf.collect(model, loader, loss_fn, plan, progress=False)
solver = solvers.Cholesky(damping=0.1).fit(store)
solver.describe()
scores: Tensor = dropinf.scores(store, store, solver)
values, indices = dropinf.topk(store, store, solver, k=2)
best: Tensor = values[:, 0]
index = torch.zeros(2, dtype=torch.int32)
sampled: Tensor = ops.sampled_outer(rows[:, None], rows[:, None], index, index)
version: str = dropinf.__version__ + dropinf.backends()["reference"]
"""
# What stands in SCRIPT -> what a user may write by mistake.
MISTAKES = {
    "dropinf.Dropout(r=7)": "dropinf.Dropout(r='7')",
    "width: int": "width: str",
    "tap.rows(": "tap.row(",
    "grads_tap.row()": "grads_tap.row(5)",
    "model, loader, loss_fn, plan": "model, loader, plan, loss_fn",
    "Cholesky(damping=0.1)": "Cholesky(dampings=0.1)",
    "solver.describe()": "solver.description()",
    "dropinf.scores(store, store, solver)": "dropinf.scores(store, solver, store)",
    "solver, k=2": "solver, k='2'",
    "index, index": "index, index, True",
    "dropinf.backends()": "dropinf.backend()",
}
MISTAKES_WITH_TENSORS = {"best: Tensor": "best: list[float]"}
SKIP_TORCH = "[mypy]\n[mypy-torch.*,numpy.*]\nfollow_imports = skip\n"


def test_that_script_runs():
    exec(SCRIPT, {})


@pytest.mark.parametrize("torch_is", ["Any", pytest.param("read", marks=pytest.mark.more)])
def test_types_of_a_users_script(torch_is, tmp_path):
    """mypy --strict accepts the right one, and finds each mistake.

    To read torch's own types takes 17 s, so the quick case takes them as Any.
    """
    mistakes = MISTAKES if torch_is == "Any" else MISTAKES | MISTAKES_WITH_TENSORS
    wrong = SCRIPT
    for right, mistake in mistakes.items():
        assert wrong.count(right) == 1, right
        wrong = wrong.replace(right, mistake)
    (tmp_path / "right.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(wrong)
    (tmp_path / "mypy.ini").write_text(SKIP_TORCH if torch_is == "Any" else "[mypy]\n")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "dropinf").symlink_to(ROOT / "dropinf")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini"]
    done = subprocess.run(
        [*command, "--cache-dir", "cache", "right.py", "wrong.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "path")},
    )
    found = {tuple(line.split(":")[:2]) for line in done.stdout.splitlines() if "error:" in line}
    pairs = enumerate(zip(SCRIPT.splitlines(), wrong.splitlines(), strict=True), start=1)
    expected = {("wrong.py", str(number)) for number, (a, b) in pairs if a != b}
    assert len(expected) == len(mistakes) and found == expected, done.stdout + done.stderr
