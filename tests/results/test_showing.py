"""What people read beside the numbers: their unit, which is true, and how they were made."""

import html

import numpy as np
import pytest
import torch
from score_cases import plan_of, stores

import dropinf
from dropinf import RowStore, attribute
from dropinf.results.showing import _array
from dropinf.solvers import Cholesky, Identity
from dropinf.text_table import Table, width_of


@pytest.mark.parametrize(
    "solver, options, unit",
    [
        (Cholesky(), {}, "query's loss by about its score / n, up where the score is positive"),
        (Cholesky(), {"relative": True}, "divided by the root of the example's self-influence"),
        (Identity(), {}, "the product of two gradients: a step of size s"),
        (Identity(cosine=True, max_bytes=10**9), {}, "the cosine of two gradients, from -1 to 1"),
    ],
)
def test_every_form_says_the_unit(solver, options, unit, capsys, tmp_path):
    """And how scores were made; another solver, another unit."""
    store, queries = stores(9, 2, 6, 9)
    found = attribute(queries, store, solver.fit(store), k=2, **options)
    found.show()
    figure = found.show(images=np.zeros((9, 3, 3)))
    title = figure.get_suptitle()
    for text in (str(found), capsys.readouterr().out, title):
        assert unit in text and repr(solver) in text and "not compared with autograd" in text
    assert unit in html.unescape(found.to_html()) and repr(solver) in found.to_html()
    assert unit in found.to_pandas().attrs["unit"]
    page = dropinf.write_report(tmp_path / "report.html", found).read_text("utf-8")
    assert unit in html.unescape(page)


def test_removal_changes_the_loss_by_the_score_over_n():
    """Size and sign, on least squares, where what removal does has a closed form."""
    torch.manual_seed(0)
    X = torch.randn(400, 3, dtype=torch.float64)
    y = X @ torch.tensor([1.0, -2, 0.5]).double() + torch.randn(400, dtype=torch.float64)
    model = torch.nn.Linear(3, 1, bias=False).double()
    model.weight.data = torch.linalg.lstsq(X, y[:, None]).solution.T.clone()
    plan = dropinf.Plan.make(model, dropinf.Full())
    loader = [(X, y)]
    store = dropinf.collect(
        model,
        loader,
        lambda m, batch: (m(batch[0])[:, 0] - batch[1]).square() / 2,
        plan,
        progress=False,
    )
    solver = Cholesky(damping=0.0).fit(RowStore(X, plan))  # the Hessian is Xᵀ X / n
    found = attribute(store[[7]], store, solver, k=4, weights="any")
    for ranked in (found.top, found.bottom):
        for j, i in enumerate(ranked.ids[0]):
            if i == 7:
                continue  # far from a small change
            kept = torch.arange(400) != i
            w = torch.linalg.lstsq(X[kept], y[kept, None]).solution[:, 0]
            after, before = (
                float((X[7] @ v - y[7]).square() / 2) for v in (w, model.weight[0].detach())
            )
            assert after - before == pytest.approx(float(ranked.scores[0, j]) / 400, rel=0.1)
    assert found.top.scores.min() > 0 > found.bottom.scores.max()


def test_names_on_images():
    """Are no formulas, and hold no control characters; scores have their errors."""
    store = RowStore(torch.randn(3, 4), plan_of(4), ids=["$x_{$", "\x1b[31m", "y" * 1000])
    solver = Identity().fit(store)
    found = attribute([store] * 2, [store] * 2, [solver] * 2, k=3)
    figure = found.show(images=lambda id_: np.zeros((3, 3)))
    figure.draw_without_rendering()
    titles = [axis.get_title() for axis in figure.axes if axis.images]
    assert any(title.startswith("$x_{$\n") for title in titles)
    assert any(title.startswith(r"\x1b[31m" + "\n") for title in titles)
    assert all(" +- 0" in title and len(title) < 60 for title in titles)


def test_images_beside_texts(capsys):
    store = RowStore(torch.randn(3, 4), plan_of(4))
    found = attribute(store, store, Identity().fit(store), k=1)
    assert found.show(["one", "two", "three"], images=np.zeros((3, 2, 2))) is not None
    assert "two" in capsys.readouterr().out
    found.show(images=np.zeros((3, 2, 2)))
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match="query_images go with images="):
        found.show(query_images=np.zeros((3, 2, 2)))


