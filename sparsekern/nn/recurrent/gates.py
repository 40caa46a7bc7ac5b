"""The pointwise part of the recurrent cells, forward and backward, step by step.

A cell adds what its input and its last hidden state contribute to the gates, (tokens, gates H)
each, and makes its next state of the sum. Formulas and gate order are torch's (`torch.nn.GRU`,
`LSTM`, `RNN`).

Backward is linear in the gradient of the state. All its factors are derivatives at values that the
forward pass has left, so they are computed for all time steps at once; a step of the walk back is
then one or two multiplications. The factors' buffer becomes the gradient of the gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten

Rows = Callable[[Tensor], Sequence[Tensor]]
"""Cuts a (tokens, n) buffer into its time steps."""
States = Sequence[Tensor]
"""The hidden state (tokens, H), for an LSTM also the cell state."""
Step = Callable[[int, Tensor, States], None]
"""(time step, contribution of the hidden state, last states): writes the next states."""


class Walk(NamedTuple):
    """The way back through time.

    Attributes:
        hidden: (tokens, gates H), the gradient of the hidden state's contribution, once the walk
            is over.
        hidden_rows: the same by time step, each filled by `step`.
        step: (time step, gradient of h, gradients of other states, which become those of the last
            states in place), fills a row of `hidden`.
        carry: (time step, gradient of h, gradient of the last h, to which the direct path is
            added in place); None where h passes through the gates only.
        inputs: the gradient of the input's contribution, after the walk.
    """

    hidden: Tensor
    hidden_rows: Sequence[Tensor]
    step: Callable[[int, Tensor, States], None]
    carry: Callable[[int, Tensor, Tensor], None] | None
    inputs: Callable[[], Tensor]


class Kind(NamedTuple):
    """One kind of cell.

    Attributes:
        states: tensors in a state.
        gates: rows of the weights per hidden unit.
        kept: numbers per hidden unit that forward leaves for backward, besides the states.
        forward: (input's contribution, buffer of what is kept, next states by time step, how to
            cut the first and the second) -> step.
        backward: (what was kept, last states, next states, how to cut) -> walk.
    """

    states: int
    gates: int
    kept: int
    forward: Callable[[Tensor, Tensor, Sequence[Sequence[Tensor]], Rows, Rows], Step]
    backward: Callable[[Tensor, States, States, Rows], Walk]


def _by_gate(buffer: Tensor, gates: int) -> tuple[Tensor, ...]:
    return buffer.chunk(gates, 1)


# ---- RNN: h' = tanh(a), or max(a, 0)


def _rnn_forward(squash: Callable[[Tensor], Tensor]) -> Callable[..., Step]:
    def forward(
        x: Tensor, _kept: Tensor, new: Sequence[Sequence[Tensor]], rows: Rows, _kept_rows: Rows
    ) -> Step:
        inputs, (hidden,) = rows(x), new

        def step(t: int, a: Tensor, _state: States) -> None:
            squash(torch.add(inputs[t], a, out=hidden[t]))

        return step

    return forward


def _rnn_backward(slope: Callable[[Tensor], Tensor]) -> Callable[..., Walk]:
    def backward(_kept: Tensor, _last: States, new: States, rows: Rows) -> Walk:
        gradient = slope(new[0])
        gradients = rows(gradient)

        def step(t: int, dh: Tensor, _rest: States) -> None:
            gradients[t].mul_(dh)

        return Walk(gradient, gradients, step, None, lambda: gradient)

    return backward


# ---- GRU: r, z = sigmoid(x + a), n = tanh(x + r a), h' = n + z (h - n); kept are r, z, a of n, n


def _gru_forward(
    x: Tensor, kept: Tensor, new: Sequence[Sequence[Tensor]], rows: Rows, kept_rows: Rows
) -> Step:
    size = x.shape[1] // 3
    inputs_rz, inputs_n = rows(x[:, : 2 * size]), rows(x[:, 2 * size :])
    resets, updates, hiddens, news = (kept_rows(gate) for gate in _by_gate(kept, 4))
    both = kept_rows(kept[:, : 2 * size])
    out = new[0]

    def step(t: int, a: Tensor, state: States) -> None:
        torch.add(inputs_rz[t], a[:, : 2 * size], out=both[t]).sigmoid_()
        hidden = hiddens[t].copy_(a[:, 2 * size :])
        n = torch.addcmul(inputs_n[t], resets[t], hidden, out=news[t]).tanh_()
        torch.lerp(n, state[0], updates[t], out=out[t])

    return step


def _gru_backward(kept: Tensor, last: States, _new: States, rows: Rows) -> Walk:
    size = kept.shape[1] // 4
    r, z, hidden, n = _by_gate(kept, 4)
    factors = torch.empty_like(kept)
    f_r, f_z, f_hidden, f_n = _by_gate(factors, 4)
    _aten.tanh_backward(1 - z, n, grad_input=f_n)
    torch.mul(f_n, r, out=f_hidden)
    _aten.sigmoid_backward(last[0] - n, z, grad_input=f_z)
    _aten.sigmoid_backward(f_n * hidden, r, grad_input=f_r)
    by_gate, updates = rows(factors.view(-1, 4, size)), rows(z)
    gradient = factors[:, : 3 * size]

    def step(t: int, dh: Tensor, _rest: States) -> None:
        by_gate[t].mul_(dh.unsqueeze(1))

    def carry(t: int, dh: Tensor, d_last: Tensor) -> None:
        d_last.addcmul_(dh, updates[t])

    def inputs() -> Tensor:
        return torch.cat([f_r, f_z, f_n], 1)

    return Walk(gradient, rows(gradient), step, carry, inputs)


# ---- LSTM: i, f, o = sigmoid, g = tanh of x + a; c' = f c + i g, h' = o tanh(c')


def _lstm_forward(
    x: Tensor, kept: Tensor, new: Sequence[Sequence[Tensor]], rows: Rows, kept_rows: Rows
) -> Step:
    size = x.shape[1] // 4
    inputs, gates, both = rows(x), kept_rows(kept), kept_rows(kept[:, : 2 * size])
    ins, forgets, cells, outs = (kept_rows(gate) for gate in _by_gate(kept, 4))
    hidden, memory = new

    def step(t: int, a: Tensor, state: States) -> None:
        torch.add(inputs[t], a, out=gates[t])
        both[t].sigmoid_()
        g, o = cells[t].tanh_(), outs[t].sigmoid_()
        c = torch.mul(forgets[t], state[1], out=memory[t]).addcmul_(ins[t], g)
        torch.tanh(c, out=hidden[t]).mul_(o)

    return step


def _lstm_backward(kept: Tensor, last: States, new: States, rows: Rows) -> Walk:
    size = kept.shape[1] // 4
    i, f, g, o = _by_gate(kept, 4)
    squashed = new[1].tanh()
    factors = torch.empty_like(kept)
    f_i, f_f, f_g, f_o = _by_gate(factors, 4)
    _aten.sigmoid_backward(g, i, grad_input=f_i)
    _aten.sigmoid_backward(last[1], f, grad_input=f_f)
    _aten.tanh_backward(i, g, grad_input=f_g)
    _aten.sigmoid_backward(squashed, o, grad_input=f_o)
    slopes, forgets = rows(_aten.tanh_backward(o, squashed)), rows(f)
    through_c, outs = rows(factors.view(-1, 4, size)[:, :3]), rows(f_o)

    def step(t: int, dh: Tensor, rest: States) -> None:
        dc = rest[0].addcmul_(dh, slopes[t])
        through_c[t].mul_(dc.unsqueeze(1))
        outs[t].mul_(dh)
        dc.mul_(forgets[t])

    return Walk(factors, rows(factors), step, None, lambda: factors)


def _tanh_slope(y: Tensor) -> Tensor:
    slope: Tensor = _aten.tanh_backward(torch.ones((), dtype=y.dtype, device=y.device), y)
    return slope


def _relu_slope(y: Tensor) -> Tensor:
    return (y > 0).to(y.dtype)


KINDS = {
    "gru": Kind(1, 3, 4, _gru_forward, _gru_backward),
    "lstm": Kind(2, 4, 4, _lstm_forward, _lstm_backward),
    "tanh": Kind(1, 1, 0, _rnn_forward(torch.tanh_), _rnn_backward(_tanh_slope)),
    "relu": Kind(1, 1, 0, _rnn_forward(torch.relu_), _rnn_backward(_relu_slope)),
}
"""Cells by name: `torch.nn.GRU`, `LSTM`, and `RNN` with either nonlinearity."""
