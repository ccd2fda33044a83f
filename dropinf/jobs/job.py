"""What a job is: which model, data, plan and solver; of flags, or of one file."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from dropinf import compression, solvers
from dropinf.compression import Energies, Plan
from dropinf.jobs import job_file
from dropinf.solvers import Solver

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_COMPRESSIONS = (
    *("Dropout", "FactoredDropout", "Sketch", "Full", "LoGra"),
    *("SJLT", "FJLT", "Gaussian", "Rademacher"),
)
_SOLVERS = ("Cholesky", "Eigen", "DataInf", "Diagonal", "Identity", "CG", "LiSSA")
_BUDGET = ("r", "rate", "total")
_R = 1024  # where no budget is given
_TYPES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    tuple: "a list of strings",
}


def _key(place: str, about: str, default: Any = None, example: Any = None, **more: Any) -> Any:
    """A key `section.name` of a job file; `example` is what the file shows where it is not set."""
    section, name = place.split(".")
    metadata = {"section": section, "name": name, "about": about, "example": example, **more}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Job:
    """A job; each field is a key of the file and an option of the command line.

        job = Job.of(model="my-model", train="train.jsonl", queries="queries.jsonl")
        job.save("job.toml")
        ready = prepare(Job.load("job.toml"))

    `fields(Job)` have in their metadata the section, the name there and what it means. Which of
    them go together is looked at where they are used.
    """

    model: str | None = _key(
        "model.path",
        "directory of a Hugging Face model (config.json, safetensors, tokenizer), or of a LoRA "
        "adapter of one",
        example="my-model",
        path=True,
    )
    adapter: str | None = _key(
        "model.adapter",
        "directory of a LoRA adapter of that model, whose parameters are then tracked",
        example="my-adapter",
        path=True,
    )
    entry: str | None = _key(
        "model.entry",
        "in place of a model and data: module:function, which gives (model, train_loader, loss_fn) "
        "or (model, train_loader, query_loader, loss_fn)",
        example="my_module:my_function",
    )
    dtype: str = _key(
        "model.dtype",
        "of the model's weights, auto being that of its files",
        "auto",
        choices=("auto", *_DTYPES),
    )
    device: str = _key("model.device", "cpu, cuda, cuda:1; auto is cuda where there is one", "auto")
    train: str | None = _key(
        "data.train",
        "training examples: a JSONL, CSV or Parquet file with named columns",
        example="train.jsonl",
        path=True,
    )
    queries: str | None = _key(
        "data.queries",
        "examples to explain, with the same columns",
        example="queries.jsonl",
        path=True,
    )
    text: str | None = _key(
        "data.text",
        "column of texts (for token classification, of lists of words)",
        example="text",
    )
    prompt: str | None = _key(
        "data.prompt",
        "in its place: column of prompts, on which there is no loss ...",
        example="prompt",
    )
    completion: str | None = _key(
        "data.completion", "... and of completions, on which it is", example="completion"
    )
    messages: str | None = _key(
        "data.messages",
        "or: column of chats, lists of {role, content}; the loss is on what the assistant says",
        example="messages",
    )
    label: str | None = _key(
        "data.label",
        'column of labels, for classification: numbers or the model\'s names (default "label")',
        example="label",
    )
    image: str | None = _key(
        "data.image",
        'column of image files, for image classification (default "image"); paths are relative to '
        "the data file",
        example="image",
    )
    id: str | None = _key(
        "data.id",
        "column of ids, whole numbers or strings; without, an example's id is its place in the "
        "file, from 0",
        example="id",
    )
    truth: str | None = _key(
        "data.truth",
        "column of the training examples that says which are known to be wrong (true or false), "
        "for the report",
        example="wrong",
    )
    max_tokens: int | None = _key(
        "data.max_tokens",
        "longer examples are cut (default: what the model takes)",
        example=512,
        least=1,
    )
    loss: str | None = _key(
        "loss.kind",
        "summed over each example's tokens (default: the model's own)",
        example="causal_lm",
        choices=(
            *("causal_lm", "seq2seq", "masked_lm", "token_classification"),
            *("classification", "regression"),
        ),
    )
    compression: str = _key(
        "plan.compression", "which entries of a gradient are kept", "Dropout", choices=_COMPRESSIONS
    )
    r: int | None = _key("plan.r", f"entries of each layer (default {_R}) ...", example=_R, least=1)
    rate: float | None = _key("plan.rate", "... or a fraction of each layer", example=0.001)
    total: int | None = _key("plan.total", "... or entries of all layers", example=65536, least=1)
    seed: int = _key("plan.seed", "of the draw", 0, least=0)
    energies: int = _key(
        "plan.energies",
        "draw by energies, measured on so many training examples; 0 draws uniformly",
        0,
        least=0,
    )
    allocation: str = _key(
        "plan.allocation",
        "how a total is shared out, by energy where there are energies",
        "size",
        choices=("size", "sqrt", "equal", "energy"),
    )
    include: str | tuple[str, ...] | None = _key(
        "plan.include",
        "track these parameters only: names of them or of modules above, or patterns",
        example=["*.mlp.*"],
    )
    exclude: str | tuple[str, ...] | None = _key(
        "plan.exclude", "leave these out", example=["*embed*"]
    )
    batch_tokens: int = _key(
        "collect.batch_tokens",
        "a batch has so many tokens at most, with its padding",
        4096,
        least=1,
    )
    batch_size: int | None = _key(
        "collect.batch_size",
        "and so many examples (default: 32 images, any number of texts)",
        example=8,
        least=1,
    )
    rows_dtype: str | None = _key(
        "collect.dtype",
        "in which rows are kept (default: that in which they are computed)",
        example="float16",
        choices=("float32", "bfloat16", "float16", "int8"),
    )
    solver_kind: str = _key(
        "solver.kind", "what inverts each layer's damped matrix", "Cholesky", choices=_SOLVERS
    )
    damping: float | None = _key(
        "solver.damping",
        "relative to the mean diagonal of each layer's matrix (default 0.1)",
        example=0.1,
    )
    max_bytes: int | None = _key(
        "solver.max_bytes", "bound of the memory of the solver", example=8_000_000_000, least=1
    )
    out: str = _key("out.directory", "where everything goes", "dropinf-run", path=True)

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if type(value) is list:  # of TOML
                value = tuple(value)
                object.__setattr__(self, one.name, value)
            if value is not one.default:
                _check(one, value, _named(one))

    @classmethod
    def of(cls, **given: Any) -> Job:
        """A job of these fields; None is what is not given.

        Raises:
            ValueError: a name is unknown, or a value has the wrong type.
        """
        return cls().but(**given)

    def but(self, **given: Any) -> Job:
        """The same job with other fields; None leaves one as it is.

        One of r, rate and total takes the place of the others, an entry that of a model and data.

        Raises:
            ValueError: a name is unknown, or a value has the wrong type.
        """
        known = {one.name for one in fields(self)}
        for name in given:
            if name not in known:
                raise ValueError(f"{name!r} is no part of a job{_close(name, known)}")
        given = {name: value for name, value in given.items() if value is not None}
        if any(name in given for name in _BUDGET):
            given = {**dict.fromkeys(_BUDGET), **given}
        return replace(self, **given)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Job:
        """Read a job file; relative paths in it are relative to where it is.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not TOML, a key is unknown, or a value has the wrong type.
        """
        path = Path(path)
        found = {}
        places = {(one.metadata["section"], one.metadata["name"]): one for one in fields(cls)}
        sections = dict.fromkeys(section for section, _ in places)
        for section, keys in job_file.read(path).items():
            if section not in sections:
                raise ValueError(
                    f"{path}: {section!r} is no section of a job{_close(section, sections)}"
                )
            if not isinstance(keys, Mapping):
                raise ValueError(f"{path}: {section!r} must be a section, [{section}]")
            for name, value in keys.items():
                one = places.get((section, name))
                if one is None:
                    names = [name for of, name in places if of == section]
                    raise ValueError(
                        f"{path}: {name!r} is no key of [{section}]{_close(name, names)}"
                    )
                _check(one, value, f"{path}: {_named(one)}")
                if one.metadata.get("path"):
                    value = os.path.normpath(path.parent / value)
                found[one.name] = value
        return cls(**found)

    def save(self, path: str | os.PathLike) -> None:
        """Write the job with a comment for each key; an existing file is replaced at once or not.

        Relative paths are written as they are from there.
        """
        job_file.write(
            Path(path), [(one.metadata, getattr(self, one.name)) for one in fields(self)]
        )

    def plan(self, model: nn.Module, energies: Energies | None = None) -> Plan:
        """The plan of this model.

        Args:
            model: of `prepare`.
            energies: of `dropinf.energies`, where the job asks for them.

        Raises:
            ValueError: what is asked for does not go together, or a name matches no parameter.
        """
        kind = getattr(compression, self.compression)
        budget = {name: getattr(self, name) for name in _BUDGET if getattr(self, name) is not None}
        known = {one.name for one in fields(kind)}
        if not known:
            if budget:
                raise ValueError(
                    f"{self.compression} keeps every entry and takes no {next(iter(budget))}"
                )
            return Plan.make(model, kind(), self.include, self.exclude)
        options = {**(budget or {"r": _R}), "seed": self.seed, "allocation": self.allocation}
        if energies is not None:
            if "energies" not in known:
                raise ValueError(
                    f"{self.compression} does not draw by energies; Dropout and Sketch do"
                )
            options["energies"] = energies
        elif self.energies:
            raise ValueError(
                f"the job draws by energies of {self.energies} examples; measure them with "
                "dropinf.energies and give them to Job.plan"
            )
        return Plan.make(model, kind(**options), self.include, self.exclude)

    def solver(self) -> Solver:
        """The solver, not fitted.

        Raises:
            ValueError: it takes no damping, or a value is out of its range.
        """
        kind = getattr(solvers, self.solver_kind)
        options: dict[str, Any] = {"max_bytes": self.max_bytes}
        if self.damping is not None:
            if kind is solvers.Identity:
                raise ValueError("Identity inverts nothing and takes no damping")
            options["damping"] = self.damping
        return kind(**options)


def _named(one: Field) -> str:
    return f"[{one.metadata['section']}] {one.metadata['name']}"


def _check(one: Field, value: Any, where: str) -> None:
    """Refuse a value of another type than the field's, or beside its choices."""
    value = tuple(value) if type(value) is list else value
    names = one.type.replace("[str, ...]", "").split(" | ")
    allowed = [kind for kind in _TYPES if kind.__name__ in names]
    fits = type(value) in allowed or (type(value) is int and float in allowed)
    if type(value) is tuple:
        fits = fits and all(type(item) is str for item in value)
    if not fits:
        wanted = " or ".join(_TYPES[kind] for kind in allowed)
        raise ValueError(f"{where} must be {wanted}, got {value!r}")
    choices = one.metadata.get("choices")
    if choices and value is not None and value not in choices:
        raise ValueError(f"{where} must be one of {', '.join(choices)}, got {value!r}")
    least = one.metadata.get("least")
    if least is not None and value is not None and value < least:
        raise ValueError(f"{where} must be a whole number from {least}, got {value!r}")


def _close(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}"
