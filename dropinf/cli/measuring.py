"""Commands that measure: the demo, the doctor, the backends, the microbenchmark."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

import dropinf
from dropinf import tools
from dropinf.cli.app import command
from dropinf.cli.terminal import Terminal
from dropinf.extras import optional
from dropinf.text_table import printable


class Preset(str, Enum):
    """How much `bench` measures."""

    quick = "quick"
    full = "full"
    gpu = "gpu"


class Demo(str, Enum):
    """What the demo is on."""

    digits = "digits"
    text = "text"


@command("dropinf demo text")
def demo(
    terminal: Terminal,
    on: Annotated[Demo, typer.Argument(help="Images, or text.")] = Demo.digits,
    picture: Annotated[
        Path, typer.Option(help="Of digits: where to draw the most suspicious ones.")
    ] = Path("dropinf-demo.png"),
    report: Annotated[Path, typer.Option(help="Where to write the report.")] = Path(
        "dropinf-demo.html"
    ),
) -> None:
    """Find wrong labels in handwritten digits, or what taught a language model (a minute each)."""
    if on is Demo.text:
        optional("jinja2", "demo", "the demo")
        from dropinf.tools import demo_text

        with terminal.printing():
            facts = demo_text.main(report)
        terminal.show_json(facts)
        return
    for module in ("sklearn", "matplotlib", "jinja2", "PIL"):
        optional(module, "demo", "the demo")
    from dropinf.tools import demo as quickstart

    with terminal.printing():
        facts = quickstart.main(picture, report)
    terminal.show_json(facts)


@command("dropinf backends")
def backends(terminal: Terminal) -> None:
    """Which backends are here, and why others are not."""
    found = dropinf.backends()
    lines = (printable(f"{name:12}{state}") for name, state in found.items())
    terminal.show(dict(found), "\n".join(lines))


@command("dropinf doctor --json")
def doctor(terminal: Terminal) -> None:
    """Versions, devices, and a self-test of every backend."""
    from dropinf.tools import doctor as tests

    tables, failed = tests.look()
    facts = {
        name: [dict(zip(table.columns, row, strict=True)) for row in table.rows]
        for name, table in tables.items()
    }
    terminal.show(facts, "\n\n".join(map(str, tables.values())))
    sys.exit(failed)


@command("dropinf bench --preset quick --out dropinf-bench")
def bench(
    terminal: Terminal,
    preset: Annotated[
        Preset, typer.Option(help="quick takes two minutes on two cores, without memory.")
    ] = Preset.quick,
    out: Annotated[Path, typer.Option(help="Directory for results, page and figures.")] = Path(
        "dropinf-bench"
    ),
    against: Annotated[
        Path | None,
        typer.Option(
            help="results.json of another run: say what became slower, and exit with 1 if "
            "anything did."
        ),
    ] = None,
) -> None:
    """What compressing costs, beside other packages."""
    with terminal.printing():
        results, slower = tools.bench(preset.value, out, against)
    terminal.show_json({"path": str(out), "slower": slower, **results})
    sys.exit(bool(slower))
