"""Losses -log p(target | outputs): their values, and square roots of their Hessians.

H [C, C] is the Hessian of an example's loss with respect to the model's outputs at one position,
and S a root of it, H = S Sᵀ. With J the derivative of the outputs with respect to the parameters,
Jᵀ H J is the example's part of the Gauss-Newton matrix (Martens, arXiv 1412.1193, section 8), and
Jᵀ S s, for any random s with E[s sᵀ] = 1, a row whose outer product is that in expectation. For
these three losses it is the Fisher matrix too (ibid., section 9.2), and the rows of labels that are
drawn from the model are those of one such s.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropinf.losses.noise import IGNORED

Uniform = Callable[[Tensor, int], Tensor]


class Likelihood(ABC):
    """The outputs of a model for a batch, and what they should have been.

        losses = dropinf.losses.Categorical(logits, labels).losses()  # [B]

    Attributes:
        outputs: [B, C] or [B, ..., C], in float32 at least; what autograd leads back from.
        weight: of each example's loss, a number or [B].

    Raises:
        ValueError: outputs are [B].
    """

    def __init__(self, outputs: Tensor, weight: float | Tensor = 1.0) -> None:
        self.outputs, self.weight = full(outputs), weight
        if outputs.dim() < 2:
            raise ValueError(
                f"loss_fn: outputs must be [B, ..., C], got {list(outputs.shape)}; "
                "unsqueeze(1) where there is one number an example"
            )

    def losses(self) -> Tensor:
        """[B]: weight times the sum over an example's positions."""
        return self.weight * _summed(self._losses())

    def along(self, direction: Tensor) -> Tensor:
        """[B] whose gradients are sqrt(weight) Jᵀ direction, for a direction like outputs."""
        direction = direction.detach()
        products = direction * self.outputs  # NaN where a logit is -inf, of a class ruled out
        return self.weight**0.5 * _summed(products.masked_fill(direction == 0, 0))

    def places(self) -> Tensor:
        """[n] or [B, n] int64: a number for each of an example's n positions, whatever padding
        stands behind it."""
        return torch.arange(self.outputs[0, ..., 0].numel(), device=self.outputs.device)

    @abstractmethod
    def _losses(self) -> Tensor:
        """Without the weight, [B, ...]."""

    @abstractmethod
    def root(self, s: Tensor) -> Tensor:
        """S s for s like outputs, [B, ..., C]."""

    @abstractmethod
    def gradient(self, uniform: Uniform) -> Tensor:
        """[B, ..., C]: of the loss at a target drawn from the model, by the outputs.

        uniform(places, k) gives [B, n, k] numbers in (0, 1), k for each of n places.
        """


class Categorical(Likelihood):
    """Cross entropy: -log softmax(z)[y] of logits z [B, ..., C], summed over positions.

    H = diag(p) - p pᵀ with p = softmax(z), and S = (diag(1) - p 1ᵀ) diag(sqrt(p)).

        losses = dropinf.losses.Categorical(logits, labels).losses()  # [B]

    Args:
        logits: [B, ..., C].
        labels: [B, ...] classes, -100 for a position without loss; or [B, ..., C]
            probabilities, whose sum weighs the position.
        weight: see `Likelihood`.

    Raises:
        ValueError: labels are of another shape.
    """

    def __init__(self, logits: Tensor, labels: Tensor, weight: float | Tensor = 1.0) -> None:
        super().__init__(logits, weight)
        self.soft = labels.is_floating_point()
        wanted = logits.shape if self.soft else logits.shape[:-1]
        if labels.shape != wanted:
            raise ValueError(
                f"loss_fn: labels {list(labels.shape)} do not belong to logits "
                f"{list(logits.shape)}; they must be {list(logits.shape[:-1])} classes or "
                f"{list(logits.shape)} probabilities"
            )
        self.labels = labels

    def _losses(self) -> Tensor:
        logits, labels = self.outputs, self.labels
        if logits.dim() > 2:  # classes are the second dimension for torch
            logits = logits.movedim(-1, 1)
            labels = labels.movedim(-1, 1) if self.soft else labels
        labels = labels.to(logits.dtype if self.soft else torch.int64)
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")

    def _p(self) -> Tensor:
        return self.outputs.detach().softmax(-1)

    def _counts(self) -> Tensor:
        """[B, ..., 1] weight of each position."""
        labels = self.labels
        return labels.sum(-1, keepdim=True) if self.soft else (labels != IGNORED)[..., None]

    def places(self) -> Tensor:
        """[B, n] of those that count, counted from the last one: on the right of it is no padding,
        and a text that is padded on the left has a label more, that of its first token."""
        counted = (self._counts() != 0).flatten(1)  # [B, n]
        return counted.sum(1, keepdim=True) - counted.cumsum(1)

    def root(self, s: Tensor) -> Tensor:
        """S s = a - p sum(a) with a = sqrt(p) s."""
        p = self._p()
        a = p.sqrt() * s
        return (a - p * a.sum(-1, keepdim=True)) * self._counts().to(p.dtype).sqrt()

    def gradient(self, uniform: Uniform) -> Tensor:
        """p - e_y of classes y drawn from p."""
        p = self._p()
        cumulated = p.cumsum(-1)
        u = uniform(self.places(), 1).reshape(*p.shape[:-1], 1).to(p.dtype)
        u = u.clamp(max=1 - torch.finfo(p.dtype).eps)  # which may have been rounded to 1
        # Times the last sum, which rounding makes a little more or less than 1.
        y = torch.searchsorted(cumulated, u * cumulated[..., -1:], right=True)
        y = y.clamp(max=p.shape[-1] - 1)
        return (p - torch.zeros_like(p).scatter_(-1, y, 1.0)) * self._counts().to(p.dtype).sqrt()


