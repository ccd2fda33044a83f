"""Which columns of a data file a job takes, and the labels in them."""

from __future__ import annotations

from typing import Any

from dropinf.jobs.data_files import DataFile
from dropinf.jobs.job import Job

# What a kind of model learns from, in the order in which it is looked for where no column is named.
_FORMS = {
    "causal_lm": (("messages",), ("prompt", "completion"), ("text",)),
    "seq2seq": (("prompt", "completion"),),
    "masked_lm": (("text",),),
    "classification": (("text", "label"),),
    "token_classification": (("text", "label"),),
    "image_classification": (("image", "label"),),
}
_KEYS = ("text", "prompt", "completion", "messages", "label", "image")


def columns_of(job: Job, kind: str, data: DataFile) -> dict[str, str]:
    """Of each key that a model of this kind needs, the column.

    Raises:
        ValueError: the job names columns that do not go together, or the file has none of them.
    """
    forms = _FORMS[kind]
    named = {key for key in _KEYS if getattr(job, key) is not None}
    fitting = [form for form in forms if named <= set(form)]
    wanted = " or ".join(" and ".join(form) for form in forms)
    what = kind.replace("_lm", " language model").replace("_", " ")
    if not fitting:
        raise ValueError(
            f"data of a {what} has columns {wanted}; the job names {', '.join(sorted(named))} "
            "([data])"
        )
    for form in fitting:
        columns = {key: getattr(job, key) or key for key in form}
        if named or all(column in data.rows[0] for column in columns.values()):
            return columns
    raise ValueError(
        f"{data.path} has no columns {wanted}, which a {what} learns from; it has "
        f"{', '.join(map(repr, data.columns))}; name them in [data]"
    )


def classes_of(data: DataFile, column: str, config: Any) -> list[int]:
    """The labels in a column, as the model counts them.

    Raises:
        ValueError: one is unknown.
    """
    values = data.column(column, "label", (int, str), "a class, a whole number or a name")
    return [class_of(value, config, data, i) for i, value in enumerate(values)]


def class_of(value: Any, config: Any, data: DataFile, position: int) -> int:
    """A label, a number or a name, as the model counts it."""
    names = config.label2id or {}
    number = names.get(value) if isinstance(value, str) else value
    if number is None and isinstance(value, str) and value.strip().isdecimal():
        number = int(value)  # of a CSV file
    known = type(number) is int and 0 <= number < config.num_labels
    if not known:
        there = ", ".join(map(repr, list(names)[:10])) + (", ..." if len(names) > 10 else "")
        raise ValueError(
            f"{data.where(position)}: label {value!r} is unknown to the model; it has {there} "
            f"(0 to {config.num_labels - 1})"
        )
    return number


def truth_of(data: DataFile, column: str) -> list[bool]:
    """Which examples a column calls wrong: true or false, 1 or 0, in a CSV file as text.

    Raises:
        ValueError: a value is something else.
    """
    wanted = "true or false, or 1 or 0"
    said = {"true": True, "1": True, "false": False, "0": False}
    found = []
    for position, value in enumerate(data.column(column, "truth", (bool, int, str), wanted)):
        flag = said.get(str(value).strip().lower())
        if flag is None:
            raise ValueError(
                f"{data.where(position)}: column {column!r} must be {wanted}, got {value!r}"
            )
        found.append(flag)
    return found


def numbers_of(data: DataFile, column: str) -> list[float]:
    """What a regression is to give."""
    values = data.column(column, "label", (int, float, str), "a number")
    numbers = []
    for position, value in enumerate(values):
        try:
            numbers.append(float(value))
        except ValueError:
            raise ValueError(
                f"{data.where(position)}: label {value!r} is no number, which the model gives"
            ) from None
    return numbers
