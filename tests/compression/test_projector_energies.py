"""DropoutProjector by energy: unbiased, the coordinates of a plan, and what is refused."""

import numpy as np
import pytest
import torch
from conftest import assert_within
from torch import nn

import dropinf
from dropinf import DropoutProjector, Energies

TYPES = ["dropout", "sketch"]
SHAPES = {"a": (3, 4), "b": (), "c": (2, 3, 2)}
D = 12 + 1 + 12


def energies_of(shapes=SHAPES, sigma=2.0):
    """Over orders of magnitude; the first row of each matrix has none."""
    rng, found = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        a, b = dropinf.compression.energy.sides(shape)
        rows, columns = (np.exp(sigma * rng.normal(size=n)) for n in (a, b))
        rows[0] *= a == 1
        found[name] = shape, rows, columns
    return Energies.of("test", found)


def squares():
    """[D], of which some are zero."""
    values = torch.exp(2 * torch.randn(D, generator=torch.Generator().manual_seed(0)))
    values[5:9] = 0
    return values


FORMS = {"energies": energies_of(), "a tensor": squares()}


def matrix(r, model_id=0, D=D, **options):
    """The projection matrix [D, r] of a projector."""
    unit = torch.eye(D, dtype=torch.float64)
    return DropoutProjector(D, r, dtype=torch.float64, **options).project(unit, model_id).numpy()


