"""A job from the command line: a file, a directory, options that take the place of its keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from dropinf.jobs import Job

_KINDS = {"str": str, "int": int, "float": float}


def takes_job(function: Callable[..., None]) -> Callable[..., None]:
    """Gives a command (terminal, job, ...) an argument JOB and an option for each key of a job."""
    first, second, *own = inspect.signature(function, eval_str=True).parameters.values()

    def run(terminal: Any, source: Path | None, **given: Any) -> None:
        flags = {one.name: given.pop(one.name) for one in _FIELDS}
        function(terminal, job_of(source, flags), **given)

    source = second.replace(name="source", annotation=_SOURCE, default=None)
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [first, source, *own, *map(_option, _FIELDS)], __validate_parameters__=False
    )
    run.__annotations__ = {}
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run


def job_of(source: Path | None, flags: dict[str, Any]) -> Job:
    """The job of a file, of a run's directory, or of a model's; flags come before what it says.

    Raises:
        FileNotFoundError, ValueError: as of `Job.load` and `Job.but`.
    """
    job = Job()
    if source is not None:
        _refuse_nothing(source)
        if (source / "job.toml").exists():
            source = source / "job.toml"
        is_file = source.is_file() or source.suffix == ".toml"
        job = Job.load(source) if is_file else Job.of(model=str(source))
    return job.but(**{name: value for name, value in flags.items() if value != []})


def _refuse_nothing(source: Path) -> None:
    if source.suffix == ".toml":
        return  # which Job.load says better
    if not source.exists():
        raise FileNotFoundError(
            f"there is no {source}: no job's file, and no directory of a run or a model; models "
            "are not fetched from a hub, so download it first"
        )
    without_job = not (source / "job.toml").exists()
    if without_job and (source / "train" / "store.json").exists():
        raise FileNotFoundError(
            f"{source} is a run without a job.toml, as Python makes them, so that its model and "
            "data are not known; topk, score and self need none, and dropinf.write_report writes "
            "its report"
        )


_SOURCE = Annotated[
    Path | None,
    typer.Argument(
        metavar="JOB",
        help="A job's file (dropinf init writes one), the directory of a run, or that of a model.",
    ),
]
_FIELDS = [one for one in fields(Job) if one.name != "model"]  # which is JOB


def _option(one: Field) -> inspect.Parameter:
    kind = next(cls for name, cls in _KINDS.items() if name in one.type)
    several = "tuple" in one.type
    about = one.metadata["about"]
    choices = one.metadata.get("choices")
    text = about + (f": {', '.join(choices)}" if choices else "")
    option = typer.Option(
        f"--{one.name.replace('_', '-')}",
        help=text,
        # The backslash keeps rich from taking the section for markup.
        rich_help_panel=f"\\[{one.metadata['section']}] in a job's file",
        show_default=False,
    )
    return inspect.Parameter(
        one.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[(list[kind] if several else kind) | None, option],
    )
