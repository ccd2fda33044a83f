"""The JSON file of one GPU and day: parts merge into it, and replace what they wrote before."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import time
from datetime import date, datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dropinf
from dropinf.ops import dispatch

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "bench" / "results"


class Results:
    """What is known so far; every change is written at once, so that nothing is lost by a kill."""

    def __init__(self, path: Path, rehearsal: bool, measured: str | None = None) -> None:
        self.path, self.commit = path, measured or commit()
        self.data: dict[str, Any] = {
            "rehearsal": rehearsal,
            "device": device(rehearsal),
            "versions": versions(),
            "backends": dropinf.backends(),
            "date": date.today().isoformat(),
            "parts": {},
            "ceilings": {},
            "rows": [],
            "targets": [],
            "verified": {},
            "sources": {},
            "sanitizers": {},
            "left_out": [],
        }
        if path.exists():
            before = json.loads(path.read_text())
            for key in ("rehearsal", "device"):
                if before[key] != self.data[key]:
                    raise SystemExit(f"{path} is of {before[key]}, not of {self.data[key]}")
            self.data = before | {key: self.data[key] for key in ("versions", "backends")}

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.replace(self.path)

    def reload(self) -> None:
        """Take over what a worker wrote."""
        self.data = json.loads(self.path.read_text())

    def begin(self, part: str, quick: bool = False) -> None:
        """Forget what this part wrote before."""
        for key in ("rows", "targets", "left_out"):
            self.data[key] = [entry for entry in self.data[key] if entry["part"] != part]
        if part == "test":
            self.data["verified"], self.data["sources"] = {}, sources()
            self.data.pop("machine_code", None)  # of other sources; see tests/machine_code.py
        if part == "sanitize":
            self.data["sanitizers"] = {}
        entry = {"start": now(), "end": None, "commit": self.commit, "quick": quick}
        self.data["parts"][part] = entry
        self.save()

    def end(self, part: str, seconds: float) -> None:
        self.data["parts"][part] |= {"end": now(), "seconds": round(seconds, 1)}
        self.save()

    def add(self, key: str, part: str, **entry: Any) -> None:
        self.data[key].append({"part": part, **entry})
        self.save()

    def leave_out(self, part: str, what: str, reason: str) -> None:
        self.add("left_out", part, what=what, reason=reason)

    def of(self, key: str, part: str) -> list[dict[str, Any]]:
        return [entry for entry in self.data[key] if entry["part"] == part]


def kernel_files(root: Path = ROOT) -> dict[str, Path]:
    """op -> the file that has its CUDA kernels, of those that have some."""
    folder = root / "csrc" / "cuda"
    files = {op: folder / f"{op}.cu" for op in dispatch.KERNELS}
    files |= dict.fromkeys(("damped_cholesky", "cholesky_solve"), folder / "cholesky.cu")
    return {op: file for op, file in files.items() if file.exists()}


def sources(root: Path = ROOT) -> dict[str, str]:
    """op -> sha256 of its CUDA kernels and what they include, comments and white space aside."""
    folder, found = root / "csrc", {}
    for op, file in kernel_files(root).items():
        waiting, seen = [file], {}
        while waiting:
            path = waiting.pop()
            if path in seen or not path.exists():  # one of the standard library
                continue
            seen[path] = "".join(re.sub(r"//.*", "", path.read_text()).split())
            waiting += [folder / name for name in re.findall(r'#include"(.+?)"', seen[path])]
        code = "".join(seen[path] for path in sorted(seen))
        found[op] = hashlib.sha256(code.encode()).hexdigest()
    return found


def default_path() -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return FOLDER / f"{name}-{date.today().isoformat()}.json"


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def device(rehearsal: bool) -> dict[str, Any]:
    """What was measured."""
    if rehearsal:
        return {"type": "cpu", "name": platform.machine()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("torch", "triton", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str:
    """The commit, with "-dirty" where files differ; "unknown" outside of a checkout."""
    return printed("git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def printed(*command: str) -> str:
    """What a command prints, or "unknown"."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def environment(rehearsal: bool, **more: str) -> dict[str, str]:
    """For child processes: this checkout first, kernels compiled, and no GPU in a rehearsal."""
    paths = [str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    made = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}
    made.pop("TRITON_INTERPRET", None)
    if rehearsal:
        made["CUDA_VISIBLE_DEVICES"] = ""
    return made


class Deadline:
    """How much is left of a number of seconds."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()
