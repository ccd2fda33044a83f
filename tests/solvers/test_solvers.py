"""Every solver against its own definition, written out densely in float64 numpy."""

from functools import partial

import numpy as np
import pytest
import torch
from score_cases import formula, plan_of, stores

import dropinf.rows.part_files
import dropinf.rows.row_passes
import dropinf.solvers.eigen
import dropinf.solvers.gauss_newton
from dropinf import RowStore
from dropinf.rows import RowWriter
from dropinf.solvers import CG, Cholesky, DataInf, Diagonal, Eigen, Identity, LiSSA

TOL = 1e-7  # of the iterations
RANK = 3


def inverse(G, λ):
    return np.linalg.inv(matrix(G) + λ * np.eye(G.shape[1]))


def inverse_of_diagonal(G, λ):
    return np.diag(1 / (np.diag(matrix(G)) + λ))


def mean_of_inverses(G, λ):
    return sum(np.linalg.inv(np.outer(g, g) + λ * np.eye(G.shape[1])) for g in G) / len(G)


def inverse_of_largest(G, λ):
    s, V = np.linalg.eigh(matrix(G))
    s[:-RANK] = 0
    return V @ np.diag(1 / (s + λ)) @ V.T


def matrix(G):
    return sum(np.outer(g, g) for g in G) / len(G)


SOLVERS = {
    "cholesky": (partial(Cholesky, dtype=torch.float64), inverse),
    "cg": (partial(CG, tol=TOL), inverse),
    "lissa": (partial(LiSSA, tol=TOL, depth=100_000), inverse),
    "eigen": (Eigen, inverse),
    "eigen of rank 3": (partial(Eigen, rank=RANK), inverse_of_largest),
    "diagonal": (Diagonal, inverse_of_diagonal),
    "datainf": (DataInf, mean_of_inverses),
}
EXACT = [name for name in SOLVERS if SOLVERS[name][1] is inverse]

SHAPES = pytest.mark.parametrize(
    "n, sizes",
    [(40, (5, 17, 30)), (12, (40, 13)), (12, (5, 12, 13, 30)), (1, (4, 1)), (300, (24,))],
    ids=["r < n", "n < r", "mixed", "one row", "one layer, two parts"],
)


def make(name, damping=0.1, absolute=False):
    return SOLVERS[name][0](damping, absolute)


def check(name, solved, store, queries, damping=0.1, absolute=False):
    """Each layer's solution against the dense one.

    A residual of `tol |q|` is an error of at most tol |q| / σ_min(F + λ); float64 arithmetic adds
    a small multiple of its rounding times the condition, the dtype of the rows its rounding.
    """
    train, asked = (s.rows.double().numpy() for s in (store, queries))
    train = train[store.valid.numpy()]
    tol = TOL if name in ("cg", "lissa") else 0
    assert solved.dtype == queries.rows.dtype and solved.shape == queries.rows.shape
    for at, block in enumerate(store.plan.blocks):
        G, q = train[:, block.entries], asked[:, block.entries]
        number = damping[at] if isinstance(damping, list) else damping
        λ = number if absolute else number * sum(g @ g for g in G) / (len(G) * block.r)
        if λ == 0 and not G.any():
            assert not solved[:, block.entries].any()
            continue
        truth = q @ SOLVERS[name][1](G, λ)
        s = np.linalg.eigvalsh(matrix(G))
        least = λ + (0 if name in ("eigen of rank 3", "datainf") else max(s[0], 0))
        rounding = 10 * block.r * np.finfo(np.float64).eps * (s[-1] + λ) / least
        bound = (tol + rounding) * np.linalg.norm(q, axis=1) / least
        rounding_of_rows = torch.finfo(queries.rows.dtype).eps * np.linalg.norm(truth, axis=1)
        error = np.linalg.norm(solved[:, block.entries].double().numpy() - truth, axis=1)
        assert (error <= bound + rounding_of_rows).all(), (block.name, error, bound)


@SHAPES
@pytest.mark.parametrize("damping", [0.1, 10.0])
@pytest.mark.parametrize("name", SOLVERS)
def test_solver(name, damping, n, sizes):
    store, queries = stores(n, 7, *sizes)
    before = store.rows.clone(), queries.rows.clone()
    check(name, make(name, damping).fit(store).solve(queries.rows), store, queries, damping)
    assert torch.equal(store.rows, before[0]) and torch.equal(queries.rows, before[1])


