"""Markdown and the figure of what bounds.py recorded."""

import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pages
from pages import new_figure, row, rows_of, save_figure

COMPRESSIONS = ("dropout", "Gaussian")
# Up to a constant that nobody gives.
BOUNDS: dict[str, Callable[["Point"], float]] = {
    "dropout": lambda point: point.sigma,
    "Gaussian": lambda point: point.d + point.d**2 * point.sigma,
}
SPELLED = {"dropout": "sigma_max(H)", "Gaussian": "d + d² sigma_max(H)"}


class Point(NamedTuple):
    """One d, or one scale: means over models, with standard errors over them."""

    d: int
    sigma: float  # largest eigenvalue of the Gauss-Newton matrix, as scaled
    hessian: float  # largest singular value of the Hessian
    size: float  # root mean square of the exact influence
    error: dict[str, tuple[float, float]]


def point_of(records: list[dict[str, Any]]) -> Point:
    def mean(name: str) -> float:
        return statistics.fmean(x[name] for x in records)

    error = {}
    for name in COMPRESSIONS:
        each = [statistics.fmean(x[name]) for x in records]
        error[name] = statistics.fmean(each), statistics.stdev(each) / len(each) ** 0.5
    sigma, hessian = mean("sigma_max"), mean("hessian_sigma_max")
    return Point(records[0]["d"], sigma, hessian, mean("size"), error)


def by_d(data: dict[str, Any], r: int | str) -> list[Point]:
    """Of unscaled models."""
    return [
        point_of(mine)
        for width in data["settings"]["widths"]
        if (mine := chosen(data, width=width, r=r, scale=1.0))
    ]


def by_scale(data: dict[str, Any], r: int | str) -> list[Point]:
    settings = data["settings"]
    return [
        point_of(chosen(data, width=settings["scaled"], r=r, scale=scale))
        for scale in settings["scales"]
    ]


def chosen(data: dict[str, Any], **where: Any) -> list[dict[str, Any]]:
    return [x for x in data["records"] if all(x[k] == v for k, v in where.items())]


def slope(x: list[float], y: list[float]) -> float:
    """Of log y against log x, by least squares."""
    return statistics.linear_regression(list(map(math.log, x)), list(map(math.log, y))).slope


def write_report(data: dict[str, Any], page: Path, figures: Path) -> None:
    settings = data["settings"]
    drawn = draw(data, figures / "bounds.svg")
    link = pages.link(drawn, page)
    lines = [
        *pages.head("bounds", "Error of compressed influence beside the paper's bounds", data),
        f"MLPs 16-w-10 on scikit-learn's digits pooled to 4 x 4 ({settings['n']} training images, "
        f"{settings['m']} queries, {settings['epochs']} epochs of Adam), {settings['models']} of "
        f"each size, {settings['masks']} masks; H is the exact Gauss-Newton matrix over all "
        f"parameters together, λ = {settings['lambda']}, gradients scaled to length 1, float64. "
        "Error: the root mean square over queries and examples of compressed less exact "
        "influence; ± standard error over models. Products of rows are unbiased in both "
        "compressions.",
        "",
        f"![Error against d and sigma_max beside the bounds]({link})",
        "",
    ]
    for r in settings["r"]:
        lines += [f"## r = {r}", "", *table(by_d(data, r)), "", *growth(by_d(data, r), "d"), ""]
    r = settings["r"][0]
    scaled = by_scale(data, r)
    lines += [f"## H scaled, d = {scaled[0].d}, r = {r}", "", *table(scaled), ""]
    lines += [
        *growth(scaled, "sigma_max"),
        "",
        "## What this says of the bounds, and what not",
        "",
        *compared(data),
        "",
        "The bounds are upper bounds up to constants that are not known here (they may hold "
        "gradient norms, λ, r and the scaling of the projection), so no error above can be said to "
        "meet or break one; only how they grow can be compared with how errors grow. One bound "
        "below another says nothing of which error is smaller.",
    ]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(points: list[Point]) -> Iterator[str]:
    yield from rows_of(
        (
            *("d", "sigma_max(H)", "of the Hessian", "size of exact influence"),
            *(f"error, {name}" for name in COMPRESSIONS),
            "Gaussian / dropout",
        )
    )
    for point in points:
        errors = [point.error[name] for name in COMPRESSIONS]
        yield row(
            point.d,
            *(f"{value:.3g}" for value in (point.sigma, point.hessian, point.size)),
            *(f"{value:.3g} ± {error:.1g}" for value, error in errors),
            f"{errors[1][0] / errors[0][0]:.2f}",
        )


