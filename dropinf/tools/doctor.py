"""dropinf doctor: what is here, and whether every backend computes what it should."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from time import perf_counter

import torch

import dropinf
from dropinf.ops import dispatch, selftest
from dropinf.text_table import Table


def look() -> tuple[dict[str, Table], int]:
    """What there is to print, and 1 if a self-test fails, else 0."""
    rows, failed = _self_tests()
    tables = {
        "versions": Table(("what", "version"), _versions()),
        "devices": Table(("device", "is"), _devices()),
        "backends": Table(("backend", "state"), list(dispatch.backends().items())),
        "self-tests": Table(("op", "backend", "on", "self-test", "picked by default"), rows),
    }
    return tables, failed


def _versions() -> list[tuple[str, str]]:
    versions = [("python", platform.python_version()), ("dropinf", dropinf.__version__)]
    for package in ("torch", "triton", "numpy"):
        try:
            versions.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            versions.append((package, "not installed"))
    if torch.version.cuda:
        versions.append(("CUDA of torch", torch.version.cuda))
    if dispatch.backends()["cpu"] == "available":
        build = importlib.import_module("dropinf._C").build_info()
        versions.append(("extension", f"{build['compiler']}, torch {build['torch']}"))
        versions.append(("CUDA kernels", build["cuda"] or f"none, {build['why_no_cuda']}"))
    return versions


def _devices() -> list[tuple[str, str]]:
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if dispatch.backends()["cpu"] == "available":
        capability = importlib.import_module("dropinf._C").cpu_capability()
        cores += f", {capability} kernels"
    devices = [("cpu", f"{platform.machine()}, {cores}")]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        about = f"{gpu.multi_processor_count} SMs, {gpu.total_memory / 1e9:.0f} GB"
        devices.append((f"cuda:{i}", f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {about}"))
    return devices


def _self_tests() -> tuple[list[tuple[str, ...]], int]:
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    rows, failed = [], 0
    for op, kernels in dispatch.KERNELS.items():
        for name, kernel in kernels.items():
            for device in devices:
                call = (op, name, device, (torch.float32,), torch.float32)
                if dispatch.obstacle(*call):
                    continue
                started = perf_counter()
                try:
                    wrong = selftest.mismatch(op, kernel, device)
                except Exception as error:  # a crash of one is no reason not to test the others
                    wrong = f"{type(error).__name__}: {error}"
                ms = 1000 * (perf_counter() - started)
                failed |= wrong is not None
                default = name == dispatch.default(op, *call[2:])
                record = dispatch.VERIFIED.get((name, op), "")
                picked = f"yes, {record}" if record and default else "yes" if default else "no"
                if not record and name in dispatch.GPU_BACKENDS:
                    picked = "no: not verified on a GPU"
                result = "ok" if wrong is None else f"FAILS {wrong}"
                rows.append((op, name, str(device), f"{result} ({ms:.0f} ms)", picked))
    return rows, int(failed)