@pytest.mark.parametrize("name", SOLVERS)
def test_weak_damping(name):
    damping = 1e-2 if name == "lissa" else 1e-5
    store, queries = stores(30, 4, 10, 40)
    check(name, make(name, damping).fit(store).solve(queries.rows), store, queries, damping)


@pytest.mark.parametrize("name", SOLVERS)
def test_float32_rows(name):
    for n, sizes in [(40, (5, 17, 30)), (12, (5, 30))]:
        store, queries = stores(n, 7, *sizes, dtype=torch.float32)
        check(name, make(name).fit(store).solve(queries.rows), store, queries)
    # A query may be wider than the rows.
    wide = RowStore(queries.rows.double(), queries.plan)
    check(name, make(name).fit(store).solve(wide.rows), store, wide)


@pytest.mark.parametrize("name", SOLVERS)
def test_layer_of_zeros(name):
    for n in (30, 7):
        store, queries = stores(n, 4, 10, 20)
        store.rows[:, :10] = 0
        for damping, absolute in [(0.1, False), (0.5, True)]:
            solved = make(name, damping, absolute).fit(store).solve(queries.rows)
            check(name, solved, store, queries, damping, absolute)


@pytest.mark.parametrize("rows_a_part", [1, 3, 1000])
@pytest.mark.parametrize("name", SOLVERS)
def test_store_in_parts_with_invalid_rows(name, rows_a_part, monkeypatch):
    plan = plan_of(5, 12, 50)
    monkeypatch.setattr(dropinf.rows.part_files, "CHUNK_BYTES", 7 * plan.width * 8)
    monkeypatch.setattr(dropinf.rows.row_passes, "PART_BYTES", rows_a_part * plan.width * 8)
    store, queries = stores(40, 6, 5, 12, 50)
    store.valid[[0, 9, 10, 33]] = False
    store.rows[~store.valid] = 1000  # whatever stands there
    store.rows[9, 0] = torch.nan
    check(name, make(name).fit(store).solve(queries.rows), store, queries)


@pytest.mark.parametrize("name", SOLVERS)
def test_damping_of_each_layer(name):
    store, queries = stores(20, 4, 6, 9, 30)
    for absolute in (False, True):
        solver = make(name, {"1": 2.0, "*": 0.3}, absolute).fit(store)
        check(name, solver.solve(queries.rows), store, queries, [0.3, 2.0, 0.3], absolute)
    with pytest.raises(ValueError, match=r"no entry for layer '2'"):
        make(name, {"0": 1, "1": 1}).fit(store)


@pytest.mark.parametrize("name", SOLVERS)
def test_rows_of_a_directory(name, tmp_path, monkeypatch):
    store, queries = stores(40, 5, 6, 50, dtype=torch.float32)
    monkeypatch.setattr(dropinf.rows.part_files, "CHUNK_BYTES", 11 * store.plan.width * 4)
    valid = torch.ones(40, dtype=torch.bool)
    valid[[3, 39]] = False
    with RowWriter(store.plan, tmp_path / "rows") as writer:
        writer.append(store.rows, valid)
        loaded = writer.finish()
    before = (tmp_path / "rows" / "part-000000" / "rows.bin").read_bytes()
    check(name, make(name).fit(loaded).solve(queries.rows), loaded, queries)
    assert (tmp_path / "rows" / "part-000000" / "rows.bin").read_bytes() == before


@pytest.mark.parametrize("name", [*SOLVERS, "cosine"])
def test_odd_queries(name):
    """None, one that is zero, some that are equal, one that is NaN, tiny and huge ones."""
    store, queries = stores(30, 12, 6, 40)
    solver = (Identity(cosine=True) if name == "cosine" else make(name)).fit(store)
    assert solver.solve(queries.rows[:0]).shape == (0, 46)
    rows = queries.rows.clone()
    rows[1] = 0
    rows[3] = rows[2]
    rows[4] *= 1e-12
    rows[5] *= 1e12
    solved = solver.solve(rows)
    if name != "cosine":
        check(name, solved, store, RowStore(rows, store.plan))
    assert not solved[1].any()
    mixed = rows.clone()
    mixed[7, 2] = torch.nan
    again = solver.solve(mixed)
    others = torch.arange(12) != 7
    assert again[7].isnan().all()
    atol = TOL * solved[others].abs().max().item()
    torch.testing.assert_close(again[others], solved[others], rtol=0, atol=atol)


