"""Plan: a pure function of shapes and compression; saved and loaded without loss."""

import json

import numpy as np
import pytest
import torch
from cases import Transformer, gpt2
from torch import nn

from dropinf import (
    FJLT,
    SJLT,
    Dropout,
    FactoredDropout,
    Full,
    Gaussian,
    LoGra,
    Plan,
    Rademacher,
    Sketch,
)
from dropinf.manifest import sealed


def mlp():
    return nn.Sequential(nn.Linear(6, 11), nn.ReLU(), nn.Linear(11, 4))


def test_layout():
    plan = Plan.make(mlp(), Dropout(r=50))
    assert [b.name for b in plan.blocks] == ["0", "2"]
    assert [(b.P, b.r, b.offset) for b in plan.blocks] == [(77, 50, 0), (48, 48, 50)]
    assert plan.width == 98
    for block in plan.blocks:
        weight, bias = block.slots
        assert weight.offset == block.offset
        assert bias.offset == weight.offset + len(weight.index) == weight.entries.stop
        assert bias.entries.stop == block.entries.stop
        assert weight.scale == bias.scale == (block.P / block.r) ** 0.5
    assert plan.blocks[1].slots[0].index.tolist() == list(range(44))  # P <= r keeps all


def test_rows_are_unbiased():
    """The mean over seeds of row · row is the full gradient product (rows scale by sqrt(P / r))."""
    g, h = torch.randn(2, 7 * 11, dtype=torch.float64)
    model = nn.Linear(11, 7, bias=False)
    products = []
    for seed in range(2000):
        (slot,) = Plan.make(model, Dropout(r=15, seed=seed)).slots
        products.append(((g[slot.index] * slot.scale) @ (h[slot.index] * slot.scale)).item())
    spread = np.std(products) / np.sqrt(len(products))
    assert abs(np.mean(products) - (g @ h).item()) < 4 * spread


def test_tied_parameters_belong_to_the_first_owner():
    plan = Plan.make(gpt2(), Full())
    names = [slot.name for slot in plan.slots]
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names
    assert plan.width == sum(p.numel() for p in gpt2().parameters())


def test_pure_function_of_shapes_and_seed():
    one, other = (Plan.make(Transformer(), Dropout(r=20, seed=3)) for _ in range(2))
    assert one.fingerprint == other.fingerprint and len(one.fingerprint) == 16
    for a, b in zip(one.slots, other.slots, strict=True):
        assert torch.equal(a.index, b.index)
    fingerprints = {
        Plan.make(Transformer(**shape), compression).fingerprint
        for shape in ({}, {"width": 15})
        for compression in (
            *(Dropout(r=20), Dropout(r=20, seed=1), Dropout(r=21), Full()),
            *(Sketch(r=20), Sketch(r=20, s=3), Sketch(r=20, seed=1), FactoredDropout(r=20)),
            *(Gaussian(r=20), Gaussian(r=20, seed=1), Rademacher(r=20), LoGra(r=20)),
            *(SJLT(r=20), SJLT(r=20, s=2), FJLT(r=20)),
        )
    }
    assert len(fingerprints) == 30


def test_names_do_not_count():
    assert (
        Plan.make(nn.Sequential(mlp()), Dropout(r=9)).fingerprint
        == Plan.make(mlp(), Dropout(r=9)).fingerprint
    )


@pytest.mark.parametrize(
    "compression",
    [
        Dropout(r=20),
        Dropout(rate=0.1, seed=2**63),
        Dropout(total=300, allocation="sqrt"),
        Full(),
        Sketch(r=20, s=3, seed=1),
        FactoredDropout(r=20),
        Gaussian(r=20),
        Rademacher(r=20),
        SJLT(r=20, s=2),
        FJLT(r=20),
        LoGra(r=20),
    ],
    ids=str,
)
def test_save_and_load(compression, tmp_path):
    plan = Plan.make(Transformer(), compression)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.fingerprint == plan.fingerprint
    assert loaded.compression == plan.compression
    assert [s.name for s in loaded.slots] == [s.name for s in plan.slots]
    assert [p.name for p in tmp_path.iterdir()] == ["plan"]
    assert (tmp_path / "plan").stat().st_size < 5000  # coordinates are drawn anew, not stored


def test_numpy_numbers_are_saved(tmp_path):
    plan = Plan.make(mlp(), Dropout(r=np.int64(7), seed=np.uint64(2)))
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").fingerprint == plan.fingerprint


def test_damaged_plans(tmp_path):
    path = tmp_path / "plan"
    Plan.make(mlp(), Dropout(r=7)).save(path)
    text = path.read_bytes()
    saved = json.loads(text)
    del saved["crc32"]
    assert sealed(saved, indent=1) == text
    for damaged in (
        text[:-20],
        b"[]",
        b"{}",
        text.replace(b"Dropout", b"Nonsense"),
        text.replace(b'"seed": 0', b'"seed": 1'),
        sealed({**saved, "format": "dropinf plan 1"}),
        sealed({**saved, "compression": {**saved["compression"], "kind": "Nonsense"}}),
        sealed({**saved, "compression": {**saved["compression"], "seed": 1}}),
        sealed({**saved, "compression": {**saved["compression"], "r": 0}}),
        sealed({**saved, "width": saved["width"] + 1}),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"Plan.load: .*damaged"):
            Plan.load(path)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none")


def test_include_exclude():
    def names(**filters):
        return [slot.name for slot in Plan.make(Transformer(), Full(), **filters).slots]

    assert names(include="head") == ["head.weight", "head.bias"]
    assert names(include=["head.bias", "norm"]) == ["norm.weight", "norm.bias", "head.bias"]
    assert names(include="layers.1.mlp.[03]") == [
        f"layers.1.mlp.{j}.{kind}" for j in (0, 3) for kind in ("weight", "bias")
    ]
    everything = names()
    assert names(exclude=["token", "position"]) == everything[2:]
    assert not any(name.endswith("bias") for name in names(exclude="*.bias"))


@pytest.mark.parametrize(
    "filters, message",
    [
        ({"include": "heed"}, "include='heed' matches no trainable parameter; .*'head'"),
        ({"include": ["head", "layers.7"]}, r"include='layers.7' .*'layers.[01]'"),
        ({"exclude": "dropout"}, "exclude='dropout' matches no trainable"),
        ({"include": "head", "exclude": "head"}, "none left to track"),
    ],
    ids=str,
)
def test_names_that_match_nothing(filters, message):
    with pytest.raises(ValueError, match=message):
        Plan.make(Transformer(), Full(), **filters)


def test_nothing_to_track():
    with pytest.raises(ValueError, match="0 trainable parameters"):
        Plan.make(nn.ReLU(), Full())
    with pytest.raises(ValueError, match="0 trainable parameters"):
        Plan.make(mlp().requires_grad_(False), Full())
    with pytest.raises(ValueError, match=r"compression must be one of Dropout, Sketch, .* got 64"):
        Plan.make(mlp(), 64)
