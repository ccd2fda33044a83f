"""Texts of six kinds out of packages, as documents: nothing is downloaded.

    pip install -c constraints.txt --no-deps gensim chatterbot-corpus
    apt install bible-kjv r-cran-janeaustenr

(or `dpkg -x` of these two and of bible-kjv-text into a folder that DEBIAN_ROOT names). The standard
library is always there.
"""

import bz2
import html
import os
import re
import struct
import subprocess
import sysconfig
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

LEAST = 600  # characters of a document


def wikipedia() -> list[str]:
    """Articles of the English Wikipedia, without their markup."""
    dump = _in_package("gensim", "test/test_data") / (
        "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    )
    with bz2.open(dump) as file:
        pages = [
            element.text
            for _, element in ElementTree.iterparse(file)
            if element.tag.endswith("}text") and element.text
        ]
    return [plain(page) for page in pages if not page.startswith("#REDIRECT")]


def news() -> list[str]:
    """Of the Australian Broadcasting Corporation, 2001: Lee's corpus, a line each."""
    file = _in_package("gensim", "test/test_data") / "lee_background.cor"
    return file.read_text(encoding="utf-8").splitlines()


def code() -> list[str]:
    """Modules of Python's standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def dialogue() -> list[str]:
    """Of chatterbot-corpus in English: exchanges that follow each other, each once.

    Without those about coding, whose answers are code.
    """
    import yaml

    documents, seen = [], set()
    for file in sorted(_in_package("chatterbot_corpus", "data/english").glob("*.yml")):
        document = ""
        if file.stem == "coding":
            continue
        for exchange in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            text = "\n".join(str(line).strip() for line in exchange)
            if text in seen:
                continue
            seen.add(text)
            document += text + "\n"
            if len(document) >= LEAST:
                documents.append(document)
                document = ""
    return documents


def king_james() -> list[str]:
    """Chapters of the King James Bible, 1611, by Debian's program that unpacks it."""
    root = _debian()
    program, text = root / "usr/bin/bible", root / "usr/lib"
    if not (program.exists() and (text / "bible.data").exists()):
        raise FileNotFoundError("apt install bible-kjv")
    command = [program, "-p", text, "-f", "Gen1:1-Rev22:21"]
    verses = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    chapters: dict[str, list[str]] = {}
    for line in verses.splitlines():
        place, _, verse = line.partition(" ")
        chapters.setdefault(place.partition(":")[0], []).append(verse)
    return ["\n".join(chapter) for chapter in chapters.values()]


def austen() -> list[str]:
    """Chapters of Jane Austen's six novels, out of Debian's r-cran-janeaustenr."""
    file = _debian() / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    if not file.exists():
        raise FileNotFoundError("apt install r-cran-janeaustenr")
    left, chapters = file.read_bytes(), []
    while left:
        unpacked = zlib.decompressobj()
        lines = strings_of(unpacked.decompress(left[4:]))  # after the length
        left = unpacked.unused_data
        text = "\n".join(lines)
        parts = re.split(r"^(?:CHAPTER|Chapter) [IVXLC0-9]+\.?$", text, flags=re.MULTILINE)
        chapters += [part.strip() for part in parts[1:]]
    return chapters


SOURCES: dict[str, Callable[[], list[str]]] = {
    "Wikipedia": wikipedia,
    "news": news,
    "code": code,
    "dialogue": dialogue,
    "King James": king_james,
    "Austen": austen,
}


def load() -> dict[str, list[str]]:
    """Documents of every source that is there; says which is not, and how to get it."""
    found = {}
    for name, documents in SOURCES.items():
        try:
            long_enough = [text for text in documents() if len(text) >= LEAST]
        except (FileNotFoundError, ModuleNotFoundError) as missing:
            print(f"{name} is left out: {missing}")
            continue
        found[name] = long_enough
    return found


def plain(page: str) -> str:
    """Wikitext without templates, tables, references, files and the marks of links and headings."""
    page = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>", "", page, flags=re.DOTALL)
    inner = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", re.DOTALL)
    while inner.search(page):
        page = inner.sub("", page)
    page = re.sub(r"\[\[(?:File|Image|Category)(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", page)
    page = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", page)
    page = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", page)
    page = re.sub(r"<[^<>]+>|'{2,}|={2,}", "", page)
    lines = (line.strip("*#:; ") for line in html.unescape(page).splitlines())
    return "\n".join(line for line in lines if len(line) > 40)  # what is no list or heading


def strings_of(serialised: bytes) -> list[str]:
    """A vector of strings as R 3.5 and later writes it (R Internals, section 1.8)."""
    if serialised[:2] != b"X\n" or struct.unpack(">i", serialised[2:6]) != (3,):
        raise ValueError("strings_of: not R's binary format of version 3")
    (encoding,) = struct.unpack(">i", serialised[14:18])
    at = 18 + encoding
    kind, count = struct.unpack(">ii", serialised[at : at + 8])
    if kind & 0xFF != 16:
        raise ValueError(f"strings_of: R's type {kind & 0xFF} is no vector of strings")
    at, found = at + 8, []
    for _ in range(count):
        _, length = struct.unpack(">ii", serialised[at : at + 8])
        found.append(serialised[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return found


def _in_package(package: str, folder: str) -> Path:
    found = find_spec(package)
    if found is None:
        name = package.replace("_", "-")
        raise ModuleNotFoundError(f"pip install -c constraints.txt --no-deps {name}")
    return Path(found.submodule_search_locations[0]) / folder


def _debian() -> Path:
    return Path(os.environ.get("DEBIAN_ROOT", "/"))
