"""A job made ready: its model, loss and data, of a directory or of a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dropinf import losses
from dropinf.jobs.columns import columns_of, truth_of
from dropinf.jobs.data_files import DataFile, ids_of_column, read_data
from dropinf.jobs.entry import given_by
from dropinf.jobs.examples import Encoded, Examples, examples_of
from dropinf.jobs.images import BATCH, Images, stacked
from dropinf.jobs.job import Job
from dropinf.jobs.models import Loaded, load_model
from dropinf.jobs.texts import coded, padded
from dropinf.jobs.tokenizing import Tokens

_OF_DIRECTORIES = (
    *("model", "adapter", "train", "queries", "text", "prompt", "completion", "messages"),
    *("label", "image", "id", "truth", "max_tokens", "loss", "batch_size"),
)


@dataclass
class Ready:
    """What `prepare` gives.

    Attributes:
        model: of a directory in eval mode on its device; of a function as that gave it.
        loss_fn: (model, batch) -> [B].
        train: the training examples.
        queries: those to explain, None if the job names none.
        truth: by position, which training examples are known to be wrong; None if the job names no
            column of it.
        notes: sentences that people should read, as of examples that were cut.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    train: Examples
    queries: Examples | None = None
    truth: list[bool] | None = None
    notes: list[str] = field(default_factory=list)


def prepare(job: Job) -> Ready:
    """Load the model, the tokenizer and the data of a job; nothing comes from a network.

        ready = prepare(job)
        plan = job.plan(ready.model)
        store = dropinf.collect(
            ready.model, ready.train.loader, ready.loss_fn, plan, ids=ready.train.ids
        )

    Training examples are batched by their lengths and queries in the order of their file, so that a
    row is found by its id; `Examples.position` says where its text is.

    Raises:
        FileNotFoundError: a file or directory is not there.
        ValueError: anything else is wrong, in one sentence.
    """
    if job.entry is not None:
        for name in _OF_DIRECTORIES:
            if getattr(job, name) is not None:
                raise ValueError(
                    f"the job has an entry, which gives model, data and loss, and {name!r} too; "
                    "leave one of them out"
                )
        model, loss_fn, train, queries = given_by(job.entry)
        return Ready(model, loss_fn, train, queries)
    for name in ("model", "train"):
        if getattr(job, name) is None:
            raise ValueError(
                f"the job names no {name}; give a model directory and a file of training examples, "
                "or an entry"
            )
    # The data first: what is wrong with them is found before a large model is loaded.
    files = {
        name: read_data(getattr(job, name)) for name in ("train", "queries") if getattr(job, name)
    }
    truth = None if job.truth is None else truth_of(files["train"], job.truth)
    loaded = load_model(job.model, job.adapter, job.dtype, job.device)
    loss_fn = loaded.loss_fn if job.loss is None else getattr(losses, f"{job.loss}_loss")
    if loss_fn is None:
        raise ValueError(
            f"no loss is known for {type(loaded.model).__name__}; name one as [loss] kind"
        )
    make = _of_images if loaded.kind == "image_classification" else _of_texts
    notes: list[str] = []
    made = {name: make(job, loaded, data, name == "queries", notes) for name, data in files.items()}
    return Ready(loaded.model, loss_fn, **made, truth=truth, notes=notes)


def _of_texts(
    job: Job, loaded: Loaded, data: DataFile, in_order: bool, notes: list[str]
) -> Examples:
    columns = columns_of(job, loaded.kind, data)
    tokens = Tokens(loaded.directory, loaded.config, loaded.num_embeddings, job.max_tokens)
    found = coded(loaded.kind, tokens, data, columns, loaded.config)
    if found.cut:
        notes.append(
            f"{data.path}: {found.cut} of {len(data)} examples are cut to {tokens.most} tokens"
        )
    if loaded.kind == "classification" and loaded.config.pad_token_id is None:
        # By which models that read from left to right find an example's last token.
        loaded.config.pad_token_id = tokens.pad
    encoded = Encoded(found.items.__getitem__, found.lengths, job.batch_tokens, job.batch_size)
    return examples_of(
        encoded,
        lambda items: padded(items, tokens.pad),
        loaded.device,
        in_order,
        _names(job, data),
        texts=found.texts,
        tokens=lambda position: found.pieces(tokens, position),
    )


def _of_images(
    job: Job, loaded: Loaded, data: DataFile, in_order: bool, notes: list[str]
) -> Examples:
    images = Images(loaded.directory, data, columns_of(job, loaded.kind, data), loaded.config)
    size = job.batch_size or BATCH
    encoded = Encoded(images.item, [1] * len(data), max(job.batch_tokens, size), size)
    dtype = loaded.model.dtype

    def collate(items: list[Any]) -> dict[str, Tensor]:
        batch = stacked(items)
        return {**batch, "pixel_values": batch["pixel_values"].to(dtype)}

    return examples_of(
        encoded, collate, loaded.device, in_order, _names(job, data), images=images.files
    )


def _names(job: Job, data: DataFile) -> list[int] | list[str] | None:
    return None if job.id is None else ids_of_column(data, job.id)
