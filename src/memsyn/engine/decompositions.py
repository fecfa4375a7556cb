"""Operations that hide several layers, written out in plain ones.

Owns the equivalents of attention and recurrent networks, from which every use of a weight can be seen. Must compute
what the originals compute, in eval mode.
"""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _never(_: object) -> bool:
    return False


_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": _never},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__
"""torch's own code without its first question, which would hand the whole call over as one operation."""

Weights = Sequence[Tensor]
Step = Callable[[Tensor, tuple[Tensor, ...], Tensor, Tensor | None], tuple[Tensor, ...]]
"""(the input's part of the gates (B, gates), state, recurrent weight and bias) -> next state, the output first."""


def _lstm_step(gates: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    hidden, cell = state
    entry, forget, candidate, exit_ = (gates + F.linear(hidden, weight, bias)).chunk(4, -1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(entry) * torch.tanh(candidate)
    return torch.sigmoid(exit_) * torch.tanh(cell), cell


class _Steps(NamedTuple):
    """What the forward pass of a recurrence gives, without a graph."""

    outputs: Tensor
    cells: Tensor
    """(T, B, H), after each step."""
    active: Tensor
    """(T, B, 4, H), the gates after their nonlinearities."""


class _Recurrence(torch.autograd.Function):
    """All steps of one LSTM layer in one direction, several times as fast as a graph of their operations.

    From the gates' inputs (T, B, 4 H), of which the recurrent part is given apart so that its weight has a use of its
    own, to the outputs (T, B, H) and the last cell state.
    """

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, recurrent: Tensor, hidden: Tensor, cell: Tensor, weight: Tensor, steps: _Steps
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, cell, steps.active, steps.cells)
        return steps.outputs, steps.cells[-1].clone()

    @staticmethod
    def backward(ctx: Any, from_outputs: Tensor, from_cell: Tensor) -> tuple[Tensor | None, ...]:
        with torch._C.DisableTorchFunction():
            weight, first, active, cells = ctx.saved_tensors
            entry, forget, candidate, exit_ = active.unbind(2)
            before, squashed = torch.cat([first.unsqueeze(0), cells[:-1]]), torch.tanh(cells)
            factors = torch.stack(
                [
                    candidate * entry * (1 - entry),
                    before * forget * (1 - forget),
                    entry * (1 - candidate.square()),
                    squashed * exit_ * (1 - exit_),
                ],
                2,
            )
            to_cell = exit_ * (1 - squashed.square())
            grads = torch.empty_like(factors)
            of_cell, of_hidden = from_cell.clone(), torch.zeros_like(first)
            for t in range(len(grads) - 1, -1, -1):
                of_hidden = of_hidden + from_outputs[t]
                of_cell = torch.addcmul(of_cell, of_hidden, to_cell[t])
                torch.mul(of_cell.unsqueeze(1), factors[t, :, :3], out=grads[t, :, :3])
                torch.mul(of_hidden, factors[t, :, 3], out=grads[t, :, 3])
                of_cell = of_cell * forget[t]
                of_hidden = grads[t].flatten(1) @ weight
            flat = grads.flatten(2)
            return flat, flat, of_hidden, of_cell, None, None


def _run_lstm(gates: Tensor, hidden: Tensor, cell: Tensor, weight: Tensor, bias: Tensor | None) -> _Steps:
    with torch.no_grad(), torch._C.DisableTorchFunction():  # no mode need see the steps
        active = (gates if bias is None else gates + bias).unflatten(-1, (4, -1)).clone()
        outputs, cells = torch.empty_like(active[:, :, 0]), torch.empty_like(active[:, :, 0])
        for t, now in enumerate(active):
            flat = now.view(len(now), -1).addmm_(hidden, weight.T).view(now.shape)
            flat[:, :2].sigmoid_()
            flat[:, 2].tanh_()
            flat[:, 3].sigmoid_()
            cell = torch.addcmul(now[:, 1] * cell, now[:, 0], now[:, 2], out=cells[t])
            hidden = torch.mul(now[:, 3], torch.tanh(cell), out=outputs[t])
        return _Steps(outputs, cells, active)


def _lstm(
    gates: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None, *, backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction over the gates' inputs (T, B, 4 H)."""
    hidden, cell = state
    ordered = gates.flip(0) if backwards else gates
    steps = _run_lstm(ordered, hidden, cell, weight, bias)
    recurrent = F.linear(torch.cat([hidden.detach().unsqueeze(0), steps.outputs[:-1]]), weight, bias)
    outputs, last = _Recurrence.apply(ordered, recurrent, hidden, cell, weight.detach(), steps)  # type: ignore[no-untyped-call]
    return outputs.flip(0) if backwards else outputs, (outputs[-1], last)


def _gru_step(gates: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    (hidden,) = state
    reset, update, new = gates.chunk(3, -1)
    from_reset, from_update, from_new = F.linear(hidden, weight, bias).chunk(3, -1)
    kept = torch.sigmoid(update + from_update)
    candidate = torch.tanh(new + torch.sigmoid(reset + from_reset) * from_new)
    return (candidate + kept * (hidden - candidate),)


def _tanh_step(gates: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    return (torch.tanh(gates + F.linear(state[0], weight, bias)),)


def _relu_step(gates: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    return (torch.relu(gates + F.linear(state[0], weight, bias)),)


def _direction(
    step: Step,
    inputs: Tensor,
    state: tuple[Tensor, ...],
    weights: Weights,
    *,
    biased: bool,
    backwards: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction over (T, B, features)."""
    bias, recurrent_bias = weights[2:4] if biased else (None, None)
    projection = weights[-1] if len(weights) % 2 else None
    gates = F.linear(inputs, weights[0], bias)
    if step is _lstm_step and projection is None:
        return _lstm(gates, state, weights[1], recurrent_bias, backwards=backwards)
    at = gates.unbind(0)  # indexing would cost a whole gradient a step
    outputs: list[Tensor] = []
    for t in range(len(at) - 1, -1, -1) if backwards else range(len(at)):
        new = step(at[t], state, weights[1], recurrent_bias)
        if projection is not None:
            new = (F.linear(new[0], projection), *new[1:])
        state = new
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _layers(
    step: Step,
    sequence: Tensor,
    starts: Sequence[Tensor],
    weights: Weights,
    *,
    biased: bool,
    num_layers: int,
    bidirectional: bool,
) -> tuple[Tensor, list[Tensor]]:
    """All layers over (T, B, features): the outputs, and the last states (layers * directions, B, features)."""
    num_directions = 2 if bidirectional else 1
    size = len(weights) // (num_layers * num_directions)
    ends: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(num_directions):
            index = layer * num_directions + direction
            output, end = _direction(
                step,
                sequence,
                tuple(part[index] for part in starts),
                weights[index * size : (index + 1) * size],
                biased=biased,
                backwards=direction == 1,
            )
            outputs.append(output)
            ends.append(end)
        sequence = torch.cat(outputs, -1) if bidirectional else outputs[0]
    return sequence, [torch.stack(parts) for parts in zip(*ends, strict=True)]


def _network(step: Step) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if not isinstance(args[3], bool):  # packed sequences: their rows are in no order of samples
            return NotImplemented
        inputs, start, weights, biased, num_layers, _, _, bidirectional, batch_first = args
        sequence, last = _layers(
            step,
            inputs.transpose(0, 1) if batch_first else inputs,
            [start] if isinstance(start, Tensor) else start,
            weights,
            biased=biased,
            num_layers=num_layers,
            bidirectional=bidirectional,
        )
        return (sequence.transpose(0, 1) if batch_first else sequence, *last)

    return run


def _cell(step: Step) -> Callable[..., Any]:
    def run(
        inputs: Tensor,
        state: Tensor | tuple[Tensor, ...],
        into: Tensor,
        recurrent: Tensor,
        bias: Tensor | None = None,
        recurrent_bias: Tensor | None = None,
    ) -> Any:
        if isinstance(state, Tensor):
            return step(F.linear(inputs, into, bias), (state,), recurrent, recurrent_bias)[0]
        return step(F.linear(inputs, into, bias), tuple(state), recurrent, recurrent_bias)

    return run


Decompositions = dict[Callable[..., Any], Callable[..., Any]]

DECOMPOSITIONS: Decompositions = {
    F.multi_head_attention_forward: _attention,
    torch.lstm: _network(_lstm_step),
    torch.gru: _network(_gru_step),
    torch.rnn_tanh: _network(_tanh_step),
    torch.rnn_relu: _network(_relu_step),
    torch.lstm_cell: _cell(_lstm_step),
    torch.gru_cell: _cell(_gru_step),
    torch.rnn_tanh_cell: _cell(_tanh_step),
    torch.rnn_relu_cell: _cell(_relu_step),
}


def _lstm_step_by_step(*args: Any) -> tuple[Tensor, ...]:
    return _lstm_step(*args)


PLAIN_DECOMPOSITIONS: Decompositions = DECOMPOSITIONS | {torch.lstm: _network(_lstm_step_by_step)}
"""The same without functions of our own, so that all that is computed can be seen."""
