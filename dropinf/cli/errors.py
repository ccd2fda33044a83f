"""What ended a command, as one sentence and an exit code."""

from __future__ import annotations

import errno

import typer

from dropinf.text_table import printable

FAILED, WRONG_CALL, INTERRUPTED = 1, 2, 130

UsageError = typer.BadParameter.__mro__[1]  # of the click that typer has inside, or beside it
_WRONG_CALLS = (
    *(UsageError, ValueError, ImportError),
    *(FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError),
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError", "AcceleratorError")  # torch's by name


def sentence_of(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the code to exit with.

    A wrong call is one that would fail again: of an option, a file or a job that does not fit.
    What is damaged, full or out of memory is a failure.
    """
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, UsageError):
        return _one_line(error.format_message()), WRONG_CALL
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f": {error.filename}"
        way_out = "; make room, or write elsewhere" if error.errno in FULL else ""
        known = isinstance(error, _WRONG_CALLS)
        return _one_line(f"{error.strerror}{where}{way_out}"), WRONG_CALL if known else FAILED
    kind = type(error).__name__
    text = _one_line(str(error))
    if kind in _OUT_OF_MEMORY:
        return f"out of memory: {text or kind}; make batches smaller, or set --max-bytes", FAILED
    if isinstance(error, _WRONG_CALLS) and text:
        damaged = "damaged" in text or "truncated" in text
        return text, FAILED if damaged else WRONG_CALL
    if isinstance(error, RuntimeError | OSError) and text:
        return text, FAILED
    return f"{kind}: {text}; --debug shows where", FAILED


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