@pytest.mark.parametrize("name", EXACT)
def test_scores_without_damping(name):
    """Where F is regular, λ = 0 is its plain inverse."""
    store, queries = stores(60, 3, 4, 9)
    got = make(name, 0).fit(store).solve(queries.rows) @ store.rows.T
    truth = formula(store.rows, queries.rows, (4, 9), 0)
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-5 * truth.abs().max().item())


def test_cosine():
    store, queries = stores(30, 4, 10, 20)
    store.rows[5] = 0
    solver = Identity(cosine=True).fit(store)
    got = solver.solve(queries.rows) @ store.rows.T * solver.scale(store.rows)
    q, g = queries.rows.numpy(), store.rows.numpy()
    others = np.arange(30) != 5
    norms = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(g, axis=1)
    truth = (q @ g.T)[:, others] / norms[:, others]
    torch.testing.assert_close(got[:, others], torch.from_numpy(truth), rtol=0, atol=1e-14)
    assert (got[:, 5] == 0).all()
    large = store.rows.float() * 1e25  # whose squares are above float32
    torch.testing.assert_close(solver.scale(large)[0] * large[0].double().norm().float(), one())
    assert solver.scale(large).dtype == torch.float32
    for other in (Identity(), CG(), Eigen()):
        assert other.fit(store).scale(store.rows) is None


def one():
    return torch.ones(())


def test_eigen_at_other_dampings():
    store, queries = stores(20, 4, 6, 30)
    for rank, name in [(None, "eigen"), (RANK, "eigen of rank 3")]:
        solver = Eigen(0.1, rank=rank).fit(store)
        for damping in (1e-3, 0.1, 5.0):
            check(name, solver.solve_at(queries.rows, damping), store, queries, damping)
        solved = solver.solve_at(queries.rows, {"0": 0.2, "1": 3})
        check(name, solved, store, queries, [0.2, 3.0])
        absolute = Eigen(0.1, absolute=True, rank=rank).fit(store)
        check(name, absolute.solve_at(queries.rows, 0.7), store, queries, 0.7, absolute=True)
    with pytest.raises(ValueError, match=r"Eigen\.solve_at: layer '1' .*raise the damping"):
        Eigen().fit(store).solve_at(queries.rows, 0)
    with pytest.raises(ValueError, match="damping must be"):
        solver.solve_at(queries.rows, -1)
    with pytest.raises(ValueError, match=r"Eigen\.solve_at: rows must be \[m, 36\]"):
        solver.solve_at(queries.rows[:, 1:], 0.1)
    with pytest.raises(RuntimeError, match=r"Eigen\.solve_at: call fit"):
        Eigen().solve_at(queries.rows, 0.1)


