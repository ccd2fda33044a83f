"""DropoutProjector: its matrix, seen by projecting the unit vectors, and TRAK's expectations."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import assert_within
from hypothesis import given, settings

from dropinf import DropoutProjector

SHAPES = {"a.weight": (5, 7), "a.bias": (5,), "scalar": (), "b": (3, 2, 4)}
D = 35 + 5 + 1 + 24
TYPES = ["dropout", "sketch"]


def gradients(B=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(B, *s, generator=generator).to(dtype) for n, s in SHAPES.items()}


def flat(grads):
    return torch.cat([g.reshape(len(g), -1) for g in grads.values()], 1)


def matrix(D, r, model_id=0, **options):
    """The projection matrix [D, r] of a projector."""
    unit = torch.eye(D, dtype=torch.float64)
    return DropoutProjector(D, r, dtype=torch.float64, **options).project(unit, model_id).numpy()


sizes = st.integers(1, 60)


@settings(max_examples=60, deadline=None)
@given(
    D=sizes, r=sizes, s=st.integers(1, 6), seed=st.integers(0, 2**64 - 1), model=st.integers(0, 9)
)
def test_matrix(D, r, s, seed, model):
    """Every coordinate is in one entry at most, with a sign, all entries are as long as another."""
    r = min(r, D)
    dropout = matrix(D, r, model, seed=seed)
    assert ((dropout != 0).sum(0) == 1).all() and (dropout != 0).sum(1).max() <= 1
    np.testing.assert_allclose(dropout[dropout != 0], np.sqrt(D / r), rtol=1e-15)
    rows = dropout.nonzero()[0][np.argsort(dropout.nonzero()[1])]
    assert (np.diff(rows) > 0).all()  # in the gradient's order

    sketch = matrix(D, r, model, seed=seed, proj_type="sketch", s=s)
    n = min(D, r * s)
    lengths = (sketch != 0).sum(0)
    assert (sketch != 0).sum(1).max() <= 1 and lengths.sum() == n
    assert lengths.max() - lengths.min() <= (n % r != 0)
    np.testing.assert_allclose(np.abs(sketch[sketch != 0]), np.sqrt(D / n), rtol=1e-15)


@pytest.mark.parametrize("proj_type", TYPES)
def test_products_are_unbiased(proj_type):
    """The mean of M Mᵀ over seeds is the identity, to its standard error."""
    D, r, seeds = 12, 4, 4000
    total, squares = np.zeros((D, D)), np.zeros((D, D))
    for seed in range(seeds):
        M = matrix(D, r, seed=seed, proj_type=proj_type, s=2)
        total += M @ M.T
        squares += (M @ M.T) ** 2
    mean = total / seeds
    error = np.sqrt((squares / seeds - mean**2) / seeds)
    assert (np.abs(mean - np.eye(D)) <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_definition(proj_type, dtype):
    """Every form of the gradients gives them times the matrix."""
    grads = gradients(dtype=dtype)
    projector = DropoutProjector(D, 20, seed=5, proj_type=proj_type)
    out = projector.project(grads, model_id=3)
    assert out.shape == (3, 20) and out.dtype == torch.float32
    M = matrix(D, 20, 3, seed=5, proj_type=proj_type)
    truth = flat(grads).double().numpy() @ M
    np.testing.assert_allclose(out.double().numpy(), truth, rtol=0, atol=1e-6 * np.abs(truth).max())
    for form in (flat(grads), list(grads.values()), tuple(grads.values())):
        assert torch.equal(projector.project(form, 3), out)
    assert torch.equal(projector.project(flat(grads)[:1], ensemble_id=3), out[:1])


@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype_of_the_result(proj_type, dtype):
    """As the projector has it: that of rounded gradients, rounded once."""
    grads = flat(gradients())
    grads += 0.1 * grads.sign()  # no subnormal half
    out = DropoutProjector(D, 16, proj_type=proj_type, dtype=dtype).project(grads)
    assert out.dtype == dtype
    M = torch.from_numpy(matrix(D, 16, proj_type=proj_type))
    rounded = grads.to(dtype).double()
    truth, sizes = rounded @ M, rounded.abs() @ M.abs()
    wide = torch.promote_types(dtype, torch.float32)  # of the sums
    limit = torch.finfo(dtype).eps / 2 * truth.abs() + 3 * torch.finfo(wide).eps * sizes
    assert_within(out, truth, limit)


def test_strides():
    """Gradients of any strides are read where they are."""
    grads = gradients()
    projector = DropoutProjector(D, 40)
    out = projector.project(grads)
    turned = {n: g.transpose(0, -1).contiguous().transpose(0, -1) for n, g in grads.items()}
    turned["b"] = grads["b"].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not turned["b"].is_contiguous()
    assert torch.equal(projector.project(turned), out)
    reordered = dict(reversed(grads.items()))  # the first call's order counts
    assert torch.equal(projector.project(reordered), out)
    with_graph = {n: g.clone().requires_grad_() for n, g in grads.items()}
    assert not projector.project(with_graph).requires_grad


@pytest.mark.parametrize("proj_type", TYPES)
def test_same_every_time(proj_type):
    """As TRAK's own tests want: by seed and model_id alone, and another one for another of them."""
    grads = gradients()

    def run(seed, model_id, times=1):
        projector = DropoutProjector(D, 30, seed, proj_type)
        for _ in range(times):
            out = projector.project(grads, model_id)
            projector.free_memory()
        return out

    assert torch.equal(run(1, 0), run(1, 0, times=3))
    others = [run(1, 1), run(2, 0), run(1, 2**40), run(2**63 + 1, 0)]
    everyone = [run(1, 0), *others]
    assert len({tuple(out.flatten().tolist()) for out in everyone}) == len(everyone)


