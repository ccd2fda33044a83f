"""The pages of the manual, and the Python that they show."""

import re

import pytest
from places import ROOT

DOCS = ROOT / "docs"
MODULES = {"arrow": "datasets", "report": "matplotlib"}  # of extras not named as what they bring


def pages():
    """The README and all that stands in docs/."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def blocks(page):
    """Its Python."""
    return [part.split("\n```")[0] for part in page.read_text().split("```python\n")[1:]]


def needs(page):
    """What is installed for a page, as it says: extras, named as their tools, and packages."""
    said = re.search(r"^(?:Needs: )?`pip install ([^`]*)`", page.read_text(), re.M)
    return re.sub(r"'dropinf\[(.*)\]'", r"\1", said[1]).replace(",", " ").split() if said else []


def run(page):
    """Run its blocks as they stand, in order; the names that they make."""
    for name in needs(page):
        pytest.importorskip(MODULES.get(name, name), reason=f"{page.name} needs {name}")
    names = {"__name__": page.stem}
    for k, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {k}", "exec"), names)
    return names
