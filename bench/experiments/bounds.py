"""Error of dropout and of Gaussian influence beside the bounds of arXiv 2509.15651, as they grow.

    python bench/experiments/bounds.py [--quick] [--out bench/results/bounds.json]

Of MLPs on scikit-learn's digits (pooled to 4 x 4), small enough for the whole Gauss-Newton matrix H
[d, d] and the Hessian: the influence g_q (H + λ)⁻¹ g_i of unit gradients, exact and with dropout's
or Gaussian rows of r numbers (products unbiased, the same λ), in float64. What the bounds,
O(sigma_max(H)) for dropout and O(d + d² sigma_max(H)) for Gaussian rows, say of growth is set
beside the root mean square error: with d, and at one d with sigma_max as H is scaled.
"""

import torch
from bounds_report import write_report
from command import files_of, parser_of
from quality import rounded
from records import Records
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

SETTINGS = {
    **{"widths": [2, 4, 8, 16, 32, 64], "r": ["d / 8", 16], "models": 3, "masks": 10},
    **{"n": 400, "m": 40, "epochs": 40, "scales": [0.01, 0.1, 1.0, 10.0, 100.0], "scaled": 16},
}
QUICK = {
    **{"widths": [2, 4], "r": ["d / 8", 16], "models": 2, "masks": 3},
    **{"n": 60, "m": 8, "epochs": 5, "scales": [0.1, 1.0, 10.0], "scaled": 4},
}
LAMBDA = 0.01  # the same for all, exact and compressed
NAMES = ("width", "model", "r", "scale")
PACKAGES = ("scikit-learn",)
COMPRESSIONS = ("dropout", "Gaussian")


def main(arguments: list[str] | None = None) -> None:
    given = parser_of(__doc__).parse_args(arguments)
    torch.set_num_threads(1)
    settings = {"quick": given.quick, "lambda": LAMBDA, **(QUICK if given.quick else SETTINGS)}
    files = files_of("bounds", given)
    records = Records(files.json, settings, NAMES, PACKAGES)
    records.save()
    data = digits(settings["n"], settings["m"])
    for width in settings["widths"]:
        for seed in range(settings["models"]):
            measure(width, seed, data, records)
        print(f"width {width}: done", flush=True)
    write_report(records.data, files.page, files.figures)
    print(files)


def digits(n: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, label) of n training images and of m queries, float64."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).view(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1) / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], torch.from_numpy(labels)[order]
    return x[:n], y[:n], x[n : n + m], y[n : n + m]


def measure(width: int, seed: int, data: tuple, records: Records) -> None:
    """One model, at every r and scale that is not recorded."""
    settings = records.data["settings"]
    scales = settings["scales"] if width == settings["scaled"] else [1.0]
    keys = [(width, seed, r, scale) for r in settings["r"] for scale in scales]
    todo = [key for key in keys if key not in records]
    if not todo:
        return
    x, y, asked, answers = data
    model = trained(width, seed, x, y, settings["epochs"])
    parameters = dict(model.named_parameters())
    rows, queries = (unit(gradients(model, *these)) for these in ((x, y), (asked, answers)))
    H = gauss_newton(model, x)
    d = len(H)
    full = hessian_of(model, parameters, x, y)
    largest = float(torch.linalg.eigvalsh(H)[-1]), float(torch.linalg.eigvalsh(full).abs().max())
    for key in todo:
        r, scale = d // 8 if key[2] == "d / 8" else key[2], key[3]
        exact = influence(scale * H, queries, rows)
        errors = {name: [] for name in COMPRESSIONS}
        for mask in range(settings["masks"]):
            for name, P in projections(d, r, mask).items():
                found = influence(scale * (P @ H @ P.T), queries @ P.T, rows @ P.T)
                errors[name].append(float((found - exact).square().mean().sqrt()))
        records.add(
            key,
            d=d,
            rows=r,
            sigma_max=rounded((scale * largest[0],))[0],
            hessian_sigma_max=rounded((scale * largest[1],))[0],
            size=rounded((float(exact.square().mean().sqrt()),))[0],
            **{name: rounded(values) for name, values in errors.items()},
        )


def trained(width: int, seed: int, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 10)).double()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for at in torch.randperm(len(x), generator=order).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[at]), y[at]).backward()
            optimizer.step()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def flat(by_name: dict[str, Tensor], lead: int) -> Tensor:
    """Gradients by parameter -> [..., d]."""
    return torch.cat([g.flatten(lead) for g in by_name.values()], -1)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[n, d] of each example's loss: (p - onehot) J."""
    J = jacobians(model, x)
    residual = model(x).softmax(-1) - nn.functional.one_hot(y, 10)
    return torch.einsum("no,nod->nd", residual, J)


def jacobians(model: nn.Module, x: Tensor) -> Tensor:
    """[n, 10, d] of the logits."""
    parameters = dict(model.named_parameters())

    def logits(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, parameters, one[None])[0]

    return flat(vmap(jacrev(logits), (None, 0))(parameters, x), 2)


def gauss_newton(model: nn.Module, x: Tensor) -> Tensor:
    """[d, d]: the mean of Jᵀ (diag(p) - p pᵀ) J."""
    J, p = jacobians(model, x), model(x).softmax(-1)
    centred = J - torch.einsum("no,nod->nd", p, J)[:, None]
    half = (p.sqrt()[..., None] * centred).flatten(0, 1)
    return half.T @ half / len(x)


def hessian_of(model: nn.Module, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """[d, d] of the mean loss."""
    names, shapes = list(parameters), [p.shape for p in parameters.values()]
    sizes = [p.numel() for p in parameters.values()]

    def loss(vector: Tensor) -> Tensor:
        given = {
            name: part.view(shape)
            for name, part, shape in zip(names, vector.split(sizes), shapes, strict=True)
        }
        return nn.functional.cross_entropy(functional_call(model, given, x), y)

    at = torch.cat([p.flatten() for p in parameters.values()])
    return jacrev(jacrev(loss), chunk_size=128)(at)  # all at once would take GBs


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def influence(H: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
    """[m, n]."""
    damped = H + LAMBDA * torch.eye(len(H), dtype=H.dtype)
    return queries @ torch.linalg.solve(damped, rows.T)


def projections(d: int, r: int, seed: int) -> dict[str, Tensor]:
    """P [r, d] with E PᵀP = 1: r of d coordinates, and normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    dropout = torch.zeros(r, d, dtype=torch.float64)
    dropout[torch.arange(r), torch.randperm(d, generator=generator)[:r]] = (d / r) ** 0.5
    gaussian = torch.randn(r, d, generator=generator, dtype=torch.float64) / r**0.5
    return dict(zip(COMPRESSIONS, (dropout, gaussian), strict=True))


if __name__ == "__main__":
    main()