def growth(points: list[Point], over: str) -> Iterator[str]:
    """A sentence for each compression."""
    x = [float(p.d) if over == "d" else p.sigma for p in points]
    for name in COMPRESSIONS:
        error = [p.error[name][0] for p in points]
        bound = [BOUNDS[name](p) for p in points]
        yield (
            f"- {name}: as {over} goes from {x[0]:.3g} to {x[-1]:.3g}, its bound {SPELLED[name]} "
            f"grows {bound[-1] / bound[0]:.3g} times (like {over}^{slope(x, bound):.2f}), its "
            f"error {error[-1] / error[0]:.3g} times (like {over}^{slope(x, error):.2f})."
        )


def compared(data: dict[str, Any]) -> Iterator[str]:
    """The two errors beside each other, and what a growing H does to the influence itself."""
    points = [point for r in data["settings"]["r"] for point in by_d(data, r)]
    ratios = [p.error["Gaussian"][0] / p.error["dropout"][0] for p in points]
    gaussian = [BOUNDS["Gaussian"](p) / BOUNDS["dropout"](p) for p in points]
    scaled = by_scale(data, data["settings"]["r"][0])
    relative = [scaled[at].error["dropout"][0] / scaled[at].size for at in (0, -1)]
    sizes = " to ".join(f"{scaled[at].size:.3g}" for at in (0, -1))
    yield (
        f"Over all d and r the Gaussian error is {min(ratios):.2f} to {max(ratios):.2f} times "
        "dropout's, while the ratio of their bounds grows "
        f"{max(gaussian) / min(gaussian):.3g} times: they do not order the two as measured. With "
        f"λ held, a larger H makes the influence itself smaller, from {sizes}, and dropout's "
        f"error with it; over that size the error goes from {relative[0]:.2f} to "
        f"{relative[1]:.2f}, where its bound grows with sigma_max."
    )


def draw(data: dict[str, Any], path: Path) -> Path:
    """Bounds go through the first point of their own errors, as their constants are not known."""
    settings = data["settings"]
    found = [(f"r = {r}", by_d(data, r), "d") for r in settings["r"]]
    scaled = by_scale(data, settings["r"][0])
    found.append((f"H scaled, d = {scaled[0].d}, r = {settings['r'][0]}", scaled, "sigma_max(H)"))
    figure, panels = new_figure("bounds", 1, 3, figsize=(13, 4.6))
    for panel, (title, points, over) in zip(panels, found, strict=True):
        x = [p.d if over == "d" else p.sigma for p in points]
        for number, name in enumerate(COMPRESSIONS):
            error = [p.error[name][0] for p in points]
            bound = [BOUNDS[name](p) for p in points]
            spread = [p.error[name][1] for p in points]
            panel.errorbar(x, error, spread, color=f"C{number}", marker="o", label=name)
            panel.plot(
                x,
                [error[0] * b / bound[0] for b in bound],
                color=f"C{number}",
                linestyle=":",
                label=f"growth of its bound, {SPELLED[name]}",
            )
        size = [p.size for p in points]
        panel.plot(x, size, color="black", linewidth=1, label="size of the exact influence")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel(over)
        panel.set_title(title, fontsize=10)
    panels[0].set_ylabel("root mean square error")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return save_figure(figure, path)
