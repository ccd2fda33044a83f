"""The general path: a function that has no closed form, run again for each example.

In the backward pass each example's slice of the data goes through the function once more, with the
parameters requiring grad, so that torch's own formula gives that example's gradient; one example's
gradients are held at a time. A loop, not vmap, which has no rule for recurrent layers, for random
or in-place functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from dropinf.capturing.rules import RefusedError


@dataclass(frozen=True)
class Call:
    """A call of a function, with its data cut out.

    Attributes:
        func: the function.
        arguments: of (args, kwargs) flattened, those that are not data.
        spec: how to put them together.
        places: where the data belong among them.
        dims: the batch dimension of each.
        leaves: where the parameters stand among the arguments.
        out_dims: the batch dimension of each output.
    """

    func: Callable
    arguments: tuple[Any, ...]
    spec: Any
    places: tuple[int, ...]
    dims: tuple[int, ...]
    leaves: tuple[int, ...]
    out_dims: tuple[int, ...]

    def outputs(self, data: Sequence[Tensor], replaced: dict[int, Tensor]) -> list[Tensor]:
        """The outputs for these data, some arguments replaced."""
        flat = list(self.arguments)
        for place, tensor in (*zip(self.places, data, strict=True), *replaced.items()):
            flat[place] = tensor
        args, kwargs = tree_unflatten(flat, self.spec)
        return flat_outputs(self.func(*args, **kwargs))[0]

    def cut(self, data: Sequence[Tensor], b: int, B: int) -> list[Tensor]:
        """Example b of B of the data."""
        return [cut(t, d, b, B) for t, d in zip(data, self.dims, strict=True)]

    def gradients(
        self, data: Sequence[Tensor], dys: Sequence[Tensor | None], B: int
    ) -> Iterator[tuple[int, tuple[Tensor | None, ...]]]:
        """(b, the gradient of each parameter) of every example b."""
        for b in range(B):
            leaves = [self.arguments[i].detach().requires_grad_() for i in self.leaves]
            with torch.enable_grad():
                ys = self.outputs(
                    self.cut([t.detach() for t in data], b, B),
                    dict(zip(self.leaves, leaves, strict=True)),
                )
            pairs = [
                (y, cut(dy, d, b, B))
                for y, dy, d in zip(ys, dys, self.out_dims, strict=True)
                if dy is not None and y.requires_grad
            ]
            if pairs:
                outputs, grads = zip(*pairs, strict=True)
                yield b, torch.autograd.grad(outputs, leaves, grads, allow_unused=True)


def prepare(
    func: Callable,
    args: tuple,
    kwargs: dict,
    is_data: Callable[[Tensor], bool],
    is_source: Callable[[Tensor], bool],
    dim: int,
    B: int,
) -> tuple[Call, list[Tensor]]:
    """The call, and its data.

    Raises:
        RefusedError: some data do not have the batch in the dimension expected.
    """
    arguments, spec = tree_flatten((args, kwargs))
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
    special = BATCH_DIMS.get(func)
    dims, out_dims = special(args, kwargs) if special else ({}, None)
    dims = {id(t): d for t, d in dims}
    places = [i for i in tensors if is_data(arguments[i]) or id(arguments[i]) in dims]
    data = [arguments[i] for i in places]
    where = [dims.get(id(t), dim if t.dim() > dim else 0) for t in data]
    for t, d in zip(data, where, strict=True):
        if t.dim() <= d or t.shape[d] % B:
            raise RefusedError(f"its input of shape {tuple(t.shape)} is not a batch of {B}")
    leaves = [i for i in tensors if is_source(arguments[i])]
    kept = [None if i in places else a for i, a in enumerate(arguments)]
    call = Call(func, tuple(kept), spec, tuple(places), tuple(where), tuple(leaves), ())
    return call, data, out_dims


def check(call: Call, data: Sequence[Tensor], ys: Sequence[Tensor], B: int) -> None:
    """Compare example 0 alone with its part of the batch.

    Raises:
        RefusedError: they differ: the function mixes examples, is random, or holds the batch in
            another dimension.
    """
    with torch.no_grad():
        try:
            alone = call.outputs(call.cut(data, 0, B), {})
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise RefusedError(f"it does not take one example alone ({error})") from error
    for one, y, d in zip(alone, ys, call.out_dims, strict=True):
        part = cut(y.detach(), d, 0, B)
        close = one.shape == part.shape and torch.allclose(
            one.double(),
            part.double(),
            rtol=0.0,
            atol=float(torch.finfo(y.dtype).eps ** 0.5 * (1e-30 + part.double().abs().max())),
        )
        if not close:
            raise RefusedError("example 0 alone gives another result than in the batch")


def flat_outputs(y: Any) -> tuple[list[Tensor], list[Any], Any]:
    """The floating point tensors of an output, all of its leaves, and its structure."""
    leaves, spec = tree_flatten(y)
    return [t for t in leaves if _differentiable(t)], leaves, spec


def _differentiable(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def cut(t: Tensor, dim: int, b: int, B: int) -> Tensor:
    """Example b of B along a dimension that holds them one after the other."""
    k = t.shape[dim] // B
    return t.narrow(dim, b * k, k)


def _recurrent(args: tuple, kwargs: dict) -> tuple[list[tuple[Tensor, int]], tuple[int, ...]]:
    """torch.lstm and its kin: (input, hx, weights, biases, layers, dropout, train, bidirectional,
    batch_first); the states are [layers, B, H] always."""
    input, hx = args[0], args[1]
    if isinstance(hx, Tensor) and hx.dim() == 1:  # (data, batch_sizes, hx, ...)
        raise RefusedError("it is given a PackedSequence, whose rows are sorted by time")
    if args[5] and args[6]:
        raise RefusedError("its dropout between layers is random; call .eval() on it")
    batch = 0 if args[-1] else 1
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    dims = [(input, batch), *((state, 1) for state in states)]
    return dims, (batch, *(1 for _ in states))


# Functions whose arguments hold the batch in other dimensions than their caller's data.
BATCH_DIMS: dict[Callable, Callable] = {
    torch.lstm: _recurrent,
    torch.gru: _recurrent,
    torch.rnn_tanh: _recurrent,
    torch.rnn_relu: _recurrent,
}
