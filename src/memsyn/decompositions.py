"""Operations that hide several layers, written out in plain ones.

Owns the equivalents of attention and recurrent networks, from which every use of a weight can be seen. Must compute
what the originals compute, in eval mode.
"""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

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
    active: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction over (T, B, features); where not `active` (T, B), a sample's state stays."""
    bias, recurrent_bias = weights[2:4] if biased else (None, None)
    projection = weights[-1] if len(weights) % 2 else None
    gates = F.linear(inputs, weights[0], bias).unbind(0)  # indexing would cost a whole gradient a step
    outputs: list[Tensor] = []
    for t in range(len(gates) - 1, -1, -1) if backwards else range(len(gates)):
        new = step(gates[t], state, weights[1], recurrent_bias)
        if projection is not None:
            new = (F.linear(new[0], projection), *new[1:])
        if active is not None:
            new = tuple(torch.where(active[t, :, None], a, b) for a, b in zip(new, state, strict=True))
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
    active: Tensor | None = None,
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
                active=active,
            )
            outputs.append(output)
            ends.append(end)
        sequence = torch.cat(outputs, -1) if bidirectional else outputs[0]
    return sequence, [torch.stack(parts) for parts in zip(*ends, strict=True)]


def _network(step: Step) -> Callable[..., tuple[Tensor, ...]]:
    def run(*args: Any) -> tuple[Tensor, ...]:
        if not isinstance(args[3], bool):  # the weights stand one place later for packed sequences
            return packed(*args)
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

    def packed(*args: Any) -> tuple[Tensor, ...]:
        data, sizes, start, weights, biased, num_layers, _, _, bidirectional = args
        active = torch.arange(int(sizes[0])) < sizes.unsqueeze(1)  # (T, B)
        places = (active.flatten().cumsum(0) - 1).clamp(min=0).view(active.shape).to(data.device)
        active = active.to(data.device)
        sequence, last = _layers(
            step,
            data[places],
            [start] if isinstance(start, Tensor) else start,
            weights,
            biased=biased,
            num_layers=num_layers,
            bidirectional=bidirectional,
            active=active,
        )
        return (sequence[active], *last)

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


DECOMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {
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