@SHAPES
@pytest.mark.parametrize("name", ["eigen", "eigen of rank 3"])
def test_products_of_whitened_rows_are_scores(name, n, sizes):
    """The root of the inverse, by numpy's of the whole matrix; half of it twice is all of it."""
    store, queries = stores(n, 7, *sizes)
    solver = make(name).fit(store)
    rows, asked = solver.whiten(store.rows), solver.whiten(queries.rows)
    train, truth = store.rows.numpy(), torch.zeros(7, n, dtype=torch.float64)
    for block in store.plan.blocks:
        G = train[:, block.entries]
        inverse_of = SOLVERS[name][1](G, 0.1 * np.square(G).sum() / (len(G) * block.r))
        s, V = np.linalg.eigh(inverse_of)
        root = torch.from_numpy(V @ np.diag(np.sqrt(s)) @ V.T)
        torch.testing.assert_close(
            asked[:, block.entries], queries.rows[:, block.entries] @ root, rtol=1e-10, atol=1e-10
        )
        q = queries.rows[:, block.entries]
        truth += q @ torch.from_numpy(inverse_of) @ store.rows[:, block.entries].T
    torch.testing.assert_close(asked @ rows.T, truth, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(solver.whiten(asked), solver.solve(queries.rows))


def test_rows_that_are_not_whitened():
    store, queries = stores(12, 3, 4, 5)
    store.rows[:, :4] = 0  # a layer without a gradient, at no damping
    queries.rows[1, 8] = torch.nan
    solver = Eigen(0).fit(store)
    found = solver.whiten(queries.rows)
    assert not found[[0, 2], :4].any() and found[[0, 2]].isfinite().all() and found[1].isnan().all()
    assert solver.whiten(queries.rows[:0]).shape == (0, 9)
    with pytest.raises(RuntimeError, match=r"Eigen\.whiten: call fit"):
        Eigen().whiten(queries.rows)
    with pytest.raises(ValueError, match=r"Eigen\.whiten: rows must be \[m, 9\]"):
        solver.whiten(queries.rows[:, 1:])


def test_eigen_of_rows_that_repeat():
    """n < r and yet rank below n: the pairs of eigenvalue zero are no division by it."""
    store, queries = stores(12, 4, 30)
    store.rows[6:] = store.rows[:6]
    for name in ("eigen", "eigen of rank 3"):
        check(name, make(name).fit(store).solve(queries.rows), store, queries)


def test_products_stay_small():
    """[m, c] of a part has no more than R columns, or 256."""
    for n, R in [(600, 4), (900, 300)]:
        store, _ = stores(n, 1, R)
        cut = list(dropinf.solvers.gauss_newton.parts(store))
        assert max(map(len, cut)) <= max(256, R) and torch.equal(torch.cat(cut), store.rows)


@pytest.mark.parametrize("name", SOLVERS)
def test_failed_fit_leaves_nothing_of_the_one_before(name):
    store, queries = stores(30, 2, 4, 9)
    solver = make(name, {"0": 0.1, "1": 0} if name in EXACT else 0.1).fit(store)
    store.rows[4, 4] = torch.inf
    with pytest.raises(ValueError, match="row 4 of the store"):
        solver.fit(store)
    with pytest.raises(RuntimeError, match="call fit"):
        solver.solve(queries.rows)


def passes(monkeypatch, module):
    """A list that grows by the number of layers of each product with F."""
    seen = []

    def counted(store, n, vectors, part_bytes):
        seen.append(len(vectors))
        return dropinf.solvers.gauss_newton.multiply(store, n, vectors, part_bytes)

    monkeypatch.setattr(module, "multiply", counted)
    return seen


def test_cg_takes_one_pass_a_step(monkeypatch):
    """All layers in one pass, no more than their rank in steps, and done ones drop out."""
    seen = passes(monkeypatch, dropinf.solvers.cg)
    store, queries = stores(60, 1, 3, 20)
    CG(tol=1e-10).fit(store).solve(queries.rows)
    assert seen[0] == 2 and seen[-1] == 1 and len(seen) <= 20 + 2
    one_query = len(seen)
    seen.clear()
    queries = stores(60, 10, 3, 20, seed=1)[1]
    CG(tol=1e-10).fit(store).solve(queries.rows)
    assert len(seen) < one_query  # a block of queries searches a larger space
    seen.clear()
    CG().fit(store).solve(stores(60, 50, 3, 20)[1].rows)  # more queries than dimensions
    assert len(seen) == 2


def test_cg_searches_no_direction_twice(monkeypatch):
    """Queries that depend on others cost nothing."""
    store, queries = stores(60, 3, 20)
    widths = []

    def counted(store, n, vectors, part_bytes):
        widths.append(len(vectors[0][1]))
        return dropinf.solvers.gauss_newton.multiply(store, n, vectors, part_bytes)

    monkeypatch.setattr(dropinf.solvers.cg, "multiply", counted)
    mixed = torch.randn(9, 3, dtype=torch.float64) @ queries.rows
    solved = CG(tol=TOL).fit(store).solve(mixed)
    check("cg", solved, store, RowStore(mixed, store.plan))
    assert max(widths[:-1]) == 3


def test_cg_does_not_trust_the_running_residual():
    """At a condition of 1e8 it comes below 1e-14, which the true one cannot."""
    store, queries = stores(100, 3, 40)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((40, 40)))[0]
    store.rows.copy_(store.rows * torch.logspace(0, -4, 40, dtype=torch.float64))
    store.rows.copy_(store.rows @ torch.from_numpy(turn))
    with pytest.raises(RuntimeError, match=r"above tol=1e-14 .*take Cholesky or Eigen"):
        CG(0, tol=1e-14, max_iterations=1000).fit(store).solve(queries.rows)
    solved = CG(0, tol=1e-7, max_iterations=1000).fit(store).solve(queries.rows)
    residual = queries.rows.numpy() - solved.numpy() @ matrix(store.rows.numpy())
    lengths = np.linalg.norm(queries.rows.numpy(), axis=1)
    assert (np.linalg.norm(residual, axis=1) <= 1.1e-7 * lengths).all()


