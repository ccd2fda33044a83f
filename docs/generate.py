"""Pages of the manual that are made as it is built: hooks of mkdocs.

The reference comes from docstrings, the options of the commands from the command line itself, and
the pages of bench/results/ are shown as they stand.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Page of the reference -> its title, and what it shows, in order.
REFERENCE: dict[str, tuple[str, list[str]]] = {
    "plans": (
        "Plans and compressions",
        [
            "Plan",
            "Dropout",
            "Sketch",
            "FactoredDropout",
            "LoGra",
            "Gaussian",
            "Rademacher",
            "SJLT",
            "FJLT",
            "Full",
            "Energies",
            "energies",
            "energies_from_adam",
            "DropoutProjector",
        ],
    ),
    "capture": ("Capture", ["capture", "verify", "keeps_examples", "ProofError"]),
    "rows": ("Rows", ["collect", "RowStore", "split", "over_ranks", "LockedError"]),
    "solvers": (
        "Solvers",
        [
            "choose_damping",
            "solvers.Cholesky",
            "solvers.Full",
            "solvers.Eigen",
            "solvers.CG",
            "solvers.LiSSA",
            "solvers.DataInf",
            "solvers.Diagonal",
            "solvers.Identity",
            "solvers.Solver",
            "solvers.DampingChoice",
        ],
    ),
    "scores": (
        "Scores",
        [
            "influence",
            "scores",
            "topk",
            "self_influence",
            "mean_query",
            "ensemble",
            "agreement",
            "stability",
            "optimizer_updates",
        ],
    ),
    "looking": ("Looking at scores", ["attribute", "Attribution", "ScoreTable", "write_report"]),
    "losses": ("Losses", ["losses"]),
    "evaluate": ("Evaluation", ["evaluate"]),
    "ops": ("Ops", ["backends", "BackendError", "ops"]),
    "integrations": (
        "Adapters",
        [
            "integrations.trak",
            "integrations.dattri",
            "integrations.captum",
            "integrations.transformers",
            "integrations.lightning",
        ],
    ),
}


def reference_page(name: str) -> str:
    """A page of the reference, for mkdocstrings to fill."""
    title, names = REFERENCE[name]
    return "\n\n".join([f"# {title}", *(f"::: dropinf.{each}" for each in names)]) + "\n"


def options_page() -> str:
    """Every command with its arguments and options, as `--help` has them.

    What several commands take is told once, at the end: the options of all, and the parts of a job.
    """
    from typer.main import get_command

    from dropinf.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    of_all = set.intersection(*({p.name for p in c.params} for c in commands.values()))
    parts: dict[str, list[Any]] = {}  # of a job
    text = ["# Commands and their options", "Made from the command line itself.\n"]
    for name, command in commands.items():
        own = [p for p in command.params if p.name not in of_all and not _part(p)]
        text += [f"## dropinf {name}", command.help, _as_code(command.epilog), *_table(own)]
        taken: dict[str, list[Any]] = {}
        for param in command.params:
            if _part(param):
                taken.setdefault(_part(param), []).append(param)
        if taken:
            links = (f"[{part}](#{_anchor(part)})" for part in taken)
            text.append(f"And the options of {', '.join(links)}.")
        parts.update(taken)
    shared = [p for p in next(iter(commands.values())).params if p.name in of_all]
    text += ["## Options of every command", *_table(shared)]
    for part, params in parts.items():
        text += [f"## {part}", *_table(params)]
    return "\n\n".join(text) + "\n"


def _part(param: Any) -> str:
    """The part of a job's file that an option stands for."""
    return getattr(param, "rich_help_panel", None) or ""


def _anchor(title: str) -> str:
    """The name that mkdocs gives a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def _as_code(epilog: str) -> str:
    """The example of a command; several are joined by ", or "."""
    examples = epilog.removeprefix("Example: ").split(", or ")
    return "\n".join(["```sh", *examples, "```"])


def _table(params: list[Any]) -> list[str]:
    rows = ["| option | |", "| --- | --- |"]
    for param in params:
        names = param.opts if param.param_type_name == "option" else [param.name.upper()]
        shown = ", ".join(f"`{one}`" for one in names)
        said = " ".join((param.help or "").split()).replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| {shown} | {said} |")
    return ["\n".join(rows)] if params else []


def generated() -> dict[str, str]:
    """Address of each page that is made -> its text."""
    return {
        "options.md": options_page(),
        **{f"reference/{name}.md": reference_page(name) for name in REFERENCE},
    }


def shown_as_they_stand() -> list[Path]:
    """Files beside docs/ that the manual links to."""
    results = ROOT / "bench"
    kinds = ("results/*.md", "results/*.json", "results/microbenchmark/*.*", "figures/*.svg")
    return [ROOT / "CHANGELOG.md", *(f for kind in kinds for f in sorted(results.glob(kind)))]


def within_the_site(markdown: str, page: str) -> str:
    """Links of a page of docs/ to files beside docs/, as links to where the site has them."""
    folder = posixpath.dirname(page)

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, link[1]))
        if target.startswith("docs/") or re.match(r"\w+:", link[1]):
            return link[0]
        return f"]({posixpath.relpath(target, folder or '.')}{link[2] or ''})"

    return re.sub(r"\]\(([^)#\s]+)(#[^)]*)?\)", moved, markdown)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for address, text in generated().items():
        files.append(File.generated(config, address, content=text))
    for path in shown_as_they_stand():
        address = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    address = page.file.src_uri
    beside = address.startswith("bench/") or address == "CHANGELOG.md"
    return markdown if beside else within_the_site(markdown, address)
