"""No question to CUDA at import or from the CPU: it could break CUDA in processes forked later."""

import os
import subprocess
import sys

import pytest

import dropinf
from dropinf.ops import dispatch

# Each question ends the process at once, so that nobody can catch an error and go on.
PREPARE = """
import os, traceback
import torch

def asked(*args, **options):
    traceback.print_stack()
    os._exit(3)

for module, names in (
    (torch.cuda, "is_available device_count current_device get_device_properties mem_get_info"),
    (torch.cuda, "get_device_name get_device_capability init _lazy_init synchronize"),
    (torch.accelerator, "is_available device_count current_device_index"),
    (torch._C, "_cuda_init _cuda_getDeviceCount _cuda_getDevice"),  # a CPU build has none of these
):
    for name in filter(lambda name: hasattr(module, name), names.split()):
        setattr(module, name, asked)
"""

IMPORT = """
import importlib, pkgutil
import dropinf.triton_kernels  # which an editable install finds elsewhere

names = {
    module.name
    for package in (dropinf, dropinf.triton_kernels)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
}
names.discard("dropinf.__main__")
some = {"dropinf.ops.dispatch", "dropinf.solvers.cholesky", "dropinf.triton_kernels.gram"}
assert some <= names
for name in sorted(names):
    try:
        importlib.import_module(name)
    except ImportError as error:  # its package is not here
        print(f"left out: {name}: {error}")
"""

CALL = """
from torch import nn
from dropinf import Dropout, ops, solvers
from dropinf.ops import dispatch

for op, kernels in dispatch.KERNELS.items():  # all may be picked by default
    for backend in dispatch.GPU_BACKENDS:
        dispatch.VERIFIED[backend, op] = "some.json"
model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
data = [torch.randn(5, 4)]
loss_fn = lambda model, x: model(x).pow(2).sum(1)
plan = dropinf.Plan.make(model, Dropout(r=7))
with dropinf.capture(model, plan) as tap:
    assert tap.rows(loss_fn(model, data[0])).shape == (5, 14)
store = dropinf.collect(model, data, loss_fn, plan, progress=False)
solver = solvers.Cholesky().fit(store)
assert dropinf.scores(store, store, solver).isfinite().all()
assert dropinf.topk(store, store, solver, 3)[0].shape == (5, 3)
o_idx = i_idx = torch.zeros(1, dtype=torch.int32)
x = torch.ones(2, 3, 4)
for backend in ("cuda", "cpu"):
    try:
        ops.sampled_outer(x.double(), x.double(), o_idx, i_idx, backend=backend)
    except dropinf.BackendError as error:
        assert "Here: 'reference'." in str(error)
"""


def run(*parts):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", "".join(parts)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "imported",
    ["import dropinf\n", pytest.param(IMPORT, marks=pytest.mark.more)],
    ids=["dropinf", "every module"],
)
def test_not_at_import_nor_on_the_cpu(imported):
    done = run(PREPARE, imported, CALL)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_when_the_backends_are_listed():
    """So that the test above can fail."""
    pytest.importorskip("triton")
    done = run(PREPARE, "import dropinf\ndropinf.backends()")
    assert done.returncode == 3 and "_why_no_triton" in done.stderr, done.stderr


def test_answers_are_kept(monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch, "_STATES", {})
    monkeypatch.setitem(dispatch._WHY_NOT, "cuda", lambda: asked.append(1) or "of a test")
    for _ in range(2):
        assert dropinf.backends()["cuda"] == "not available: of a test"
    assert len(asked) == 1