def test_cg_where_coordinates_differ_in_size(monkeypatch):
    """The preconditioner takes out what 1e16 between the diagonal's entries would cost."""
    seen = passes(monkeypatch, dropinf.solvers.cg)
    store, queries = stores(100, 3, 40)
    store.rows.mul_(torch.logspace(-4, 4, 40, dtype=torch.float64))
    solved = CG(1e-9, absolute=True).fit(store).solve(queries.rows)
    assert len(seen) <= 25
    F = matrix(store.rows.numpy()) + 1e-9 * np.eye(40)
    residual = np.linalg.norm(queries.rows.numpy() - solved.numpy() @ F, axis=1)
    assert (residual <= 1.01e-6 * np.linalg.norm(queries.rows.numpy(), axis=1)).all()


def test_cg_not_converged():
    store, queries = stores(40, 1, 3, 30)
    solver = CG(1e-4, max_iterations=5).fit(store)
    with pytest.raises(
        RuntimeError,
        match=r"layer '1' has a relative residual of .* after max_iterations=5, above tol=1e-06 "
        r"\(layers not done: 1\); raise max_iterations, tol or the damping",
    ):
        solver.solve(queries.rows)
    twins = RowStore(torch.ones(20, 33, dtype=torch.float64), store.plan)
    twins.rows[:, 3:] = torch.randn(20, 30, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"layer '0' .*residual .*raise .*damping"):
        CG({"0": 0, "1": 0.1}).fit(twins).solve(queries.rows)


def test_lissa_with_sampled_rows():
    """The recursion by hand, with the same draws; and its mean comes to the solution."""
    store, queries = stores(25, 3, 4, 8)
    store.valid[[2, 7]] = False
    solver = LiSSA(0.5, depth=30, batch_size=6, repeats=2, seed=3).fit(store)
    got = solver.solve(queries.rows)
    generator = torch.Generator().manual_seed(3)
    draws = [
        [torch.randint(23, (6,), generator=generator).numpy() for _ in range(30)] for _ in range(2)
    ]
    train, q = store.rows[store.valid].numpy(), queries.rows.numpy()
    for (block, λ), s in zip(solver._layers, solver._scales, strict=True):
        G = train[:, block.entries]
        largest = np.linalg.eigvalsh(matrix(G))[-1] + (G**2).sum(1).max() / 6 + λ
        assert largest <= s <= 1.2 * largest
        result = 0
        for run in draws:
            x = q[:, block.entries]
            for drawn in run:
                A = matrix(G[drawn]) + λ * np.eye(block.r)
                x = q[:, block.entries] + x - x @ A / s
            result = result + x / s / 2
        torch.testing.assert_close(got[:, block.entries], torch.from_numpy(result))
    assert torch.equal(got, LiSSA(0.5, False, 30, 6, 2, 3).fit(store).solve(queries.rows))
    exact = Cholesky(0.5).fit(store).solve(queries.rows)
    few, many = (
        LiSSA(0.5, depth=300, batch_size=b, repeats=4).fit(store).solve(queries.rows) - exact
        for b in (4, 400)
    )
    assert many.norm() < 0.1 * exact.norm() and many.norm() < few.norm() / 3


