"""The command line of every experiment: --quick, --out, and the files that it writes."""

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

BENCH = Path(__file__).parent.parent


class Files(NamedTuple):
    """What an experiment writes."""

    json: Path
    page: Path
    figures: Path

    def __str__(self) -> str:
        return f"{self.json}, {self.page} and figures in {self.figures}"


def parser_of(doc: str) -> argparse.ArgumentParser:
    """Of an experiment, whose docstring begins with what it is about."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in another place")
    parser.add_argument("--out", type=Path, help="the JSON file; its page and figures go beside it")
    return parser


def files_of(name: str, given: argparse.Namespace) -> Files:
    """Those in bench/results and bench/figures, if nothing else was asked for."""
    own = BENCH / "results" / f"{name}.json"
    path = given.out
    if path is None:
        path = Path(tempfile.mkdtemp()) / f"{name}-quick.json" if given.quick else own
    figures = BENCH / "figures" if path == own else path.parent
    return Files(path, path.with_suffix(".md"), figures)
