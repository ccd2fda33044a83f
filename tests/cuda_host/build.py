"""Builds the CUDA kernels as C++ for the host, and registers them as torch.ops.dropinf_host.

DROPINF_SANITIZE=address or thread compiles the kernels with that sanitizer; `make sanitize` sets it
together with what the process needs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from places import ROOT
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

HERE = Path(__file__).parent
SOURCES = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_host"

COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-pthread", "-Wall", "-Werror"]
FLAGS.append("-Wno-unknown-pragmas")  # unroll
FLAGS.append("-U_FORTIFY_SOURCE")  # which refuses a jump to another stack: see block_threads.h
INCLUDE = re.compile(r'^#include ["<](.+)[">]', re.MULTILINE)


@lru_cache
def load() -> None:
    """Build what is not there yet, and load it.

    Raises:
        RuntimeError: it does not compile.
    """
    torch.ops.load_library(str(library(SOURCES, os.environ.get("DROPINF_SANITIZE", ""))))


def library(sources: Path, sanitizer: str) -> Path:
    """The shared library of the kernels in `sources`/cuda, built if it is not there yet."""
    # What includes torch has no thread of ours: only the kernels are watched.
    watched = [f"-fsanitize={sanitizer}"] if sanitizer else []
    python = sysconfig.get_paths()["include"]
    system = [f for path in (*include_paths(), python) for f in ("-isystem", path)]
    kernels = sorted((sources / "cuda").glob("*.cu"))
    # The files that register them, compiled as one, for torch's headers are most of the time.
    ops = [o for kernel in kernels for o in ("-include", f"{kernel.stem}.cpp")]
    on_host = ["-DDROPINF_CUDA", "-DDROPINF_CUDA_ON_HOST", *system, *ops]
    jobs = [(HERE / "module.cpp", on_host), *((kernel, watched) for kernel in kernels)]
    torch_libraries = [f"-L{TORCH_LIB_PATH}", "-ltorch", "-ltorch_cpu", "-lc10"]
    return _linked("cuda_host.so", _objects(sources, jobs), [*watched, "-shared", *torch_libraries])


def program(source: Path, sources: Path) -> Path:
    """The program of `source`, which has a main(), and the kernels in `sources`/cuda, without
    torch."""
    kernels = sorted((sources / "cuda").glob("*.cu"))
    jobs = [(file, []) for file in (source, *kernels, sources / "bank_order.cpp")]
    return _linked(source.stem, _objects(sources, jobs), [])


def planted(folder: Path, file: str, line: str, becomes: str) -> Path:
    """A copy of the sources in `folder` with a fault: in one file, one line is another."""
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources)
    text = (sources / file).read_text()
    assert text.count(line) == 1, f"{file} has {text.count(line)} times: {line}"
    (sources / file).write_text(text.replace(line, becomes))
    return sources


def _objects(sources: Path, jobs: Iterable[tuple[Path, list[str]]]) -> list[Path]:
    """The objects of these files, each with options of its own, several at a time."""

    def compiled(job: tuple[Path, list[str]]) -> Path:
        source, options = job
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        flags = [o for o in options if o.startswith("-")]  # where torch lies changes nothing
        digest = hashlib.sha256(" ".join([COMPILER, torch.__version__, *FLAGS, *flags]).encode())
        for file in _included(source, sources, options):
            digest.update(file.read_bytes())
        target = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        include = [f"-I{HERE}", f"-I{sources}"]
        return _made(target, *FLAGS, *include, *options, *language, "-c", str(source))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, jobs))


def _included(source: Path, sources: Path, options: Sequence[str] = ()) -> list[Path]:
    """The file and all of ours that it includes, the same order for the same contents."""
    found = [source]
    found += [sources / name for flag, name in pairwise(options) if flag == "-include"]
    for file in found:
        for name in INCLUDE.findall(file.read_text()):
            places = (folder / name for folder in (file.parent, HERE, sources))
            there = next((p for p in places if p.exists()), file)  # else it is the system's
            if there not in found:
                found.append(there)
    return found


def _linked(name: str, objects: list[Path], options: list[str]) -> Path:
    digest = hashlib.sha256(" ".join(map(str, (*objects, *options))).encode()).hexdigest()[:16]
    stem, dot, suffix = name.partition(".")
    target = BUILD / f"{stem}-{digest}{dot}{suffix}"
    return _made(target, "-pthread", *map(str, objects), *options)


def _made(target: Path, *arguments: str) -> Path:
    """What the compiler makes of these, unless it is there; whole from the first moment, and in a
    folder of its own until then, for another process may be making it too."""
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        made = Path(folder, target.name)
        command = [COMPILER, *arguments, "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        made.replace(target)
    return target
