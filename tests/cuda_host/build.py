"""Builds the CUDA kernels as C++ for the host, and registers them as torch.ops.dropinf_host.

DROPINF_SANITIZE=address or thread compiles the kernels with that sanitizer; `make sanitize` sets it
together with what the process needs.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SOURCES = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_host"


@lru_cache
def load() -> None:
    """Build what is not there yet, and load it.

    Raises:
        RuntimeError: it does not compile.
    """
    torch.ops.load_library(str(library(SOURCES, os.environ.get("DROPINF_SANITIZE", ""))))


def library(sources: Path, sanitizer: str) -> Path:
    """The shared library of the kernels in `sources`/cuda, built if it is not there yet."""
    flags = ["-std=c++20", "-O1", "-g", "-fPIC", "-pthread", "-Wall", "-Werror"]
    flags.append("-Wno-unknown-pragmas")  # unroll
    # The bindings are torch's and ours, without a thread: only the kernels are watched.
    watched = [f"-fsanitize={sanitizer}"] if sanitizer else []
    python = sysconfig.get_paths()["include"]
    system = [f for path in (*include_paths(), python) for f in ("-isystem", path)]
    include = [f"-I{HERE}", f"-I{sources}"]
    kernels = sorted((sources / "cuda").glob("*.cu"))
    jobs = [([*flags, *watched, "-x", "c++"], kernel) for kernel in kernels]
    jobs.append(([*flags, *system], HERE / "module.cpp"))
    BUILD.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "c++")
    headers = sorted([*sources.rglob("*.h"), *sources.rglob("*.cuh"), *HERE.rglob("*.h")])
    common = hashlib.sha256(f"{compiler} {torch.__version__}".encode())
    for file in [*headers, sources / "cuda" / "bindings.cpp"]:
        common.update(file.read_bytes())

    def compiled(job: tuple[list[str], Path]) -> Path:
        options, source = job
        digest = common.copy()
        digest.update(" ".join(options).encode() + source.read_bytes())
        target = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            _run(compiler, *include, *options, "-c", str(source), "-o", f"{target}.partial")
            Path(f"{target}.partial").replace(target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, jobs))
    digest = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    target = BUILD / f"cuda_host-{digest}.so"
    if not target.exists():
        torch_libraries = [f"-L{TORCH_LIB_PATH}", "-ltorch", "-ltorch_cpu", "-lc10"]
        parts = [*watched, "-shared", "-pthread", *map(str, objects), *torch_libraries]
        _run(compiler, *parts, "-o", f"{target}.partial")
        Path(f"{target}.partial").replace(target)
    return target


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
