"""The command line: `dropinf`, of the extra "cli"."""

from dropinf.cli.app import main

__all__ = ["main"]
