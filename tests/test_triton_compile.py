"""Every Triton kernel compiles for the GPUs it is meant for, and spills nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAPABILITIES = ("80", "90")
SCRIPT = Path(__file__).with_name("triton_resources.py")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    pytest.importorskip("triton")
    if sys.platform != "linux":
        pytest.skip("the triton package has cuobjdump on Linux only")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    runs = []
    for capability in CAPABILITIES:  # at the same time
        command = [sys.executable, "-W", "error", str(SCRIPT), capability]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        runs.append(subprocess.Popen(command, env=environment, **pipes))
    found = []
    for run in runs:
        out, errors = run.communicate()
        assert run.returncode == 0, errors
        found += json.loads(out)
    return found


def test_resources(kernels):
    print(f"\n{'kernel':40} sm warps registers stack shared")
    for k in kernels:
        print(
            f"{k['kernel']:40} {k['sm']} {k['warps']:5} {k['registers']:9} {k['stack']:5} "
            f"{k['shared']:6}"
        )
    for k in kernels:
        assert k["stack"] == 0, k
        # 255 would be the most a thread can have, and a sign that more are wanted.
        assert k["registers"] < 255 and k["registers"] * k["warps"] * 32 <= 65536, k
        assert k["shared"] <= 48 * 1024, k  # what a block gets without asking


def test_every_kernel_is_compiled(kernels):
    folder = Path(__file__).parent.parent / "triton_kernels"
    written = {
        line.split("(")[0].removeprefix("def ")
        for file in folder.glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert written == {k["kernel"].split()[0] for k in kernels}
