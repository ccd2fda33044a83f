"""The frame of the command line: commands, what they share, and how they end."""

from __future__ import annotations

import inspect
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer

import dropinf
from dropinf.cli.errors import FULL, INTERRUPTED, sentence_of
from dropinf.cli.terminal import Terminal
from dropinf.version import __version__

app = typer.Typer(
    name="dropinf",
    help=dropinf.__doc__,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_SAID_AT_THE_END = "collect: stopped;"  # by the error, with the command that goes on

_DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
_JSON = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"dropinf {__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback(help=dropinf.__doc__)
def _app(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_say_version, help="And torch's."),
    ] = False,
) -> None:
    """Options of all commands."""


def command(
    example: str, name: str | None = None, goes_on: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command; what it takes first is the `Terminal`.

    Args:
        example: how it is called, for its help.
        name: of the command, if not the function's.
        goes_on: what to do after an interrupt, or when a disk was full.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        called = name or function.__name__.replace("_", "-")
        _, *own = inspect.signature(function, eval_str=True).parameters.values()
        shared = {"as_json": _JSON, "quiet": _QUIET, "debug": _DEBUG}

        def run(**given: Any) -> None:
            debug = given.pop("debug")
            how = {key: given.pop(key) for key in ("as_json", "quiet")}
            terminal = Terminal(f"dropinf {called}", **how)
            with _ending(terminal, debug, goes_on), _warnings_said(terminal):
                function(terminal, **given)

        options = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for key, kind in shared.items()
        ]
        named = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        run.__signature__ = inspect.Signature([*named, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {}
        app.command(called, help=inspect.getdoc(function), epilog=f"Example: {example}")(run)
        return function

    return add


@contextmanager
def _ending(terminal: Terminal, debug: bool, goes_on: str) -> Iterator[None]:
    """Turns what ends a command into one sentence and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for what Python flushes at its end
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        sentence, code = sentence_of(error)
        goes = code == INTERRUPTED or getattr(error, "errno", None) in FULL
        terminal.say(sentence + (f"; {goes_on}" if goes_on and goes else ""))
        sys.exit(code)


@contextmanager
def _warnings_said(terminal: Terminal) -> Iterator[None]:
    """Warnings as sentences, without lines of source."""
    with warnings.catch_warnings():

        def say(message: Warning | str, *_: Any, **__: Any) -> None:
            if not str(message).startswith(_SAID_AT_THE_END):
                terminal.say(f"warning: {' '.join(str(message).split())}")

        warnings.showwarning = say
        yield


def main() -> None:
    """Run the command of sys.argv, and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever a terminal cannot show is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        # Not standalone, where typer would draw frames around errors.
        code = typer.main.get_command(app).main(prog_name="dropinf", standalone_mode=False)
    except Exception as error:  # of the call itself
        context = getattr(error, "ctx", None)
        sentence, code = sentence_of(error)
        called = context.command_path if context else "dropinf"
        Terminal(called).say(f"{sentence.rstrip('.')}; {called} --help says what there is")
    sys.exit(code or 0)


# The commands, which are added as they are imported.
from dropinf.cli import collecting, masks, measuring, reporting, scoring, stores  # noqa: E402, F401
