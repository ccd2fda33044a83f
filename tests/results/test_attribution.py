"""Attributions against numpy's sort of the scores, and in every form that people take them in."""

import csv
import errno
import html.parser
import json
import os

import numpy as np
import pytest
import torch
from score_cases import plan_of, stores

import dropinf
from dropinf import RowStore, attribute, scores
from dropinf.results import Facts
from dropinf.results.contents import Lookup, shortened
from dropinf.solvers import Cholesky, Identity

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "\"quotes\" and 'quotes' & <b>",
    "\u202eright to left \u05d0\u05d1",
    "emoji \U0001f600\U0001f468\u200d\U0001f469",
    "\x1b[31mred\x00",
    "comma, and\nnew line",
    "x" * 100_000,
)


@pytest.fixture(scope="module")
def case():
    """A store of 30 rows, 5 queries, a solver; row 4 and query 2 are invalid."""
    store, queries = stores(30, 5, 6, 9)
    store = RowStore(store.rows, store.plan, torch.arange(30) != 4, ids=torch.arange(30) * 7)
    queries = RowStore(queries.rows, store.plan, torch.arange(5) != 2)
    return queries, store, Cholesky(0.3).fit(store)


def sorted_by_hand(found, k, sign):
    """Positions [m, k] by numpy, None for what is not known."""
    order = []
    for row in np.asarray(found, dtype=np.float64):
        known = np.flatnonzero(~np.isnan(row))
        best = known[np.argsort(-sign * row[known], kind="stable")][:k]
        order.append(best.tolist() if len(known) else [None] * k)
    return order


@pytest.mark.parametrize("k", [1, 4, 29, 30, 1000])
@pytest.mark.parametrize("relative", [False, True])
def test_both_ends_are_those_of_the_scores(case, k, relative):
    found = attribute(*case, k=k, relative=relative)
    whole = scores(*case, relative=relative)
    most = min(k, 29)
    for ranked, sign in ((found.top, 1), (found.bottom, -1)):
        expected = sorted_by_hand(whole, most, sign)
        assert ranked.ids == [[None if i is None else 7 * i for i in row] for row in expected]
        for q in (0, 1, 3, 4):
            assert ranked.indices[q].tolist() == expected[q]
            torch.testing.assert_close(ranked.scores[q], whole[q, expected[q]])
        assert ranked.scores[2].isnan().all() and ranked.errors is None
        with pytest.raises(IndexError):
            list(range(30))[ranked.indices[2, 0]]
    assert found.query_ids == [0, 1, 2, 3, 4] and len(found) == 5


def test_masks_give_means_and_errors(case):
    queries, store, _ = case
    parts = [(queries, store, Cholesky(d).fit(store)) for d in (0.1, 0.3, 1.0)]
    found = attribute(*map(list, zip(*parts, strict=True)), k=3)
    each = np.stack([scores(*part).double().numpy() for part in parts])
    mean, error = each.mean(0), each.std(0, ddof=1) / 3**0.5
    for ranked, sign in ((found.top, 1), (found.bottom, -1)):
        expected = sorted_by_hand(mean, 3, sign)
        assert ranked.indices[[0, 1, 3, 4]].tolist() == [expected[q] for q in (0, 1, 3, 4)]
        assert ranked.ids[2] == [None] * 3
        at = np.array(expected[0])
        np.testing.assert_allclose(ranked.scores[0], mean[0, at], rtol=1e-9)
        np.testing.assert_allclose(ranked.errors[0], error[0, at], rtol=1e-6)
    assert found.facts.masks == 3 and "error" in found.to_pandas().columns


