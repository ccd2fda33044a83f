"""The report as a file, and as a person with a browser finds it."""

import base64
import errno
import hashlib
import json
import os
import re
import sys
import time

import numpy as np
import pytest
import torch
from score_cases import stores

import dropinf
from dropinf import RowStore, attribute, write_report
from dropinf.reporting import charts, page_contents
from dropinf.scoring import Agreement, Stability
from dropinf.solvers import Cholesky, DampingChoice

sys.path.insert(0, os.path.dirname(__file__))
from browser import chromium, opened

pytest.importorskip("jinja2")

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    "\" onmouseover='window.hacked = 1' & <b>bold</b>",
    "\u202eright to left \u05d0\u05d1\u05d2",
    "emoji \U0001f600\U0001f468\u200d\U0001f469, \ud83d alone, NUL \x00, \u2028 \u2029",
    "long " + "word " * 20_000,
    "{{ 7 * 7 }} {% raw %} javascript:window.hacked=1",
]


@pytest.fixture(scope="module")
def found():
    """12 queries, of which one is invalid; 60 training examples."""
    store, queries = stores(60, 12, 6, 9)
    queries = RowStore(queries.rows, store.plan, torch.arange(12) != 5)
    solver = Cholesky(0.3).fit(store)
    scores = dropinf.scores(queries, store, solver)
    own = dropinf.self_influence(store, solver)
    by = dropinf.scores(queries, store, solver, by="layer")
    return attribute(queries, store, solver, k=3), own, scores, by


def everything(found):
    """All that a report can be given."""
    _, own, scores, by = found
    rng = np.random.default_rng(0)
    agreements = (Agreement(0.4, 0.1, 0.3, 0.1), Agreement(0.9, 0.02, 0.85, 0.03))
    return {
        "texts": [f"{HOSTILE[i % 8]} {i}" for i in range(60)],
        "query_texts": [f"asked {HOSTILE[i % 8]}" for i in range(12)],
        "images": [rng.random((8, 8)) for _ in range(60)],
        "query_images": [torch.rand(3, 5, 6) for _ in range(12)],
        "tokens": lambda q, i: [(f"{HOSTILE[0]} ", 2.0), ("and ", -1.0), (str(i), 0.0)],
        "self_influence": own,
        "scores": scores,
        "truth": np.arange(60) % 5 == 0,
        "layers": {"first": by[0], "<b>second</b>": by[1]},
        "stability": Stability((64, 256), (128, 512), agreements, 3, 10),
        "sweep": damping_choice(torch.tensor([0.2, 0.5, 0.4]), 0.01, 0.1, 1.0),
        "title": "<script>window.hacked = 1</script> & \ud83d",
    }


def damping_choice(values, *dampings):
    errors = torch.full_like(values, torch.nan)
    return DampingChoice(0.1, values, errors, dampings, "metric", at_edge=False)