@pytest.mark.parametrize("proj_type", TYPES)
def test_nothing_else_counts(proj_type):
    """Not torch's random numbers, its default device or dtype, nor the other examples."""
    grads = gradients(7)
    truth = DropoutProjector(D, 30, 1, proj_type).project(grads, 2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            projector = DropoutProjector(D, 30, 1, proj_type)
            out = projector.project(grads, 2)
            alone = projector.project({n: g[2:3] for n, g in grads.items()}, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out, truth) and torch.equal(alone, truth[2:3])
    assert torch.equal(torch.get_rng_state(), state)
    twice = {n: torch.cat([g, g[:1]]) for n, g in grads.items()}
    out = DropoutProjector(D, 30, 1, proj_type).project(twice, 2)
    assert torch.equal(out[0], out[-1])


def deviation(u, v, D, r, s):
    """The exact standard deviation of a product of projections of u and v [..., D].

    The n = r s coordinates are a sample without replacement; with s > 1, entry k adds the products
    of different coordinates of its own, which random signs keep uncorrelated with all else.
    """
    n, products = r * s, u * v
    variance = D**2 / n * products.var(-1) * (1 - n / D)
    pairs = ((u**2).sum(-1) * (v**2).sum(-1) + products.sum(-1) ** 2) - 2 * (products**2).sum(-1)
    variance += (D / n) ** 2 * n * (s - 1) * pairs / (D * (D - 1))
    return variance.sqrt()


@pytest.mark.parametrize("shape", [(8, 10_000), (16, 10_001)])
@pytest.mark.parametrize("proj_type, s", [("dropout", 1), ("sketch", 4)])
def test_products_at_traks_sizes(proj_type, s, shape):
    """Norms, differences and products are kept as well as their variance says, for every mask.

    The shapes, the width and the seeds are those of TRAK's own tests of its projectors. One of
    them does not hold for a mask, which leaves features out: that every feature shows. The vectors
    have a mean, for which signs count.
    """
    (B, D), r = shape, 2048
    generator = torch.Generator().manual_seed(B)
    g = torch.rand(B, D, generator=generator, dtype=torch.float64) * 18 - 6
    g[-1] -= g[0] @ g[-1] / (g[0] @ g[0]) * g[0]  # orthogonal
    g = torch.cat([g, g[1:] - g[:-1]])
    standard = deviation(g[:, None], g, D, r, s)
    truth, scores = g @ g.T, []
    for seed in (0, 1, 10**8):
        projector = DropoutProjector(D, r, seed, proj_type, dtype=torch.float64, s=s)
        for model_id in range(20):
            p = projector.project(g, model_id)
            scores.append((p @ p.T - truth) / standard)
    scores = torch.stack(scores)
    # 60 masks of up to 31 * 32 / 2 products, each a sum of thousands of terms, so nearly normal:
    # 30,000 times the probability of 6 is below 1e-4. The mean square over a mask's products is 1,
    # with a variance of at most 2.
    assert scores.abs().max() < 6
    assert scores.mean(0).abs().max() < 6 / len(scores) ** 0.5
    assert abs(float(scores.square().mean()) - 1) < 5 * (2 / len(scores)) ** 0.5


def test_more_than_31_bits():
    """Numbers that share their memory: a copy of a row would not fit."""
    D = 2**31 + 1000
    values = torch.arange(1.0, 3.0)[:, None].expand(2, D)
    projector = DropoutProjector(D, 100)
    scale = (D / 100) ** 0.5
    torch.testing.assert_close(projector.project(values), values[:, :100] * scale)
    parts = [values[:, : 2**31 - 5], values[:, :1005]]
    torch.testing.assert_close(projector.project(parts), values[:, :100] * scale)
    assert int(projector._masks[0].index[-1]) > 2**31 * 0.9


def test_empty_batch():
    assert DropoutProjector(D, 10).project(torch.zeros(0, D)).shape == (0, 10)
    assert DropoutProjector(D, D).project(torch.ones(2, D)).eq(1).all()


good = gradients()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"proj_dim": D + 1}, f"proj_dim must be 1 to grad_dim={D}, got {D + 1}"),
        ({"proj_dim": 0}, "proj_dim must be 1"),
        ({"seed": -1}, "seed must be"),
        ({"proj_type": "normal"}, "proj_type must be one of"),
        ({"s": 0}, "s must be at least 1"),
        ({"dtype": torch.int32}, "dtype must be floating point"),
    ],
    ids=str,
)
def test_bad_projector(change, message):
    with pytest.raises(ValueError, match=message):
        DropoutProjector(**{"grad_dim": D, "proj_dim": 9, **change})


