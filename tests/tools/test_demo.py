"""The demo on real data: it finds flipped labels, and says so truthfully."""

import re

import pytest

from dropinf.tools import demo, demo_text


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    import contextlib
    import io

    picture = tmp_path_factory.mktemp("demo") / "picture.png"
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        demo.main(picture, picture.with_name("report.html"))
    assert picture.stat().st_size > 10_000 and str(picture) in text.getvalue()
    assert "labelled 3" in picture.with_name("report.html").read_text()
    return text.getvalue()


def test_table(printed):
    aucs = {
        line[:32].strip(): float(line[32:39])
        for line in printed.splitlines()
        if re.match(r".{32} *[01]\.\d{3} ", line)
    }
    assert len(aucs) == 7
    dot_product = aucs.pop("gradient dot product, no inverse")
    assert all(auc > 0.75 for auc in aucs.values())
    assert aucs["Dropout, r = 1024 in all"] > dot_product


def test_stored_bytes_are_rows_times_width(printed):
    assert re.search(r"Dropout, r = 1024 in all .* 4,915,200\n", printed)  # 1200 * 1024 * 4
    assert re.search(r"Full .* 82,684,800\n", printed)  # 1200 * 17226 * 4


def test_digits():
    digits = demo.load_digits()
    given = digits.train.tensors[1]
    assert (given != digits.true_labels).equal(digits.flipped)
    assert int(digits.flipped.sum()) == 240 and len(digits.queries) == 200


def test_text(tmp_path, capsys, monkeypatch):
    """A few sentences of each topic: above chance, and a report with shaded words."""
    monkeypatch.setattr(demo_text, "EACH", 60)
    monkeypatch.setattr(demo_text, "ASKED", 8)
    demo_text.main(tmp_path / "report.html")
    printed = capsys.readouterr().out
    found = dict(re.findall(r"^(.{38}) +(\d\.\d\d)", printed, re.M))
    chance, *others = map(float, found.values())
    assert 1 / 6 - 0.01 < chance < 0.34 and len(others) == 3 and max(others) > chance
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in printed and '"tokens":[["' in page


def test_words_are_numbered():
    text = "one two three four"
    assert demo_text.split("It's 42, a b-c.") == [
        "it",
        "'",
        "s",
        "42",
        ",",
        "a",
        "b",
        "-",
        "c",
        ".",
    ]
    vocabulary = demo_text.words_of([text, text])
    assert demo_text.encode([text, "five one"], vocabulary).tolist() == [[2, 3, 4, 5], [1, 2, 0, 0]]
