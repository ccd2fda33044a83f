"""dattri and Bergson, each called as its own loop over batches calls itself, in its best form.

All of them keep r = side x side numbers of each layer's gradient of each example, and take
nn.Linear alone, so norms and embeddings cost them nothing. LoGra and Bergson put the gradient
between two random matrices. FactGraSS takes a grid of 2 side x 2 side coordinates and projects
that; on the CPU with a dense matrix, which dattri makes anew in every batch, since its sparse one
is for CUDA only.

Other matrices are made, and functions compiled, in the first call, which is not timed. Rows stay in
memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dropinf.tools.measuring import Call, LeftOut

Batch = tuple[Tensor, Tensor]


class Work(NamedTuple):
    """A model and a batch to make rows of.

    Attributes:
        model: its parameters require grad.
        batch: (x, label).
        loss_fn: (model, batch) -> [B], one loss per example.
        earliest: a small parameter before or in the first linear layer, whose gradient passes all.
        side: the square root of the entries of each layer.
        layers: names of the modules to keep; None: all that the peer takes.
    """

    model: nn.Module
    batch: Batch
    loss_fn: Callable[[nn.Module, Batch], Tensor]
    earliest: nn.Parameter
    side: int
    layers: list[str] | None = None


@contextmanager
def only_trainable(model: nn.Module, parameter: nn.Parameter) -> Iterator[None]:
    """One parameter alone requires grad, so that no weight gradient is formed.

    It must be early enough for every layer's backward pass to run.
    """
    model.requires_grad_(False)
    parameter.requires_grad_(True)
    try:
        yield
    finally:
        model.requires_grad_(True)
        parameter.grad = None


class WithLoss(nn.Module):
    """A model that takes its batch as keywords and gives losses.

    dattri hands a batch to the model whole if it is a dict; of a tuple it takes the first example
    without the batch dimension.
    """

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.model, self.loss_fn = work.model, work.loss_fn

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.loss_fn(self.model, (x, label))


def dattri(method: str, work: Work) -> Call:
    """`cache` of a loader of one batch, without the Hessian."""
    model, batch = work.model, work.batch
    check(model, "dattri")
    from dattri.algorithm.factgrass import FactGraSSAttributor
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    # dattri compiles its compression for each layer; torch would give up after eight.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    kind = {"LoGra": LoGraAttributor, "FactGraSS": FactGraSSAttributor}[method]
    wrapped = WithLoss(work)
    task = AttributionTask(
        loss_func=lambda model, batch, device: model(**batch).mean(),  # a mean is what it assumes
        model=wrapped,
        checkpoints=wrapped.state_dict(),
    )
    folder = tempfile.TemporaryDirectory()  # for its metadata, some lines of JSON
    attributor = kind(
        task,
        None if work.layers is None else [f"model.{name}" for name in work.layers],
        hessian="Identity",
        proj_dim=work.side**2,
        offload="none",
        cache_dir=folder.name,
        device=str(batch[0].device),
    )
    keywords = dict(zip(("x", "label"), batch, strict=True))
    examples = range(len(batch[0]))
    loader = DataLoader(examples, batch_size=len(examples), collate_fn=lambda _: keywords)

    def call() -> Tensor:
        with only_trainable(model, work.earliest):
            attributor.cache(loader)
        return torch.cat(attributor.offload_manager.retrieve_gradients(0), 1)

    call.folder = folder  # which goes when nothing holds it
    return call


def bergson(work: Work) -> Call:
    """Its collector in memory, with hooks set for each batch and weights frozen, as it builds.

    Its default leaves biases out; with them it keeps whole inputs until the backward pass.
    """
    model, batch = work.model, work.batch
    check(model, "bergson")
    from bergson import GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset

    if not hasattr(model, "device"):  # as transformers' models have it, whom it asks for it
        model.device = batch[0].device
    at = list(range(len(batch[0])))
    collector = InMemoryCollector(
        model=model,
        data=Dataset.from_dict({"at": at}),
        target_modules=None if work.layers is None else set(work.layers),
        cfg=IndexConfig(run_path="", projection_dim=work.side),
        processor=GradientProcessor(projection_dim=work.side),
    )

    def call() -> Tensor:
        with only_trainable(model, work.earliest), collector.with_batch():
            losses = work.loss_fn(model, batch)
            losses.sum().backward()
        collector.process_batch(at, losses=losses)
        return torch.from_numpy(collector.builder.grad_buffer)

    return call


def check(model: nn.Module, package: str) -> None:
    """Raise LeftOut if the package is missing or does not take the layers that matter."""
    try:
        version(package)
    except PackageNotFoundError:
        raise LeftOut(
            f"{package} is not installed; pip install 'dropinf[peers]', or make peers"
        ) from None
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        refusal = {
            "dattri": "takes nn.Linear only, here the head alone",
            "bergson": "takes inputs of three dimensions only, a convolution's has four",
        }
        raise LeftOut(refusal[package])


PEERS: dict[str, Callable[[Work], Call]] = {
    "dattri LoGra": lambda work: dattri("LoGra", work),
    "dattri FactGraSS": lambda work: dattri("FactGraSS", work),
    "Bergson": bergson,
}
