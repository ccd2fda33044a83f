"""capture on the models of the zoo: rows equal one-example autograd in float64."""

import copy

import pytest
import torch
from cases import assert_exact, build, true_rows
from zoo import ZOO, Float64Throughout, mixtral, qwen3_moe

from dropinf import Dropout, Full, Plan, capture

WHOLE = ("Llama", "ViT", "Mixtral, experts eager", "ResNet, Bottleneck")


@pytest.mark.parametrize("mode", ["activations", "grads"])
@pytest.mark.parametrize(
    "case, compression",
    [(case, Dropout(r=50)) for case in ZOO] + [(c, Full()) for c in ZOO if c.name in WHOLE],
    ids=lambda value: getattr(value, "name", type(value).__name__),
)
def test_rows_equal_autograd(case, compression, mode):
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, compression)
    with Float64Throughout():
        truth = true_rows(case, model, batch, plan)
        with capture(model, plan, mode) as tap:
            rows = tap.rows(case.loss_fn(model, batch))
    assert_exact(rows, truth)


CHECKPOINTED = ("Llama", "Mixtral, experts batched_mm", "GPT-2", "T5", "ViT", "Mamba")


@pytest.mark.filterwarnings("ignore:.*checkpointing_enable:FutureWarning")
@pytest.mark.filterwarnings("ignore:rows. a backward pass for each:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "case", [case for case in ZOO if case.name in CHECKPOINTED], ids=lambda case: case.name
)
def test_gradient_checkpointing(case, reentrant):
    """Blocks run again in the backward pass; both kinds of Hugging Face's."""
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, Dropout(r=50))
    with Float64Throughout():
        truth = true_rows(case, model, batch, plan)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()  # without which it is off
        for module in model.modules():
            for name in ("p", "dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        with capture(model, plan) as tap:
            losses = case.loss_fn(model, batch)
            rows = tap.rows(losses)
    assert_exact(rows, truth)
    passes = any(path.startswith("a pass for each loss") for path in plan.paths.values())
    assert passes == (case.name == "T5" and reentrant)  # its first block hands a bias to the others


@pytest.mark.parametrize("mode", ["activations", "grads"])
@pytest.mark.parametrize("family", [mixtral, qwen3_moe], ids=lambda family: family.__name__)
def test_grouped_experts(family, mode):
    """grouped_mm has no float64: as close to the other experts' truth as twice plain float32."""
    case = family("eager")
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, Dropout(r=50))
    with Float64Throughout():
        truth = true_rows(case, model, batch, plan)
    narrow = copy.deepcopy(model).float()
    narrow.config._experts_implementation = "grouped_mm"
    plain = (true_rows(case, narrow, batch, plan).double() - truth).norm()
    with capture(narrow, plan, mode) as tap:
        rows = tap.rows(case.loss_fn(narrow, batch))
    assert (rows.double() - truth).norm() <= 2 * plain < 1e-5 * truth.norm()
