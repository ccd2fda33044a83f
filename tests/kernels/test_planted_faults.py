"""The sanitizers see faults in kernels: planted in a copy of the sources, and absent from ours.

`make sanitize` runs it; each fault is a build of its own.
"""

import os
import subprocess
import sys

import pytest
from cuda_host import build

pytestmark = [
    pytest.mark.more,
    pytest.mark.skipif(
        os.environ.get("DROPINF_SANITIZE") != "planted", reason="make sanitize runs it"
    ),
]

FAULTS = {  # sanitizer, file, a line of it, and the fault it becomes
    "a read out of range": (
        "address",
        "cuda/gather_grads.cu",
        "const int64_t position = grad.idx[q];",
        "const int64_t position = grad.idx[q + 1];",
    ),
    "a missing barrier": (
        "thread",
        "cuda/sampled_outer.cu",
        "of_warps[threadIdx.x] = total;\n  __syncthreads();",
        "of_warps[threadIdx.x] = total;",
    ),
}
SIGNS = {"address": "heap-buffer-overflow", "thread": "data race"}

USE = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.dropinf_host
x, dy, out = torch.randn(2, 40, 9), torch.randn(2, 40, 7), torch.empty(2, 5)
index = torch.arange(5, dtype=torch.int32)
ops.sampled_outer(x, dy, index, index, None, False, [], out)
torch.testing.assert_close(out, torch.einsum("bto,bti->boi", dy, x)[:, index.long(), index.long()])
grad, index, out = torch.randn(9), torch.arange(9), torch.empty(9)
ops.gather_grads([grad], [index], None, out)
assert torch.equal(out, grad)
"""


def run(sources, sanitizer):
    library = build.library(sources, sanitizer)
    compiler = os.environ.get("CXX", "c++")
    runtime = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]
    found = subprocess.run(
        [compiler, f"-print-file-name={runtime}"], capture_output=True, text=True
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": found.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1",
    }
    command = [sys.executable, "-c", USE, str(library)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted(fault, tmp_path):
    sanitizer, file, line, becomes = FAULTS[fault]
    clean = run(build.SOURCES, sanitizer)
    assert clean.returncode == 0, clean.stderr
    faulty = run(build.planted(tmp_path, file, line, becomes), sanitizer)
    assert faulty.returncode != 0 and SIGNS[sanitizer] in faulty.stderr, faulty.stderr
