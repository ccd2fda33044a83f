"""The package as installed, with and without a compiler; its command line; its one direction."""

import ast
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import PACKAGE, ROOT

import dropinf.__main__
from dropinf.ops import dispatch
from dropinf.tools.microbenchmark import sweep
from dropinf.tools.microbenchmark.formed import Point


def run(*command, cwd=None, **environment):
    """Run python with `command`; return stdout."""
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources(tmp_path):
    """A copy of what is built, without what was."""
    source = tmp_path / "source"
    built = shutil.ignore_patterns("*.so", "__pycache__", "_build_failure.txt")
    for folder in ("csrc", "dropinf", "triton_kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=built)
    for file in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / file, source)
    return source


def build(tmp_path, **environment):
    """What `pip install .` builds first; why there is no extension."""
    command = ["setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    run(*command, cwd=sources(tmp_path), **environment)
    return (tmp_path / "dropinf" / "_build_failure.txt").read_text()


NO_COMPILER = {"CXX": "/nowhere/c++", "CC": "/nowhere/cc"}


USE = """
import sys
# The editable install of the checkout would lend its extension.
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
import torch, dropinf
assert dropinf.__file__.startswith(sys.argv[1]), dropinf.__file__
import dropinf.triton_kernels
model = torch.nn.Linear(4, 3)
data = [torch.randn(5, 4)]
scores = dropinf.influence(
    model, data, data, lambda m, x: m(x).pow(2).sum(1), dropinf.Dropout(r=7), progress=False
)
assert scores.shape == (5, 5) and scores.isfinite().all()
tools = {"bm25s", "captum", "dattri", "lightning", "sklearn", "trak", "transformers"}
tools |= {"datasets", "jinja2", "matplotlib", "pandas", "pyarrow", "rich", "typer"}
assert not tools & set(sys.modules)  # those that adapters and the demo are for
for name, state in dropinf.backends().items():
    print(f"{name}: {state}")
"""


@pytest.mark.more
def test_install_without_compiler(tmp_path):
    """It installs, imports, works on `reference`, and says why `cpu` is missing."""
    target = tmp_path / "target"
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    source = str(sources(tmp_path))
    run(*pip, "--target", str(target), source, **NO_COMPILER, DROPINF_EXTENSION="")
    printed = run("-c", USE, str(target), cwd=target, PYTHONPATH=str(target))
    assert "reference: available" in printed
    assert "cpu: not available: the C++ extension did not compile" in printed
    assert not list(target.glob("dropinf/_C*"))


def test_extension_that_was_not_wanted(tmp_path):
    assert build(tmp_path, DROPINF_EXTENSION="0").startswith("DROPINF_EXTENSION=0 was set")


@pytest.mark.more
def test_extension_that_was_asked_for_is_an_error(tmp_path):
    with pytest.raises(AssertionError, match=r"DROPINF_EXTENSION|compile|nowhere"):
        build(tmp_path, **NO_COMPILER, DROPINF_EXTENSION="1")


@pytest.mark.more
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_cuda_kernels_that_were_asked_for_are_an_error(tmp_path):
    with pytest.raises(AssertionError, match=r"DROPINF_CUDA=1, but torch .* is not a CUDA build"):
        build(tmp_path, DROPINF_CUDA="1")


def test_build_information():
    if dropinf.backends()["cpu"] != "available":
        pytest.skip(dropinf.backends()["cpu"])
    info = dropinf._C.build_info()
    assert info["torch"] == torch.__version__.split("+")[0] and info["openmp"]
    assert bool(info["cuda"]) != bool(info.get("why_no_cuda"))
    assert dropinf._C.cpu_capability() in ("avx2", "portable")
    with pytest.raises((ValueError, RuntimeError)):
        dropinf._C.set_cpu_capability("nonsense")


def test_command_line():
    assert "reference   available" in run("-m", "dropinf", "backends")


@pytest.fixture
def command(monkeypatch, capsys):
    """command("doctor"): the exit status of `python -m dropinf doctor`, and what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dropinf", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            dropinf.__main__.main()
        return end.value.code, capsys.readouterr().out

    return run


def test_doctor(command):
    """Every backend that is here passes its self-test, and each op has a line."""
    status, printed = command("doctor")
    for op, kernels in dispatch.KERNELS.items():
        for name in kernels:
            here = dropinf.backends()[name] == "available" and name != "cuda"
            lines = [x for x in printed.splitlines() if x.split()[:2] == [op, name]]
            assert len(lines) == here and all("ok (" in x for x in lines), (op, name)
    assert "FAILS" not in printed and "picked by default" in printed and status == 0


def test_doctor_finds_a_wrong_backend(command, monkeypatch):
    """It prints what is wrong, and ends with 1."""
    kernels = {**dispatch.KERNELS["gram"], "cpu": lambda *args: None}
    monkeypatch.setattr(dispatch, "KERNELS", {"gram": kernels})
    status, printed = command("doctor")
    assert status == 1 and "FAILS with torch.float32, off by" in printed


def test_bench(command, monkeypatch, request, tmp_path):
    """Dropout and its floor in tiny sizes: results, a page with figures, and a comparison."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("TQDM_DISABLE", "1")  # which it sets, as it silences logs, for good
    request.addfinalizer(lambda: logging.disable(logging.NOTSET))
    for module in sweep.SETTINGS.values():
        few = {name: module.CONTESTANTS[name] for name in (module.FLOOR, module.OURS)}
        monkeypatch.setattr(module, "CONTESTANTS", few)
    base = {"formed": Point(4, 16, 2000), "passes": Point(2, 16, 32**2)}
    sizes = {name: {"n": (2, 4), "r": (16,), "d": (base[name].d,)} for name in base}
    tiny = sweep.Preset(base, sizes, budget=10.0, rounds=1, loop_seconds=1e-4, memory=False)
    monkeypatch.setitem(sweep.PRESETS, "quick", tiny)
    results = tmp_path / "one" / "results.json"
    status, printed = command("bench", "--out", results.parent)
    assert status == 0 and printed.endswith(f"{results.parent / 'page.md'}\n")
    for found in json.loads(results.read_text())["settings"].values():
        assert all(
            list(point["ms"]) == [found["floor"], found["ours"]] for point in found["points"]
        )
    page = (results.parent / "page.md").read_text()
    assert "(formed-n.svg)" in page and "<svg" in (results.parent / "formed-n.svg").read_text()
    status, printed = command("bench", "--out", tmp_path / "two", "--against", results)
    assert status in (0, 1) and ("nothing became slower" in printed) == (status == 0)


# From the ops, which know only tensors, to the calls that do everything.
ROOMS = [
    ["ops", "losses"],
    ["compression"],
    ["capturing.rules"],
    ["capturing"],
    ["rows"],
    ["solvers"],
    ["scoring"],
    ["results", "evaluate"],
    ["reporting", "integrations"],
    ["jobs"],
    ["tools"],
    ["cli"],
]
LEAVES = (
    "argument_kinds",
    "extras",
    "manifest",
    "processes",
    "progress",
    "ranks",
    "text_table",
    "user_warning",
    "version",
    "whole_files",
    "world",
)


def room_of(module):
    """The room that dropinf.<module> is in, or is; "" of what stands in none."""
    names = [name for names in ROOMS for name in names]
    return max((n for n in names if f"{module}.".startswith(f"{n}.")), key=len, default="")


def imports(path):
    """What a file imports of the package: "rows" of `from dropinf.rows import ...`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dropinf":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dropinf."):
            yield node.module.removeprefix("dropinf.")
        elif isinstance(node, ast.Import):
            names = (alias.name.partition(".") for alias in node.names)
            yield from (inside for package, _, inside in names if package == "dropinf")


def test_one_direction():
    """A room imports from rooms before it, and only what their front doors have."""
    rank = {name: i for i, names in enumerate(ROOMS) for name in names}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        mine = room_of(".".join(parts))
        if not mine:
            assert parts[0] in ("__init__", "__main__", "triton_kernels", *LEAVES), parts
            continue
        for other in imports(file):
            theirs = room_of(other)
            if theirs == mine or other in LEAVES or (mine in ("tools", "cli") and not theirs):
                continue
            assert theirs and rank[theirs] < rank[mine], f"{'.'.join(parts)} imports {other}"
            front = other == theirs or theirs in ("integrations", "tools")  # a file for each
            assert front, f"{'.'.join(parts)} imports {other}, not from {theirs}"


def test_no_module_has_the_name_of_a_public_function():
    for name in ["dropinf", *(f"dropinf.{name}" for names in ROOMS for name in names)]:
        package = importlib.import_module(name)
        modules = {path.stem for path in Path(package.__file__).parent.iterdir()}
        public = getattr(package, "__all__", [])
        assert not modules & {n for n in public if callable(getattr(package, n))}, name


def test_warnings_point_at_the_user(recwarn):
    """At the line that called the package, however deep inside of it the warning was made."""
    plan = dropinf.Plan.make(torch.nn.Linear(4, 1, bias=False), dropinf.Full())
    store = dropinf.RowStore(torch.randn(9, 4), plan)
    dropinf.solvers.LiSSA(damping=1e-3, depth=1).fit(store).solve(store.rows)
    assert recwarn.pop(UserWarning).filename == __file__


def test_what_tests_share_hides_no_module_of_bench():
    """All of them are on one path: the first of two modules of one name is imported for both."""
    folders = ("tests", "bench", "bench/experiments")
    names = [p.name for f in folders for p in (ROOT / f).glob("*.py") if p.name != "conftest.py"]
    assert len(names) == len(set(names))
