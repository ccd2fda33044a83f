"""bench/experiments/bounds.py in its tiny size, and the arithmetic of what it concludes."""

import bounds
import bounds_report
import pytest
import torch
from bench_runs import assert_second_run_changes_the_date_alone, run_quick
from torch import nn


@pytest.mark.more
def test_quick_run(tmp_path):
    pytest.importorskip("sklearn")
    path = tmp_path / "bounds.json"
    data = run_quick("bounds", path)
    for x in data["records"]:
        assert len(x["dropout"]) == len(x["Gaussian"]) == data["settings"]["masks"]
        assert min(x["dropout"] + x["Gaussian"]) > 0 and x["d"] == 27 * x["width"] + 10
    assert_second_run_changes_the_date_alone("bounds", path)


def batch(n=7):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 16, generator=generator).double()
    return x, torch.randint(10, (n,), generator=generator)


def test_gradients_are_those_of_autograd():
    x, y = batch()
    model = bounds.trained(3, 0, x, y, 1).requires_grad_()
    found = bounds.gradients(model, x, y)
    for row, one, label in zip(found, x, y, strict=True):
        loss = nn.functional.cross_entropy(model(one[None]), label[None])
        expected = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close(row, torch.cat([g.flatten() for g in expected]))


def test_gauss_newton_is_the_hessian_of_a_linear_model():
    x, y = batch()
    model = nn.Sequential(nn.Linear(16, 10)).double().requires_grad_(False)
    parameters = dict(model.named_parameters())
    H = bounds.hessian_of(model, parameters, x, y)
    torch.testing.assert_close(bounds.gauss_newton(model, x), H, atol=1e-12, rtol=1e-9)

    def loss(weight, bias):
        return nn.functional.cross_entropy(x @ weight.T + bias, y)

    given = tuple(p.detach().clone() for p in parameters.values())
    blocks = torch.autograd.functional.hessian(loss, given)
    expected = torch.cat([torch.cat([b.reshape(160, -1) for b in blocks[0]], 1)[:1]])
    torch.testing.assert_close(H[:1], expected, atol=1e-12, rtol=1e-9)


def test_projections_are_unbiased():
    total = {name: torch.zeros(6, 6, dtype=torch.float64) for name in bounds.COMPRESSIONS}
    for seed in range(4000):
        for name, P in bounds.projections(6, 2, seed).items():
            assert P.shape == (2, 6)
            total[name] += P.T @ P / 4000
    for found in total.values():
        assert (found - torch.eye(6)).abs().max() < 0.1
    assert (bounds.projections(6, 6, 0)["dropout"].sum(0) == 1).all()  # each coordinate once


def test_whole_rows_have_no_error():
    x, _ = batch(5)
    H = x.T @ x / 5
    P = bounds.projections(16, 16, 1)["dropout"]
    exact = bounds.influence(H, x[:2], x)
    expected = x[:2] @ torch.linalg.inv(H + bounds.LAMBDA * torch.eye(16)) @ x.T
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=1e-8)
    found = bounds.influence(P @ H @ P.T, x[:2] @ P.T, x @ P.T)
    torch.testing.assert_close(found, exact)


def test_growth():
    """Planted: sigma as d, dropout's error as d^0.5, Gaussian's as d²."""
    points = [
        bounds_report.Point(
            d, 3.0 * d, 1.0, 1.0, {"dropout": (d**0.5, 0.1), "Gaussian": (d**2.0, 0.1)}
        )
        for d in (10, 100, 1000)
    ]
    dropout, gaussian = bounds_report.growth(points, "d")
    assert "sigma_max(H) grows 100 times (like d^1.00), its error 10 times (like d^0.50)" in dropout
    # 10 + 3 * 10³ to 1000 + 3 * 10⁹.
    assert "grows 9.97e+05 times (like d^3.00), its error 1e+04 times (like d^2.00)" in gaussian
    by_sigma = bounds_report.growth(points, "sigma_max")
    assert "as sigma_max goes from 30 to 3e+03" in next(by_sigma)
