"""The command line: `dropinf`, or `python -m dropinf`."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import dropinf
from dropinf.text_table import printable
from dropinf.tools import doctor


def main() -> None:
    """Parse the arguments and run the command."""
    parser = argparse.ArgumentParser(prog="dropinf", description=dropinf.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="find wrong labels in handwritten digits (a minute)")
    demo.add_argument(
        "--picture",
        type=Path,
        default=Path("dropinf-demo.png"),
        help="where to draw the most suspicious digits (default: %(default)s)",
    )
    commands.add_parser("backends", help="which backends are here, and why others are not")
    commands.add_parser("doctor", help="versions, devices, and a self-test of every backend")
    bench = commands.add_parser("bench", help="what compressing costs, beside other packages")
    bench.add_argument(
        "--preset",
        choices=("quick", "full", "gpu"),
        default="quick",
        help="quick takes two minutes on two cores, without memory (default: %(default)s)",
    )
    bench.add_argument(
        "--out",
        type=Path,
        default=Path("dropinf-bench"),
        help="directory for results, page and figures (default: %(default)s)",
    )
    bench.add_argument(
        "--against",
        type=Path,
        help="results.json of another run: say what became slower, and exit with 1 if anything did",
    )
    arguments = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):  # whatever a terminal cannot show is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    if arguments.command == "backends":
        for name, state in dropinf.backends().items():
            print(printable(f"{name:12}{state}"))
        return
    if arguments.command == "doctor":
        sys.exit(doctor.main())
    if arguments.command == "bench":
        from dropinf.tools.microbenchmark import main as microbenchmark

        try:
            sys.exit(microbenchmark.run(arguments.preset, arguments.out, arguments.against))
        except ValueError as error:
            parser.error(str(error))
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        parser.error(f"the demo needs {error.name}: pip install 'dropinf[demo]'")
    from dropinf.tools import demo as quickstart

    quickstart.main(arguments.picture)


if __name__ == "__main__":
    main()
