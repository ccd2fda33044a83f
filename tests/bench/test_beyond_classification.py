"""bench/experiments/beyond_classification.py: a quick run, and its policy-gradient problem."""

import itertools

import numpy as np
import pytest
import torch
from bench_runs import assert_second_run_changes_the_date_alone, run_quick

pytest.importorskip("sklearn")

import beyond_classification as beyond
import policy_task

pytestmark = pytest.mark.more


def test_quick_run(tmp_path):
    path = tmp_path / "beyond.json"
    data = run_quick("beyond_classification", path)
    settings = data["settings"]
    assert list(settings["datasets"]) == ["diabetes", "policy"]
    for dataset in settings["datasets"]:
        scored = [
            (x["compression"], x["r"], x["seed"])
            for x in data["records"]
            if (x["stage"], x["dataset"]) == ("score", dataset) and x["seed"] is not None
        ]
        wanted = itertools.product(
            beyond.COMPRESSIONS, settings["totals"], range(settings["seeds"])
        )
        assert sorted(scored) == sorted(wanted)
    assert not any(x["stage"] == "time" for x in data["records"])
    assert_second_run_changes_the_date_alone("beyond_classification", path)


def test_grid():
    """From the middle of the upper row: to the right nine times in ten, and what slipping adds."""
    P, R = policy_task.transitions(), policy_task.rewards()
    assert torch.allclose(P.sum(2), torch.ones(25, 4))
    assert P[2, 3, 3] == pytest.approx(0.925) and P[2, 3, 2] == pytest.approx(0.025)
    assert P[policy_task.GOAL, :, policy_task.GOAL].eq(1).all()
    assert R[23, 24] == pytest.approx(0.96) and R[11, 12] == pytest.approx(-1.04)
    assert R[24, 24] == R[12, 12] == 0


def test_expected_returns():
    """Against a recursion over cells, actions and steps, one number at a time."""
    policies = torch.rand(2, 25, 4, generator=torch.Generator().manual_seed(0)).softmax(2)
    P, R = policy_task.transitions().tolist(), policy_task.rewards().tolist()
    found = policy_task.expected_returns(policies)
    for policy, returns in zip(policies.tolist(), found, strict=True):
        value = [0.0] * 25
        for _ in range(policy_task.HORIZON):
            value = [
                sum(
                    policy[s][a] * P[s][a][t] * (R[s][t] + value[t])
                    for a in range(4)
                    for t in range(25)
                    if P[s][a][t]
                )
                for s in range(25)
            ]
        assert returns.tolist() == pytest.approx(value, abs=1e-5)


def test_trajectories():
    """Each step is one that the grid allows, and a return is the sum of the rewards from there."""
    cells, actions, returns = policy_task.trajectories(50)
    P, R = policy_task.transitions(), policy_task.rewards()
    ends = (policy_task.GOAL, policy_task.PIT)
    ended = 0
    for cell, action, back in zip(cells.tolist(), actions.tolist(), returns.tolist(), strict=True):
        steps = [t for t in range(policy_task.HORIZON) if cell[t] not in ends]
        assert steps == list(range(len(steps))) and np.isnan(back[len(steps) :]).all()
        for t in steps[:-1]:
            assert P[cell[t], action[t], cell[t + 1]] > 0
            assert back[t] - back[t + 1] == pytest.approx(float(R[cell[t], cell[t + 1]]), abs=1e-5)
        ended += len(steps) < policy_task.HORIZON
        if len(steps) < policy_task.HORIZON:
            last = R[cell[steps[-1]], cell[len(steps)]]
            assert back[steps[-1]] == pytest.approx(float(last), abs=1e-5)
    assert 10 < ended < 50


def test_losses_of_a_policy():
    task = policy_task.policy_task(20)
    assert int(task.spoiled.sum()) == 4
    model = task.make()
    x, asked = task.train[:5]
    losses = task.loss_fn(model, (x, asked))
    for one, given, loss in zip(x, asked, losses, strict=True):
        log_pi = torch.stack([model(step).log_softmax(0) for step in one])
        expected = -sum(
            float(weight) * float(log_pi[t, int(action)])
            for t, (action, weight) in enumerate(given.tolist())
        )
        assert float(loss) == pytest.approx(expected, abs=1e-5)
    policy = model(policy_task.features()).softmax(1)
    returns = policy_task.expected_returns(policy[None])[0]
    starts = [cell for cell in range(25) if cell not in (policy_task.GOAL, policy_task.PIT)]
    assert torch.allclose(task.query_losses(model), -returns[starts], atol=1e-6)


def test_training_raises_the_return():
    """Of a policy on trajectories whose returns are told right."""
    task = policy_task.policy_task()
    x, asked = (part[~task.spoiled] for part in task.train.tensors)
    right = beyond.replace(task, train=torch.utils.data.TensorDataset(x, asked))
    chance = policy_task.expected_returns(torch.full((1, 25, 4), 0.25))[0].mean()
    assert -right.query_losses(right.trained()).mean() > chance + 0.5
