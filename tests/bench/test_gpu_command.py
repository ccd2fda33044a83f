"""The commands of docs/developing/gpu.md for the first minutes on a GPU, rehearsed on the CPU.

From a copy of the checkout without a build, in an environment that has what such a machine has and
no more: torch, triton, numpy, pytest, ninja, pybind11, and what these need.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from cuda_host import build
from places import ROOT

from dropinf.ops import dispatch

PACKAGES = ["torch", "triton", "numpy", "pytest", "ninja", "pybind11", "setuptools"]

pytestmark = pytest.mark.more


def commands():
    """The first is the run, the second the sanitizers."""
    text = (ROOT / "docs" / "developing" / "gpu.md").read_text()
    section = text.partition("## The first minutes on a GPU")[2].partition("\n## ")[0]
    return [" ".join(block.split()) for block in re.findall(r"\n\n((?: {4}.+\n)+)", section)]


def with_what_they_need(names):
    """Distributions by name."""
    found, waiting = {}, list(names)
    while waiting:
        name = re.match(r"[\w.-]+", waiting.pop())[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # needed elsewhere, or by an extra
            continue
        waiting += [r for r in found[name].requires or [] if "extra ==" not in r]
    return list(found.values())


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python with links to PACKAGES alone."""
    home = tmp_path_factory.mktemp("python")
    venv.create(home, with_pip=False)
    (site,) = home.glob("lib/python*/site-packages")
    for package in with_what_they_need(PACKAGES):
        for file in package.files:
            path = Path(package.locate_file(file)).resolve()
            place = home / "bin" / path.name if "bin" in path.parts[-2:-1] else None
            if file.parts[0] != "..":
                path, place = Path(package.locate_file(file.parts[0])), site / file.parts[0]
            if place is not None and not place.exists():
                place.symlink_to(path)
    shutil.rmtree(site / "__pycache__", ignore_errors=True)
    return home / "bin"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files that git knows or would take, and no build but that of the kernels on the host."""
    build.library(build.SOURCES, "")
    copy = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a checkout of git")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    (copy / "build").mkdir()
    (copy / "build" / "cuda_host").symlink_to(build.BUILD)  # which a GPU does not need
    return copy


def paste(command, checkout, python, out, **more):
    made = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    made["PATH"] = f"{python}{os.pathsep}{made['PATH']}"
    made |= {"OUT": str(out), "COMMIT": "abc123", "CUDA_VISIBLE_DEVICES": "", **more}
    return subprocess.run(
        ["bash", "-c", command], cwd=checkout, env=made, capture_output=True, text=True
    )


def test_only_what_a_gpu_machine_has(python):
    for name, there in {"torch": True, "pytest": True, "tqdm": False, "hypothesis": False}.items():
        done = subprocess.run([python / "python3", "-c", f"import {name}"], capture_output=True)
        assert (done.returncode == 0) == there, done.stderr


def rehearsal_of(command):
    """The same, without CUDA in the build, on the CPU, with the time that two busy cores need."""
    assert len(command) < 2000 and "TORCH_CUDA_ARCH_LIST=9.0" in command
    for what, instead in (
        ("DROPINF_CUDA=1", "DROPINF_CUDA=0 DROPINF_EXTENSION=1"),
        ("gpu.run", "gpu.run --rehearse"),
        ("timeout 200", "timeout 1200"),  # the build took more than 200 s beside another test
    ):
        assert command.count(what) == 1
        command = command.replace(what, instead)
    return command.replace("$((585 - SECONDS))", "1200")


def test_the_run(checkout, python, tmp_path):
    done = paste(rehearsal_of(commands()[0]), checkout, python, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "quick.json").exists(), done.stdout[-2000:] + done.stderr[-2000:]
    data = json.loads((tmp_path / "quick.json").read_text())
    assert data["versions"]["python"] == platform.python_version()
    assert list(data["parts"]) == ["test", "bench", "model"]
    for part in data["parts"].values():
        assert part["end"] and part["commit"] == "abc123" and part["quick"]
    assert not data["parts"]["test"]["failures"]
    for of in ("cuda-host/gather_grads", "default/gpu_capturing", "default/gpu_rows"):
        assert data["verified"][of]["passed"] > 0
    assert all(counts["complete"] for counts in data["verified"].values())
    assert data["rows"] and not [row for row in data["rows"] if row.get("reason")]
    names = ("its case was not run", "not to be measured on this device", "did not run")
    for target in data["targets"]:
        assert target["measured"] or any(name in target["reason"] for name in names)
    assert not [e for e in data["left_out"] if e["part"] in ("test", "model")]


def test_the_fallback(checkout, python, tmp_path):
    """Where the extension does not build, nvcc is called for kernels.cu alone."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\necho "$@" > "$OUT/called"\ncp /bin/true "$OUT/kernels"\n')
    nvcc.chmod(0o755)
    command = commands()[0].replace("setup.py", "no_such_file.py")
    done = paste(
        command, checkout, python, tmp_path, PATH=f"{tmp_path}:{python}:{os.environ['PATH']}"
    )
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "called").read_text().split()
    for word in words:
        assert "*" in word or not word.endswith((".cu", ".cpp")) or (checkout / word).exists()
    assert "bench/gpu/kernels.cu" in words and not (tmp_path / "quick.json").exists()


def test_the_sanitizers(checkout, python, tmp_path):
    """With a program that runs what it is given."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        '#!/bin/sh\nwhile [ "${1##*/}" != python3 ]; do shift; done\n"$@"; code=$?\n'
        'echo "========= ERROR SUMMARY: 0 errors"; exit $code\n'
    )
    program.chmod(0o755)
    command = rehearsal_of(commands()[1])
    done = paste(
        command, checkout, python, tmp_path, PATH=f"{tmp_path}:{python}:{os.environ['PATH']}"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sanitize.json").exists(), done.stdout[-2000:] + done.stderr[-2000:]
    tools = json.loads((tmp_path / "sanitize.json").read_text())["sanitizers"]
    assert set(tools) == {"memcheck", "racecheck", "synccheck", "initcheck"}
    for tool in tools.values():
        assert tool["state"] == "clean" and set(tool["outcomes"]) == {"passed"}, tool
        assert tool["outcomes"]["passed"] >= len(dispatch.VERIFIED)
