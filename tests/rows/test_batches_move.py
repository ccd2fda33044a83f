"""Batches go to the device of the model."""

import torch
from torch import nn

from dropinf.compression import Full, Plan
from dropinf.losses import classification_loss
from dropinf.rows.batches import Batches


def drawn(model):
    plan = Plan.make(model, Full())
    batches = Batches(model, classification_loss, plan, "activations", {}, None, 1.0, "raise")
    with batches.opened():
        return list(batches.drawn([(torch.ones(2, 3), "a")]))


def test_to_the_model():
    ((x, said),) = drawn(nn.Linear(3, 2).to("meta"))  # stands for a GPU
    assert x.is_meta and said == "a"


def test_not_from_the_cpu():
    ((x, _),) = drawn(nn.Linear(3, 2))
    assert x.device.type == "cpu"
