"""Run functions of one example on a whole batch, with one call of the model.

Attribution tools write a loss or an output for one example, `f(params, example) -> scalar`, around
`torch.func.functional_call(model, params, ...)`, and vmap it. dropinf wants one ordinary call of
the model on the batch. So f is vmapped here as well; where it calls the model, vmap is left for
that call, which gets the inputs of all examples, and f goes on with each example's own output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.utils._pytree import tree_map_only

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
    call, failure = _Call(where, model, len(batch[0])), None
    with _answering(model, call):
        try:
            outputs = torch.func.vmap(function, randomness="different")(*batch)
        except Exception as error:
            if call.begun and not call.done:  # the model's own, or says what is wrong already
                raise
            failure = error
    if not call.done:
        said = "did not call the model" if failure is None else f"failed first ({failure})"
        raise ValueError(
            f"{where}: the function must call the model that the plan is for with data of its "
            f"example, and {said}; {_WAY_OUT}"
        ) from failure
    if failure is not None:
        raise ValueError(
            f"{where}: the function failed on the model's outputs ({failure}); {_WAY_OUT}"
        ) from failure
    if outputs.dim() == 2 and outputs.shape[1] == 1:  # a batch of one example's losses
        outputs = outputs[:, 0]
    return outputs


def first_alone(function: Callable[..., Tensor], batch: Sequence[Tensor]) -> Tensor:
    """The output of `function` for example 0 of a batch, without the others."""
    with torch.no_grad():
        return function(*(t[0] for t in batch)).reshape(())


def check_first(where: str, outputs: Tensor, alone: Tensor) -> None:
    """Compare example 0's output in the batch with that of `first_alone`.

    Raises:
        ValueError: they differ: the model mixes examples, or the function is random.
    """
    first = outputs[0].detach()
    eps = torch.finfo(torch.promote_types(alone.dtype, outputs.dtype)).eps
    if not torch.allclose(first, alone, rtol=eps**0.5, atol=eps**0.5, equal_nan=True):
        raise ValueError(
            f"{where}: example 0 has output {float(first):.6g} in its batch and "
            f"{float(alone):.6g} alone; call .eval() on the model, or, where the function is "
            "random, skip this with check=False"
        )


class _Call:
    """The one call of the model that a vmapped function makes.

    Attributes:
        begun: the function has called the model.
        done: the model has answered.
    """

    def __init__(self, where: str, model: nn.Module, B: int) -> None:
        self._where, self._model, self._B = where, model, B
        self.begun = self.done = False

    def __call__(self, args: Any, kwargs: Any) -> Any:
        if self.begun:
            raise ValueError("it calls the model twice for an example")
        self.begun = True
        if _functorch.get_dynamic_layer_stack_depth() != 1:
            raise ValueError(
                f"{self._where}: the function calls the model inside of a vmap or grad of its own; "
                f"{_WAY_OUT}"
            )
        level = _functorch.current_level()
        args, kwargs = tree_map_only(Tensor, lambda x: self._whole(x, level), (args, kwargs))
        with retrieve_current_functorch_interpreter().lower():
            found = tree_map_only(Tensor, self._of_one, self._model(*args, **kwargs))
        self.done = True
        return tree_map_only(Tensor, lambda x: _functorch._add_batch_dim(x, 0, level), found)

    def _whole(self, x: Tensor, level: int) -> Tensor:
        """[B, ...] of what is [1, ...] for each example."""
        whole, dim = _functorch._unwrap_batched(x, level)
        if dim is None:
            return x
        if x.shape[:1] != (1,):
            raise ValueError(
                f"{self._where}: the function must call the model with batches of one, [1, ...], "
                f"got {list(x.shape)}; unsqueeze(0) the example, or {_WAY_OUT}"
            )
        return whole.movedim(dim, 0).flatten(0, 1)

    def _of_one(self, x: Tensor) -> Tensor:
        """[B, 1, ...] of an output [B, ...], which is [1, ...] for each example."""
        if not x.dim() or len(x) != self._B:
            raise ValueError(
                f"{self._where}: the model gives a tensor {list(x.shape)} for {self._B} examples, "
                "which must be [B, ...]; a mean or sum over the batch belongs into the function"
            )
        return x.unsqueeze(1)


@contextmanager
def _answering(model: nn.Module, call: _Call) -> Iterator[None]:
    """While open, a call of the model is `call`'s.

    By its class, where Python looks for __call__: with another forward its hooks would run twice.
    """
    kind = type(model)

    class Answering(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            model.__class__ = kind  # it runs as what it is
            try:
                return call(args, kwargs)
            finally:
                model.__class__ = Answering

    model.__class__ = Answering
    try:
        yield
    finally:
        model.__class__ = kind
