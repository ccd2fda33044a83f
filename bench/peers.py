"""dattri and Bergson, each called as its own loop over batches calls itself, in its best form here.

All of them keep r = 32 x 32 numbers of each layer's gradient of each example, and take nn.Linear
alone, so norms and embeddings cost them nothing. LoGra and Bergson put the gradient between two
random matrices. FactGraSS takes a grid of 64 x 64 coordinates and projects that; on the CPU with a
dense matrix, which dattri makes anew in every batch, since its sparse one is for CUDA only.

Other matrices are made, and functions compiled, in the first call, which is not timed. Rows stay in
memory.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch
from models import loss_fn
from torch import Tensor, nn
from torch.utils.data import DataLoader

SIDE = 32  # of the square of numbers kept of a layer


class LeftOut(Exception):
    """Why a peer does not run."""


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

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return loss_fn(self.model, (x, label))


def dattri(method: str, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    """`cache` of a loader of one batch, without the Hessian."""
    check(model, "dattri")
    from dattri.algorithm.factgrass import FactGraSSAttributor
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    # dattri compiles its compression for each layer; torch would give up after eight.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    kind = {"LoGra": LoGraAttributor, "FactGraSS": FactGraSSAttributor}[method]
    wrapped = WithLoss(model)
    task = AttributionTask(
        loss_func=lambda model, batch, device: model(**batch).mean(),  # a mean is what it assumes
        model=wrapped,
        checkpoints=wrapped.state_dict(),
    )
    folder = tempfile.TemporaryDirectory()  # for its metadata, some lines of JSON
    attributor = kind(
        task, hessian="Identity", proj_dim=SIDE * SIDE, offload="none", cache_dir=folder.name
    )
    keywords = dict(zip(("x", "label"), batch, strict=True))
    examples = range(len(batch[0]))
    loader = DataLoader(examples, batch_size=len(examples), collate_fn=lambda _: keywords)

    def call() -> Tensor:
        with only_trainable(model, model.earliest):
            attributor.cache(loader)
        return torch.cat(attributor.offload_manager.retrieve_gradients(0), 1)

    call.folder = folder  # which goes when nothing holds it
    return call


def bergson(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    """Its collector in memory, with hooks set for each batch and weights frozen, as it builds.

    Its default leaves biases out; with them it keeps whole inputs until the backward pass.
    """
    check(model, "bergson")
    from bergson import GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset

    model.device = torch.device("cpu")  # it asks the model for it, as a transformers model
    at = list(range(len(batch[0])))
    collector = InMemoryCollector(
        model=model,
        data=Dataset.from_dict({"at": at}),
        cfg=IndexConfig(run_path="", projection_dim=SIDE),
        processor=GradientProcessor(projection_dim=SIDE),
    )

    def call() -> Tensor:
        with only_trainable(model, model.earliest), collector.with_batch():
            losses = loss_fn(model, batch)
            losses.sum().backward()
        collector.process_batch(at, losses=losses)
        return torch.from_numpy(collector.builder.grad_buffer)

    return call


def check(model: nn.Module, package: str) -> None:
    """Raise LeftOut if the package is missing or does not take the layers that matter."""
    try:
        version(package)
    except PackageNotFoundError:
        raise LeftOut("not installed; `make peers` does") from None
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        refusal = {
            "dattri": "takes nn.Linear only, here the head alone",
            "bergson": "takes inputs of three dimensions only, a convolution's has four",
        }
        raise LeftOut(refusal[package])


PEERS: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor]], Callable[[], Tensor]]] = {
    "dattri LoGra": lambda model, batch: dattri("LoGra", model, batch),
    "dattri FactGraSS": lambda model, batch: dattri("FactGraSS", model, batch),
    "Bergson": bergson,
}
