"""solvers.Cholesky and Full: both forms, retries, memory, files; against numpy in float64."""

import gc
import json
import warnings

import numpy as np
import pytest
import torch
from score_cases import plan_of, stores

import dropinf.rows.part_files
from dropinf import RowStore, ops, scores
from dropinf.manifest import sealed
from dropinf.rows import RowWriter
from dropinf.solvers import Cholesky, Full
from dropinf.solvers.factor_file import FileTensor

HARD = ["random", "rank-deficient", "one dominant", "scaled rows", "tridiagonal", "zeros"]


def rows_of(kind, n, r, seed=0):
    """[n, r] float64 whose Gram matrix is a hard case."""
    rng = np.random.default_rng(seed)
    G = rng.standard_normal((n, r))
    if kind == "rank-deficient":
        G = rng.standard_normal((n, max(1, r // 3))) @ rng.standard_normal((max(1, r // 3), r))
    elif kind == "one dominant":
        G += 1e3 * rng.standard_normal((n, 1)) * rng.standard_normal(r)
    elif kind == "scaled rows":
        G *= 10.0 ** rng.uniform(-6, 6, (n, 1))
    elif kind == "tridiagonal":
        G = np.zeros((n, r))
        i = np.arange(min(n, r))
        G[i, i] = 2
        G[i[1:], i[1:] - 1] = -1
    elif kind == "zeros":
        G = np.zeros((n, r))
    return G


def store_of(*layers, dtype=torch.float64, valid=None):
    """A store whose layers have those rows."""
    plan = plan_of(*(G.shape[1] for G in layers))
    rows = torch.from_numpy(np.concatenate(layers, 1)).to(dtype)
    return RowStore(rows, plan, valid)


def truth(G, q, damping=0.1, absolute=False):
    """(F + λ)⁻¹ q for rows q, with numpy alone."""
    n, r = G.shape
    λ = damping if absolute else damping * (G**2).sum() / (n * r)
    return np.linalg.solve(G.T @ G / n + λ * np.eye(r), q.T).T


def on_disk(store, path):
    with RowWriter(store.plan, path) as writer:
        for rows, valid in zip(store.rows.split(7), store.valid.split(7), strict=True):
            writer.append(rows, valid)
        return writer.finish()


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("n, r", [(60, 30), (40, 40), (20, 40), (19, 40), (5, 300)])
@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_residual_is_lapacks(kind, n, r, damping):
    """float32: the residual is at most twice that of LAPACK's float32 Cholesky."""
    G = rows_of(kind, n, r).astype(np.float32)
    q = np.random.default_rng(1).standard_normal((4, r)).astype(np.float32)
    solver = Cholesky(damping).fit(store_of(G, dtype=torch.float32))
    got = solver.solve(torch.from_numpy(q))
    assert got.dtype == torch.float32
    if kind == "zeros":
        assert solver.layers[0].form == "zero" and not got.any()
        return
    assert solver.layers[0].form == ("n x n" if 2 * n <= r else "r x r")
    exact = G.astype(float)
    A = exact.T @ exact / n
    A += damping * A.trace() / r * np.eye(r)
    lapack = torch.cholesky_solve(
        torch.from_numpy(q).T, torch.linalg.cholesky(torch.from_numpy(A).float())
    ).T

    def residual(x):
        return np.abs(x.double().numpy() @ A - q)

    # LAPACK's is that of one draw: compare by query, with its own rounding as the floor.
    floor = 2.0**-24 * np.abs(A).sum(0).max() * np.abs(lapack.numpy()).max(1, keepdims=True)
    worst = residual(lapack).max(1, keepdims=True)
    assert (residual(got).max(1, keepdims=True) <= 2 * np.maximum(worst, floor)).all()


@pytest.mark.parametrize("kind", HARD)
def test_both_forms_agree(kind, monkeypatch):
    """The same rows in either form, float64."""
    layers = [rows_of(kind, 20, r, seed=r) for r in (40, 55, 200)]
    store = store_of(*layers)
    q = torch.randn(6, store.plan.width, dtype=torch.float64)
    small = Cholesky(0.01).fit(store)
    monkeypatch.setattr(dropinf.solvers.cholesky, "Dual", dropinf.solvers.cholesky.Primal)
    large = Cholesky(0.01).fit(store)
    if kind != "zeros":
        assert [layer.form for layer in small.layers] == ["n x n"] * 3
        assert [layer.form for layer in large.layers] == ["r x r"] * 3
    torch.testing.assert_close(small.solve(q), large.solve(q), rtol=1e-8, atol=1e-10)
    for solver in (small, large):
        start = 0
        for G in layers:
            part = slice(start, start + G.shape[1])
            start = part.stop
            if kind == "zeros":
                assert not solver.solve(q)[:, part].any()
                continue
            expected = truth(G, q[:, part].numpy(), 0.01)
            np.testing.assert_allclose(
                solver.solve(q)[:, part], expected, rtol=0, atol=1e-9 * np.abs(expected).max()
            )


def mixed(n=30, dtype=torch.float64):
    sizes = (3, 70, 1, 59, 64, 200, 8, 58, 57)
    return store_of(*(rows_of("random", n, r, seed=r) for r in sizes), dtype=dtype), sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_memory_bound(where, dtype, tmp_path, monkeypatch):
    """Layers in several groups, factors in a file: the answers of one group in memory."""
    store, _ = mixed(dtype=dtype)
    monkeypatch.setattr(
        dropinf.rows.part_files, "CHUNK_BYTES", 4 * store.plan.width * store.rows.itemsize
    )
    if where == "disk":
        store = on_disk(store, tmp_path / "rows")
    q = torch.randn(6, store.plan.width, dtype=dtype)
    whole = Cholesky().fit(store)
    bounded = Cholesky(max_bytes=48_000 if dtype == torch.float32 else 160_000).fit(store)
    assert len(bounded._groups) > len(whole._groups) and bounded._spill is not None
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(bounded.solve(q), whole.solve(q), **tolerance)
    assert bounded.layers[1].form == "n x n" and bounded.layers[4].form == "n x n"
    file = bounded._spill._file
    assert file.exists()
    del bounded
    gc.collect()
    assert not file.exists()
    with pytest.raises(ValueError, match=r"layer '\d' .* needs max_bytes=\d+ or more, got 3000"):
        Cholesky(max_bytes=3000).fit(store)
    # The bound that the message gives is enough for its layer.
    bound = 3000
    for _ in store.plan.blocks:
        try:
            assert Cholesky(max_bytes=bound).fit(store).solve(q).isfinite().all()
            break
        except ValueError as error:
            bound = int(str(error).split("max_bytes=")[1].split()[0])
    else:
        pytest.fail("the bounds of the messages are not enough")


def test_invalid_rows_in_both_forms(tmp_path, monkeypatch):
    store, _ = mixed()
    monkeypatch.setattr(dropinf.rows.part_files, "CHUNK_BYTES", 4 * store.plan.width * 8)
    valid = torch.ones(30, dtype=torch.bool)
    valid[[0, 1, 2, 3, 17]] = False
    rows = store.rows.clone()
    rows[~valid] = torch.nan
    q = torch.randn(2, store.plan.width, dtype=torch.float64)
    got = Cholesky().fit(RowStore(rows, store.plan, valid)).solve(q)
    torch.testing.assert_close(got, Cholesky().fit(RowStore(rows[valid], store.plan)).solve(q))


def test_float64_of_float32_rows():
    """dtype=float64 is exact where float32 loses the small directions."""
    G = rows_of("one dominant", 60, 30).astype(np.float32)
    store = store_of(G, dtype=torch.float32)
    q = np.random.default_rng(1).standard_normal((3, 30))
    exact = truth(G.astype(float), q, 1e-9)
    got = Cholesky(1e-9, dtype=torch.float64).fit(store).solve(torch.from_numpy(q))
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-6 * np.abs(exact).max())


def test_damping_of_each_layer():
    store, _ = mixed()
    q = torch.randn(3, store.plan.width, dtype=torch.float64)
    got = Cholesky({"5": 0.5, "[0-3]": 0.01, "*": 2.0}).fit(store)
    fixed = Cholesky({"5": 0.5, "*": 0.3}, absolute=True).fit(store)
    for l, block in enumerate(store.plan.blocks):
        G, part = store.rows[:, block.entries].numpy(), q[:, block.entries].numpy()
        expected = truth(G, part, 0.5 if l == 5 else 0.01 if l < 4 else 2.0)
        np.testing.assert_allclose(got.solve(q)[:, block.entries], expected, atol=1e-8)
        expected = truth(G, part, 0.5 if l == 5 else 0.3, absolute=True)
        np.testing.assert_allclose(fixed.solve(q)[:, block.entries], expected, atol=1e-8)
        assert fixed.layers[l].λ == (0.5 if l == 5 else 0.3)
    with pytest.raises(ValueError, match="no entry for layer '0'"):
        Cholesky({"5": 1.0}).fit(store)
    with pytest.raises(ValueError, match=r"damping\['lm_head'\] matches no layer"):
        Cholesky({"lm_head": 1.0, "*": 0.1}).fit(store)
    with pytest.raises(ValueError, match="damping must be a number from 0, got -1"):
        Cholesky({"5": -1, "*": 0.1})


def test_zero_layer_with_absolute_damping():
    store = store_of(np.zeros((9, 4)), np.zeros((9, 40)))
    q = torch.randn(2, 44, dtype=torch.float64)
    torch.testing.assert_close(Cholesky(0.5, absolute=True).fit(store).solve(q), q / 0.5)


def test_failed_pivots_are_retried():
    """float32 alone cannot factorise the second layer at 1e-9; it says so, and what it took."""
    G = np.random.default_rng(0).standard_normal((60, 30))
    store = store_of(G, np.outer(G[:, 0], np.arange(1, 31.0)) * 1e3, dtype=torch.float32)
    with pytest.warns(
        UserWarning, match=r"layer '1' \(n=60, r=30\): pivot \d+ is not positive beyond"
    ):
        solver = Cholesky(1e-9, dtype=torch.float32).fit(store)
    first, second = solver.layers
    assert first.retries == 0 and 1 <= second.retries <= 4 and first.λ < 2e-9
    λ = 1e-9 * float((store.rows[:, 30:].double() ** 2).mean())
    assert second.λ == pytest.approx(λ * 10**second.retries, rel=1e-4)
    q = torch.randn(2, 60)
    A = store.rows[:, 30:].double().T @ store.rows[:, 30:].double() / 60
    A += second.λ * torch.eye(30)
    x = solver.solve(q)[:, 30:].double()
    # Backward stable: the residual is small beside |A| |x|.
    assert (x @ A - q[:, 30:]).norm() <= 30 * 30 * 2**-24 * A.norm() * x.norm()
    with (
        pytest.raises(
            ValueError, match=r"layer '1' .* singular at .*power of ten that works is 1e-"
        ),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        Cholesky(1e-14, dtype=torch.float32).fit(store)
    assert len(caught) == 4


@pytest.mark.parametrize("size", [2.0**60, 2.0**-60])
def test_retries_of_rows_whose_squares_leave_float32(size):
    """A power of two changes no digit of what is tried, nor of what is said."""
    G = np.outer(np.random.default_rng(0).standard_normal(60), np.arange(1, 31.0))
    stores = [store_of(G * factor, dtype=torch.float32) for factor in (1.0, size)]
    with pytest.warns(UserWarning, match="is not positive beyond rounding"):
        plain, scaled = (Cholesky(1e-9, dtype=torch.float32).fit(s) for s in stores)
    (one,), (other,) = plain.layers, scaled.layers
    assert other.exponent and not one.exponent
    assert other.retries == one.retries > 0
    assert other.λ == pytest.approx(one.λ * size**2, rel=1e-6)
    q = torch.randn(2, 30)
    torch.testing.assert_close(scaled.solve(q * size) * size, plain.solve(q))
    said = []
    for store in stores:
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="is singular") as error:
            Cholesky(1e-14, dtype=torch.float32).fit(store)
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("n", [60, 9], ids=["r x r", "n x n"])
def test_singular_without_damping(n):
    """The damping that the error gives does work, and in float32 alone a tenth of it does not."""
    G = rows_of("random", n, 10)
    twins = np.concatenate([G, G], 1)
    store = store_of(G, twins, dtype=torch.float32)
    sizes = "n=60, r=20" if n == 60 else "n=9, r=10"
    layer = "1" if n == 60 else "0"
    with pytest.raises(
        ValueError, match=rf"layer '{layer}' \({sizes}\) is singular at damping=0;"
    ) as e:
        Cholesky(0).fit(store)
    works = float(str(e.value).rsplit(" ", 1)[1])
    only = store_of(twins if n == 60 else G, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Cholesky(works).fit(only)
    if works > 1e-12:
        with pytest.warns(UserWarning, match="not positive"):
            Cholesky(works / 10, dtype=torch.float32).fit(only)
    assert 1e-12 <= works <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pivots_that_rounding_made_do_not_pass(dtype):
    """Matrices of rank 9 with r = 10: LAPACK alone takes some of them."""
    passed = 0
    for seed in range(10):
        G = rows_of("random", 60, 9, seed)
        store = store_of(np.concatenate([G, G.mean(1, keepdims=True)], 1), dtype=dtype)
        passed += int(torch.linalg.cholesky_ex(store.rows.T @ store.rows / 60).info == 0)
        with pytest.raises(ValueError, match="is singular at damping=0"):
            Cholesky(0).fit(store)
    assert passed


def few_directions():
    """float32 rows whose second layer has rank 5, and the answers to four queries at 1e-5."""
    rng = np.random.default_rng(0)
    G = rng.standard_normal((60, 20)), rng.standard_normal((60, 5)) @ rng.standard_normal((5, 30))
    store = store_of(*G, rng.standard_normal((60, 25)), dtype=torch.float32)
    q = rng.standard_normal((4, 75)).astype(np.float32)
    parts = np.split(store.rows.double().numpy(), [20, 50], 1)
    asked = np.split(q.astype(float), [20, 50], 1)
    exact = np.concatenate([truth(G, q, 1e-5) for G, q in zip(parts, asked, strict=True)], 1)
    return store, torch.from_numpy(q), exact


@pytest.mark.parametrize("max_bytes", [None, 60_000])
def test_layers_that_need_float64_get_it(max_bytes, tmp_path):
    """And no others; with a memory bound, in a file, and after it was saved."""
    store, q, exact = few_directions()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solver = Cholesky(1e-5, max_bytes=max_bytes).fit(store)
    wide = [g.blocks for g in solver._groups if g.setting.dtype == torch.float64]
    assert wide == [[store.plan.blocks[1]]]
    in_a_file = [isinstance(g.factors, FileTensor) for g in solver._groups]
    assert all(in_a_file) if max_bytes else not any(in_a_file)
    assert [layer.retries for layer in solver.layers] == [0, 0, 0]
    solver.save(tmp_path / "solver")
    for each in (solver, Cholesky.load(tmp_path / "solver", max_bytes=max_bytes)):
        got = each.solve(q.double()).numpy()
        part = slice(20, 50)
        np.testing.assert_allclose(got[:, part], exact[:, part], rtol=1e-7, atol=1e-6)
        assert np.abs(got - exact)[:, :20].max() <= 1e-3 * np.abs(exact[:, :20]).max()
    assert max(solver.condition()) > 1e5


def test_float32_alone_says_what_it_loses():
    store, _, _ = few_directions()
    with pytest.warns(UserWarning, match=r"layer '1' .*fewer than two digits .*use dtype=torch.fl"):
        Cholesky(1e-5, dtype=torch.float32).fit(store)
    with pytest.warns(UserWarning, match=r"layer '1' .*fewer than two digits"):
        Cholesky(1e-5, max_bytes=25_000).fit(store)  # no room for float64


def test_rows_that_are_not_finite_are_named():
    store, _ = mixed()
    store.rows[13, 5] = torch.nan
    for solver in (Cholesky(), Full()):
        with pytest.raises(ValueError, match="row 13 of the store is not finite"):
            solver.fit(store)
        assert solver.plan is None


def test_rows_whose_squares_leave_float32():
    """Each such layer is scaled by a power of two, and the one between them is not."""
    layers = [rows_of("random", 60, r, r) * size for r, size in ((4, 1e25), (5, 1), (6, 1e-25))]
    store = store_of(*layers, dtype=torch.float32)
    q = torch.randn(3, 15, dtype=torch.float64)
    solver, exact = Cholesky().fit(store), Cholesky(dtype=torch.float64).fit(store)
    assert [layer.exponent != 0 for layer in solver.layers] == [True, False, True]
    for columns in (slice(4), slice(4, 9), slice(9, 15)):
        found, wanted = (s.solve(q)[:, columns] for s in (solver, exact))
        assert (found - wanted).norm() < 1e-5 * wanted.norm()
    for ours, theirs in zip(solver.layers, exact.layers, strict=True):
        assert ours.λ == pytest.approx(theirs.λ, rel=1e-6)


@pytest.mark.parametrize("n", [100, 60])
def test_full_is_one_matrix(n):
    store, _ = stores(n, 1, 20, 5, 30, 65)
    q = torch.randn(3, 120, dtype=torch.float64)
    solver = Full(0.2).fit(store)
    expected = truth(store.rows.numpy(), q.numpy(), 0.2)
    np.testing.assert_allclose(
        solver.solve(q), expected, rtol=0, atol=1e-9 * np.abs(expected).max()
    )
    (layer,) = solver.layers
    assert layer.form == ("r x r" if n == 100 else "n x n") and layer.name == "all layers"


def test_describe(capsys):
    store, sizes = mixed()
    solver = Cholesky().fit(store)
    print(solver.describe())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["layer", "r", "form", "lambda"] and len(lines) == 1 + len(sizes)
    assert [line.split()[1] for line in lines[1:]] == list(map(str, sizes))
    forms = [" ".join(line.split()[2:5]) for line in lines[1:]]
    assert forms == ["n x n" if r >= 60 else "r x r" for r in sizes]
    for block, layer, condition in zip(
        store.plan.blocks, solver.layers, solver.condition(), strict=True
    ):
        G = store.rows[:, block.entries].numpy()
        eigenvalues = np.linalg.eigvalsh(G.T @ G / 30 + layer.λ * np.eye(block.r))
        exact = eigenvalues[-1] / eigenvalues[0]
        assert 0.5 * exact <= condition <= exact * (1 + 1e-9)
        assert layer.λ == pytest.approx(0.1 * (G**2).sum() / (30 * block.r))
    with pytest.raises(RuntimeError, match="describe: call fit"):
        Cholesky().describe()


@pytest.mark.parametrize("max_bytes", [None, 100_000])
def test_save_and_load(tmp_path, max_bytes):
    store, _ = mixed(dtype=torch.float32)
    solver = Cholesky({"0": 0.2, "*": 0.1}).fit(store)
    solver.save(tmp_path / "solver")
    loaded = Cholesky.load(tmp_path / "solver", store, max_bytes=max_bytes)
    q = torch.randn(3, store.plan.width)
    assert torch.equal(loaded.solve(q), solver.solve(q))
    assert (len(loaded._groups) > len(solver._groups)) == (max_bytes is not None)
    assert loaded.layers == solver.layers and loaded.plan.fingerprint == store.plan.fingerprint
    torch.testing.assert_close(scores(store, store, loaded), scores(store, store, solver))
    with pytest.raises(FileExistsError, match=r"save: .*solver exists"):
        solver.save(tmp_path / "solver")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["solver"]


def test_load_refuses(tmp_path):
    store, _ = mixed(dtype=torch.float32)
    path = tmp_path / "solver"
    Cholesky().fit(store).save(path)
    with pytest.raises(FileNotFoundError, match="holds no solver"):
        Cholesky.load(tmp_path)
    with pytest.raises(ValueError, match=r"holds a Cholesky; use Cholesky\.load"):
        Full.load(path, store)
    with pytest.raises(ValueError, match="n x n form need the rows again; give store="):
        Cholesky.load(path)
    with pytest.raises(ValueError, match=r"fitted on 30 valid rows under plan .* has 29"):
        Cholesky.load(path, RowStore(store.rows[1:], store.plan))
    factors = (path / "factors.bin").read_bytes()
    for damaged in (factors[:-4], factors[:40] + b"\x01" + factors[41:]):
        (path / "factors.bin").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"factors\.bin is missing or damaged"):
            Cholesky.load(path, store)
    (path / "factors.bin").write_bytes(factors)
    text = (path / "solver.json").read_text()
    (path / "solver.json").write_text(text[:-20])
    with pytest.raises(ValueError, match=r"solver\.json is damaged"):
        Cholesky.load(path, store)
    saved = json.loads(text)
    saved["fingerprint"] = "0" * 16
    del saved["crc32"]
    (path / "solver.json").write_bytes(sealed(saved))
    with pytest.raises(ValueError, match="do not belong together"):
        Cholesky.load(path, store)


def test_bad_options():
    with pytest.raises(ValueError, match="dtype must be float32 or float64"):
        Cholesky(dtype=torch.float16)
    with pytest.raises(ValueError, match="max_bytes must be positive, got 0"):
        Cholesky(max_bytes=0)


def test_unpacked_matrices_are_views():
    packed = torch.zeros(5)
    ops.unpack(packed, [0, 1, 3])[1][1, 0] = 7
    assert packed.tolist() == [0, 0, 0, 7, 0]
