"""What the cases of bench_embed share: contestants on one input, and truths that use no dropinf."""

from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from bench_collect import pick
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from dropinf.tools.measuring import LeftOut

N, M, B = 64, 16, 32  # training examples, queries, examples in a batch
SIZE = f"a perceptron of 2.0 M parameters, n={N}, m={M}, B={B}"

Call = Callable[[], Any]


class Case(NamedTuple):
    """Contestants that do one job."""

    make: Callable[[], Any]  # the inputs, the same in every process
    contestants: dict[str, Callable[[Any], Call]]  # name -> a call from the inputs; or LeftOut
    ours: str
    to_reach: dict[str, tuple[float | None, float | None]]
    check: Callable[[Any, dict[str, Call]], None]  # before anything is timed
    rows: float  # MB of the projections that a call makes
    at_most: dict[str, float] | None = None  # contestant -> MB of memory to stay below
    held: dict[str, Callable[[Any], Call]] | None = None  # contestants in memory; None: the same

    def calls(self, inputs: Any, held: bool = False) -> tuple[dict[str, Call], dict[str, str]]:
        """Calls by contestant, and why the others are left out."""
        calls, left_out = {}, {}
        for name, contestant in ((held and self.held) or self.contestants).items():
            try:
                calls[name] = contestant(inputs)
            except LeftOut as reason:
                left_out[name] = str(reason)
        return calls, left_out


class Examples(NamedTuple):
    """A model with images to train on and to ask about."""

    model: nn.Module
    train: TensorDataset
    queries: TensorDataset

    def loaders(self) -> tuple[DataLoader, DataLoader]:
        return DataLoader(self.train, B), DataLoader(self.queries, B)


def examples(num_train: int = N, num_queries: int = M) -> Examples:
    torch.manual_seed(0)
    layers = (nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU())
    model = nn.Sequential(*layers, nn.Linear(1024, 100)).eval()
    parts = (
        TensorDataset(torch.randn(n, 784), torch.randint(100, (n,)))
        for n in (num_train, num_queries)
    )
    return Examples(model, *parts)


def need(package: str) -> None:
    """Raise LeftOut if the package is missing."""
    try:
        version(package)
    except PackageNotFoundError:
        raise LeftOut(f"{package} is not installed") from None


def only_if(package: str, contestant: Callable[[Any], Call]) -> Callable[[Any], Call]:
    def make(inputs: Any) -> Call:
        need(package)
        return contestant(inputs)

    return make


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[None], label[None])


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """log(p / (1 - p)) of the label's class."""
    log_p = torch.log_softmax(logits, 0).gather(0, label[None])[0]
    return log_p - torch.log1p(-log_p.exp())


def formed_rows(
    model: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    function: Callable[[Tensor, Tensor], Tensor],
    chosen: Callable[[dict[str, Tensor]], Tensor],
) -> Tensor:
    """[n, r] float64: what `chosen` takes of the gradients of function(logits, label), formed."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(parameters, x, label):
        return function(functional_call(model, parameters, (x[None],))[0], label)

    gradients = vmap(grad(one), (None, 0, 0))
    return torch.cat([chosen(gradients(parameters, *batch)).double() for batch in data])


def at_plan(plan: Any) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda gradients: pick(plan, gradients)


def at(index: Tensor, scale: float) -> Callable[[dict[str, Tensor]], Tensor]:
    """Coordinates of the gradients of all parameters, one behind the other."""
    return lambda gradients: joined(gradients)[:, index] * scale


def joined(gradients: dict[str, Tensor]) -> Tensor:
    """[B, D]"""
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


def influence(queries: Tensor, rows: Tensor, plan: Any, damping: float = 0.1) -> Tensor:
    """[m, n] sum over layers of q (F + λ)⁻¹ g, in float64."""
    total = torch.zeros(len(queries), len(rows), dtype=torch.float64)
    for block in plan.blocks:
        q, g = queries[:, block.entries], rows[:, block.entries]
        F = g.T @ g / len(g)
        F.diagonal().add_(damping * F.trace() / len(F))
        total += q @ torch.linalg.solve(F, g.T)
    return total


def assert_near(found: Any, truth: Tensor, name: str, tolerance: float = 1e-3) -> None:
    """To a part of the truth's size, which float32 keeps through a solve."""
    found = torch.as_tensor(found).detach().double()
    assert found.shape == truth.shape, name
    assert (found - truth).norm() <= tolerance * truth.norm(), name


def assert_scores(found: Any, shape: tuple[int, int], name: str) -> None:
    """Of those whose random matrix is their own."""
    found = torch.as_tensor(found).detach()
    assert found.shape == shape and found.isfinite().all() and found.std() > 0, name
