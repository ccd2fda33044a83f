"""Markdown tables of a benchmark run: python bench/report.py RESULTS.json > RESULTS.md."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

NAMES = {
    "bench_sampled_outer": "sampled_outer, B=1, T=2048, I=O=4096, float32; r, inputs: {}",
    "bench_sampled_outer_by_energy": "sampled_outer by energy, float32; energies, r, sizes: {}",
    "bench_energies": "energies, the pass of a batch: {}",
    "bench_sampled_conv": "sampled_conv, B=8, r=1024, float32; C, O, plane, kernel: {}",
    "bench_gather_grads": "gather_grads, 200 layers of 512 x 512; r of each: {}",
    "bench_streamed_fit": "solvers.Cholesky on 100,000 rows from disk, 1,000 layers, r 1 to 8192",
    "bench_damped_cholesky": "damped_cholesky, float32, 16 right-hand sides; r, layers; what: {}",
    "bench_ragged_cholesky": "damped_cholesky, 200 layers of all sizes: {}",
    "bench_gram": "gram, 50 layers, n=512; r of each: {}",
    "bench_collect_into_a_directory": "collect, an MLP, 3 kB a row, into a directory: {}",
    "bench_topk_over_a_store": "topk, 50,000 rows of 1,024 on disk; queries: {}",
    "bench_topk_of_few_bits": "topk of 50,000 rows of 1,024 in few bits; type, queries: {}",
    "bench_whole_model": "a whole model, r=1024 a layer: {}",
    "bench_whole_model_memory": "memory of one step of a whole model: {}",
    "bench_embed": "{}",
    "bench_embed_memory": "memory of: {}",
}

PACKAGES = (
    *("torch", "numpy", "dattri", "bergson", "traker", "captum", "transformers", "lightning"),
)


def main(path: str) -> None:
    """Print the machine, then a table for each benchmark."""
    results = json.loads(Path(path).read_text())
    machine, commit = results["machine_info"], results["commit_info"]
    cpu = machine["cpu"]
    packages = ", ".join(versions(*PACKAGES))
    print(
        f"# Benchmarks of {results['datetime'][:10]}\n\n"
        f"{cpu['count']} cores of {cpu['brand_raw']}; {platform.system()}, "
        f"Python {machine['python_version']}, {packages}; commit {commit['id'][:12]}"
        f"{' with uncommitted changes' if commit['dirty'] else ''}.\n\n"
        "Contestants alternate in one process; figures are medians over the rounds, with the "
        "smallest and largest.\nA ratio is the contestant's time over dropinf's in the same round: "
        "above 1, dropinf is faster."
    )
    for result in results["benchmarks"]:
        function, _, case = result["name"].rstrip("]").partition("[")
        print(f"\n## {NAMES[function].format(case)}\n")
        info = result["extra_info"]
        if "contestants" in info:
            times(info)
        elif "streamed" in info:
            streamed(info)
        else:
            peaks(info)


def versions(*names: str) -> Iterator[str]:
    """Name and version of those that are installed."""
    for name in names:
        with suppress(PackageNotFoundError):
            yield f"{name} {version(name)}"


def times(info: dict) -> None:
    """The table of one timing."""
    print(f"{info['threads']} threads.\n")
    print("| contestant | ms | ratio | to reach | reached |\n| --- | --- | --- | --- | --- |")
    for name, measured in info["contestants"].items():
        ms, ratio = (spread(measured[key]) for key in ("ms", "ratio"))
        wanted = measured["to_reach"]
        bounds, reached = "", ""
        if wanted:
            low, high = wanted
            bounds = f"≥ {low:.2f}" if high is None else f"{low or 0:.2f} to {high:.2f}"
            met = (low or 0) <= measured["ratio"][0] <= (high or float("inf"))
            reached = "yes" if met else "**no**"
        print(f"| {name} | {ms} | {ratio} | {bounds} | {reached} |")
    for name, reason in info.get("left_out", {}).items():
        print(f"| {name} | not run: {reason} | | | |")


def peaks(info: dict) -> None:
    """The table of peak memory."""
    ours, rows = info["peaks"][info["ours"]], info["rows"]
    print(f"The rows are {rows:.2g} MB.\n")
    print(
        f"| pass | peak above what the process held, MB | ({info['ours']} - rows) / this "
        "| to reach, MB | reached |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, peak in info["peaks"].items():
        bound = info.get("at_most", {}).get(name)
        reached = "" if bound is None else "yes" if peak <= bound else "**no**"
        bound = "" if bound is None else f"≤ {bound:.2g}"
        print(f"| {name} | {peak:.3g} | {ratio(ours - rows, peak)} | {bound} | {reached} |")
    for name, reason in info["left_out"].items():
        print(f"| {name} | not run: {reason} | | | |")


def ratio(part: float, whole: float) -> str:
    return f"{part / whole:.2g}" if part > 0 and whole > 0 else ""


def streamed(info: dict) -> None:
    """The table of memory that a bound holds."""
    print(f"The rows are {info['rows']:.0f} MB, the factors {info['factors']:.0f} MB.\n")
    print("| max_bytes, MB | peak above what the process held, MB | fit, s | solve, s | residual |")
    print("| --- | --- | --- | --- | --- |")
    for run in info["streamed"]:
        bound = "none" if run["bound"] is None else f"{run['bound']:.0f}"
        figures = (
            f"{run['peak']:.0f} | {run['fit']:.1f} | {run['solve']:.1f} | {run['residual']:.1g}"
        )
        print(f"| {bound} | {figures} |")


def spread(values: list[float]) -> str:
    """Median (smallest to largest)."""
    return "{:.3g} ({:.3g} to {:.3g})".format(*values)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    main(sys.argv[1])
