"""Rows on a device that is not the CPU, on a machine that has none: see `simulated_gpu`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")

TESTS = Path(__file__).parents[1]

# Of test_gpu_rows.py, those that need no captures there.
CHOSEN = (
    "every_solver or what_is_made or saved_solver or store_of_rows or where_scores or choices "
    "or moved or several_devices or in_a_file or beyond_their_range"
)


def run(code_or_options):
    return subprocess.run(
        [sys.executable, *code_or_options],
        cwd=TESTS.parent,
        env=os.environ | {"DROPINF_SIMULATED_GPU": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "chosen", ["where_scores", pytest.param(CHOSEN, marks=pytest.mark.more)], ids=["one", "all"]
)
def test_rows_there(chosen):
    options = ["-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", chosen]
    done = run([*options, str(TESTS / "kernels/test_gpu_rows.py")])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout


MIXED = """
import torch
from simulated_gpu import DEVICE, SimulatedGpu

with SimulatedGpu():
    there, here = torch.arange(6.0).view(2, 3).to(DEVICE), torch.ones(2, 3)
    column = there[:, 1]
    there[1] = 7
    assert column.device == DEVICE and column.tolist() == [1, 7]
    there[torch.tensor([True, False])] = float("nan")  # as CUDA takes it
    there[torch.tensor([1])] += here.mean()
    assert there.cpu().nan_to_num(-1).tolist() == [[-1, -1, -1], [8, 8, 8]]
    out = torch.empty(2, 2, device=DEVICE)
    assert torch.mm(there, there.T, out=out) is out and out.tolist()[1][1] == 192
    here.copy_(there)
    mask = there > 0
    for mixed in (
        lambda: there + here,
        lambda: here.mul_(there),
        lambda: torch.cat([there, here]),
        lambda: torch.mm(here, there.T),
        lambda: torch.mm(there, there.T, out=torch.empty(2, 2)),
        lambda: here[mask],
        lambda: there.masked_fill_(mask.cpu(), 0),
        lambda: there.index_put_((torch.tensor([0]),), torch.ones(1, 3)),
        lambda: there.numpy(),
    ):
        try:
            mixed()
        except (RuntimeError, TypeError):
            continue
        raise AssertionError("two devices were mixed")
"""


def test_mixed_devices_are_refused():
    done = run(["-c", MIXED])
    assert done.returncode == 0, done.stderr[-2000:]
