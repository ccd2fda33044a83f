"""Models under torch.compile, which stay compiled inside a capture.

What torch.compile was told compiles the model once more, for captures alone, so that nothing that
was compiled before is used or lost; `graph` puts the sites in. Where it cannot, the model
is captured as written, which is said once.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch._dynamo.eval_frame import innermost_backend
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.overrides import _get_current_function_mode_stack

from dropinf.capturing.checkpoints import region
from dropinf.capturing.closing import Closing, transformed
from dropinf.capturing.compiled.graph import CompiledGraph, NotInGraphError
from dropinf.capturing.tap import _EAGER, NotCompiledError
from dropinf.compression import Plan
from dropinf.user_warning import warn_user

_NUMBERS = itertools.count()
# model -> what compiles it in captures, one for each torch.compile of it.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, list[CompiledForward]] = weakref.WeakKeyDictionary()


class Capture(Protocol):
    """The capture that a compiled model is called in."""

    given: nn.Module
    model: nn.Module
    plan: Plan
    parameters: Sequence[torch.Tensor]
    probe: torch.Tensor

    def entered(self, args: Any, kwargs: Any) -> None:
        """The model was called."""

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Inside, functions run as if there were no capture."""


class CompiledForward:
    """The forward pass of a model that was compiled as a whole, for captures.

    Attributes:
        context: what torch.compile was told.
        why: why it runs as written in the open capture; empty as long as it is compiled.
        used: it ran compiled since the last rows.
    """

    def __init__(self, context: Any) -> None:
        self.context, self.why, self.used = context, "", False
        self._tap: Capture | None = None
        self._closing: Closing | None = None
        self._refused: dict[Any, str] = {}  # what was tracked in which training mode -> why
        # A name of its own, by which torch.compile knows what shapes it was called with.
        code = _forward.__code__.replace(co_name=f"forward_{next(_NUMBERS)}")
        self._run = torch.compile(
            types.FunctionType(code, _forward.__globals__),
            backend=self._compile,
            fullgraph=True,  # nobody would see what is between two graphs
            dynamic=context._dynamic,
        )

    def attach(self, tap: Capture, closing: Closing, undo: contextlib.ExitStack) -> None:
        """Be what calls the model, until `undo`."""
        self._tap, self._closing, self.used = tap, closing, False
        self.why = self._refused.get(self._key(), "")
        owner, name = _place(tap.given, tap.model)
        plain = owner.__dict__[name]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.why or not self._free(tap.model):
                return plain(*args, **kwargs)
            tap.entered(args, kwargs)
            try:
                with tap.paused(), torch.compiler.set_stance("default"), _unhooked(tap.model):
                    results = self._run(tap.model, args, kwargs)
                self.used = True
                return results
            # Before anything has run.
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                why = _reason(error)
            results = plain(*args, **kwargs)  # or the error is the model's own
            self._give_up(why)
            return results

        owner.__dict__[name] = forward

        def put_back() -> None:
            owner.__dict__[name] = plain
            self._tap = self._closing = None

        undo.callback(put_back)

    @contextlib.contextmanager
    def as_written(self) -> Iterator[None]:
        """Inside, the model is not compiled."""
        before, self.why = self.why, "asked for"
        try:
            yield
        finally:
            self.why = before

    @contextlib.contextmanager
    def passes(self) -> Iterator[None]:
        """Inside, backward passes run, which may keep the graph.

        Raises:
            NotCompiledError: they meet a gradient of a gradient.
        """
        try:
            with torch._functorch.config.patch(donated_buffer=False):
                yield
        except RuntimeError as error:
            if self.used and "double backward" in str(error):
                self.why, self.used = "a gradient of a gradient", False
                raise NotCompiledError() from error
            raise

    def judge(self, passes: str) -> None:
        """Rows were taken, with such a pass for each loss if not empty."""
        if self.used and passes:
            self._give_up(passes)
        self.used = False

    def _give_up(self, why: str) -> None:
        self.why = why
        if self._refused.setdefault(self._key(), why) is why:
            warn_user(f"capture: the compiled model is captured as written, because of {why}")

    def _key(self) -> Any:
        return frozenset(slot.name for slot in self._tap.plan.slots), self._tap.model.training

    def _free(self, model: nn.Module) -> bool:
        """Whether nothing stands between the capture and the compiler."""
        modes = _get_current_function_mode_stack()
        if len(modes) != 1 or modes[0] is not self._closing:
            return False
        with torch._C.DisableTorchFunction():
            own = any((model._forward_hooks, model._backward_hooks, model._backward_pre_hooks))
            return (
                not own
                and len(model._forward_pre_hooks) == 1  # the capture's
                and all(self._closing.asked(p) is not None for p in self._tap.parameters)
                and region() is None
                and not transformed()
            )

    def _compile(self, module: fx.GraphModule, inputs: list[Any]) -> Callable:
        """What torch.compile calls with the graph."""
        compiler = innermost_backend(self.context.callback)
        graph = CompiledGraph(module, inputs, self._closing, compiler)
        return lambda *inputs: graph(self._tap, self._closing, *inputs)


def _forward(model: nn.Module, args: Any, kwargs: Any) -> Any:
    return model._call_impl(*args, **kwargs)


def _reason(error: Exception) -> str:
    """Why there is no graph, in few words."""
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, NotInGraphError):
        return str(inner)
    if isinstance(error, FailOnRecompileLimitHit):
        return "more sizes of batches than torch._dynamo.config.recompile_limit"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def compiled_forward(given: nn.Module, model: nn.Module) -> CompiledForward | None:
    """That of a model which was compiled as a whole; None of any other.

    Args:
        given: the model, or what torch.compile made of it.
        model: the model itself.
    """
    place = _place(given, model)
    if place is None:
        return None
    owner, name = place
    made = owner.__dict__[name]
    context = (
        inspect.getclosurevars(made).nonlocals.get("self") if inspect.isfunction(made) else None
    )
    if not all(hasattr(context, name) for name in ("callback", "fullgraph", "_dynamic")):
        return None
    stance = _EAGER[0].prev if _EAGER else torch._dynamo.eval_frame._stance
    if not callable(context.callback) or stance.stance != "default":
        return None  # disabled, or to run as written anyway
    known = _KNOWN.setdefault(model, [])
    found = next((one for one in known if one.context is context), None)
    if found is None:
        found = CompiledForward(context)
        known.append(found)
    return found


def _place(given: nn.Module, model: nn.Module) -> tuple[nn.Module, str] | None:
    """Where what torch.compile made of a model is kept."""
    if given is model:
        return (model, "_compiled_call_impl") if model._compiled_call_impl is not None else None
    inside = given._modules.get("_orig_mod")
    return (given, "forward") if inside is model and "forward" in given.__dict__ else None


@contextlib.contextmanager
def _unhooked(model: nn.Module) -> Iterator[None]:
    """Without the capture's own hook, for which the compiler would compile the model anew."""
    hooks, given = model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs
    before = dict(hooks), dict(given)
    hooks.clear()
    given.clear()
    try:
        yield
    finally:
        hooks.update(before[0])
        given.update(before[1])