@pytest.mark.parametrize(
    "grads, message",
    [
        (torch.zeros(3, D + 1), rf"must be \[B, grad_dim={D}\], got \(3, {D + 1}\)"),
        (torch.zeros(D), "must be"),
        ([], "must be"),
        (list(good.values())[:2], f"40 numbers an example, grad_dim is {D}"),
        ({n: g for n, g in good.items() if n != "b"}, r"missing \['b'\]"),
        ({**good, "c": torch.zeros(3, 1)}, r"unknown \['c'\]"),
        ({**good, "b": torch.zeros(3, 24)}, r"of another shape \['b'\]"),
        ({**good, "b": good["b"].half()}, "one dtype, got torch.float16, torch.float32"),
        ({**good, "b": good["b"].to("meta")}, "one device, got cpu, meta"),
        ({**good, "b": good["b"][:2]}, r"\[B, \*shape\] of one B"),
        (flat(good).long(), "floating point on cpu, got torch.int64"),
        (flat(good).to("meta"), "floating point on cpu, got torch.float32 on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_gradients(grads, message):
    projector = DropoutProjector(D, 9)
    projector.project(good)
    with pytest.raises(ValueError, match=message):
        projector.project(grads)


def test_bad_model():
    with pytest.raises(ValueError, match="model_id must be"):
        DropoutProjector(D, 9).project(good, -1)
    with pytest.raises(ValueError, match="one thing, got 1 and 2"):
        DropoutProjector(D, 9).project(good, 1, ensemble_id=2)
