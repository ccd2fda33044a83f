"""dattri's own tests of TRAK, TracIn and DVEmb, whose projections `projection` replaces.

    python bench/dattri_tests.py

The tests are those of the sdist of the installed version, fetched for the run and not kept. They
take some minutes, as one trains a ResNet. It ends with 1 unless each passes or is refused by
`projection` with its reason, as two of DVEmb's factorised forms are, and with pytest's own status
if there are none to run.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from dropinf.integrations.dattri import projection

FILES = [f"test/dattri/algorithm/test_{name}.py" for name in ("trak", "tracin", "dvemb")]
REFUSED = "projects both sides of a layer with one seed, which is biased"


class Projected:
    """A plugin of pytest: each test runs inside of `projection`."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.refused: list[str] = []
        self.failed: list[str] = []

    @pytest.fixture(autouse=True)
    def projected(self):
        with projection():
            yield

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2]
        if report.failed:
            said = self.refused if REFUSED in str(report.longrepr) else self.failed
            said.append(name)
        elif report.when == "call" and report.passed:
            self.passed.append(name)


def fetch(directory: Path) -> Path:
    """The sources of the installed dattri, from the package index."""
    release = f"dattri=={version('dattri')}"
    options = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation", "-d", str(directory)]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options, release], check=True)
    (archive,) = directory.glob("dattri-*.tar.gz")
    with tarfile.open(archive) as sdist:
        sdist.extractall(directory, filter="data")
    return directory / archive.name.removesuffix(".tar.gz")


def stand_in_for_torchvision(patch: pytest.MonkeyPatch) -> None:
    """dattri's modules of CIFAR import torchvision, missing beside a CPU build of torch."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    for name in ("torchvision", "torchvision.datasets", "torchvision.datasets.cifar"):
        patch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["torchvision.datasets.cifar"].CIFAR10 = object  # of no test here


def main() -> int:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        source, plugin = fetch(Path(directory)), Projected()
        (source / "pyproject.toml").unlink()  # pytest would take it for its own
        patch.chdir(source)  # where they write checkpoints
        stand_in_for_torchvision(patch)
        options = ["-q", "--tb=no", "--no-summary", "-p", "no:cacheprovider"]
        ran = pytest.main([*options, *FILES], plugins=[plugin])
    if ran not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(ran)
    print(
        f"dattri {version('dattri')} inside of projection(): {len(plugin.passed)} passed, "
        f"{len(plugin.refused)} refused with the reason ({', '.join(plugin.refused)}), "
        f"{len(plugin.failed)} failed {plugin.failed}"
    )
    return int(bool(plugin.failed))


if __name__ == "__main__":
    sys.exit(main())
