"""The measurement: both settings, their sizes, and what each contestant can afford."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

import dropinf
from dropinf.tools.measuring import Call, LeftOut, alternate, loop_of, seconds_of, spread
from dropinf.tools.microbenchmark import formed, passes
from dropinf.tools.microbenchmark.formed import Point

SETTINGS: dict[str, ModuleType] = {"formed": formed, "passes": passes}
TITLES = {
    "formed": "Compressing gradients that are there",
    "passes": "Compressing inside of a backward pass",
}
_PACKAGES = ("torch", "numpy", "traker", "dattri", "bergson", "opacus", "fast_jl")


class Preset(NamedTuple):
    """What to measure.

    Attributes:
        base: setting -> the size around which one number at a time changes.
        sweeps: setting -> {"n", "r", "d" -> its values}.
        budget: seconds that one call of a contestant may take; larger sizes are left out for it,
            except for Dropout and the floor.
        rounds: of all contestants.
        loop_seconds: of a contestant in a round.
        memory: whether to measure it, which begins a process for each contestant.
        device: "cpu" or "cuda".
    """

    base: dict[str, Point]
    sweeps: dict[str, dict[str, Sequence[int]]]
    budget: float
    rounds: int
    loop_seconds: float
    memory: bool = True
    device: str = "cpu"


PRESETS = {
    "quick": Preset(
        {"formed": Point(16, 256, 10**5), "passes": Point(8, 256, 256**2)},
        {
            "formed": {"n": (4, 16, 64), "r": (64, 256, 1024), "d": (10**4, 10**5, 10**6)},
            "passes": {"n": (4, 8, 16), "r": (64, 256), "d": (128**2, 256**2, 512**2)},
        },
        budget=0.2,
        rounds=3,
        loop_seconds=0.03,
        memory=False,
    ),
    "full": Preset(
        {"formed": Point(16, 1024, 10**5), "passes": Point(8, 1024, 512**2)},
        {
            "formed": {
                "n": (4, 16, 64, 256),
                "r": (64, 256, 1024, 4096, 16384),
                "d": (10**4, 10**5, 10**6, 10**7),
            },
            "passes": {
                "n": (2, 8, 32, 128),
                "r": (64, 256, 1024, 4096, 16384),
                "d": (128**2, 256**2, 512**2, 1024**2, 2048**2),
            },
        },
        budget=3.0,
        rounds=5,
        loop_seconds=0.1,
    ),
    "gpu": Preset(
        {"formed": Point(64, 1024, 10**7), "passes": Point(32, 1024, 1024**2)},
        {
            "formed": {
                "n": (16, 64, 256),
                "r": (64, 256, 1024, 4096, 16384),
                "d": (10**6, 10**7, 10**8),
            },
            "passes": {
                "n": (8, 32, 128),
                "r": (64, 256, 1024, 4096, 16384),
                "d": (512**2, 1024**2, 2048**2, 4096**2),
            },
        },
        budget=2.0,
        rounds=7,
        loop_seconds=0.1,
        device="cuda",
    ),
}


def measure(
    name: str, preset: Preset, memory: bool = True, say: Callable = print
) -> dict[str, Any]:
    """The results of a preset, as they are saved.

    Raises:
        ValueError: the preset is for a GPU, and torch finds none.
    """
    if preset.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"bench: preset {name!r} needs a CUDA device, and torch finds none; use another one"
        )
    device = torch.device(preset.device)
    settings = {}
    for setting, module in SETTINGS.items():
        say(f"{setting}: checking contestants")
        able, left_out = _able(module, device)
        points = []
        slowest: dict[str, list[tuple[Point, float]]] = {}
        for point in _points(preset, setting):
            say(f"{setting}: n={point.n}, r={point.r}, d={point.d}")
            points.append(_measured(module, able, point, preset, device, slowest))
        peaks = {}
        if preset.memory:
            say(f"{setting}: memory")
            peaks = _peaks(setting, able, preset.base[setting], preset, points)
        settings[setting] = {
            "ours": module.OURS,
            "floor": module.FLOOR,
            "base": preset.base[setting]._asdict(),
            "left_out": left_out,
            "points": points,
            "peak_mb": peaks,
        }
    return {
        "preset": name,
        "budget": preset.budget,
        "rounds": preset.rounds,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": commit(),
        "settings": settings,
    }


def _able(module: ModuleType, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Contestants that run and compute what they should; and why others are left out."""
    able, left_out = [], {}
    for name in module.CONTESTANTS:
        try:
            module.check(name, device)
            able.append(name)
        except LeftOut as reason:
            left_out[name] = str(reason)
        except ImportError as error:  # of a peer that is installed beside what it cannot work with
            if name.startswith("dropinf"):
                raise
            left_out[name] = f"does not import: {' '.join(str(error).split())[:200]}"
    return able, left_out


