"""Memory and time that a collection will take, from a model on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dropinf.capturing import ActivationsTap, Prover, Snapshot, capture
from dropinf.compression import Plan
from dropinf.jobs.dry_run import dry_run
from dropinf.jobs.images import BATCH
from dropinf.jobs.job import Job
from dropinf.jobs.models import Loaded, meta_model
from dropinf.rows import PART_BYTES, LossFn
from dropinf.text_table import Table

_GB = 1e9
_BATCHES = ("causal_lm", "seq2seq", "masked_lm", "classification", "image_classification")


@dataclass(frozen=True)
class Card:
    """What a GPU can do by its data sheet.

    Attributes:
        num_bytes: of its memory.
        flops: a second, dense, by dtype; None for any other.
        bandwidth: bytes a second of its memory.
    """

    num_bytes: float
    flops: dict[torch.dtype | None, float]
    bandwidth: float


_HOPPER = {torch.bfloat16: 989e12, torch.float16: 989e12, None: 67e12}
CARDS = {
    "H100 SXM 80 GB": Card(80e9, _HOPPER, 3.35e12),
    "H200 SXM 141 GB": Card(141e9, _HOPPER, 4.8e12),
}
# The part of a card's arithmetic that a pass reaches: 0.44 and 0.53 on an H200 (docs/gpu.md).
UTILISATION = 0.4
# Assumed: what CUDA's context and the libraries' workspaces take of its memory.
CONTEXT_BYTES = 1e9


@dataclass(frozen=True)
class Estimate:
    """What `estimate` predicts; bytes are those of tensors, which an allocator rounds up.

    Attributes:
        batch_size: examples in the batch.
        weights: bytes of parameters and buffers.
        kept: bytes kept for the backward pass, from the inputs of layers to the losses.
        rows: bytes of the batch's rows [B, R].
        coordinates: bytes of the plan's coordinates on the device.
        temporary: bytes beside all of these at the peak: gradients on their way down, and what
            loss functions make of logits.
        largest: (shape, dtype, bytes) of the tensors that take most at the peak, by shape.
        flops: of the forward pass and the gradients of the layers' inputs, for the batch.
        read: bytes that the rows of the batch take at least to read and write: each layer's input
            and output gradient, and the rows.
        passes: which parameters take a backward pass for each loss, and why; empty if none do.
        dtype: of the arithmetic: what most weights have.
        plan: of the rows.
    """

    batch_size: int
    weights: int
    kept: int
    rows: int
    coordinates: int
    temporary: int
    largest: tuple[tuple[tuple[int, ...], torch.dtype, int], ...]
    flops: int
    read: int
    passes: str
    dtype: torch.dtype
    plan: Plan

    @property
    def peak(self) -> int:
        """Bytes of all tensors at the peak."""
        return self.weights + self.kept + self.rows + self.coordinates + self.temporary

    def fits(self, num_bytes: float) -> bool:
        """Whether a GPU of so much memory has room for the batch."""
        return self.peak + CONTEXT_BYTES <= num_bytes

    def seconds(self, n: int, card: Card) -> float:
        """Of collecting n examples: arithmetic, and behind it the rows, no faster than memory."""
        flops = card.flops.get(self.dtype, card.flops[None])
        of_batch = self.flops / (UTILISATION * flops) + self.read / card.bandwidth
        return n / self.batch_size * of_batch

    def store_bytes(self, n: int, dtype: torch.dtype = torch.float32) -> int:
        """Of n rows on the disk or in memory, with integers for ids."""
        scales = 4 * len(self.plan.blocks) if dtype in (torch.float16, torch.int8) else 0
        return n * (self.plan.width * dtype.itemsize + scales + 8)

    def factor_bytes(self, n: int) -> int:
        """Of the factors that `Cholesky` keeps of n rows, in memory or in its directory."""
        return sum(8 * n**2 if 2 * n <= block.r else 4 * block.r**2 for block in self.plan.blocks)

    def fit_bytes(self, n: int) -> int:
        """Of `Cholesky.fit` on the host without max_bytes: its factors, the widest layer's once
        more in each thread, and parts of the rows."""
        r = max(block.r for block in self.plan.blocks)
        widest = 2 * 8 * n**2 if 2 * n <= r else 1.1 * 4 * r**2 * torch.get_num_threads()
        return int(self.factor_bytes(n) + widest + 3 * min(PART_BYTES, self.store_bytes(n)))

    def describe(self, n: int = 1000) -> Table:
        """As a table to print, with what n examples take."""
        table = []
        for name in ("weights", "kept", "rows", "coordinates", "temporary", "peak"):
            label = {"kept": "kept for the backward pass", "rows": "rows of the batch"}
            table.append((label.get(name, name), f"{getattr(self, name) / _GB:.3f}"))
        table.append((f"{n:,} rows on disk", f"{self.store_bytes(n) / _GB:.3f}"))
        table.append((f"Cholesky on {n:,} rows", f"{self.fit_bytes(n) / _GB:.3f}"))
        notes = [f"A batch of {self.batch_size}, predicted."]
        for name, card in CARDS.items():
            fits = "fits" if self.fits(card.num_bytes) else "does not fit"
            seconds = self.seconds(n, card)
            notes.append(f"{name}: {fits}, {seconds:.1f} s for {n:,} examples, predicted.")
        if self.passes:
            notes.append(f"Slow: a backward pass for each loss, for {self.passes}.")
        return Table(("bytes of", "GB"), table, right=(1,), notes=notes)


def estimate(model: nn.Module, plan: Plan, loss_fn: LossFn, batch: Any) -> Estimate:
    """What a collection takes with batches like this one, from a dry run of its first batch.

    That batch takes the most: `collect` keeps its graph for a second backward pass, and compares it
    with plain autograd. Nothing is computed, and the model stays on the meta device.

    Args:
        model: on the meta device, in its dtype and training mode, made inside of
            `with torch.device("meta")`.
        plan: of its rows.
        loss_fn: (model, batch) -> [B].
        batch: what loss_fn takes; of its tensors shapes and dtypes count. An attention mask is
            taken for one with padding.

    Raises:
        ValueError: the model is not on the meta device, or goes by the numbers of a tensor.
    """
    on = {t.device.type for t in (*model.parameters(), *model.buffers())}
    if on != {"meta"}:
        raise ValueError(
            f"estimate: the model is on {', '.join(sorted(on))}; make it inside of `with "
            "torch.device('meta')`, where it takes no memory"
        )
    plan = copy.copy(plan)  # what captures prepare stays with this one
    plan.paths = {}
    read = _read(model, plan, loss_fn, _on_meta(batch))
    before = Snapshot(model)
    with dry_run("estimate") as run:
        batch = _on_meta(batch)
        with capture(model, plan) as tap:
            losses = loss_fn(model, batch)
            kept = run.now
            rows = tap.rows(losses, retain_graph=True)
            flops, rest = run.flops, run.now - kept
            only = losses * losses.detach()  # of one example, as `collect` looks at it
            passes = tap.passes_said() if isinstance(tap, ActivationsTap) else ""
            tap.rows(only)
            del only
        losses = losses.detach()
        Prover(model, loss_fn, plan).prove(batch, losses, rows[0], 0, before, {}, good=False)
    row_bytes = rows.nbytes
    return Estimate(
        batch_size=len(rows),
        weights=_weights(model),
        kept=kept,
        rows=row_bytes,
        coordinates=rest - row_bytes,
        temporary=run.peak - kept - rest,
        largest=tuple(
            (*kind, size) for kind, size in sorted(run.at_peak.items(), key=lambda t: -t[1])[:3]
        ),
        flops=flops,
        read=read + row_bytes,
        passes=passes,
        dtype=max(model.parameters(), key=lambda p: p.numel()).dtype,
        plan=plan,
    )


def largest_batch(
    model: nn.Module,
    plan: Plan,
    loss_fn: LossFn,
    batch_of: Callable[[int], Any],
    num_bytes: float,
) -> Estimate | None:
    """The estimate for the largest batch that a GPU of so much memory has room for; None if not
    even one example has.

    Args:
        model, plan, loss_fn: as for `estimate`.
        batch_of: number of examples -> a batch of them.
        num_bytes: of the GPU's memory.
    """

    def of(batch_size: int) -> Estimate:
        return estimate(model, plan, loss_fn, batch_of(batch_size))

    best, two = None, of(2)
    each = max(1, two.peak - of(1).peak)  # the peak is about a line in B
    size = max(1, 2 + int((num_bytes - CONTEXT_BYTES - two.peak) // each))
    while size > 0:
        found = of(size)
        if found.fits(num_bytes):
            best, size = found, size + 1
        elif best is not None:
            return best
        else:
            size -= 1
    return best


def estimate_of_job(job: Job, tokens: int | None = None) -> Estimate:
    """What collecting a job's directory takes, from its config alone: no weights, no data.

    Args:
        job: of the directory of a language model or a classifier of texts or images.
        tokens: of a text; None is the job's max_tokens, or else the most that the model takes.

    Raises:
        ValueError: the job is of a function, or its loss or its batches are not known.
    """
    if job.model is None:
        raise ValueError(
            "estimate: name the directory of a model; one that a function makes is not known "
            "before it is there"
        )
    found = meta_model(job.model, job.adapter, job.dtype)
    if found.loss_fn is None or found.kind not in _BATCHES:
        raise ValueError(
            f"estimate: {job.model} is a model of kind {found.kind}, which --estimate does not "
            "know batches of; dropinf.jobs.estimate takes any model and batch"
        )
    if found.kind == "image_classification":
        batch = _image_batch(job.batch_size or BATCH, found)
        return estimate(found.model, job.plan(found.model), found.loss_fn, batch)
    if found.kind == "classification" and found.config.pad_token_id is None:
        found.config.pad_token_id = 0  # as `prepare` sets one, of the tokenizer
    most = getattr(found.config, "max_position_embeddings", None) or 2048
    tokens = tokens or min(job.max_tokens or most, most)
    batch_size = job.batch_size or max(1, job.batch_tokens // tokens)
    batch = token_batch(batch_size, tokens, padded=True)
    if found.kind == "classification":
        batch["labels"] = batch["labels"][:, 0]
    return estimate(found.model, job.plan(found.model), found.loss_fn, batch)


def _image_batch(batch_size: int, found: Loaded) -> dict[str, Tensor]:
    """Images of the size that the config names.

    Raises:
        ValueError: it names none.
    """
    size = getattr(found.config, "image_size", None)
    if size is None:
        raise ValueError(
            f"estimate: the config of {found.directory} does not say how large images are; "
            "dropinf.jobs.estimate takes any model and batch"
        )
    height, width = (size, size) if isinstance(size, int) else size
    shape = batch_size, getattr(found.config, "num_channels", 3), height, width
    pixels = torch.empty(shape, dtype=found.model.dtype, device="meta")
    return {
        "pixel_values": pixels,
        "labels": torch.empty(batch_size, dtype=torch.int64, device="meta"),
    }


def token_batch(batch_size: int, tokens: int, padded: bool = False) -> dict[str, Tensor]:
    """A batch for a language model, whose labels are its tokens."""
    ids = torch.empty(batch_size, tokens, dtype=torch.int64, device="meta")
    mask = {"attention_mask": ids} if padded else {}
    return {"input_ids": ids, "labels": ids, **mask}


def _on_meta(batch: Any) -> Any:
    """Its shapes and dtypes."""
    made = tree_map(
        lambda t: torch.empty_like(t, device="meta") if isinstance(t, Tensor) else t, batch
    )
    mask = made.get("attention_mask") if isinstance(made, dict) else None
    if mask is None or mask.dim() != 2:
        return made
    # What models of transformers make of one with padding; whether it has some, they would look at.
    B, T = mask.shape
    return {**made, "attention_mask": mask.new_empty(B, 1, T, T, dtype=torch.bool)}


def _weights(model: nn.Module) -> int:
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def _read(model: nn.Module, plan: Plan, loss_fn: LossFn, batch: Any) -> int:
    """Bytes of the inputs and outputs of the plan's layers."""
    total = 0

    def count(module: nn.Module, args: tuple, kwargs: dict, made: Any) -> None:
        nonlocal total
        x = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        total += sum(t.nbytes for t in (x, made) if isinstance(t, Tensor))

    layers = [model.get_submodule(block.name) for block in plan.blocks]
    handles = [layer.register_forward_hook(count, with_kwargs=True) for layer in layers]
    try:
        with dry_run("estimate"), torch.no_grad():
            loss_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return total
