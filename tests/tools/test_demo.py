"""The demo on real data: it finds flipped labels, and says so truthfully."""

import re

import pytest
import torch

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
    """Self-influence finds nearly all wrong labels, mean influence most."""
    found = {
        line[:32].strip(): tuple(map(float, re.findall(r"[01]\.\d{3}", line[32:49])))
        for line in printed.splitlines()
        if re.match(r".{32} *[01]\.\d{3}( |$)", line)
    }
    assert len(found) == 7 and found.pop("loss value")[0] > 0.98
    dot_product = found["gradient dot product, no inverse"][1]
    assert all(itself > 0.98 and queries > 0.75 for itself, queries in found.values())
    assert found["Dropout, r = 1024 in all"][1] > dot_product


def test_suggestions(printed):
    """The model's own second thought is right more often than the queries that are harmed."""
    thought, harmed = map(float, re.findall(r"^  the label .* (\d+\.\d)%$", printed, re.M))
    assert 100 > thought > harmed > 75


def test_most_harmed_and_second_thoughts():
    """By hand: an example given as 1 harms the queries of 2 most; the model takes it for a 3."""
    data = torch.utils.data.TensorDataset(torch.eye(10)[:1], torch.tensor([1]))
    asked = torch.utils.data.TensorDataset(torch.zeros(10, 10), torch.arange(10))
    digits = demo.Digits(data, asked, torch.tensor([2]), torch.tensor([True]))
    on_queries = torch.tensor([[1.0, -9, -5, 2, 0, 0, 0, 0, 0, 0]]).T
    assert demo.most_harmed(digits, on_queries).tolist() == [2]
    model = torch.nn.Linear(10, 10, bias=False)
    with torch.no_grad():
        model.weight.zero_()[:, 0] = torch.tensor([0.0, 9, 1, 5, 0, 0, 0, 0, 0, 0])
    assert demo.second_thoughts(model, digits).tolist() == [3]


def test_stored_bytes_are_rows_times_width(printed):
    assert re.search(r"Dropout, r = 1024 in all .* 4,915,200\n", printed)  # 1200 * 1024 * 4
    assert re.search(r"Full .* 82,684,800\n", printed)  # 1200 * 17226 * 4


def test_digits():
    digits = demo.load_digits()
    given = digits.train.tensors[1]
    assert (given != digits.true_labels).equal(digits.flipped)
    assert int(digits.flipped.sum()) == 240 and len(digits.queries) == 200


@pytest.mark.more
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
