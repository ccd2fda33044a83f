"""bench/experiments/texts.py: documents of each source, and and the two formats it reads itself."""

import struct

import pytest
import texts

STARTS = {  # of what stands in each source for sure
    "King James": "In the beginning God created the heaven and the earth.",
    "Austen": "It is a truth universally acknowledged",
    "Wikipedia": "Anarchism is a political philosophy",
    "news": "Hundreds of people have been forced to vacate their homes",
    "dialogue": "You are immortal",
    "code": "import ",
}


@pytest.mark.parametrize("name", texts.SOURCES)
def test_a_source(name):
    try:
        documents = texts.SOURCES[name]()
    except (FileNotFoundError, ModuleNotFoundError) as missing:
        pytest.skip(str(missing))
    assert sum(len(text) >= texts.LEAST for text in documents) >= 90
    assert any(STARTS[name] in text for text in documents)
    assert len(set(documents)) > 0.95 * len(documents)


def test_what_is_missing_is_left_out_and_said(monkeypatch, capsys):
    def gone():
        raise FileNotFoundError("apt install it")

    some = {"here": lambda: ["x" * texts.LEAST, "too short"], "gone": gone}
    monkeypatch.setattr(texts, "SOURCES", some)
    assert texts.load() == {"here": ["x" * texts.LEAST]}
    assert capsys.readouterr().out == "gone is left out: apt install it\n"


def test_packages_that_are_missing_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    monkeypatch.setenv("DEBIAN_ROOT", str(tmp_path))
    for name, way in {
        "Wikipedia": "pip install -c constraints.txt --no-deps gensim",
        "news": "pip install -c constraints.txt --no-deps gensim",
        "dialogue": "pip install -c constraints.txt --no-deps chatterbot-corpus",
        "King James": "apt install bible-kjv",
        "Austen": "apt install r-cran-janeaustenr",
    }.items():
        with pytest.raises((FileNotFoundError, ModuleNotFoundError), match=f"^{way}$"):
            texts.SOURCES[name]()


def test_wikitext():
    page = (
        "{{Infobox|a={{b}}}}'''Ada''' was an [[England|English]] [[mathematician]].<ref>x</ref>\n"
        "[[File:Ada.jpg|thumb|a [[portrait]]]]\n== Life ==\n"
        "She wrote to [http://example.org Charles Babbage] &amp; others about the engine.\n"
        "{| class=x\n|-\n| a cell that is long enough to stay if tables did\n|}\n* [[Short]]"
    )
    # Lines as short as a heading or a list's go.
    assert texts.plain(page) == "She wrote to Charles Babbage & others about the engine."
    long = (
        "'''Ada''' was an [[England|English]] [[mathematician]], the first programmer<ref name=a/>."
    )
    assert texts.plain(long) == "Ada was an English mathematician, the first programmer."


def test_strings_of_r():
    def string(text):
        return struct.pack(">ii", 0x40009, len(text.encode())) + text.encode()

    head = b"X\n" + struct.pack(">iii", 3, 0x40201, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
    lines = ["CHAPTER I", "", "naïve"]
    vector = struct.pack(">ii", 16, 3) + b"".join(map(string, lines))
    assert texts.strings_of(head + vector) == lines
    with pytest.raises(ValueError, match="type 13 is no vector"):
        texts.strings_of(head + struct.pack(">ii", 13, 1))
    with pytest.raises(ValueError, match="version 3"):
        texts.strings_of(b"X\n" + struct.pack(">i", 2) + vector)
