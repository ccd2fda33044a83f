"""Every Triton kernel compiles for the GPUs it is meant for, and spills nothing."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from places import ROOT

CAPABILITIES = ("80", "90")
SCRIPT = ROOT / "tests" / "kernels" / "triton_resources.py"
BUILD = ROOT / "build" / "triton"


ALL = 0
EVERY = [pytest.param((version, ALL), marks=pytest.mark.more) for version in ("installed", "3.6.0")]


@pytest.fixture(scope="module", params=[("installed", 1), *EVERY], ids=str)
def kernels(request):
    """What the first or each uses when compiled by the Triton that is installed, or by the one in
    build/.

    Kept in build/ until a kernel, the script or Triton's version changes.
    """
    which, most = request.param
    pytest.importorskip("triton")
    if sys.platform != "linux":
        pytest.skip("the triton package has cuobjdump on Linux only")
    version, folder = importlib.metadata.version("triton"), None
    if which != "installed":
        version = which
        folder = ROOT / "build" / f"triton-{version}"
        if not folder.exists():
            pytest.skip(f"Triton {version} is not there; make build/{folder.name} gets it")
    digest = hashlib.sha256(repr((version, CAPABILITIES, most)).encode())
    for file in [SCRIPT, *sorted((ROOT / "triton_kernels").glob("*.py"))]:
        digest.update(file.read_bytes())
    report = BUILD / f"{version}-{digest.hexdigest()[:16]}.json"
    if not report.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        compile_all(folder, most, report)
    found = json.loads(report.read_text())
    assert {k["triton"] for k in found} == {version}
    return found


def compile_all(folder, most, report):
    """Write the report of so many or all, by the Triton in `folder`; whole at once."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if folder:
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory(dir=BUILD) as temporary:
        environment["TRITON_CACHE_DIR"] = temporary
        runs = []
        for capability in CAPABILITIES[: most or None]:  # at the same time
            command = [sys.executable, "-W", "error", str(SCRIPT), str(most), capability]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            runs.append(subprocess.Popen(command, env=environment, **pipes))
        found = []
        for run in runs:
            out, errors = run.communicate()
            assert run.returncode == 0, errors
            found += json.loads(out)
        made = Path(temporary, "report.json")
        made.write_text(json.dumps(found))
        made.replace(report)


def test_resources(kernels):
    print(f"\n{'Triton ' + kernels[0]['triton']:40} sm warps registers stack shared")
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
        if k["kernel"].startswith("sampled_outer"):
            # Twice as many, if neighbouring lanes are on positions: see `load_tile`.
            assert k["registers"] <= 64, k


@pytest.mark.parametrize("kernels", EVERY, indirect=True, ids=str)
def test_every_kernel_is_compiled(kernels):
    written = {
        line.split("(")[0].removeprefix("def ")
        for file in (ROOT / "triton_kernels").glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert written == {k["kernel"].split()[0] for k in kernels}
