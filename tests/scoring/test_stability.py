"""Agreement between masks against its definition in numpy, and at which r there is enough of it."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import dropinf
from dropinf import Dropout, Full, Plan, RowStore
from dropinf.scoring import Agreement, Stability
from dropinf.solvers import Cholesky


def squared(model, batch):
    x, y = batch
    return (model(x) - y).square().sum(1)


@pytest.fixture(scope="module")
def task():
    """A model, 60 training examples, 7 queries."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 2))
    draw = [
        (torch.randn(n, 6, generator=generator), torch.randn(n, 2, generator=generator))
        for n in (60, 7)
    ]
    return model, [draw[0]], [draw[1]]


def parts_of(task, r, seeds):
    model, train, asked = task
    for seed in seeds:
        plan = Plan.make(model, Dropout(r=r, seed=seed))
        store, queries = (
            dropinf.collect(model, loader, squared, plan, progress=False)
            for loader in (train, asked)
        )
        yield queries, store, Cholesky().fit(store)


def by_hand(found, k):
    """Correlation and overlap [m] of scores, by scipy and by sets."""
    pairs = list(itertools.combinations(found, 2))
    correlation = [
        [scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)] for a, b in pairs
    ]
    overlap = [
        [
            len(set(np.argsort(-x)[:k]) & set(np.argsort(-y)[:k])) / k
            for x, y in zip(a, b, strict=True)
        ]
        for a, b in pairs
    ]
    return np.mean(correlation, 0), np.mean(overlap, 0)


@pytest.mark.parametrize("k, masks", [(1, 2), (5, 3), (60, 2), (500, 2)])
def test_agreement_is_its_definition(task, k, masks):
    parts = list(parts_of(task, 12, range(masks)))
    got = dropinf.agreement(iter(parts), k)
    found = [dropinf.scores(*part).double().numpy() for part in parts]
    correlation, overlap = by_hand(found, min(k, 60))
    root = len(correlation) ** 0.5
    expected = [
        correlation.mean(),
        correlation.std(ddof=1) / root,
        overlap.mean(),
        overlap.std(ddof=1) / root,
    ]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    assert isinstance(got, Agreement) and (k < 60 or got.overlap == 1)


def test_invalid_rows_do_not_count(task):
    parts = list(parts_of(task, 12, range(2)))
    expected = dropinf.agreement(parts, 5)
    more = []
    for queries, store, solver in parts:
        wider = [
            RowStore(
                torch.cat([s.rows, torch.zeros(2, s.plan.width)]),
                s.plan,
                torch.arange(len(s) + 2) < len(s),
            )
            for s in (queries, store)
        ]
        more.append((*wider, solver))
    got = dropinf.agreement(more, 5, weights="any")
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strings", [False, True])
def test_the_order_of_a_loader_does_not_count(task, strings):
    """As of one that shuffles: places are other examples then."""
    parts = list(parts_of(task, 12, range(2)))
    expected = dropinf.agreement(parts, 5)
    (queries, store, solver), (asked, known, fitted) = parts

    def turned(rows, by):
        order = [(by * i) % len(rows) for i in range(len(rows))]
        ids = [str(i) for i in order] if strings else order
        return RowStore(rows.rows[order], rows.plan, ids=ids)

    first = turned(queries, 3), turned(store, 7), solver
    other = turned(asked, 2), turned(known, 13), fitted
    got = dropinf.agreement([first, other], 5, weights="any")
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    for which, name in enumerate(("queries", "examples")):
        wrong = list(other)
        rows = other[which]
        wrong[which] = RowStore(rows.rows, rows.plan, ids=[f"{i}?" for i in range(len(rows))])
        with pytest.raises(ValueError, match=f"agreement: a part has {name} of other ids"):
            dropinf.agreement([first, wrong], 5, weights="any")


