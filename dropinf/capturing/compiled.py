"""Models under torch.compile, which stay compiled inside a capture.

What torch.compile was told compiles the model once more, for captures alone, so that nothing that
was compiled before is used or lost; `compiled_graph` puts the sites in. Where it cannot, the model
is captured as written, which is said once.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.overrides import _get_current_function_mode_stack

from dropinf.capturing.checkpoints import region
from dropinf.capturing.closing import Closing, transformed
from dropinf.capturing.compiled_graph import CompiledGraph
from dropinf.capturing.tap import _EAGER, NotCompiledError
from dropinf.user_warning import warn_user

_NUMBERS = itertools.count()
# model -> what compiles it in captures, one for each torch.compile of it.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, list[CompiledForward]] = weakref.WeakKeyDictionary()


class Capture(Protocol):
    """The capture that a compiled model is called in."""

    given: nn.Module
    model: nn.Module
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
        # A name of its own, by which torch.compile knows what shapes it was called with.
        code = _forward.__code__.replace(co_name=f"forward_{next(_NUMBERS)}")
        self._run = torch.compile(
            types.FunctionType(code, _forward.__globals__),
            backend=self._compile,
            fullgraph=context.fullgraph,
            dynamic=context._dynamic,
        )

    def attach(self, tap: Capture, closing: Closing, undo: contextlib.ExitStack) -> None:
        """Be what calls the model, until `undo`."""
        self._tap, self._closing, self.why, self.used = tap, closing, "", False
        owner, name = _place(tap.given, tap.model)
        plain = owner.__dict__[name]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.why or not self._free(tap.model):
                return plain(*args, **kwargs)
            tap.entered(args, kwargs)
            with tap.paused(), torch.compiler.set_stance("default"), _unhooked(tap.model):
                self.used = True
                return self._run(tap.model, args, kwargs)

        owner.__dict__[name] = forward

        def put_back() -> None:
            owner.__dict__[name] = plain
            self._tap = self._closing = None

        undo.callback(put_back)

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
                self.why = "a gradient of a gradient"
                raise NotCompiledError() from error
            raise

    def judge(self, passes: str) -> None:
        """Rows were taken, with such a pass for each loss if not empty."""
        if self.used and passes:
            self._give_up(passes)
        self.used = False

    def _give_up(self, why: str) -> None:
        if not self.why:
            self.why = why
            warn_user(
                "capture: the compiled model runs as written in this capture from here on, as in "
                f"compiled code there is no closed form for {why}"
            )

    def _free(self, model: nn.Module) -> bool:
        """Whether nothing stands between the capture and the compiler."""
        modes = _get_current_function_mode_stack()
        hooks = (model._forward_hooks, model._backward_hooks, model._backward_pre_hooks)
        return (
            len(modes) == 1
            and modes[0] is self._closing
            and not any(hooks)
            and len(model._forward_pre_hooks) == 1  # the capture's own
            and region() is None
            and not transformed()
        )

    def _compile(self, module: fx.GraphModule, inputs: list[Any]) -> Callable:
        """What torch.compile calls with each graph."""
        from torch._dynamo.eval_frame import innermost_backend

        compiler = innermost_backend(self.context.callback)
        graph = CompiledGraph(module, inputs, self._closing, compiler)

        def run(*inputs: Any) -> Any:
            if graph.refused:
                self._give_up(graph.refused)
            return graph(self._tap, self._closing, *inputs)

        return run


def _forward(model: nn.Module, args: Any, kwargs: Any) -> Any:
    return model._call_impl(*args, **kwargs)


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
    context = inspect.getclosurevars(made).nonlocals.get("self") if callable(made) else None
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
