"""Every number of docs/results.md stands in what the experiment of its section wrote."""

import json
import re

import pytest
from places import ROOT

PAGE = ROOT / "docs" / "results.md"
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?|(?<![\w.])\.\d+")


def sections(text):
    """(title, text) of each "## " section."""
    parts = re.split(r"^## +(.*)$", text, flags=re.M)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def numbers(text):
    """Of a text, but for code, addresses of links, and titles of papers: 0.5 and .5 are one."""
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv [\d.]+", " ", text, flags=re.S)
    return {found.replace(",", "").lstrip("0") or "0" for found in NUMBER.findall(text)}


def recorded(section):
    """What the files say that the section links to, in `bench/results/`."""
    known = set()
    for name in re.findall(r"\]\(\.\./bench/results/([\w-]+)\.md\)", section):
        page = (ROOT / "bench" / "results" / f"{name}.md").read_text()
        data = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
        known |= numbers(page.replace("`", " ")) | numbers(json.dumps(data.get("settings", {})))
    return known


def unknown_numbers(section):
    """Small counts in words of the text (1 to 9) are let pass."""
    few = set("123456789")
    return numbers(section) - recorded(section) - few


@pytest.mark.parametrize(
    "title, text",
    [
        pytest.param(*each, id=each[0])
        for each in (sections(PAGE.read_text()) if PAGE.exists() else [])
    ],
)
def test_numbers(title, text):
    assert "](../bench/results/" in text, f"{title}: leads to no result"
    assert not unknown_numbers(text)


def test_a_number_of_nowhere_is_found():
    name = next(iter(re.findall(r"results/([\w-]+)\.md", PAGE.read_text())))
    text = f"[page](../bench/results/{name}.md): it was .98765."
    assert unknown_numbers(text) == {".98765"}
