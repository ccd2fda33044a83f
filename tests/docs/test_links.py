"""Links between the pages lead to something, on a disk; `make docs` checks them on the site."""

import importlib.util
import re

import manual_pages
import pytest
from places import ROOT

TEXTS = [*manual_pages.pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
_spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)
MADE = {"options.md", *(f"reference/{name}.md" for name in generate.REFERENCE)}


def links(text):
    """(file, heading) of each link, either of which may be missing; without those of the web."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)
    found = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text)
    return [(file, heading) for file, heading in found if not re.match(r"\w+:", file)]


def headings(text):
    """The names that mkdocs gives them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    plain = (re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles)
    return {re.sub(r"[\s-]+", "-", title) for title in plain}


def broken(page, text):
    for file, heading in links(text):
        target = (page.parent / file).resolve() if file else page
        if (
            target.is_relative_to(manual_pages.DOCS)
            and str(target.relative_to(manual_pages.DOCS)) in MADE
        ):
            continue
        lost = heading and target.suffix == ".md" and target.exists()
        if not target.exists() or (lost and heading not in headings(target.read_text())):
            yield f"{file}#{heading}"


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    assert not list(broken(page, page.read_text()))


def test_broken_ones_are_found():
    page = ROOT / "README.md"
    text = "[a](docs/no.md) [b](docs/index.md#no) [c](docs/index.md#install) [d](docs/options.md)"
    assert list(broken(page, text)) == ["docs/no.md#", "docs/index.md#no"]


def test_every_public_name_is_in_the_reference():
    import dropinf

    shown = {name for _, names in generate.REFERENCE.values() for name in names}
    assert {*dropinf.__all__} - {"solvers"} <= shown
    solvers = {f"solvers.{name}" for name in dropinf.solvers.__all__} - {"solvers.choose_damping"}
    assert solvers <= shown