@pytest.mark.parametrize(
    "proj_type, form",
    [
        ("dropout", "energies"),
        ("sketch", "a tensor"),
        pytest.param("dropout", "a tensor", marks=pytest.mark.more),
        pytest.param("sketch", "energies", marks=pytest.mark.more),
    ],
)
def test_products_are_unbiased(proj_type, form):
    """The mean of M Mᵀ over draws is the identity, to its standard error, also where E g² is 0."""
    draws = 3000
    total, squares = np.zeros((D, D)), np.zeros((D, D))
    for k in range(draws):
        by = {"seed": k // 2, "model_id": k % 2}
        M = matrix(6, proj_type=proj_type, s=2, energies=FORMS[form], **by)
        total += M @ M.T
        squares += (M @ M.T) ** 2
    mean = total / draws
    error = np.sqrt((squares / draws - mean**2) / draws)
    assert (error.diagonal() > 0).any() and error.max() < 0.2
    assert (np.abs(mean - np.eye(D)) <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("form", FORMS)
def test_probabilities(form):
    """Entries are 1 / sqrt(pi), with pi = r (0.9 sqrt(E g²) / sum + 0.1 / D): none is above 1."""
    if form == "energies":
        parts = [np.multiply.outer(*FORMS[form][name]).ravel() for name in SHAPES]
        sizes = np.sqrt(np.concatenate(parts))
    else:
        sizes = FORMS[form].double().sqrt().numpy()
    r = 2
    pi = r * (0.9 * sizes / sizes.sum() + 0.1 / D)
    assert pi.max() < 1
    for seed in range(20):
        M = matrix(r, seed=seed, energies=FORMS[form])
        coordinates = M.nonzero()[0]
        # Weights of rows and columns are integers, of 2^10 in the mean. A tensor is kept in steps
        # of 2^(1/8): its roots are off by half a step of their own, and so may be their sum.
        wide = 0.01 if form == "energies" else 2 ** (1 / 16) - 1
        np.testing.assert_allclose(M[coordinates].max(1) ** -2, pi[coordinates], rtol=wide)


def test_coordinates_are_those_of_a_plan():
    """Of a layer, and so are rows collected under it; another model_id has others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    data = [torch.randn(9, 6) * torch.tensor([9, 3, 1, 0.3, 0.1, 0.03])]

    def losses(model, batch):
        return model(batch).square().sum(1)

    energies = dropinf.energies(model, data, losses)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=8, seed=3, energies=energies))
    rows = dropinf.collect(model, data, losses, plan, progress=False)
    own = {n: [] for n, _ in model.named_parameters()}
    for x in data[0]:
        grads = torch.autograd.grad(losses(model, x[None]).sum(), list(model.parameters()))
        for name, grad in zip(own, grads, strict=True):
            own[name].append(grad)
    grads = {name: torch.stack(values) for name, values in own.items()}
    projector = DropoutProjector(35, 8, seed=3, energies=energies)
    found, rows = projector.project(grads), rows.rows
    torch.testing.assert_close(found, rows, rtol=1e-5, atol=1e-6 * float(rows.abs().max()))
    assert not torch.equal(projector.project(grads, 1), found)
    everything = matrix(8, D=35, seed=3, energies=energies)
    for slot in plan.slots:
        first = {"0.weight": 0, "0.bias": 30}[slot.name]
        for k, (j, scale) in enumerate(zip(slot.index, slot.scale, strict=True)):
            assert everything[first + j, slot.offset + k] == scale


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_definition(proj_type, dtype, form):
    """Every form of the gradients gives them times the matrix, rounded once."""
    generator = torch.Generator().manual_seed(0)
    grads = {n: torch.randn(3, *s, generator=generator) for n, s in SHAPES.items()}
    grads = {n: (g + 0.1 * g.sign()).to(dtype) for n, g in grads.items()}  # no subnormal half
    flat = torch.cat([g.reshape(3, -1) for g in grads.values()], 1)
    options = {"seed": 5, "proj_type": proj_type, "energies": FORMS[form]}
    projector = DropoutProjector(D, 9, dtype=dtype, **options)
    M = torch.from_numpy(matrix(9, 3, **options))
    wide = torch.promote_types(dtype, torch.float32)  # of factors and sums
    truth, sizes = flat.double() @ M, flat.double().abs() @ M.abs()
    limit = torch.finfo(dtype).eps / 2 * truth.abs() + 5 * torch.finfo(wide).eps * sizes
    given = dict(reversed(grads.items())) if form == "energies" else grads
    for grads_in_a_form in (given, list(grads.values()), flat):
        out = projector.project(grads_in_a_form, 3)
        assert out.dtype == dtype
        assert_within(out, truth, limit)
    assert torch.equal(DropoutProjector(D, D, energies=FORMS[form]).project(flat), flat.float())


def test_more_than_31_bits():
    """Time and memory go with rows and columns."""
    a, b = 2**15, 2**16 + 1
    rows = np.zeros(a)
    rows[-2:] = 1.0
    energies = Energies.of("test", {"w": ((a, b), rows, np.ones(b))})
    projector = DropoutProjector(a * b, 64, energies=energies)
    out = projector.project([torch.ones(1, 1, 1).expand(1, a, b)])
    crowded = out[0] < out[0].mean()  # their pi is far larger
    assert 45 <= int(crowded.sum()) <= 64
    pi = 64 * (0.9 / (2 * b) + 0.1 / (a * b))
    np.testing.assert_allclose(out[0, crowded], pi**-0.5, rtol=1e-3)


def test_proj_type_tells_energies_apart():
    """TRAK compares it with that of the results in a folder."""
    given = [None, *FORMS.values(), squares() * 3 + 1, squares() * 3]
    kinds = [DropoutProjector(D, 9, energies=energies).proj_type for energies in given]
    assert kinds[0] == "dropout" and len(set(kinds)) == len(kinds)
    assert all(kind.startswith("dropout by energy ") for kind in kinds[1:])
    again = DropoutProjector(D, 9, seed=1, energies=energies_of())
    assert again.proj_type == kinds[1] and kinds[1] in repr(again)


def changed(value):
    values = squares()
    values[3] = value
    return values


@pytest.mark.parametrize(
    "energies, message",
    [
        (torch.ones(D + 1), rf"real numbers \[grad_dim={D}\], got torch.float32 \({D + 1},\)"),
        (torch.ones(1, D), rf"real numbers \[grad_dim={D}\], got"),
        (torch.ones(D, dtype=torch.complex64), "real numbers"),
        (torch.zeros(D), "every gradient was zero"),
        (changed(float("nan")), "must be finite and not negative, got nan"),
        (changed(float("inf")), "must be finite and not negative, got inf"),
        (changed(-1.0), "must be finite and not negative, got -1"),
        (energies_of({"a": (3, 4)}), f"of 12 numbers, grad_dim is {D}; .*include="),
        (np.ones(D), "what dropinf.energies returns, or a tensor .* got ndarray"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_energies(energies, message):
    with pytest.raises(ValueError, match=f"DropoutProjector: .*{message}"):
        DropoutProjector(D, 9, energies=energies)


def test_gradients_of_other_names():
    projector = DropoutProjector(D, 9, energies=energies_of())
    grads = {name: torch.zeros(2, *shape) for name, shape in SHAPES.items()}
    other = {"x" if name == "c" else name: g for name, g in grads.items()}
    with pytest.raises(ValueError, match=r"the energies: missing \['c'\]; unknown \['x'\]"):
        projector.project(other)
    with pytest.raises(ValueError, match=r"those of the energies: of another shape \['a'\]"):
        projector.project({**grads, "a": torch.zeros(2, 4, 3)})
