"""No page of the manual says what another says, as far as words and figures show it.

The README may summarise, and the tutorial stands alone; both are left out.
"""

import itertools
import re
from collections import defaultdict

import manual_pages
from places import ROOT

WORDS = 8  # in a row, code aside, which chance does not make
FIGURES = 3  # of three decimals, in one line each
ALONE = [ROOT / "README.md", manual_pages.DOCS / "index.md"]
PAGES = [p for p in [*manual_pages.pages(), ROOT / "CONTRIBUTING.md"] if p not in ALONE]


def paragraphs(text):
    """Its paragraphs, lists and tables, without code, headings and the addresses of links."""
    text = re.sub(r"^```.*?^```|^#[^\n]*", "", text, flags=re.M | re.S)
    return re.split(r"\n\s*\n", re.sub(r"\]\([^)]*\)", "", text))


def phrases(text):
    """Every run of WORDS words."""
    for paragraph in paragraphs(text):
        words = [word.strip("._") for word in re.findall(r"[\w.%ᵀ⁻]+", paragraph.lower())]
        words = [word for word in words if word]
        yield from (" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))


def figures(text):
    """The figures of three decimals in each line, 0.589 and .589 being one."""
    for paragraph in paragraphs(text):
        for line in paragraph.splitlines():
            found = sorted(set(re.findall(r"(?<![\d.])\d*(\.\d{3})(?!\d)", line)))
            yield from map(" ".join, itertools.combinations(found, FIGURES))


def said_twice(texts):
    """{what: pages} of what stands on several of {page: text}."""
    where = defaultdict(set)
    for page, text in texts.items():
        for said in (*phrases(text), *figures(text)):
            where[said].add(page)
    return {said: sorted(pages) for said, pages in where.items() if len(pages) > 1}


def test_no_page_says_what_another_says():
    assert not said_twice({p.relative_to(ROOT).as_posix(): p.read_text() for p in PAGES})


def test_a_repetition_is_found():
    sentence = "The damping that is best\ngrows with [r](x.md), as one task shows."
    title, code = (
        "# A title of eight words that several pages have\n\n",
        "x = 1  # eight words, too",
    )
    once = f"{title}Said here.\n\n```python\n{code}, as the title is\n```\n"
    rows = {"a": "| MLP | .589 | 0.599 | .613 |", "b": "| of it | 0.589 | .599 | 0.1 | .613 |"}
    assert said_twice(rows) == {".589 .599 .613": ["a", "b"]}
    assert not said_twice({"a": once, "b": once, "c": "\n\n".join(sentence.split())})
    assert len(said_twice({"a": once + sentence, "b": f"- {sentence} And more."})) > 1
