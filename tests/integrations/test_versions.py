"""Adapters refuse versions of their tool that were not tested."""

import importlib
import importlib.metadata
import re
import sys

import pytest
from places import ROOT

import dropinf.integrations
from dropinf.integrations import versions

TESTED = [
    ("trak", "traker", "0.3"),
    ("dattri", "dattri", "0.3"),
    ("captum", "captum", "0.9"),
    ("lightning", "lightning", "2.6"),
]
OTHERS = ["versions", "transformers", "transformers_losses", *(adapter for adapter, *_ in TESTED)]


@pytest.fixture
def installed(monkeypatch):
    """Sets what the packages say of their version; adapters are then imported anew."""

    def say(answer):
        monkeypatch.setattr(importlib.metadata, "version", answer)
        for name in OTHERS:
            monkeypatch.delitem(sys.modules, f"dropinf.integrations.{name}", raising=False)

    # A second import replaces it, and is to be undone.
    monkeypatch.setattr(dropinf.integrations, "versions", versions)
    return say


@pytest.mark.parametrize("adapter, package, series", TESTED)
@pytest.mark.parametrize("found", ["0.1.0", "0.30.1", "2.60", "3.0.0rc1", "9"])
def test_another_version(installed, adapter, package, series, found):
    """The error names the tool, what is installed, what was tested, and the way out."""
    asked = []
    installed(lambda package: asked.append(package) or found)
    with pytest.raises(ImportError) as caught:
        importlib.import_module(f"dropinf.integrations.{adapter}")
    said = str(caught.value)
    assert f"{package} {found} is not supported, tested is {series}.x" in said
    assert f"pip install '{package}=={series}.*'" in said
    assert asked == [package]
    assert f"dropinf.integrations.{adapter}" not in sys.modules


@pytest.mark.parametrize(
    "adapter, package", [("transformers", "transformers"), *(one[:2] for one in TESTED)]
)
def test_no_version(installed, adapter, package):
    """The error names the extra, which is called as the adapter is."""

    def answer(package):
        raise importlib.metadata.PackageNotFoundError(package)

    installed(answer)
    with pytest.raises(ImportError) as caught:
        importlib.import_module(f"dropinf.integrations.{adapter}")
    said = f"dropinf.integrations needs {package}: pip install 'dropinf[{adapter}]'"
    assert str(caught.value) == said
    assert re.search(rf"^{adapter} = \[.*{package}", (ROOT / "pyproject.toml").read_text(), re.M)


@pytest.mark.parametrize("adapter, package, series", TESTED)
def test_another_patch_level(monkeypatch, adapter, package, series):
    for found in (f"{series}.0", f"{series}.99", f"{series}.1.dev3"):
        monkeypatch.setattr(versions, "version", lambda package, found=found: found)
        with versions.tested(package, series):
            pass


NAMES = [  # which each adapter takes
    ("trak", "trak.projectors", "NoOpProjector"),
    ("dattri", "dattri.task", "AttributionTask"),
    ("captum", "captum.influence._utils.common", "KMostInfluentialResults"),
    ("lightning", "lightning", "Callback"),
    ("transformers", "transformers.trainer_utils", "has_length"),
    ("transformers", "transformers.models.auto.modeling_auto", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
]


@pytest.mark.parametrize("adapter, module, name", NAMES)
def test_a_missing_name(installed, monkeypatch, adapter, module, name):
    """Of a version with a tested number, as a checkout of what comes next."""
    monkeypatch.delattr(importlib.import_module(module), name)
    installed(importlib.metadata.version)
    with pytest.raises(ImportError) as caught:
        importlib.import_module(f"dropinf.integrations.{adapter}")
    said = str(caught.value)
    assert name in said and "is not like the releases that were tested (" in said
    assert "pip install --force-reinstall --no-deps '" in said
    assert f"dropinf.integrations.{adapter}" not in sys.modules
