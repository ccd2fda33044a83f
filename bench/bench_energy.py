"""Coordinates drawn by energy, which crowd in few rows and columns, beside uniform ones; and what a
batch costs of the examples that energies are measured on."""

import numpy as np
import pytest
import torch
from bench_collect import input_gradient, set_up
from models import MODELS, loss_fn

import dropinf
from dropinf import ops
from dropinf.compression import FewOfEach, tracked
from dropinf.compression.energy import ParamEnergy
from dropinf.compression.parts import draw_layer

SHAPES = [(8, 128, 768, 768), (1, 1024, 4096, 4096)]  # (B, T, I, O)


def heavy(n: int, kind: str, generator: np.random.Generator) -> np.ndarray:
    """E g^2 of n rows or columns."""
    normal = generator.normal(size=n)
    if kind == "lognormal":  # sqrt(E g^2) over four orders of magnitude
        return np.exp(4 * normal)
    energies = np.exp(normal)
    energies[:3] *= 1e4  # a transformer's outlier features
    return energies


@pytest.mark.parametrize("kind", ["lognormal", "outliers"])
@pytest.mark.parametrize("r", [1024, 8192])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sampled_outer_by_energy(timed, shape, r, kind):
    B, T, I, O = shape
    torch.manual_seed(0)
    x, dy, weights = torch.randn(B, T, I), torch.randn(B, T, O), torch.rand(r)
    generator = np.random.default_rng(0)
    energies = [ParamEnergy.of((O, I), heavy(O, kind, generator), heavy(I, kind, generator))]

    def call(energies):
        ((at, _, _),) = draw_layer([(O, I)], r, 0, 0, energies)
        o_idx, i_idx = (torch.from_numpy(index).int() for index in (at // I, at % I))
        return lambda: ops.sampled_outer(x, dy, o_idx, i_idx, weights=weights, backend="cpu")

    calls = {"by energy": call(energies), "uniform": call(None)}
    timed(calls, "by energy", {"uniform": (1 / 1.05, None)})


@pytest.mark.parametrize("title", MODELS)
def bench_energies(timed, title):
    model, batch = set_up(title)
    tap = dropinf.capture(model, dropinf.Plan(tracked("bench", model)[0], FewOfEach()))

    def squares():
        sums = torch.zeros(tap.plan.width, dtype=torch.float64)
        with tap:
            for row in tap.rows(loss_fn(model, batch)):
                sums += row.double().square()
        return sums

    floor = "forward + input gradient"
    calls = {"a batch of energies": squares, floor: input_gradient(model, batch, frozen=True)}
    timed(calls, "a batch of energies", {floor: (1 / 1.2, None)}, rounds=5, settle=True)