def _points(preset: Preset, setting: str) -> Iterator[Point]:
    """Every size once, each sweep from its smallest."""
    base, seen = preset.base[setting], set()
    for variable, values in preset.sweeps[setting].items():
        for value in values:
            point = base._replace(**{variable: value})
            if point not in seen:
                seen.add(point)
                yield point


def _measured(
    module: ModuleType,
    able: Sequence[str],
    point: Point,
    preset: Preset,
    device: torch.device,
    known: dict[str, list[tuple[Point, float]]],
) -> dict[str, Any]:
    """Times at one size; `known` are the seconds of contestants at the sizes before."""
    given, cuda = module.make(point, device), device.type == "cuda"
    calls: dict[str, Call] = {}
    left_out = {}
    for name in able:
        before = known.setdefault(name, [])
        always = name in (module.OURS, module.FLOOR)  # ratios are to them
        # Nobody gets faster with size, so what was too slow below is too slow here.
        slow = [s for p, s in before if s > preset.budget and _below(p, point)]
        if slow and not always:
            left_out[name] = f"over budget: {slow[-1]:.1f} s at a smaller size"
            continue
        try:
            call = module.CONTESTANTS[name](given)
            seconds_of(call, cuda)  # compiles, allocates
        except Exception as error:  # of a foreign package, at a size that it does not take
            if name.startswith("dropinf") or name == module.FLOOR:
                raise
            left_out[name] = f"fails: {' '.join(str(error).split())[:200]}"
            continue
        seconds = seconds_of(call, cuda)
        if seconds > preset.budget:  # something else on the machine may have had its turn
            seconds = min(seconds, seconds_of(call, cuda))
        before.append((point, seconds))
        if seconds > preset.budget and not always:
            left_out[name] = f"over budget: {seconds:.1f} s"
        else:
            calls[name] = call
    loops = {
        name: loop_of(lambda _, call=call: call(), preset.loop_seconds, cuda)
        for name, call in calls.items()
    }
    seconds = alternate(loops, preset.rounds)
    ours = seconds[module.OURS]
    return {
        **point._asdict(),
        "ms": {name: spread([1e3 * s for s in times]) for name, times in seconds.items()},
        "ratio": {
            name: spread([a / b for a, b in zip(times, ours, strict=True)])
            for name, times in seconds.items()
        },
        "left_out": left_out,
    }


def _below(one: Point, other: Point) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


def _peaks(
    setting: str, able: Sequence[str], base: Point, preset: Preset, points: list[dict[str, Any]]
) -> dict[str, float | None]:
    """Peak memory of one call at the base size, each contestant in a process of its own."""
    (at_base,) = (p for p in points if (p["n"], p["r"], p["d"]) == tuple(base))
    names = [name for name in able if name in at_base["ms"]]

    def of(name: str) -> float | None:
        command = [sys.executable, "-m", "dropinf.tools.microbenchmark.memory", setting, name]
        command += [*map(str, base), preset.device]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        said = run.stdout.split()[-1]
        return None if said == "None" else float(said)

    # Most of it is importing the packages, so two at a time.
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(of, names), strict=True))


def machine(device: torch.device) -> str:
    """The device, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        model = names[0] if names else model
    return f"{torch.get_num_threads()} threads of {model}"


def _versions() -> dict[str, str]:
    found = {"dropinf": dropinf.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Of the checkout that the package is in, if it is in one."""
    command = ["git", "-C", str(Path(dropinf.__file__).parent), "describe", "--always", "--dirty"]
    try:
        run = subprocess.run([*command, "--abbrev=12"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