def data_of(path):
    """What the page was given."""
    text = path.read_text("utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_the_page_has_the_scores_and_nothing_of_the_data_is_markup(found, tmp_path):
    path = write_report(tmp_path / "report.html", found[0], **everything(found))
    text, data = path.read_text("utf-8"), data_of(path)
    assert path == tmp_path / "report.html" and "window.hacked = 1</script>" not in text
    assert text.count("<script") == text.count("</script>") == 2 and "<img" not in text
    assert not re.search(r"(src|href)=\"(?!#)", text)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    for element, name in (
        (r"<script>(.*?)</script>", "script"),
        (r"<style>(.*?)</style>", "style"),
    ):
        inside = re.search(element, text, re.S)[1].encode()
        digest = base64.b64encode(hashlib.sha256(inside).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    attribution, own, scores, _ = found
    for q, query in enumerate(data["queries"]):
        shown = [[each["id"], each["score"]] for each in query["top"]]
        ids = [i for i in attribution.top.ids[q] if i is not None]
        assert shown == [[i, float(scores[q, i])] for i in ids] and len(shown) == 3 * (q != 5)
    assert data["suspicious"]["own"] == own.tolist()
    np.testing.assert_allclose(data["suspicious"]["mean"], np.nanmean(scores, 0), rtol=1e-9)
    assert data["contents"][data["suspicious"]["contents"][6]]["text"] == f"{HOSTILE[6]} 6"
    kinds = [chart["kind"] for chart in data["charts"]]
    assert kinds == ["histogram", "histogram", "bars", "lines", "lines"]
    assert (
        sum(data["charts"][1]["counts"]) == 11 * 60
        and "60 are not known" in data["charts"][1]["note"]
    )


def test_the_least_that_a_report_can_have(found, tmp_path):
    data = data_of(write_report(tmp_path / "report.html", found[0]))
    assert data["suspicious"] is None and not data["charts"] and len(data["tables"]) == 1
    assert ["queries", "12"] in data["tables"][0]["rows"]


def test_area_under_the_curve():
    """Against counting pairs, with ties, and values that are not known."""
    rng = np.random.default_rng(1)
    wrong, values = rng.random(50) < 0.3, rng.integers(0, 9, 50).astype(float)
    values[3] = np.nan
    known = ~np.isnan(values)
    pairs = [(a > b) + (a == b) / 2 for a in values[wrong & known] for b in values[~wrong & known]]
    for truth, said in ((wrong, f"{np.mean(pairs):.3f}"), (np.zeros(50, dtype=bool), "not known")):
        assert charts.finding(truth, torch.from_numpy(values), None)["rows"][1][1] == said
    table = charts.finding([True, False, False], torch.tensor([3.0, 1, 2]), [-1.0, 2.0, None])
    assert [row[1] for row in table["rows"]] == ["1 of 3", "1.000", "1.000"]


def test_shares_are_of_mean_sizes():
    parts = {"a": torch.tensor([[1.0, -3.0]]), "b": torch.tensor([[torch.nan, 6.0]])}
    chart = charts.shares(parts)
    assert chart["names"] == ["b", "a"] and chart["values"] == [0.75, 0.25]


def test_images():
    pictures = pytest.importorskip("PIL.Image")
    import io

    def read(uri):
        return np.asarray(pictures.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))

    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    uri = page_contents.data_uri(grey)
    assert np.array_equal(read(uri), grey)
    assert np.array_equal(read(page_contents.data_uri(grey / 255)), grey)
    assert np.array_equal(read(page_contents.data_uri(grey[None])), grey)
    colours = torch.randint(256, (3, 5, 6), dtype=torch.uint8)
    assert np.array_equal(read(page_contents.data_uri(colours)), colours.permute(1, 2, 0).numpy())
    assert page_contents.data_uri(base64.b64decode(uri.partition(",")[2])) == uri
    for wrong, words in (
        (b"GIF89a", "must be a PNG"),
        (grey.astype(float), "must be from 0 to 1"),
        (np.full((2, 2), np.nan), "must be from 0 to 1"),
        (np.zeros((2, 3, 4, 5)), r"must be \[H, W\] or \[H, W, 3\], got \[2, 3, 4, 5\]"),
        (np.zeros((0, 3)), r"got \[0, 3\]"),
    ):
        with pytest.raises(ValueError, match=words):
            page_contents.data_uri(wrong)


def test_later_texts_are_cut_when_the_page_is_full(monkeypatch):
    monkeypatch.setattr(page_contents, "_WHOLE_BYTES", 1000)
    contents = page_contents.PageContents(["a" * 900, "b" * 900, "c" * 50], None, "texts", "images")
    assert [contents.number(i) for i in (0, 1, 2, 1)] == [0, 1, 2, 1]
    assert [len(each["text"]) for each in contents.found] == [900, 200, 50]
    assert [each.get("cut") for each in contents.found] == [None, True, None]


def test_ids_that_javascript_would_round():
    assert page_contents.plain(2**53 - 1) == 2**53 - 1
    assert page_contents.plain(2**60 + 1) == str(2**60 + 1)


def test_what_is_no_attribution(found, tmp_path):
    with pytest.raises(TypeError, match=r"needs what dropinf\.attribute returned, got list"):
        write_report(tmp_path / "report.html", [found])
    with pytest.raises(TypeError, match="path must name a file, got int"):
        write_report(5, found)


def test_refusals(found, tmp_path, monkeypatch):
    attribution, own, scores, _ = found
    path = tmp_path / "report.html"
    for given, words in (
        ({"self_influence": own, "ids": range(9)}, "60 self-influences and 9 ids"),
        ({"self_influence": own, "truth": [True]}, "60 self-influences and 1 truth"),
        ({"self_influence": own, "scores": scores[:, :4]}, "and 4 columns of scores"),
        ({"texts": ["only one"]}, "texts has nothing for id"),
    ):
        with pytest.raises(ValueError, match=words):
            write_report(path, attribution, **given)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"needs jinja2: pip install 'dropinf\[report\]'"):
        write_report(path, attribution)
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_the_old_report(found, tmp_path, monkeypatch):
    path = write_report(tmp_path / "report.html", found[0])
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(path, found[0], title="another")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["report.html"]


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def report(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    return write_report(path, found[0], **everything(found))


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_errors_nothing_runs_and_nothing_is_wider_than_the_screen(
    browser, report, width, scheme
):
    with opened(browser, report, width, scheme=scheme) as page:
        for tab in ("Queries", "Suspicious", "Charts", "How it was made"):
            page.get_by_role("tab", name=tab).click()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("section:visible").count() == 1
        assert page.evaluate("window.hacked") is None
        assert page.locator("b, main script").count() == 0
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        page.locator("#theme").click()
        assert page.evaluate("document.documentElement.dataset.theme") != scheme


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_opens_at_its_top_and_at_the_tab_of_its_address(browser, report, width):
    with opened(browser, report, width) as page:
        assert page.evaluate("scrollY") == 0
        for tab in ("Suspicious", "Queries"):
            page.get_by_role("tab", name=tab).click()
            address = page.url
            page.goto("about:blank")
            page.goto(address)
            assert page.evaluate("scrollY") == 0
            assert page.get_by_role("tab", name=tab).get_attribute("aria-selected") == "true"


def test_a_query_is_opened_searched_and_stepped_through(browser, report, found):
    attribution = found[0]
    with opened(browser, report) as page:
        shown = page.locator("#detail .example .id").all_inner_texts()
        assert shown == [str(i) for i in attribution.top.ids[0] + attribution.bottom.ids[0]]
        assert HOSTILE[0] in page.locator("#detail .query").inner_text()
        page.locator(".list .row").nth(2).click()
        assert page.locator("#open-query").inner_text() == "Query 2"
        page.keyboard.press("j")
        assert page.locator("#open-query").inner_text() == "Query 3"
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowUp")
        assert page.locator("#open-query").inner_text() == "Query 1"
        page.locator("#theme").focus()
        page.keyboard.press("/")
        page.keyboard.type("right to left")
        assert page.locator(".list .row").count() == 1
        assert page.locator("#open-query").inner_text() == "Query 4"
        page.keyboard.press("Escape")
        assert page.locator(".list .row").count() == 12
        page.locator(".list .row").nth(5).click()
        assert "This query is invalid" in page.locator("#detail").inner_text()


def test_tokens_are_shaded_by_their_share(browser, report):
    with opened(browser, report) as page:
        marks = page.locator("#detail .example").first.locator("mark")
        assert marks.first.inner_text().startswith("<script>")
        shades = marks.evaluate_all("all => all.map(each => each.style.background)")
        assert "0.6)" in shades[0] and "help" in shades[0]
        assert "0.3)" in shades[1] and "harm" in shades[1] and shades[2].endswith(" 0)")


def test_long_texts_are_folded(browser, report):
    with opened(browser, report) as page:
        page.locator(".list .row").nth(6).click()
        body = page.locator("#detail .query .text")
        assert len(body.inner_text()) == 600
        page.locator("#detail .query .more").click()
        assert len(body.inner_text()) > 100_000
        page.locator("#detail .query .more").click()
        assert len(body.inner_text()) == 600


def test_suspicious_examples_are_sorted_searched_and_opened(browser, report, found):
    own = found[1].numpy()
    with opened(browser, report) as page:
        page.get_by_role("tab", name="Suspicious").click()
        section = page.locator("#suspicious")
        ids = section.locator(".row .id")
        order = np.argsort(-own)
        assert ids.first.inner_text() == str(order[0])
        section.get_by_role("button", name="self-influence").click()
        assert ids.first.inner_text() == str(order[-1])
        section.get_by_role("button", name="example").click()
        section.get_by_role("button", name="example").click()
        assert ids.all_inner_texts()[:3] == ["0", "1", "2"]
        section.get_by_role("searchbox").fill("emoji")
        assert section.get_by_role("status").inner_text() == "7 of 60 training examples"
        assert ids.first.inner_text() == "5"
        section.get_by_role("listbox").focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        dialog = page.locator("dialog")
        assert "Training example 13" in dialog.inner_text() and "emoji" in dialog.inner_text()
        page.keyboard.press("Escape")
        assert not dialog.is_visible()
        section.get_by_role("searchbox").fill("nowhere to be found")
        assert "Nothing matches" in section.inner_text()


def test_ten_thousand_rows_without_lag(browser, found, tmp_path):
    """Drawing, sorting, searching and scrolling; what is in the page stays little."""
    n = 10_000
    own = torch.from_numpy(np.random.default_rng(0).permutation(n).astype(np.float64))
    path = write_report(
        tmp_path / "large.html",
        found[0],
        texts=lambda i: f"example {i} " + "some text " * 20,
        self_influence=own,
    )
    with opened(browser, path) as page:
        page.get_by_role("tab", name="Suspicious").click()
        section = page.locator("#suspicious")
        assert section.locator(".row").count() < 60
        start = time.perf_counter()
        section.get_by_role("button", name="self-influence").click()
        first = section.locator(".row .value").first.inner_text()
        section.get_by_role("searchbox").fill("example 77")
        found_rows = section.get_by_role("status").inner_text()
        section.get_by_role("searchbox").fill("")
        section.get_by_role("listbox").focus()
        page.keyboard.press("End")
        last = section.locator(".row .value").last.inner_text()
        # 4 s with everything else on the machine; a list of 10,000 elements takes longer to draw.
        assert time.perf_counter() - start < 4
        assert (first, last) == ("0", "9999") and found_rows.startswith("111 of 10,000")
        assert section.locator(".row").count() < 60
        times = page.evaluate(
            """async () => {
                const box = document.querySelector("#suspicious .rows"), times = [];
                for (let i = 0; i < 20; i++) {
                    const start = performance.now();
                    box.scrollTop = i * 15000;
                    await new Promise((done) => requestAnimationFrame(done));
                    await new Promise((done) => requestAnimationFrame(done));
                    times.push(performance.now() - start);
                }
                return times.sort((a, b) => a - b);
            }"""
        )
        assert times[10] < 200, times