def test_ties_are_in_the_order_of_the_store():
    store = RowStore(torch.ones(6, 4), plan_of(4))
    solver = Identity().fit(store)
    for parts in ((store, store, solver), ([store] * 2, [store] * 2, [solver] * 2)):
        found = attribute(*parts, k=3)
        assert found.top.indices[0].tolist() == found.bottom.indices[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("strings", [False, True])
def test_masks_of_other_examples_are_refused(strings):
    """As of a loader that shuffled anew: another example's score would be averaged in."""
    ids = [str(i) for i in range(6)] if strings else list(range(6))
    store, turned = (RowStore(torch.randn(6, 4), plan_of(4), ids=own) for own in (ids, ids[::-1]))
    positions = RowStore(torch.randn(6, 4), plan_of(4))
    solvers = [Cholesky().fit(store)] * 2
    with pytest.raises(
        ValueError, match="part 1 has examples of other ids than the first, or in ano"
    ):
        attribute([store, store], [store, turned], solvers)
    with pytest.raises(ValueError, match="part 1 has queries of other ids"):
        attribute([store, turned], [store, store], solvers)
    known = attribute([store, store], [store, store], solvers, k=1)
    assert known.top.scores.shape == (6, 1)
    if strings:
        with pytest.raises(ValueError, match="part 1 has examples of other ids"):
            attribute([store, store], [store, positions], solvers)


def test_refusals(case):
    queries, store, solver = case
    with pytest.raises(ValueError, match="k must be positive, got 0"):
        attribute(*case, k=0)
    with pytest.raises(ValueError, match=r"k must be positive, got 2\.5"):
        attribute(*case, k=2.5)
    with pytest.raises(ValueError, match="k must be positive, got '3'"):
        attribute(*case, k="3")
    for given, said in (
        (("rows", store, solver), "queries must be a RowStore, or several in a list, got str"),
        ((queries, None, solver), "store must be a RowStore, or several in a list, got N"),
        ((queries, store, Cholesky), "solver must be a Solver, or several in a list, got ABCMeta"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"attribute: {said}"):
            attribute(*given)
    none = RowStore(store.rows, store.plan, torch.zeros(len(store), dtype=torch.bool))
    for parts in ((queries, none, solver), ([queries] * 2, [none] * 2, [solver] * 2)):
        with pytest.raises(ValueError, match="attribute: no row of a store is valid"):
            attribute(*parts)
    with pytest.raises(ValueError, match=r"as many of each; got 2, 1 and 1"):
        attribute([queries, queries], store, solver)
    with pytest.raises(ValueError, match="got 0, 0 and 0"):
        attribute([], [], [])


def test_pandas_arrow_and_csv_say_the_same(case, tmp_path):
    pandas = pytest.importorskip("pandas")
    pyarrow = pytest.importorskip("pyarrow")
    found = attribute(*case, k=4)
    frame = found.to_pandas()
    columns = ["query", "side", "rank", "example", "position", "score"]
    assert list(frame.columns) == columns and len(frame) == 5 * 2 * 4
    one = frame[(frame["query"] == 3) & (frame.side == "bottom") & (frame["rank"] == 2)].iloc[0]
    assert one.example == found.bottom.ids[3][1] == 7 * one.position
    assert one.score == float(found.bottom.scores[3, 1])
    assert frame[frame["query"] == 2][["example", "position", "score"]].isna().all(axis=None)
    table = found.to_arrow()
    assert table.schema.field("example").type == pyarrow.int64()
    assert table.to_pylist() == [
        {k: None if pandas.isna(v) else v for k, v in row.items()}
        for row in frame.to_dict("records")
    ]
    made = {"unit": found.facts.unit, **dict(found.facts.rows())}
    assert frame.attrs == json.loads(table.schema.metadata[b"dropinf"]) == made
    found.to_csv(tmp_path / "found.csv")
    again = pandas.read_csv(tmp_path / "found.csv", dtype=dict(frame.dtypes))
    pandas.testing.assert_frame_equal(again, frame, check_exact=True)


def test_ids_that_are_strings(case, tmp_path):
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    queries, store, _ = case
    names = [*HOSTILE, *(f"text {i}" for i in range(30 - len(HOSTILE)))]
    named = RowStore(store.rows, store.plan, ids=names)
    found = attribute(queries, named, Cholesky().fit(named), k=30)
    assert sorted(found.top.ids[0]) == sorted(names)
    found.to_csv(tmp_path / "found.csv")
    with (tmp_path / "found.csv").open(newline="", encoding="utf-8") as file:
        read = [row["example"] for row in csv.DictReader(file)]
    frame = found.to_pandas()
    assert read[:30] == found.top.ids[0] == frame.example[:30].tolist()
    assert found.to_arrow()["example"].to_pylist()[:30] == read[:30]


class Tags(html.parser.HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_html_holds_text_and_no_tags_of_it(case, tmp_path):
    queries, store, _ = case
    named = RowStore(store.rows, store.plan, ids=[f"{HOSTILE[i % 7]}{i}" for i in range(30)])
    found = attribute(queries, named, Cholesky().fit(named), k=30)
    texts = {name: f"{HOSTILE[0]} of {name}" for name in named.ids}
    page = found.to_html(tmp_path / "page.html", texts)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    tags = Tags(page)
    assert set(tags.tags) <= {
        "html",
        "meta",
        "title",
        "body",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "p",
    }
    assert any(HOSTILE[0] in text for text in tags.texts) and "divided by n" in page
    assert found._repr_html_().count("<tr>") == 1 + 5 * 30


def test_a_terminal_gets_no_codes(case, capsys):
    queries, store, solver = case
    found = attribute(queries, store, solver, k=2)
    texts = {7 * i: HOSTILE[i % 7] for i in range(30)}
    found.show(texts, query_texts=["asked " + HOSTILE[4]] * 5)
    print(found.describe(texts), repr(found))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\u202e" not in printed and "\x00" not in printed
    assert max(map(len, printed.splitlines())) < 400
    assert r"asked \x1b[31mred\x00" in printed and "per example, of the summed loss" in printed
    assert f"solver: {solver!r}" in printed and "proof: not compared with autograd" in printed


def test_many_queries_are_cut_short_where_people_read(case):
    _, store, solver = case
    many = RowStore(torch.randn(200, store.plan.width).double(), store.plan)
    found = attribute(many, store, solver, k=2)
    assert "... and 180 queries more" in str(found) and len(str(found).splitlines()) < 70
    assert found.to_html().count("<tr>") == 401


def test_pictures(case):
    pytest.importorskip("matplotlib")
    found = attribute(*case, k=2)
    images = {7 * i: torch.rand(3, 4, 5) if i % 2 else np.zeros((4, 5)) for i in range(30)}
    figure = found.show(images=images, query_images=[np.ones((4, 5, 3))] * 5)
    assert len(figure.axes) == 25
    assert [len(axis.images) for axis in figure.axes[:5]] == [1] * 5
    assert figure.axes[1].get_title().startswith(f"{found.top.ids[0][0]}\n")
    assert not figure.axes[11].images  # of the invalid query


@pytest.mark.parametrize("form", ["to_csv", "to_html"])
def test_nothing_is_half_written(case, form, tmp_path, monkeypatch):
    found = attribute(*case, k=2)
    getattr(found, form)(tmp_path / "there")
    before = (tmp_path / "there").read_bytes()
    write = os.fsync

    def full(descriptor):
        write(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name in ("there", "new"):
        with pytest.raises(OSError, match="No space left"):
            getattr(attribute(*case, k=3), form)(tmp_path / name)
    assert (tmp_path / "there").read_bytes() == before
    assert os.listdir(tmp_path) == ["there"]


def test_a_missing_extra_is_named(case, monkeypatch):
    found = attribute(*case, k=2)
    for module, call, extra in (
        ("pandas", found.to_pandas, "report"),
        ("pyarrow", found.to_arrow, "arrow"),
        ("matplotlib.figure", lambda: found.show(images=[0] * 300), "report"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, module, None)
            name = module.partition(".")[0]
            with pytest.raises(ImportError, match=rf"needs {name}: pip install 'dropinf\[{extra}"):
                call()


def test_contents():
    assert Lookup(["a", "b"], "texts")(1) == "b" and Lookup({"x": 1}, "texts")("x") == 1
    assert Lookup(lambda i: i * 2, "texts")(4) == 8 and Lookup(torch.arange(3), "images")(2) == 2
    assert Lookup(None, "texts")(3) is None and Lookup(["a"], "texts")(None) is None
    assert not Lookup(None, "texts") and Lookup([], "texts")
    for contents, id_, words in (
        (["a"], 1, "texts has nothing for id 1"),
        (["a"], -1, "texts has nothing for id -1"),
        (["a"], "x", "ids are strings.*give a mapping"),
        ({"x": 1}, "y", "texts has nothing for id 'y'"),
    ):
        with pytest.raises(ValueError, match=words):
            Lookup(contents, "texts")(id_)
    with pytest.raises(ValueError, match="got a str; put it in a list"):
        Lookup("abc", "texts")
    series = pytest.importorskip("pandas").Series(["a", "b"], index=[1, 0])
    assert Lookup(series, "texts")(1) == "b"  # by position, not by its label
    assert shortened("a\n b" * 30, 10) == "a ba ba..." and shortened("a\tb") == "a b"


def test_facts_are_those_of_the_run(case):
    facts = attribute(*case, k=2).facts
    assert isinstance(facts, Facts)
    assert (facts.examples, facts.invalid, facts.queries, facts.width) == (30, 1, 5, 15)
    said = dict(facts.rows())
    assert said["training examples"] == "30, 1 of them invalid" and said["compression"] == "Full()"
    assert said["solver"] == "Cholesky(damping=0.3) fitted on 29 rows"  # one is invalid
    assert said["versions"].startswith(f"dropinf {dropinf.__version__}, torch ")


def test_stores_and_solvers_say_what_they_are(case, tmp_path):
    _, store, solver = case
    said = dict(store.describe().rows)
    assert (said["rows"], said["invalid"], said["width"]) == ("30", "1", "15")
    assert said["kept in"] == "float64" and said["path"] == "in memory"
    store.save(tmp_path / "store")
    assert dict(RowStore.load(tmp_path / "store").describe().rows)["path"].endswith("store")
    assert repr(store).startswith("RowStore(30 rows of width 15 in float64 in memory")
    assert repr(Cholesky(0.5, absolute=True)) == "Cholesky(damping=0.5, absolute=True)"
    assert (
        repr(Identity()) == "Identity()" and repr(Identity(cosine=True)) == "Identity(cosine=True)"
    )
    solver.save(tmp_path / "solver")
    loaded = Cholesky.load(tmp_path / "solver")
    assert "Cholesky(damping=0.3" in repr(loaded) and repr(loaded).endswith(") fitted on 29 rows")
    for made in ("Dropout(r=7)", "Dropout(rate=0.5, seed=3)", "Sketch(r=7, s=2)", "Full()"):
        assert repr(eval(f"dropinf.{made}")) == made
