"""Recurrent layers and cells, written in terms of linear layers.

The product with a layer's input is one call for all steps; that with the state is one a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]
# (product with the input [B, gates], state, weights) -> the next state, whose first is the output
Step = Callable[[Tensor, State, Sequence[Tensor | None]], State]


def _rnn(activation: Callable[[Tensor], Tensor]) -> Step:
    def step(gates: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
        return (activation(gates + F.linear(state[0], weights[1], weights[3])),)

    return step


def _gru(gates: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    (h,) = state
    r, z, n = gates.chunk(3, -1)
    hr, hz, hn = F.linear(h, weights[1], weights[3]).chunk(3, -1)
    r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
    n = torch.tanh(n + r * hn)
    return (n + z * (h - n),)


def _lstm(gates: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    h, c = state
    i, f, g, o = (gates + F.linear(h, weights[1], weights[3])).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if weights[4] is None else F.linear(h, weights[4])), c


def _cell(step: Step, num_states: int) -> Callable[..., Any]:
    def cell(
        input: Tensor,
        hx: Tensor | State,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = (hx,) if num_states == 1 else tuple(hx)
        found = step(F.linear(input, w_ih, b_ih), state, (w_ih, w_hh, b_ih, b_hh, None))
        return found[0] if num_states == 1 else found

    return cell


def _layers(step: Step, num_states: int) -> Callable[..., Any]:
    def layers(
        input: Tensor,
        hx: Any,
        params: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        if isinstance(hx, Tensor) and not hx.is_floating_point():
            return NotImplemented  # of a PackedSequence: (data, batch sizes, ...)
        states = (hx,) if num_states == 1 else tuple(hx)
        x = input.transpose(0, 1) if batch_first else input
        last: list[State] = []
        each = _weights(params, has_biases, num_layers * (2 if bidirectional else 1))
        for layer in range(num_layers):
            if layer and dropout and train:
                x = F.dropout(x, dropout)
            outputs = []
            for reverse in (False, True) if bidirectional else (False,):
                state = tuple(s[len(last)] for s in states)
                y, state = _along(step, x, state, next(each), reverse)
                outputs.append(y)
                last.append(state)
            x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        x = x.transpose(0, 1) if batch_first else x
        return x, *(torch.stack(part) for part in zip(*last, strict=True))

    return layers


def _weights(
    params: Sequence[Tensor], has_biases: bool, n: int
) -> Iterator[Sequence[Tensor | None]]:
    """(w_ih, w_hh, b_ih, b_hh, w_hr) of each layer and direction, None for what it has not."""
    k = len(params) // n
    for i in range(0, len(params), k):
        mine: list[Tensor | None] = list(params[i : i + k])
        if not has_biases:
            mine[2:2] = [None, None]
        yield mine + [None] * (5 - len(mine))


def _along(
    step: Step, x: Tensor, state: State, weights: Sequence[Tensor | None], reverse: bool
) -> tuple[Tensor, State]:
    """The outputs [T, B, H] of a layer in one direction, and its last state."""
    gates = F.linear(x, weights[0], weights[2]).unbind(0)
    outputs = []
    for g in reversed(gates) if reverse else gates:
        state = step(g, state, weights)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


RECURRENT: dict[Callable, Callable] = {
    torch.rnn_tanh_cell: _cell(_rnn(torch.tanh), 1),
    torch.rnn_relu_cell: _cell(_rnn(torch.relu), 1),
    torch.gru_cell: _cell(_gru, 1),
    torch.lstm_cell: _cell(_lstm, 2),
    torch.rnn_tanh: _layers(_rnn(torch.tanh), 1),
    torch.rnn_relu: _layers(_rnn(torch.relu), 1),
    torch.gru: _layers(_gru, 1),
    torch.lstm: _layers(_lstm, 2),
}