class Bernoulli(Likelihood):
    """Binary cross entropy of logits z against targets in [0, 1], summed over all C of them.

    H = diag(p (1 - p)) with p = sigmoid(z).

        losses = dropinf.losses.Bernoulli(logits, targets).losses()  # [B]

    Args:
        logits: [B, ..., C].
        targets: of that shape.
        weight: see `Likelihood`.
    """

    def __init__(self, logits: Tensor, targets: Tensor, weight: float | Tensor = 1.0) -> None:
        super().__init__(logits, weight)
        self.targets = like_outputs(targets, self.outputs)

    def _losses(self) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.outputs, self.targets, reduction="none")

    def root(self, s: Tensor) -> Tensor:
        """sqrt(p (1 - p)) s."""
        z = self.outputs.detach()
        return (z.sigmoid() * (-z).sigmoid()).sqrt() * s

    def gradient(self, uniform: Uniform) -> Tensor:
        """p - y of y drawn with probability p."""
        p = self.outputs.detach().sigmoid()
        u = uniform(self.places(), p.shape[-1]).reshape(p.shape)
        return p - (u < p).to(p.dtype)


class SquaredError(Likelihood):
    """Squared error (f - y)² of outputs f, summed over all C of them.

    H = 2. It is -log p of a normal distribution of variance 1/2 around f, up to a constant.

        losses = dropinf.losses.SquaredError(outputs, targets).losses()  # [B]

    Args:
        outputs: [B, ..., C].
        targets: of that shape.
        weight: see `Likelihood`; 1 / C makes it the mean over outputs.
    """

    def __init__(self, outputs: Tensor, targets: Tensor, weight: float | Tensor = 1.0) -> None:
        super().__init__(outputs, weight)
        self.targets = like_outputs(targets, self.outputs)

    def _losses(self) -> Tensor:
        return (self.outputs - self.targets).square()

    def root(self, s: Tensor) -> Tensor:
        """sqrt(2) s."""
        return 2**0.5 * s

    def gradient(self, uniform: Uniform) -> Tensor:
        """2 (f - y) of y drawn around f."""
        f = self.outputs
        u = uniform(self.places(), f.shape[-1]).reshape(f.shape)
        return 2**0.5 * torch.special.ndtri(u).to(f.dtype)


Predict = Callable[[Any, Any], Likelihood]


class LikelihoodLoss:
    """A loss function (model, batch) -> [B] whose `predict` gives the likelihood behind it.

    Attributes:
        inputs: of the model that an example has: 2 of a pair, of which a batch has all first ones
            before all second ones.
    """

    def __init__(self, predict: Predict, inputs: int = 1) -> None:
        self.predict, self.inputs = predict, inputs
        functools.update_wrapper(self, predict)

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """One loss for each example, [B]."""
        return self.predict(model, batch).losses()

    def __repr__(self) -> str:
        return f"<loss {getattr(self, '__name__', self.predict)}>"

    def __reduce__(self) -> str:
        return self.__qualname__  # pickled by name, as a function is


def likelihood(predict: Predict) -> LikelihoodLoss:
    """Makes a loss function of one that returns a `Categorical`, `Bernoulli` or `SquaredError`.

        @dropinf.losses.likelihood
        def loss_fn(model, batch):
            x, label = batch
            return dropinf.losses.Categorical(model(x), label)

    It returns one loss per example, [B], and knows the model's outputs, so that `sampled`,
    `gauss_newton` and `influence(fisher=)` can take it.

    Args:
        predict: (model, batch) -> the likelihood of the batch's B examples.
    """
    return LikelihoodLoss(predict)


def _summed(losses: Tensor) -> Tensor:
    """[B] of [B, ...]."""
    return losses.flatten(1).sum(1) if losses.dim() > 1 else losses


def full(outputs: Tensor) -> Tensor:
    """In float32 or more."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def like_outputs(targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets in the shape and dtype of outputs; sizes of 1 may be left out, as in [B] of [B, 1].

    Raises:
        ValueError: they have other examples or numbers.
    """
    given, wanted = (
        [*t.shape[:1], *(n for n in t.shape[1:] if n != 1)] for t in (targets, outputs)
    )
    if given != wanted:
        raise ValueError(
            f"loss_fn: targets {list(targets.shape)} do not belong to outputs "
            f"{list(outputs.shape)}; give one for each output"
        )
    return targets.reshape(outputs.shape).to(outputs.dtype)
