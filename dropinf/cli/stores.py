"""Commands on what lies in directories: info, verify, join, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dropinf.cli.app import command
from dropinf.cli.matrix_file import Matrix, ending_of
from dropinf.cli.run_directory import Run, load_solver, refuse_job_file, solver_facts
from dropinf.cli.terminal import Terminal
from dropinf.compression import Plan
from dropinf.rows import RowStore
from dropinf.text_table import Table


@command("dropinf info dropinf-run")
def info(
    terminal: Terminal,
    path: Annotated[
        Path, typer.Argument(help="Directory of a run, a store or a solver, or a plan's file.")
    ],
) -> None:
    """What a run, a store, a solver or a plan is."""
    found = {str(one): _facts_of(what, one) for what, one in _things_at(path)}
    tables = (f"{name}\n{Table(('what', 'is'), _cells(facts))}" for name, facts in found.items())
    terminal.show(found, "\n\n".join(tables))


@command("dropinf verify dropinf-run")
def verify(
    terminal: Terminal,
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Runs, stores, solvers, plans."),
    ],
) -> None:
    """Read everything and compare its checksums; ends with 1 if something is damaged."""
    found = {}
    for path in paths:
        store = None
        for what, one in _things_at(path):
            if what == "store":
                read = RowStore.load(one)
                with terminal.passes(f"verify {one}"):
                    read.verify()
                store = store or read  # that of the training rows comes first
                found[str(one)] = f"{len(read):,} rows" + ("" if read.finished else ", unfinished")
            elif what == "solver":
                found[str(one)] = repr(load_solver(one, store))
            else:
                found[str(one)] = f"plan {Plan.load(one).fingerprint}"
    lines = [f"{name}: {what}; every checksum is right" for name, what in found.items()]
    terminal.show(found, "\n".join(lines))


@command("dropinf join first/train second/train --to all/train")
def join(
    terminal: Terminal,
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="In their order.")],
    to: Annotated[Path, typer.Option(help="Directory to make.")],
) -> None:
    """Make one store of several of the same plan and weights."""
    joint = RowStore.join([RowStore.load(path) for path in stores])
    with terminal.passes("join"):
        joint.save(to)
    facts = {"path": str(to), "rows": len(joint), "stores": len(stores)}
    terminal.show(facts, f"{to}: {len(joint):,} rows of {len(stores)} stores")


@command("dropinf export dropinf-run/train --to rows.parquet")
def export(
    terminal: Terminal,
    store: Annotated[Path, typer.Argument(help="Directory of a store.")],
    to: Annotated[
        Path,
        typer.Option(help="File to write: .csv, .parquet, .arrow, or .npy without the ids."),
    ],
) -> None:
    """Write the rows of a store as a file for other tools; invalid ones are zeros."""
    ending_of(to)
    rows = RowStore.load(store)
    with terminal.passes("export"):
        Matrix.of_store(rows).write(to)
    facts = {"path": str(to), "rows": len(rows), "width": rows.plan.width}
    terminal.show(facts, f"{to}: {len(rows):,} rows of width {rows.plan.width:,}")


def _things_at(path: Path) -> list[tuple[str, Path]]:
    """What is at a path, ("store", "solver" or "plan", path) each, training rows first.

    Raises:
        FileNotFoundError: nothing is there.
        NotADirectoryError, ValueError: it is something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if path.is_file():
        if not _is_sealed(path):
            refuse_job_file(path)
            raise ValueError(
                f"{path} is a file, and no plan; info and verify take the directory of a run, a "
                "store or a solver, or a plan's file"
            )
        return [("plan", path)]
    for what, file in (("store", "store.json"), ("solver", "solver.json")):
        if (path / file).exists():
            return [(what, path)]
    run = Run.of(path)
    things = [("store", run.train), ("store", run.queries), ("solver", run.solver)]
    things.insert(0, ("plan", run.plan))
    there = [(what, one) for what, one in things if one.exists()]
    if there:
        return there
    raise ValueError(f"{path} is no run, store, solver or plan of dropinf")


def _is_sealed(file: Path) -> bool:
    """Whether a file may be a plan's, damaged ones included: JSON, by its name or its end."""
    if file.suffix == ".json":
        return True
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 40))
        return b'"crc32"' in opened.read()


def _facts_of(what: str, path: Path) -> dict[str, Any]:
    if what == "store":
        store = RowStore.load(path)
        return {
            "kind": "store",
            "rows": len(store),
            "finished": store.finished,
            "invalid": int((~store.valid).sum()),
            "width": store.plan.width,
            "dtype": str(store.dtype).removeprefix("torch."),
            "bytes": store.num_bytes,
            "compression": repr(store.plan.compression),
            "plan": store.plan.fingerprint,
            "weights": store.weights,
            "proof": str(store.proof),
        }
    if what == "solver":
        saved = solver_facts(path)
        keys = {"n": "rows", "fingerprint": "plan", "weights": "weights"}
        return {
            "kind": saved["kind"],
            **saved["options"],
            **{shown: saved[key] for key, shown in keys.items()},
        }
    plan = Plan.load(path)
    return {
        "kind": "plan",
        "compression": repr(plan.compression),
        "layers": len(plan.blocks),
        "parameters": sum(block.P for block in plan.blocks),
        "width": plan.width,
        "plan": plan.fingerprint,
    }


def _cells(facts: dict[str, Any]) -> list[tuple[str, str]]:
    def shown(value: Any) -> str:
        if type(value) is int:
            return f"{value:,}"
        return {True: "yes", False: "no", None: "not known"}.get(value, str(value))

    return [(name, shown(value)) for name, value in facts.items()]
