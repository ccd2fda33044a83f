"""A small policy-gradient problem: trajectories on a grid, and the return that a policy expects.

A cell of a 5 by 5 grid is left in one of four directions, and one time in ten in a random one;
walls hold. The corner below on the right ends an episode with 1, a pit in the middle with -1, and
each step costs 0.04. Trajectories are those of a policy that picks directions at random.

The loss of a trajectory is REINFORCE's: minus the sum over its steps of the return from there on,
less the mean of all such returns, times log pi(action | cell). That of a query, a cell to start in,
is minus the return that the policy expects from there within `HORIZON` steps, exactly: by dynamic
programming through the policy's probabilities of all cells.
"""

import torch
from quality_tasks import Task
from torch import Tensor, nn
from torch.utils.data import TensorDataset

SIDE, ACTIONS, HORIZON = 5, 4, 15
CELLS = SIDE * SIDE
GOAL, PIT = CELLS - 1, CELLS // 2
SLIP, STEP_COST = 0.1, 0.04
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))


def transitions() -> Tensor:
    """[CELLS, ACTIONS, CELLS] probabilities; the goal and the pit are not left."""
    direct = torch.zeros(CELLS, ACTIONS, CELLS)
    for cell in range(CELLS):
        for action, (down, right) in enumerate(MOVES):
            row = min(max(cell // SIDE + down, 0), SIDE - 1)
            column = min(max(cell % SIDE + right, 0), SIDE - 1)
            direct[cell, action, row * SIDE + column] = 1
    found = (1 - SLIP) * direct + SLIP * direct.mean(1, keepdim=True)
    for end in (GOAL, PIT):
        found[end] = 0
        found[end, :, end] = 1
    return found


def rewards() -> Tensor:
    """[CELLS, CELLS] of a step from one to the other; none once an episode has ended."""
    found = torch.full((CELLS, CELLS), -STEP_COST)
    found[:, GOAL] += 1
    found[:, PIT] -= 1
    found[[GOAL, PIT]] = 0
    return found


def features() -> Tensor:
    """[CELLS, 2 SIDE]: row and column, one of each."""
    cells = torch.arange(CELLS)
    both = torch.cat([torch.eye(SIDE)[cells // SIDE], torch.eye(SIDE)[cells % SIDE]], 1)
    return both


def expected_returns(probabilities: Tensor) -> Tensor:
    """[B, CELLS] from every cell, of policies [B, CELLS, ACTIONS]."""
    P, R = transitions().to(probabilities), rewards().to(probabilities)
    step = (probabilities[..., None] * P).sum(2)  # [B, CELLS, CELLS]
    now = (step * R).sum(2)
    total = now
    for _ in range(HORIZON - 1):
        total = now + (step @ total[..., None])[..., 0]
    return total


def policy_losses(logits: Tensor, asked: Tensor) -> Tensor:
    """[B]: of trajectories, logits [B, HORIZON, ACTIONS] and [B, HORIZON, 2] action and weight;
    of queries, logits of all cells [B, CELLS, ACTIONS] and [B, CELLS], 1 where to start.
    """
    log_pi = logits.log_softmax(2)
    if asked.dim() == 2:
        return -(expected_returns(log_pi.exp()) * asked).sum(1)
    taken = log_pi.gather(2, asked[..., :1].long())[..., 0]
    return -(asked[..., 1] * taken).sum(1)


def trajectories(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of n episodes: cells [n, HORIZON], actions, and returns from each step on; NaN behind."""
    generator = torch.Generator().manual_seed(0)
    P, R = transitions(), rewards()
    starts = [cell for cell in range(CELLS) if cell not in (GOAL, PIT)]
    cell = torch.tensor(starts)[torch.randint(len(starts), (n,), generator=generator)]
    cells, actions, reward = [], [], []
    for _ in range(HORIZON):
        action = torch.randint(ACTIONS, (n,), generator=generator)
        following = torch.multinomial(P[cell, action], 1, generator=generator)[:, 0]
        over = (cell == GOAL) | (cell == PIT)
        cells.append(cell)
        actions.append(action)
        reward.append(torch.where(over, torch.nan, R[cell, following]))
        cell = following
    reward = torch.stack(reward, 1)
    returns = reward.nan_to_num().flip(1).cumsum(1).flip(1)
    return (
        torch.stack(cells, 1),
        torch.stack(actions, 1),
        returns.masked_fill(reward.isnan(), torch.nan),
    )


def policy_task(n: int = 400) -> Task:
    cells, actions, returns = trajectories(n)
    weights = (returns - returns.nanmean()).nan_to_num() / HORIZON
    spoiled = torch.zeros(n, dtype=torch.bool)
    spoiled[torch.randperm(n, generator=torch.Generator().manual_seed(1))[: n // 5]] = True
    weights[spoiled] *= -1
    starts = [cell for cell in range(CELLS) if cell not in (GOAL, PIT)]
    everywhere = features().expand(len(starts), CELLS, -1)
    return Task(
        "policy",
        f"{SIDE} by {SIDE} grid, episodes of at most {HORIZON} steps; training examples are "
        "trajectories of a random policy with REINFORCE's loss, a fifth with the sign of their "
        "returns turned; queries are cells to start in, their loss is minus the exact expected "
        "return; an MLP 10-64-64-4",
        TensorDataset(features()[cells], torch.stack([actions.float(), weights], 2)),
        TensorDataset(everywhere.contiguous(), torch.eye(CELLS)[starts]),
        spoiled,
        make=lambda: nn.Sequential(
            nn.Linear(2 * SIDE, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, ACTIONS)
        ),
        epochs=20,
        batch_size=40,
        lr=3e-4,
        halves=60,
        losses=policy_losses,
    )
