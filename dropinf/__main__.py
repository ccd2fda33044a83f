"""The command line: `dropinf`, or `python -m dropinf`."""

from __future__ import annotations

import sys

from dropinf.extras import optional


def main() -> None:
    """Run the command of sys.argv, and exit."""
    try:
        for module in ("typer", "rich"):
            optional(module, "cli", "the command line")
    except ImportError as error:
        print(f"dropinf: {error}", file=sys.stderr)
        sys.exit(2)
    from dropinf import cli

    cli.main()


if __name__ == "__main__":
    main()
