"""Adapters of peft: the default plan tracks them alone, and their rows equal autograd."""

import pytest
import torch
from cases import Case, assert_exact, build, gpt2, padded_ids, true_rows
from peft import LoraConfig, get_peft_model
from zoo import GROUPED, Float64Throughout, causal, causal_case

from dropinf import Dropout, Plan, capture

# peft asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

llama = causal_case("Llama", "Llama", **GROUPED).model
ADAPTERS = {  # name: base model, what is adapted, and one parameter that must be in the plan
    "LoRA, Conv1D": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        "transformer.h.1.mlp.c_proj.lora_B.default.weight",
    ),
    "LoRA, Linear": (
        llama,
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1},
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
    ),
    "LoRA, embedding": (
        llama,
        {"target_modules": ["embed_tokens", "o_proj"]},
        "model.embed_tokens.lora_embedding_A.default",
    ),
    "DoRA": (
        llama,
        {"target_modules": ["k_proj", "up_proj"], "use_dora": True},
        "model.layers.1.mlp.up_proj.lora_magnitude_vector.default.weight",
    ),
    "modules_to_save": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
        "lm_head.modules_to_save.default.weight",
    ),
}


@pytest.mark.parametrize("mode", ["activations", "grads"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_rows_equal_autograd(name, mode):
    base, options, tracked = ADAPTERS[name]
    config = LoraConfig(task_type="CAUSAL_LM", r=3, **options)
    case = Case(name, lambda: get_peft_model(base(), config).eval(), padded_ids, causal)
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, Dropout(r=50))
    names = [slot.name.removeprefix("base_model.model.") for slot in plan.slots]
    assert tracked in names
    assert all("lora_" in n or "modules_to_save" in n for n in names)
    with Float64Throughout():
        truth = true_rows(case, model, batch, plan)
        with capture(model, plan, mode) as tap:
            rows = tap.rows(causal(model, batch))
    assert_exact(rows, truth)
