"""Run functions of one example on a whole batch, with one call of the model.

Attribution tools write a loss or an output for one example, `f(params, example) -> scalar`, around
`torch.func.functional_call(model, params, ...)`, and vmap it. dropinf wants one ordinary call of
the model on the batch. So f is vmapped here as well, twice: once to see what it calls the model
with, and, after the model ran on those of all examples, once with each example's own output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

_WAY_OUT = "give a function of the whole batch, (model, batch) -> [B], instead"


def batched_outputs(
    where: str, model: nn.Module, function: Callable[..., Tensor], batch: Sequence[Tensor]
) -> Tensor:
    """[B] outputs of `function(*example)` for the examples of a batch.

    Args:
        where: the caller, for messages.
        model: what `function` calls, through functional_call or directly, with batches of one.
        function: tensors of one example, without the batch dimension -> a scalar.
        batch: tensors [B, ...].

    Raises:
        ValueError: the function does not call the model, or not with batches of one example, or
            the model's outputs do not have the examples in dimension 0.
    """
    if not batch or any(not isinstance(t, Tensor) or not t.dim() for t in batch):
        raise ValueError(f"{where}: a batch must be a sequence of tensors [B, ...]")
    args, kwargs = _inputs(where, model, function, batch)
    found, shape = tree_flatten(model(*args, **kwargs))
    places = [i for i, x in enumerate(found) if isinstance(x, Tensor)]
    for x in (found[i] for i in places):
        if not x.dim() or len(x) != len(batch[0]):
            raise ValueError(
                f"{where}: the model gives a tensor {list(x.shape)} for {len(batch[0])} examples, "
                "which must be [B, ...]; a mean or sum over the batch belongs into the function"
            )

    def one(own: list[Tensor], *example: Tensor) -> Tensor:
        leaves = list(found)
        for i, x in zip(places, own, strict=True):
            leaves[i] = x.unsqueeze(0)
        with _answering(model, lambda *args, **kwargs: tree_unflatten(leaves, shape)):
            return function(*example)

    try:
        outputs = _vmap(one)([found[i] for i in places], *batch)
    except Exception as error:
        raise ValueError(
            f"{where}: the function failed on the model's outputs, as one does that uses the "
            f"parameters itself ({error}); {_WAY_OUT}"
        ) from error
    if outputs.dim() == 2 and outputs.shape[1] == 1:  # a batch of one example's losses
        outputs = outputs[:, 0]
    return outputs


def check_first(
    where: str, outputs: Tensor, function: Callable[..., Tensor], batch: Sequence[Tensor]
) -> None:
    """Compare example 0's output in the batch with that of the function alone.

    Raises:
        ValueError: they differ: the model mixes examples, or the function is random.
    """
    with torch.no_grad():
        alone = function(*(t[0] for t in batch)).reshape(())
    eps = torch.finfo(torch.promote_types(alone.dtype, outputs.dtype)).eps
    if not torch.allclose(outputs[0].detach(), alone, rtol=eps**0.5, atol=eps**0.5, equal_nan=True):
        raise ValueError(
            f"{where}: example 0 has output {float(outputs[0].detach()):.6g} in its batch and "
            f"{float(alone):.6g} alone; call .eval() on the model, or, where the function is "
            "random, skip this with check=False"
        )


class _Called(Exception):
    """Ends a function where it calls the model."""


def _inputs(
    where: str, model: nn.Module, function: Callable[..., Tensor], batch: Sequence[Tensor]
) -> tuple[Any, Any]:
    """The whole batch's (args, kwargs) of the model, from the one call that `function` makes."""
    calls: list[Any] = []

    def asked(*args: Any, **kwargs: Any) -> None:
        leaves, shape = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def keep(tensors: Sequence[Tensor]) -> None:
            for i, tensor in zip(places, tensors, strict=True):
                leaves[i] = tensor
            calls.append(tree_unflatten(leaves, shape))

        _Outside.apply(keep, *(leaves[i] for i in places))
        raise _Called

    failure = None
    with _answering(model, asked):
        try:
            _vmap(function)(*batch)
        except _Called:
            pass
        except Exception as error:
            failure = error
    if not calls:
        said = "did not call the model" if failure is None else f"failed first ({failure})"
        raise ValueError(
            f"{where}: the function must call the model that the plan is for with data of its "
            f"example, and {said}; {_WAY_OUT}"
        ) from failure
    args, kwargs = calls[0]
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, _Batched):
            if x.tensor.shape[1:2] != (1,):
                raise ValueError(
                    f"{where}: the function must call the model with batches of one, [1, ...], "
                    f"got {list(x.tensor.shape[1:])}; unsqueeze(0) the example, or {_WAY_OUT}"
                )
            if x.tensor.requires_grad:
                raise ValueError(
                    f"{where}: the model's input depends on its parameters by another way; "
                    f"{_WAY_OUT}"
                )
    return tree_map(lambda x: x.tensor.flatten(0, 1) if isinstance(x, _Batched) else x, calls[0])


class _Batched:
    """[B, *shape]: what was a tensor of `shape` inside vmap."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Outside(torch.autograd.Function):
    """Hands tensors of vmap to `keep` as those of the whole batch, which is its vmap rule."""

    @staticmethod
    def forward(keep: Callable, *tensors: Tensor) -> Tensor:
        return torch.zeros(())  # no data of the example is among them: nothing is kept

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple, keep: Callable, *tensors: Tensor) -> tuple[Tensor, None]:
        keep(
            [
                t if dim is None else _Batched(t.movedim(dim, 0))
                for t, dim in zip(tensors, in_dims[1:], strict=True)
            ]
        )
        return torch.zeros(()), None


@contextmanager
def _answering(model: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """While open, the first call of the model is `answer`'s, without its hooks; a second raises.

    By its class, where Python looks for __call__: with another forward its hooks would still run.
    """
    kind, count = type(model), 0

    class Answering(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > 1:
                raise ValueError(f"the function calls the model twice for an example; {_WAY_OUT}")
            return answer(*args, **kwargs)

    model.__class__ = Answering
    try:
        yield
    finally:
        model.__class__ = kind


def _vmap(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.func.vmap(function, randomness="different")
