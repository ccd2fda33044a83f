"""The package as installed, with and without a compiler; its command line; its one direction."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dropinf
from dropinf import dispatch

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dropinf"


def run(*command, cwd=None, **environment):
    """Run python with `command`; return stdout."""
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def install(tmp_path, **environment):
    """`pip install .` of a copy of the sources, into a folder of its own."""
    source, target = tmp_path / "source", tmp_path / "target"
    built = shutil.ignore_patterns("*.so", "__pycache__", "_build_failure.txt")
    for folder in ("csrc", "dropinf", "triton_kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=built)
    for file in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / file, source)
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--target", str(target), str(source), **environment)
    return target


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
for name, state in dropinf.backends().items():
    print(f"{name}: {state}")
"""


@pytest.mark.parametrize("why", ["not asked for", "no compiler"])
def test_install_without_compiler(why, tmp_path):
    """It installs, imports, works on `reference`, and says why `cpu` is missing."""
    if why == "no compiler":
        missing = {"CXX": "/nowhere/c++", "CC": "/nowhere/cc", "DROPINF_EXTENSION": ""}
    else:
        missing = {"DROPINF_EXTENSION": "0"}
    target = install(tmp_path, **missing)
    printed = run("-c", USE, str(target), cwd=target, PYTHONPATH=str(target))
    assert "reference: available" in printed
    reason = "did not compile" if why == "no compiler" else "DROPINF_EXTENSION=0 was set"
    assert f"cpu: not available: {reason}" in printed.replace("the C++ extension ", "")
    assert not list(target.glob("dropinf/_C*"))


def test_extension_that_was_asked_for_is_an_error(tmp_path):
    with pytest.raises(AssertionError, match=r"DROPINF_EXTENSION|compile|nowhere"):
        install(tmp_path, CXX="/nowhere/c++", CC="/nowhere/cc", DROPINF_EXTENSION="1")


def test_cuda_kernels_that_were_asked_for_are_an_error(tmp_path):
    if torch.version.cuda:
        pytest.skip("torch is a CUDA build")
    with pytest.raises(AssertionError, match=r"DROPINF_CUDA=1, but torch .* is not a CUDA build"):
        install(tmp_path, DROPINF_CUDA="1")


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


def test_doctor():
    """Every backend that is here passes its self-test, and each op has a line."""
    printed = run("-m", "dropinf", "doctor", TRITON_INTERPRET="1")
    for op, kernels in dispatch.KERNELS.items():
        for name in kernels:
            here = dropinf.backends()[name] == "available" and name != "cuda"
            lines = [x for x in printed.splitlines() if x.split()[:2] == [op, name]]
            assert len(lines) == here and all("ok (" in x for x in lines), (op, name)
    assert "FAILS" not in printed and "picked by default" in printed


def test_doctor_finds_a_wrong_backend():
    """It prints what is wrong, and ends with 1."""
    broken = "from dropinf import dispatch, doctor; "
    broken += (
        "dispatch.KERNELS['gram']['cpu'] = lambda *args: None; raise SystemExit(doctor.main())"
    )
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True)
    assert done.returncode == 1 and "FAILS with torch.float32, off by" in done.stdout


def imports(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dropinf"):
            parts = node.module.split(".")
            if len(parts) > 1:
                yield ".".join(parts[1:])
            else:
                yield from (alias.name for alias in node.names)


# From the backends, which know only tensors, to the calls that do everything.
ORDER = [
    ["reference", "staging"],
    ["selftest"],
    ["dispatch"],
    ["ops"],
    ["calls", "forms", "marks", "rowmap", "composites", "tables", "shares", "projections"],
    ["folds"],
    ["compress"],
    ["baselines", "projector"],
    ["plan", "norms", "routes", "general"],
    ["layers", "tap", "store", "sources", "checking"],
    ["runs", "gradients", "solvers.base", "solvers.damping", "solvers.kept", "streaming"],
    ["entries", "solvers.group", "solvers.eigen", "solvers.gauss_newton"],
    ["graph", "solvers.primal", "solvers.dual"],
    ["meetings", "solvers.saving"],
    ["activations"],
    [
        "solvers.cg",
        "solvers.cholesky",
        "solvers.datainf",
        "solvers.diagonal",
        "solvers.identity",
        "solvers.lissa",
        "capturing",
    ],
    ["solvers", "collecting"],
    ["scoring", "dampings", "integrations.training", "integrations.drawn"],
    ["integrations.versions", "integrations.transformers_losses"],
    ["integrations.transformers", "integrations.lightning"],
    ["doctor", "microbenchmark.timing", "microbenchmark.check"],
    ["microbenchmark.peers", "microbenchmark.formed"],
    ["microbenchmark.passes"],
    ["microbenchmark.sweep"],
    ["microbenchmark.page", "microbenchmark.memory"],
    ["microbenchmark.main"],
]


def test_one_direction():
    """Nothing imports to its right: a module imports only from earlier ranks."""
    rank = {name: i for i, names in enumerate(ORDER) for name in names}
    for name, mine in rank.items():
        file = PACKAGE / (name.replace(".", "/") + ".py")
        file = file if file.exists() else PACKAGE / name / "__init__.py"
        for other in imports(file):
            if other in rank:
                assert rank[other] < mine, f"{name} imports {other}"
    modules = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__", "demo"}
    assert modules <= set(rank)


def test_no_module_has_the_name_of_a_public_function():
    modules = {p.stem for p in PACKAGE.glob("*.py")}
    functions = {n for n in dropinf.__all__ if callable(getattr(dropinf, n))}
    assert not modules & functions


def readme_blocks():
    return [
        part.split("```")[0] for part in (ROOT / "README.md").read_text().split("```python\n")[1:]
    ]


def test_readme_example():
    """The README's ten lines run as they stand."""
    example = readme_blocks()[0]
    assert example.count("\n") <= 25
    namespace = {}
    exec(example, namespace)
    assert namespace["values"].shape == namespace["indices"].shape == (20, 5)


def test_readme_projector():
    """So do those on the projector."""
    namespace = {}
    first, *others = readme_blocks()
    exec(first, namespace)
    exec(next(block for block in others if "DropoutProjector" in block), namespace)
    assert namespace["features"].shape == (32, 256)


def test_readme_solvers(tmp_path, monkeypatch):
    """So do its lines on solvers, after those."""
    monkeypatch.chdir(tmp_path)
    namespace = {}
    first, *others = readme_blocks()
    exec(first, namespace)
    model, train, queries, loss_fn = (
        namespace[k] for k in ("model", "train", "queries", "loss_fn")
    )
    namespace["parts"] = parts = []
    for seed in range(2):
        plan = dropinf.Plan.make(model, dropinf.Dropout(r=50, seed=seed))
        store, asked = (dropinf.collect(model, d, loss_fn, plan) for d in (train, queries))
        parts.append((asked, store, dropinf.solvers.Cholesky().fit(store)))
    exec(next(block for block in others if "solver.sweep" in block), namespace)
    assert namespace["many"].shape == (4, 20, 100) and namespace["own"].shape == (100,)
    assert namespace["mean"].shape == namespace["error"].shape == (20, 100)
    assert namespace["choice"].damping in (1e-3, 1e-2, 0.1, 1.0)
