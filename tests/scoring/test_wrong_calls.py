"""Calls with arguments of another kind, as people make them: one sentence with the way out."""

import numpy as np
import pytest
import torch
from torch import nn

import dropinf
from dropinf.losses import classification_loss as loss_fn

X, Y = torch.randn(12, 5), torch.randint(3, (12,))
BATCHES = [(X[:6], Y[:6]), (X[6:], Y[6:])]
model = nn.Linear(5, 3)
plan = dropinf.Plan.make(model, dropinf.Dropout(r=8))
store = dropinf.collect(model, BATCHES, loss_fn, plan, progress=False)
solver = dropinf.solvers.Cholesky().fit(store)
MODEL_PLAN = "collect: plan must be a Plan, got a "


def collect(loader=BATCHES, loss_fn=loss_fn, plan=plan):
    return dropinf.collect(model, loader, loss_fn, plan, progress=False)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: collect(plan=dropinf.Dropout(r=4)), f"{MODEL_PLAN}Dropout; make one"),
        (lambda: collect(loss_fn=plan, plan=loss_fn), f"{MODEL_PLAN}LikelihoodLoss; make one"),
        (
            lambda: dropinf.capture(model, dropinf.Full()),
            "plan must be a Plan, got a Full",
        ),
        (
            lambda: collect(loss_fn=nn.CrossEntropyLoss(reduction="none")),
            r"collect: loss_fn must .* as loss_fn\(model, batch\) .* got a CrossEntropyLoss;",
        ),
        (lambda: collect(loss_fn=None), "collect: loss_fn must be a function .* got None;"),
        (lambda: dropinf.energies(model, BATCHES, None), "energies: loss_fn must be a function"),
        (lambda: collect((X, Y)), r"collect: a tuple of tensors is one batch; give .* \[batch\]"),
        (lambda: collect(X), "collect: a Tensor of tensors is one batch"),
        (lambda: collect({"x": X, "labels": Y}), "collect: a dict of tensors is one batch"),
        (
            lambda: dropinf.solvers.Cholesky().fit(store.rows),
            "fit: store must be a RowStore",
        ),
        (lambda: dropinf.self_influence(solver, store), "self_influence: solver must be a Solver"),
        (lambda: dropinf.scores(store.rows, store, solver), "scores: queries must be a RowStore"),
        (lambda: dropinf.topk(store, solver, store, k=1), "topk: solver must be a Solver"),
        (
            lambda: dropinf.ensemble((store, store, solver)),
            "ensemble: parts must be a list",
        ),
        (
            lambda: dropinf.choose_damping([0.1], (store, store, solver)),
            "choose_damping: parts must be a list",
        ),
        (lambda: dropinf.agreement([store, store]), "agreement: parts must be a list"),
    ],
)
def test_another_kind(call, words):
    with pytest.raises(TypeError, match=words):
        call()


def test_values():
    with pytest.raises(ValueError, match=r"for rows by position take store.rows"):
        store[:3]
    with pytest.raises(ValueError, match=r"of tensors, got a tuple of ndarray, ndarray;"):
        collect([(np.ones((2, 5)), np.ones(2))])
    generator = iter([])
    with pytest.raises(ValueError, match="a generator gives them once"):
        collect(generator)


def test_batches_that_are_one_tensor_each():
    def squares(model, x):
        return model(x).square().sum(1)

    assert len(collect([X[:6], X[6:]], squares)) == len(collect((X[:6], X[6:]), squares)) == 12


def test_ids_of_a_batch():
    with pytest.warns(UserWarning, match="12 rows have 6 different ids; ids= must give each"):
        found = dropinf.collect(
            model, BATCHES, loss_fn, plan, progress=False, ids=lambda batch: range(len(batch[0]))
        )
    assert len(found) == 12
