"""The JSON file of an experiment: every result is added at once, so that a killed run goes on."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))

from gpu.results import commit, now

Key = tuple[str | int | None, ...]


class Records:
    """Results by key: a value for each of `names`.

    Raises:
        SystemExit: the file there is of other settings, versions or another machine.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        names: Sequence[str],
        packages: Sequence[str] = (),
    ) -> None:
        """A new file, or the one at `path`.

        Args:
            settings: what all results depend on.
            names: of what a key says, which tells one result from another.
            packages: beside torch and numpy, whose versions results depend on; some may be missing,
                as one task alone needs them.
        """
        self.path, self.names = path, tuple(names)
        here = {"settings": settings, "machine": machine(), "versions": versions(packages)}
        self.data = {**here, "runs": [], "records": []}
        if path.exists():
            self.data = json.loads(path.read_text())
            for key, value in here.items():
                if self.data[key] != value:
                    raise SystemExit(
                        f"{path} was made with {key} {self.data[key]}, here they are {value}; "
                        "remove it, or name another --out"
                    )
        self._by_key = {self.key_of(record): record for record in self.data["records"]}
        self._is_new = True  # this run has added nothing yet

    def __contains__(self, key: Key) -> bool:
        return key in self._by_key

    def get(self, key: Key) -> dict[str, Any] | None:
        return self._by_key.get(key)

    def add(self, key: Key, **result: Any) -> None:
        """Add a result, and write the file."""
        if self._is_new:
            self.data["runs"].append({"date": now(), "commit": commit()})
            self._is_new = False
        record = {**dict(zip(self.names, key, strict=True)), **result}
        self.data["records"].append(record)
        self._by_key[key] = record
        self.save()

    def of(self, **where: Any) -> list[dict[str, Any]]:
        """Those whose values are these."""
        return [r for r in self.data["records"] if all(r[k] == v for k, v in where.items())]

    def key_of(self, record: dict[str, Any]) -> Key:
        return tuple(record[name] for name in self.names)

    def save(self) -> None:
        """A line for each record, which a diff can be read of; the last run's date is now."""
        if self.data["runs"]:
            self.data["runs"][-1]["date"] = now()
        parts = []
        for key, value in self.data.items():
            lines = value if isinstance(value, list) else None
            text = (
                "[\n" + ",\n".join(map(json.dumps, lines)) + "\n]" if lines else json.dumps(value)
            )
            parts.append(f"{json.dumps(key)}: {text}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        partial.replace(self.path)


def machine() -> dict[str, Any]:
    return {"cpu": cpu(), "cores": os.cpu_count(), "system": platform.system()}


def cpu() -> str:
    """The model that Linux names; elsewhere the architecture."""
    about = Path("/proc/cpuinfo")
    names = about.read_text().splitlines() if about.exists() else []
    models = [line.split(":", 1)[1].strip() for line in names if line.startswith("model name")]
    return models[0] if models else platform.machine()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python, torch, numpy and those of `packages` that are there."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", *packages):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