def test_lissa_scale():
    """Twice the largest eigenvalue is where it turns: below it, an error with a way out."""
    store, queries = stores(40, 3, 4, 8)
    good = max(LiSSA().fit(store)._scales)
    largest = max(np.linalg.eigvalsh(matrix(store.rows[:, b.entries].numpy()))[-1] + λ
                  for b, λ in LiSSA().fit(store)._layers)  # fmt: skip
    assert largest <= good <= 1.2 * largest
    for batch_size in (None, 20):
        solver = LiSSA(batch_size=batch_size, scale=largest / 4, tol=TOL).fit(store)
        with pytest.raises(
            RuntimeError, match=r"LiSSA\.solve: layer '\d' diverges at .*give scale="
        ):
            solver.solve(queries.rows)
        try:
            solver.solve(queries.rows)
        except RuntimeError as error:
            advised = float(str(error).split("give scale=")[1].split(",")[0])
        solved = LiSSA(batch_size=batch_size, scale=advised, tol=TOL).fit(store).solve(queries.rows)
        assert solved.isfinite().all()
        if batch_size is None:
            check("lissa", solved, store, queries)


def test_lissa_says_that_it_is_not_done():
    store, queries = stores(40, 3, 1, 30)
    solver = LiSSA(1e-3, depth=20).fit(store)
    with pytest.warns(
        UserWarning, match=r"layer '1' has a relative residual of (.*) after depth=20"
    ):
        solver.solve(queries.rows)


@pytest.mark.parametrize("name", SOLVERS)
def test_bad_damping(name):
    for damping in (-0.1, float("nan"), float("inf"), {"*": -1}):
        with pytest.raises(ValueError, match=r"damping must be a number from 0"):
            make(name, damping)


@pytest.mark.parametrize("name", SOLVERS)
def test_singular_without_damping(name):
    store, queries = stores(30, 2, 4, 9)
    store.rows[:, 7] = 0
    with pytest.raises(ValueError, match=r"\.fit: layer '1' .*raise the damping"):
        make(name, {"0": 0.1, "1": 0}).fit(store)
    if name != "diagonal":
        few, _ = stores(3, 2, 2, 9)
        with pytest.raises(ValueError, match=r"\.fit: layer '1' .*raise the damping"):
            make(name, {"0": 0.1, "1": 0}).fit(few)
    # A layer without any gradient needs none.
    store.rows[:, 4:] = 0
    solved = make(name, {"0": 0.1, "1": 0}).fit(store).solve(queries.rows)
    check(name, solved, store, queries, [0.1, 0])


@pytest.mark.parametrize("name", SOLVERS)
def test_rows_that_are_not_finite(name):
    for sizes in [(4, 9), (50,)]:
        store, _ = stores(30, 2, *sizes)
        store.rows[17, 3] = torch.nan
        with pytest.raises(ValueError, match=r"row 17 of the store is not finite"):
            make(name).fit(store)


@pytest.mark.parametrize("name", [*SOLVERS, "cosine"])
def test_nothing_to_fit_on(name):
    solver = Identity(cosine=True) if name == "cosine" else make(name)
    store, queries = stores(2, 1, 4)
    store.valid[:] = False
    with pytest.raises(ValueError, match=r"fit: none of the store's 2 rows is valid"):
        solver.fit(store)
    with pytest.raises(RuntimeError, match=r"solve: call fit\(store\) first"):
        solver.solve(queries.rows)


@pytest.mark.parametrize(
    "build, message",
    [
        (partial(CG, tol=0), "CG: tol must be between 0 and 1, got 0"),
        (partial(CG, tol=float("nan")), "CG: tol must be"),
        (partial(CG, max_iterations=0), "CG: max_iterations must be from 1, got 0"),
        (partial(LiSSA, depth=0), "LiSSA: depth must be from 1, got 0"),
        (partial(LiSSA, batch_size=0), "LiSSA: batch_size must be from 1, got 0"),
        (partial(LiSSA, repeats=0), "LiSSA: repeats must be from 1, got 0"),
        (partial(LiSSA, scale=0.0), "LiSSA: scale must be a number above 0, got 0"),
        (partial(LiSSA, tol=float("nan")), "LiSSA: tol must be a number above 0"),
        (partial(Eigen, rank=0), "Eigen: rank must be from 1, got 0"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
