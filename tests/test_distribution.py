"""What is handed out: the package's types, its metadata, and how it is built elsewhere."""

import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from places import ROOT

import dropinf

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
print(solver.describe())
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


def run(*command, cwd=None, **environment):
    """What it prints; an error if it fails."""
    environment = {**os.environ, **environment}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, cwd=cwd
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# What setup.py asks for on three systems; then the build of the last, as far as this one can do it.
ELSEWHERE = """
import json, runpy, sys
import setuptools, torch.utils.cpp_extension
here, setup, flags = sys.platform, setuptools.setup, {}
for sys.platform in ("linux", "darwin", "win32"):
    given = {}
    setuptools.setup = given.update
    runpy.run_path("setup.py")
    (extension,) = given["ext_modules"]
    flags[sys.platform] = extension.extra_compile_args, extension.extra_link_args
print(json.dumps(flags))
sys.platform = here
sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", *sys.argv[1:]]
setup(name="dropinf", **given)
"""


@pytest.mark.more
def test_other_systems(tmp_path):
    """No flag of another compiler; on Windows no extension, and the reason, unless it is asked for.

    What their compilers would say cannot be tried here.
    """
    build = [sys.executable, "-c", ELSEWHERE, tmp_path, "--build-temp", tmp_path / "temp"]
    flags = json.loads(run(*build, cwd=ROOT, DROPINF_EXTENSION="", DROPINF_CUDA="0"))
    assert flags == {
        "linux": [["-O3", "-g0", "-fopenmp"], ["-fopenmp"]],
        "darwin": [["-O3", "-g0"], []],
        "win32": [["/O2", "/openmp"], []],
    }
    reason = (tmp_path / "dropinf" / "_build_failure.txt").read_text()
    assert "never built on Windows" in reason and "DROPINF_EXTENSION=1" in reason
    asked = {"DROPINF_EXTENSION": "1", "DROPINF_CUDA": "0", "CXX": "/nowhere/c++"}
    with pytest.raises(AssertionError, match="nowhere"):  # it tries to compile
        run(*build, cwd=ROOT, **asked)


@pytest.fixture(scope="module")
def tracked():
    """The files that git knows."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout of git")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def sdist(tracked, tmp_path_factory):
    """Made of a checkout that is installed in place: with a build, and the link."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in tracked:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "dropinf/_C.so").touch()
    (checkout / "dropinf/_build_failure.txt").touch()
    (checkout / "dropinf/triton_kernels").symlink_to("../triton_kernels")
    run(sys.executable, "setup.py", "sdist", "--dist-dir", "dist", cwd=checkout)
    (made,) = (checkout / "dist").iterdir()
    return made


@pytest.mark.more
def test_sdist_holds_all_that_git_knows(sdist, tracked):
    with tarfile.open(sdist) as archive:
        files = [member for member in archive.getmembers() if not member.isdir()]
    names = {member.name.partition("/")[2] for member in files}
    made = {name for name in names if name.startswith("dropinf.egg-info/")}
    assert names - made - {"PKG-INFO", "setup.cfg"} == tracked
    assert all(member.isfile() for member in files)


@pytest.fixture(scope="module", params=["with torch", "without torch"])
def wheel(request, sdist, tmp_path_factory):
    """(wheel built of the sdist, whether torch was there); no network."""
    made = tmp_path_factory.mktemp("wheel")
    python, with_torch = Path(sys.executable), request.param == "with torch"
    if not with_torch:
        venv.create(made / "venv", with_pip=False)
        (place,) = (made / "venv").glob("lib/python*/site-packages")
        for name in ("pip", "setuptools", "wheel", "packaging", "_distutils_hack"):
            for folder in map(Path, site.getsitepackages()):
                for found in (*folder.glob(name), *folder.glob(f"{name}-*.dist-info")):
                    (place / found.name).symlink_to(found)
        python = made / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    # Nothing of this test's own path, or the venv would find torch after all.
    run(*pip, "--wheel-dir", made, sdist, cwd=made, PYTHONPATH="", DROPINF_EXTENSION="")
    (file,) = made.glob("*.whl")
    return file, with_torch


SMOKE = """
import sys
# The editable install of the checkout would lend its extension.
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
import torch
import dropinf
assert dropinf.__file__.startswith(sys.argv[1]), dropinf.__file__
x, dy = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
o, i = torch.tensor([[0, 0, 2], [1, 3, 0]], dtype=torch.int32)
exact = torch.einsum("bto,bti->boi", dy, x)[:, o, i]
for backend in sys.argv[2:]:
    torch.testing.assert_close(dropinf.ops.sampled_outer(x, dy, o, i, backend=backend), exact)
model = torch.nn.Linear(4, 3, bias=False)
plan = dropinf.Plan.make(model, dropinf.Full())
with dropinf.capture(model, plan) as tap:
    rows = tap.rows((model(x) * dy).sum((1, 2)))
torch.testing.assert_close(rows, torch.einsum("bto,bti->boi", dy, x).flatten(1))
print(dropinf.backends()["cpu"])
"""


@pytest.mark.more
def test_wheel(wheel, tracked, tmp_path):
    """It holds the package and nothing else, and works where it is installed."""
    file, with_torch = wheel
    expected = {name for name in tracked if name.startswith("dropinf/")}
    expected |= {f"dropinf/{name}" for name in tracked if name.startswith("triton_kernels/")}
    names = {name for name in zipfile.ZipFile(file).namelist() if ".dist-info/" not in name}
    (built,) = names - expected
    assert names == {*expected, built} and "dropinf/py.typed" in names
    assert built.startswith("dropinf/_C") if with_torch else built == "dropinf/_build_failure.txt"

    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    run(*pip, "--target", target, file)
    backends = ["reference", "cpu"] if with_torch else ["reference"]
    command = [sys.executable, "-c", SMOKE, target, *backends]
    printed = run(*command, cwd=tmp_path, PYTHONPATH=str(target)).strip()
    wanted = "available" if with_torch else "not available: torch could not be imported when"
    assert printed == wanted if with_torch else printed.startswith(wanted)
    printed = run(target / "bin" / "dropinf", "backends", cwd=tmp_path, PYTHONPATH=str(target))
    assert "reference   available" in printed

    (about,) = target.glob("dropinf-*.dist-info")
    metadata = PathDistribution(about).metadata
    assert metadata["Version"] == dropinf.__version__ and metadata["Description"]
    assert not [field for field in metadata if field.startswith("License")]
