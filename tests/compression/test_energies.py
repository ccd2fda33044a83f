"""Energies in compressions and plans: unbiased products, shares, files, and what is refused."""

import base64
import json

import numpy as np
import pytest
import torch
from torch import nn

import dropinf
from dropinf import Dropout, Energies, Plan, Sketch
from dropinf.compression.energy import ParamEnergy
from dropinf.manifest import read_manifest, sealed


def model():
    return nn.Sequential(nn.Embedding(30, 8), nn.Flatten(), nn.Linear(32, 12), nn.Linear(12, 5))


def energies_of(net, seed=0, sigma=2.0):
    """Over orders of magnitude; the last ten tokens have none."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, p in net.named_parameters():
        a, b = (len(p), p[0].numel()) if p.dim() > 1 else (len(p), 1)
        rows, columns = (np.exp(sigma * rng.normal(size=n)) for n in (a, b))
        if name == "0.weight":
            rows[20:] = 0
        found[name] = tuple(p.shape), rows, columns
    return Energies.of("test", found)


def row(plan, gradients):
    """What a plan keeps of gradients {name: [*shape]}: float64, by the definition."""
    out = np.zeros(plan.width)
    for slot in plan.slots:
        values = gradients[slot.name].ravel()[slot.index.numpy()] * np.asarray(slot.scale)
        if slot.entry_map is None:
            out[slot.entries] += values
        else:
            at = slot.offset + slot.entry_map.entry.numpy()
            np.add.at(out, at, values * slot.entry_map.sign.numpy())
    return out


@pytest.mark.parametrize(
    "allocation, where, kind",
    [
        pytest.param(
            *(allocation, where, kind),
            id=f"{allocation}-{where}-{kind.__name__}",
            # Two of the eight, which have every word, are enough for a change to be tested by.
            marks=[pytest.mark.more]
            * (
                (allocation, where, kind)
                not in [("energy", "seen", Dropout), ("size", "not seen", Sketch)]
            ),
        )
        for allocation in ("size", "energy")
        for where in ("seen", "not seen")
        for kind in (Dropout, Sketch)
    ],
)
def test_products_of_rows_are_unbiased(kind, where, allocation):
    """Mean over 800 draws within 4.5 standard errors; also where the energies are zero."""
    net, rng = model(), np.random.default_rng(1)
    energies = energies_of(net)
    g, h = ({n: rng.normal(size=p.shape) for n, p in net.named_parameters()} for _ in range(2))
    if where == "not seen":
        for gradients in (g, h):
            for name, values in gradients.items():
                values *= 0.0 if name != "0.weight" else 1.0
            gradients["0.weight"][:20] = 0
    h = {name: h[name] + g[name] for name in g}
    products = []
    for seed in range(800):
        made = kind(r=24, seed=seed, energies=energies, allocation=allocation)
        plan = Plan.make(net, made)
        products.append(row(plan, g) @ row(plan, h))
    truth = sum((g[name] * h[name]).sum() for name in g)
    error = np.std(products) / np.sqrt(len(products))
    assert error < 0.2 * truth
    assert abs(np.mean(products) - truth) < 4.5 * error


def test_less_variance_than_uniform():
    """Of gradients that are as large as their energies say: products vary by a quarter less."""
    net, rng = model(), np.random.default_rng(2)
    energies = energies_of(net, sigma=1.0)
    products = {None: [], energies: []}
    for seed in range(200):
        g = {}
        for name, p in net.named_parameters():
            rows, columns = energies[name]
            g[name] = rng.normal(size=(len(rows), len(columns))) * np.sqrt(np.outer(rows, columns))
            g[name] = g[name].reshape(p.shape)
        truth = sum((g[name] ** 2).sum() for name in g)
        for e, found in products.items():
            plan = Plan.make(net, Dropout(r=24, seed=seed, energies=e))
            found.append((row(plan, g) @ row(plan, g)) / truth)
    assert np.std(products[energies]) < 0.75 * np.std(products[None])


def test_no_energies_no_difference():
    """A plan without them is the one that it was, to the bit."""
    net = model()
    made = {
        str(c): Plan.make(net, c).fingerprint
        for c in (Dropout(r=20), Dropout(rate=0.1, seed=3), Sketch(r=20, s=3))
    }
    assert list(made.values()) == ["8563742d98fcd694", "41d7e2f674e54674", "04560a806b987aa8"]


def test_shares_by_energy():
    """sqrt(energy * size) of each layer, beyond the one that each has."""
    net = nn.Sequential(nn.Linear(9, 10, bias=False), nn.Linear(10, 40), nn.Linear(40, 100))
    energies = Energies.of(
        "test",
        {
            "0.weight": ((10, 9), np.full(10, 16.0), np.ones(9)),  # 16 a coordinate
            "1.weight": ((40, 10), np.full(40, 0.25), np.ones(10)),
            "1.bias": ((40,), np.full(40, 0.25), np.ones(1)),
            "2.weight": ((100, 40), np.zeros(100), np.ones(40)),
            "2.bias": ((100,), np.zeros(100), np.ones(1)),
        },
    )
    # One each, and of 58 more: 0.9 * 58 as 4 * 90 : 0.5 * 440 : 0, that is 32.4 and 19.8, and the
    # tenth as 90 : 440 : 4100, that is 0.11, 0.55 and 5.14.
    for compression in (
        Dropout(total=61, allocation="energy", energies=energies),
        Sketch(total=61, s=2, allocation="energy", energies=energies),
    ):
        assert [b.r for b in Plan.make(net, compression).blocks] == [34, 21, 6]
    plan = Plan.make(net, Dropout(r=20, allocation="energy", energies=energies))
    # Of 57: 31.8 + 0.11, 19.5 + 0.54 and 5.05.
    assert [b.r for b in plan.blocks] == [33, 21, 6]
    plan = Plan.make(net, Dropout(rate=1.0, allocation="energy", energies=energies))
    assert [b.r for b in plan.blocks] == [90, 440, 4100]  # what has no energy gets what is left


@pytest.mark.parametrize("total", [300, 1100, 4000])
def test_no_layer_has_less_than_a_tenth_of_its_share_by_size(total):
    net = model()
    energies = Energies.of(
        "test",
        {
            name: (tuple(p.shape), np.full(len(p), 1.0 if name == "2.weight" else 0.0), np.ones(b))
            for name, p in net.named_parameters()
            for b in [p[0].numel() if p.dim() > 1 else 1]
        },
    )
    plans = [
        Plan.make(net, Dropout(total=total, allocation=allocation, energies=energies))
        for allocation in ("energy", "size")
    ]
    for one, other in zip(plans[0].blocks, plans[1].blocks, strict=True):
        assert one.r >= int(0.1 * other.r)
    assert sum(b.r for b in plans[0].blocks) == min(total, 240 + 396 + 65)
    only = Plan.make(net, Dropout(total=30, allocation="energy", energies=energies), exclude="2")
    by_size = Plan.make(net, Dropout(total=30, energies=energies), exclude="2")
    assert only.fingerprint == by_size.fingerprint  # where there is no energy, by size


def saved(plan, tmp_path):
    plan.save(tmp_path / "plan")
    content = json.loads((tmp_path / "plan").read_bytes())
    del content["crc32"]
    return content


@pytest.mark.parametrize("kind", [Dropout, Sketch], ids=["Dropout", "Sketch"])
@pytest.mark.parametrize("allocation", ["size", "energy"])
def test_plans_are_saved_with_their_energies(kind, allocation, tmp_path):
    net = model()
    energies = energies_of(net)
    made = kind(r=24, energies=energies, allocation=allocation)
    plan = Plan.make(net, made)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.fingerprint == plan.fingerprint and loaded.compression == made
    for one, other in zip(loaded.slots, plan.slots, strict=True):
        assert torch.equal(one.index, other.index) and torch.equal(one.scale, other.scale)
    assert plan.fingerprint != Plan.make(net, kind(r=24)).fingerprint
    other = kind(r=24, energies=energies_of(net, 1), allocation=allocation)
    assert plan.fingerprint != Plan.make(net, other).fingerprint
    assert len(Plan.make(net, made, include="2").saved()) < len(plan.saved())  # its own alone


def test_a_plan_has_a_byte_or_so_for_each_row_and_column(tmp_path):
    net = nn.Linear(4000, 3000)
    plan = Plan.make(net, Dropout(r=10, energies=energies_of(net)))
    assert len(plan.saved()) < 1.4 * (4000 + 3000 + 3000) + 1000


DAMAGED = {
    "no object": lambda e: [],
    "a parameter is missing": lambda e: {k: v for k, v in e.items() if k != "2.bias"},
    "no levels": lambda e: {
        **e,
        "2.bias": {"shape": [12], "rows": "", "columns": "/w==", "shift": 0},
    },
    "not base64": lambda e: {**e, "2.bias": {**e["2.bias"], "rows": "?" * 16}},
    "no text": lambda e: {**e, "2.bias": {**e["2.bias"], "rows": [1] * 12}},
    "another shape": lambda e: {**e, "2.bias": {**e["2.bias"], "shape": [3, 4]}},
    "a shape of text": lambda e: {**e, "2.bias": {**e["2.bias"], "shape": ["12"]}},
    "a shift beyond": lambda e: {**e, "2.bias": {**e["2.bias"], "shift": 1 << 40}},
    "a shift of a half": lambda e: {**e, "2.bias": {**e["2.bias"], "shift": 0.5}},
    "no parameter": lambda e: {**e, "2.bias": 3},
    "other levels": lambda e: {
        **e,
        "2.bias": {**e["2.bias"], "rows": base64.b64encode(bytes(range(12))).decode()},
    },
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_plan_with_bad_energies_is_refused(damage, tmp_path):
    net = model()
    content = saved(Plan.make(net, Dropout(r=24, energies=energies_of(net))), tmp_path)
    energies = content["compression"]["energies"]
    content["compression"]["energies"] = DAMAGED[damage](energies)
    (tmp_path / "plan").write_bytes(sealed(content))
    with pytest.raises(ValueError, match=r"Plan.load: .* is damaged or not a plan: .*; make") as e:
        Plan.load(tmp_path / "plan")
    assert "\n" not in str(e.value)


def test_a_shape_of_any_length_is_not_looked_at():
    """Where its matrix is cut is a search over dimensions: hours, of a million of them."""
    one = base64.b64encode(b"\xff").decode()
    saved = {"shape": [1] * 65, "rows": one, "columns": one, "shift": 0}
    with pytest.raises(ValueError, match="'shape' of energies has 65 dimensions"):
        ParamEnergy.load(saved)
    assert ParamEnergy.load({**saved, "shape": [1] * 64}).shape == (1,) * 64


def test_a_plan_that_could_not_be_read_is_not_written(tmp_path, monkeypatch):
    net = model()
    plan = Plan.make(net, Dropout(r=10, energies=energies_of(net)))
    size = len(plan.saved())
    monkeypatch.setattr("dropinf.compression.plan.MOST_BYTES", size)
    plan.save(tmp_path / "plan")
    monkeypatch.setattr("dropinf.compression.plan.MOST_BYTES", size - 1)
    with pytest.raises(ValueError, match=f"Plan.save: .* {size:,} bytes, more than .* exclude="):
        plan.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    # Those of 70 billion parameters: 80 layers with 160,000 rows and columns each.
    levels = base64.b64encode(bytes(80 * 160_000)).decode()
    (tmp_path / "large").write_bytes(sealed({"levels": levels}))
    assert read_manifest("load", tmp_path / "large", "make it again")["levels"] == levels


def test_energies_of_another_model():
    energies = energies_of(model())
    with pytest.raises(ValueError, match=r"'weight'; measure those of this model.* exclude="):
        Plan.make(nn.Linear(3, 4), Dropout(r=2, energies=energies))
    wider = nn.Sequential(nn.Embedding(31, 8), nn.Flatten(), nn.Linear(32, 12), nn.Linear(12, 5))
    with pytest.raises(ValueError, match=r"\(31, 8\), and the energies are .*\(30, 8\)"):
        Plan.make(wider, Dropout(r=2, energies=energies))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_energies_must_be_finite_and_positive(value):
    rows = np.array([1.0, value, 2.0])
    with pytest.raises(ValueError, match="'w' must be finite and not negative, got"):
        Energies.of("test", {"w": ((3, 2), rows, np.ones(2))})


def test_energies_of_other_sizes():
    with pytest.raises(ValueError, match=r"'w' of shape \(3, 2\) has 2 rows and 2 columns"):
        Energies.of("test", {"w": ((3, 2), np.ones(2), np.ones(2))})
    with pytest.raises(TypeError, match="Energies: 'w' has a int; make them with"):
        Energies({"w": 3})


def test_no_energy_at_all():
    with pytest.raises(ValueError, match="every gradient was zero"):
        Energies.of("test", {"w": ((3, 2), np.zeros(3), np.ones(2))})


def test_arguments():
    energies = energies_of(model())
    with pytest.raises(
        ValueError, match=r"energies must be what dropinf.energies returns, got dict"
    ):
        Dropout(r=3, energies={})
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\], got '0.1'"):
        Dropout(rate="0.1", energies=energies)
    with pytest.raises(ValueError, match="allocation='energy' needs energies="):
        Dropout(r=3, allocation="energy")
    with pytest.raises(ValueError, match="allocation='sqrt' shares out total="):
        Dropout(r=3, allocation="sqrt", energies=energies)
    with pytest.raises(ValueError, match="Gaussian: allocation='energy' is for Dropout and Sketch"):
        dropinf.Gaussian(total=30, allocation="energy")


def test_equal_energies_are_one():
    one, other = (energies_of(model()) for _ in range(2))
    assert one == other and hash(one) == hash(other) and Dropout(r=1, energies=one) is not None
    assert one != energies_of(model(), 1) and one != 3
    assert list(one) == [name for name, _ in model().named_parameters()]
    assert repr(one) == "<Energies of 5 parameters>"


def test_levels_are_kept_as_they_are():
    param = ParamEnergy.of((2, 2), np.array([1.0, 4.0]), np.array([0.0, 2.0]))
    assert param.rows.tolist() == [239, 255] and param.columns.tolist() == [0, 255]
    assert param.shift == 24  # 8 of an octave: the largest is 8
    loaded = ParamEnergy.load(json.loads(json.dumps(param.saved())))
    assert loaded.saved() == param.saved()