def test_stability_of_a_loader_that_shuffles(task):
    model, train, asked = task
    torch.manual_seed(5)

    def found(shuffle):
        data = torch.utils.data.TensorDataset(*train[0])
        loader = torch.utils.data.DataLoader(data, batch_size=60, shuffle=shuffle)
        return dropinf.stability(
            model, loader, asked, squared, (40,), masks=2, compression=Dropout(r=1), progress=False
        )

    ordered, shuffled = (found(shuffle).agreements[0] for shuffle in (False, True))
    np.testing.assert_allclose(shuffled, ordered, rtol=0, atol=1e-3)


def test_where_all_scores_tie_there_is_no_overlap(task):
    _, (_, store, solver), (_, other, fitted) = None, *parts_of(task, 12, range(2))
    asked, again = (RowStore(torch.zeros(7, s.plan.width), s.plan) for s in (store, other))
    parts = [(asked, store, solver), (again, other, fitted)]
    assert dropinf.agreement(parts, 5, weights="any").overlap == 0
    assert dropinf.agreement(parts, 60, weights="any").overlap == 1


def test_agreement_refuses_what_shows_nothing(task):
    parts = list(parts_of(task, 12, range(2)))
    with pytest.raises(ValueError, match="two masks or more, got 1; collect with"):
        dropinf.agreement(parts[:1])
    with pytest.raises(ValueError, match="have the same plan, so they agree at any r"):
        dropinf.agreement([parts[0], parts[0]])
    with pytest.raises(ValueError, match="k must be positive, got 0"):
        dropinf.agreement(parts, 0)
    with pytest.raises(ValueError, match=r"k must be positive, got 2\.5"):
        dropinf.agreement(parts, 2.5)
    model, train, _ = task
    few = parts_of((model, train, [tuple(t[:3] for t in train[0])]), 12, [1])
    with pytest.raises(ValueError, match=r"differ in queries or examples: .*7, 60.*3, 60"):
        dropinf.agreement([parts[0], *few])
    none = RowStore(parts[0][0].rows * 0, parts[0][0].plan, torch.zeros(7, dtype=torch.bool))
    with pytest.raises(ValueError, match="no query and training example is valid"):
        dropinf.agreement([(none, *parts[0][1:]), parts[1]], weights="any")


def test_stability_is_agreement_at_each_size(task):
    model, train, asked = task
    found = dropinf.stability(
        model,
        train,
        asked,
        squared,
        r=(40, 8),
        masks=2,
        k=5,
        compression=Dropout(r=1, seed=4),
        progress=False,
    )
    assert found.sizes == (8, 40) and found.widths == (16, 80)
    for r, got in zip(found.sizes, found.agreements, strict=True):
        expected = dropinf.agreement(parts_of(task, int(r), (4, 5)), 5)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    table = found.describe()
    assert table.columns[-1] == "top-5 overlap" and [row[:2] for row in table.rows] == [
        ["8", "16"],
        ["40", "80"],
    ]
    assert str(found).count("+-") == 4


def test_by_energy_unless_told(task):
    model, train, asked = task
    found = dropinf.stability(model, train, asked, squared, (8,), 2, progress=False)
    energies = dropinf.energies(model, train, squared)
    same = dropinf.stability(
        model,
        train,
        asked,
        squared,
        (8,),
        2,
        compression=Dropout(r=1, energies=energies),
        progress=False,
    )
    assert found.agreements == same.agreements


def test_a_size_that_leaves_nothing_out_is_not_run(task):
    model, train, asked = task
    ran = []

    def counted(model, batch):
        ran.append(1)
        return squared(model, batch)

    given = {"compression": Dropout(rate=0.5), "progress": False}
    found = dropinf.stability(model, train, asked, counted, (1.0,), 2, **given)
    assert found.agreements == (Agreement(1.0, 0.0, 1.0, 0.0),) and not ran
    assert found.widths == (sum(p.numel() for p in model.parameters()),)


