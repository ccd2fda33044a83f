"""TRAK (traker 0.3) with dropout compression.

Its projection replaced, one argument; TRAK forms each example's gradient:

    TRAKer(model, task, n, projector=dropinf.DropoutProjector(grad_dim=P, proj_dim=512), ...)

By energy, with `DropoutProjector(..., energies=dropinf.energies(model, loader, loss_fn))`.

Gradients and projection replaced; the features are computed inside one batched backward pass:

    from dropinf.integrations.trak import fused

    plan = dropinf.Plan.make(model, dropinf.Dropout(total=512))
    traker = TRAKer(model, task, train_set_size=n, device="cpu", lambda_reg=1e-3, **fused(plan))

Coordinates whose gradient is zero for all examples (pixels that are always black) make TRAK's
matrix singular, so give it a `lambda_reg` above 0. The coordinates of `fused` are those of the
plan for every checkpoint; another mask is another plan and another TRAKer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dropinf.capturing import capture
from dropinf.compression import Plan
from dropinf.integrations.batching import batched_outputs, check_first, first_alone
from dropinf.integrations.versions import tested

with tested("traker", "0.3"):
    from trak.gradient_computers import AbstractGradientComputer
    from trak.modelout_functions import (
        AbstractModelOutput,
        IterativeImageClassificationModelOutput,
    )
    from trak.projectors import NoOpProjector

_NAME = "DropoutGradientComputer"


def fused(plan: Plan, device: str | torch.device = "cpu", **options: Any) -> dict[str, Any]:
    """The arguments of TRAKer that compute its features under `plan`.

    Args:
        plan: made for the model.
        device: the TRAKer's.
        options: of `DropoutGradientComputer`.

    TRAK compares the plan's fingerprint, as the type of its projection, with that of the results
    which are in its save_dir.
    """
    return {
        "gradient_computer": partial(DropoutGradientComputer, plan=plan, **options),
        "projector": NoOpProjector(
            proj_dim=plan.width, proj_type=f"dropinf {plan.fingerprint}", device=device
        ),
    }


class DropoutGradientComputer(AbstractGradientComputer):
    """TRAK's gradient computer whose gradients are rows [B, R] under a plan, never formed whole.

    TRAK makes it; `fused` hands it over.
    """

    def __init__(
        self,
        model: nn.Module,
        task: AbstractModelOutput,
        grad_dim: int | None = None,
        dtype: torch.dtype = torch.float16,
        device: str | torch.device = "cuda",
        grad_wrt: Iterable[str] | None = None,
        *,
        plan: Plan,
        output_fn: Callable[[nn.Module, Sequence[Tensor]], Tensor] | None = None,
        mode: str = "activations",
        check: bool = True,
    ) -> None:
        """The first six as TRAK gives them.

        Args:
            plan: the coordinates to keep.
            output_fn: (model, batch) -> [B], the model output of each example; None takes the
                task's `get_output`, which is written for one example.
            mode: see `dropinf.capture`.
            check: compare the first batch's example 0 with the task's own output for it.

        Raises:
            ValueError: the plan does not track what `grad_wrt` names.
        """
        super().__init__(model, task, grad_dim, dtype, device)
        tracked = {slot.name for slot in plan.slots}
        if grad_wrt is not None and set(grad_wrt) != tracked:
            raise ValueError(
                f"{_NAME}: the plan must track the parameters in grad_wrt, of which "
                f"{sorted(set(grad_wrt) ^ tracked)} are in one of them only; make it with "
                "Plan.make(model, ..., include=grad_wrt)"
            )
        self.plan, self.output_fn, self.mode, self.check = plan, output_fn, mode, check
        self.load_model_params(model)

    def load_model_params(self, model: nn.Module) -> None:
        """Take the model with the parameters that it has now."""
        self.model = model
        self._weights = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())

    def compute_per_sample_grad(self, batch: Iterable[Tensor]) -> Tensor:
        """Rows [B, R] of the gradients of the model output.

        Raises:
            ValueError: the task cannot be run on a whole batch, or mixes examples.
        """
        batch = list(batch)
        # From outside of the capture, which is not to see a pass of one example.
        with capture(self.model, self.plan, self.mode) as tap:
            outputs = self._outputs(batch)
            rows = tap.rows(outputs)
        if self.check and self._single():
            check_first(_NAME, outputs, first_alone(self._output, batch))
            self.check = False
        return rows

    def compute_loss_grad(self, batch: Iterable[Tensor]) -> Tensor:
        """[B, 1] gradient of the loss by the model output, from the task."""
        with torch.no_grad():
            return self.modelout_fn.get_out_to_loss_grad(
                self.model, self._weights, self._buffers, batch
            )

    def _single(self) -> bool:
        """Whether the output is that of a function of one example."""
        whole = isinstance(self.modelout_fn, IterativeImageClassificationModelOutput)
        return self.output_fn is None and not whole

    def _output(self, *example: Tensor) -> Tensor:
        return self.modelout_fn.get_output(self.model, self._weights, self._buffers, *example)

    def _outputs(self, batch: list[Tensor]) -> Tensor:
        if self._single():
            return batched_outputs(_NAME, self.model, self._output, batch)
        if self.output_fn is not None:
            return self.output_fn(self.model, batch)
        return self._output(*batch)