def test_arrays_of_images():
    """Channels first or last, values of any range, tensors of any kind."""
    color = np.arange(48.0).reshape(4, 4, 3)
    np.testing.assert_allclose(_array(color), color / 47)
    tensor = torch.from_numpy(color).permute(2, 0, 1).requires_grad_()
    np.testing.assert_array_equal(_array(tensor), _array(color))
    half = np.full((2, 2, 3), 0.5)
    for kept in (half, color.astype(np.uint8), np.zeros((5, 6)) - 3):
        np.testing.assert_array_equal(_array(kept), kept)
    assert (_array(2 * np.ones((2, 2, 3))) == 0).all()
    assert _array(np.zeros((1, 5, 6))).shape == _array(np.zeros((5, 6, 1))).shape == (5, 6)
    assert _array(torch.zeros(4, 5, 6, dtype=torch.bfloat16)).shape == (5, 6, 4)
    for wrong in (np.zeros(7), np.zeros((5, 6, 2))):
        with pytest.raises(ValueError, match=r"must be \[H, W\], \[H, W, C\] or \[C, H, W\]"):
            _array(wrong)


def test_columns_of_wide_characters():
    """Stand below each other where a terminal gives them two cells, and combining ones none."""
    assert [*map(width_of, ("abc", "漢字", "e\u0301", "👩", "שלום"))] == [3, 4, 1, 2, 4]
    rows = [["漢字漢", "1"], ["e\u0301", "2"], ["abcdef", "3"]]
    lines = str(Table(["name", "n"], rows)).splitlines()
    assert [width_of(line) for line in lines] == [9] * 4


def test_nothing_depends_on_how_a_compression_is_written(monkeypatch, tmp_path):
    """Fingerprints, files and equality are those of any other spelling."""
    model, batch = torch.nn.Linear(6, 5), [torch.randn(8, 6)]
    energies = dropinf.energies(model, batch, lambda m, x: m(x).square().sum(1))
    chosen = [
        dropinf.Dropout(r=7, energies=energies),
        dropinf.Sketch(r=3),
        dropinf.SJLT(r=4),
        dropinf.Full(),
    ]
    plans = [dropinf.Plan.make(model, one) for one in chosen]
    saved = [(plan.saved(), plan.fingerprint) for plan in plans]
    for kind in map(type, chosen):
        monkeypatch.setattr(kind, "__repr__", lambda self: "another")
    again = [dropinf.Plan.make(model, one) for one in chosen]
    assert [(plan.saved(), plan.fingerprint) for plan in again] == saved
    for one, plan in zip(chosen, again, strict=True):
        plan.save(tmp_path / "plan.json")
        assert dropinf.Plan.load(tmp_path / "plan.json").compression == one


def test_a_path_in_a_repr(tmp_path):
    store, _ = stores(3, 1, 6, 9)
    store.save(tmp_path / "a\x1b[31m")
    assert r"a\x1b[31m" in repr(RowStore.load(tmp_path / "a\x1b[31m"))


def test_show_is_of_some_queries(capsys):
    """The first five, with a line on the others; all, or so many as are asked for."""
    store, queries = stores(9, 7, 6, 9)
    found = attribute(queries, store, Cholesky().fit(store), k=2)
    pictures = np.zeros((9, 3, 3))
    for options, number in (
        *(({}, 5), ({"queries": 2}, 2)),
        *(({"queries": None}, 7), ({"queries": 9}, 7)),
    ):
        found.show(**options)
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in printed if line.startswith("query ")] == [
            f"query {q}" for q in range(number)
        ]
        more = [line for line in printed if line.endswith(" queries more")]
        assert more == ([] if number == 7 else [f"... and {7 - number} queries more"])
        figure = found.show(images=pictures, **options)
        assert len(figure.axes) == number * 5
        assert ("queries more" in figure.get_suptitle()) == (number < 7)
    for wrong in (-1, 2.5, "all"):
        with pytest.raises(ValueError, match="show: queries must be a number of them, or None"):
            found.show(queries=wrong)