def test_smallest_size_from_which_all_reach_the_level():
    found = Stability(
        (1, 2, 3, 4),
        (1, 2, 3, 4),
        tuple(Agreement(c, 0.0, o, 0.0) for c, o in ((0.9, 0.8), (0.6, 0.5), (0.8, 0.8), (0.9, 1))),
        2,
        10,
    )
    assert found.smallest(0.8) == 3 and found.smallest(0.85) == 4
    assert "From size 3 on the top 10 overlap by 0.8 or more" in str(found)
    assert found.smallest(0.5) == 1 and found.smallest(0.95, of="correlation") is None
    assert found.smallest(0.6, of="correlation") == 1
    with pytest.raises(ValueError, match="of must be 'overlap' or 'correlation'"):
        found.smallest(of="rho")
    with pytest.raises(ValueError, match="level must be 0 to 1"):
        found.smallest(80)
    unknown = Stability((1,), (1,), (Agreement(*[float("nan")] * 4),), 2, 10)
    assert unknown.smallest(0.0) is None and "At none of these sizes" in str(unknown)


def test_plot_shows_both(task):
    pytest.importorskip("matplotlib")
    agreements = (Agreement(0.5, 0.1, 0.3, 0.1), Agreement(0.9, 0.1, 0.8, 0.1))
    axes = Stability((1, 2), (64, 256), agreements, 3, 10).plot().axes[0]
    lines = {container.get_label(): container[0].get_ydata() for container in axes.containers}
    assert [list(values) for values in lines.values()] == [[0.5, 0.9], [0.3, 0.8]]


def test_refusals(task):
    model, train, asked = task
    for given, words in (
        ({"r": ()}, "need sizes to try"),
        ({"r": 8}, "r must be the sizes to try, such as .256, 1024., got 8"),
        ({"r": "8"}, "r must be the sizes to try"),
        ({"k": "3"}, "k must be a whole number from 1, got '3'"),
        ({"masks": 2.5}, "masks must be a whole number from 2"),
        ({"masks": 1}, "masks must be a whole number from 2, got 1"),
        ({"compression": Full()}, "has no size and seed to vary"),
    ):
        with pytest.raises(ValueError, match=words):
            dropinf.stability(model, train, asked, squared, **given)
    with pytest.raises(ValueError, match="query_loader is gone after one pass"):
        dropinf.stability(model, train, iter(asked), squared)


def test_more_coordinates_agree_more(task):
    """The law that the table is for."""
    model, train, asked = task
    found = dropinf.stability(
        model, train, asked, squared, (2, 30, 120), 4, compression=Dropout(r=1), progress=False
    )
    values = [each.correlation for each in found.agreements]
    assert values == sorted(values) and values[-1] - values[0] > 0.2


@pytest.mark.parametrize("which", ["train_loader", "query_loader"])
def test_influence_refuses_a_loader_that_shuffles(task, which):
    """Its columns would be in an order that nobody knows; what does not say its order is taken."""
    model, [data], _ = task
    examples = TensorDataset(*data)
    ordered = DataLoader(examples, batch_size=60)
    drawn = WeightedRandomSampler(torch.ones(len(examples)), len(examples))
    for shuffling in (
        DataLoader(examples, batch_size=60, shuffle=True),
        DataLoader(examples, batch_size=60, sampler=drawn),
        DataLoader(examples, sampler=DistributedSampler(examples, 2, 0, shuffle=True)),
        DataLoader(examples, batch_sampler=BatchSampler(RandomSampler(examples), 60, False)),
    ):
        loaders = {"train_loader": ordered, "query_loader": ordered, which: shuffling}
        with pytest.raises(ValueError, match=f"influence: {which} shuffles"):
            dropinf.influence(model, loss_fn=squared, progress=False, **loaders)
    unshuffled = DataLoader(examples, sampler=DistributedSampler(examples, 2, 0, shuffle=False))
    for known in (ordered, unshuffled, list(ordered)):
        loaders = {"train_loader": ordered, "query_loader": ordered, which: known}
        options = {"compression": dropinf.Dropout(r=8), "progress": False}
        found = dropinf.influence(model, loss_fn=squared, **options, **loaders)
        assert found.isfinite().all()


def test_agreement_refuses_other_things(task):
    for parts, said in ((5, "got 5"), ([(1, 2)], r"got \(1, 2\)"), ([("a", "b", "c")], "got")):
        with pytest.raises(TypeError, match=r"agreement: parts must be a list of \(q.*" + said):
            dropinf.agreement(parts)
