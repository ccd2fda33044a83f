"""The path of every parameter of the zoo: what is closed stays closed."""

from fnmatch import fnmatch

import pytest
import torch
from cases import build
from zoo import ZOO

from dropinf import Dropout, Plan, capture

# Model -> parameters, by glob, and their path; all others, and all of other models, are in closed
# form. A line that is added here costs people time: say why.
PATHS = {
    # (1 + weight) * x: the product is by what is made of the weight.
    "Gemma": {"*norm.weight": "pulled back"},
    # -exp(A_log) meets the data.
    "Mamba": {"*.A_log": "pulled back"},
    # One bias [1, heads, T, T] is looked up for all layers.
    "T5": {"*.relative_attention_bias.weight": "pulled back"},
    # exp(logit_scale) meets the data.
    "CLIP": {"logit_scale": "pulled back"},
}


def expected(table, name):
    return next((path for glob, path in table.items() if fnmatch(name, glob)), "closed form")


@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_paths(case):
    model, batch = build(case, torch.float32)
    plan = Plan.make(model, Dropout(r=4))
    with capture(model, plan) as tap:
        for _ in range(2):  # what a batch showed may change the choices of the next
            tap.rows(case.loss_fn(model, batch))
            table = PATHS.get(case.name, {})
            assert plan.paths == {s.name: expected(table, s.name) for s in plan.slots}
    for glob in table:
        assert any(fnmatch(slot.name, glob) for slot in plan.slots)


def test_models_of_the_table():
    assert set(PATHS) <= {case.name for case in ZOO}
