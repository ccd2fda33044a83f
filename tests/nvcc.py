"""nvcc, and what is made of a .cu file with it: kept in build/ until a file or nvcc changes."""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from places import ROOT

BUILD = ROOT / "build" / "nvcc"
OPTIONS = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}"]


def nvcc() -> str:
    """The compiler on the path, of CUDA_HOME, or of the package nvidia-cuda-nvcc."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home, "bin", "nvcc")] if home else []
    candidates += sorted(Path(sysconfig.get_paths()["purelib"], "nvidia").glob("*/bin/nvcc"))
    found = shutil.which("nvcc") or next((str(c) for c in candidates if c.exists()), None)
    if found is None:
        pytest.skip("nvcc is not here: pip install 'dropinf[nvcc]', or put CUDA's bin on the PATH")
    return found


def release() -> str:
    """Such as 13.0.88."""
    said = output_of(nvcc(), "--version")
    return re.search(r"V(\d+\.\d+\.\d+)", said)[1]


def kept(source: Path, ending: str, make: Callable[[Path, Path], str]) -> str:
    """The text that `make` makes of a source, in a folder of its own."""
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout
    folders = (ROOT / "csrc", ROOT / "bench" / "gpu")
    headers = sorted(h for f in folders for end in ("*.h", "*.cuh") for h in f.rglob(end))
    digest = hashlib.sha256(version.encode())
    for file in [source, *headers]:
        digest.update(file.read_bytes())
    target = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.{ending}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder, target.name)
            made.write_text(make(source, Path(folder)))
            made.replace(target)  # whole from the first moment: another process may make it too
    return target.read_text()


def output_of(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout
