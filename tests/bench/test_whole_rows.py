"""Rows of a mask out of whole gradients are those that `collect` makes."""

import pytest
import quality_tasks
import torch
import whole_rows

import dropinf


@pytest.mark.parametrize("by_energy", [False, True], ids=["uniform", "by energy"])
def test_rows_of_a_mask(by_energy):
    pytest.importorskip("sklearn")
    tasks = {task.name: task for task in quality_tasks.make_tasks()}
    task = tasks["digits-cnn"].tiny(n=12, m=4)
    model = task.trained()
    train = quality_tasks.loader(task.train)
    energies = dropinf.energies(model, train, task.loss_fn) if by_energy else None
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=20, seed=3, energies=energies))
    queries, store = whole_rows.WholeRows.of(task, model).under(plan)
    for found, data in ((store, task.train), (queries, task.queries)):
        made = dropinf.collect(
            model, quality_tasks.loader(data), task.loss_fn, plan, progress=False
        )
        assert made.plan.fingerprint == found.plan.fingerprint
        torch.testing.assert_close(found.rows, made.rows, rtol=1e-4, atol=1e-6)
