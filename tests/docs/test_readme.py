"""The README is a page, and what it claims stands in the files that it names."""

import re

import pytest
from places import ROOT

README = (ROOT / "README.md").read_text()
CLAIMS = [
    (claim, file)
    for claim, file in re.findall(r"^\| (.+?) \| .+? \| \[.+?\]\((.+?)\) \|$", README, re.M)
]


def lacking(claim, text):
    """Decimal numbers of the claim that the text has not."""
    named = set(re.findall(r"(?<![\w.-])\d+\.\d+(?!\w)", claim))
    return {n for n in named if not re.search(rf"(?<![\d.]){re.escape(n)}(?![\d])", text)}


@pytest.mark.parametrize("claim, file", CLAIMS)
def test_claim(claim, file):
    assert re.search(r"\d\.\d", claim)
    assert not lacking(claim, (ROOT / file).read_text())


def test_lengths():
    assert len(CLAIMS) == 5
    assert lacking("it takes 1.23 times as long", "4 of 11.23 and 1.234") == {"1.23"}
    assert README.count("\n") <= 150
    assert (ROOT / "CONTRIBUTING.md").read_text().count("\n") <= 120
