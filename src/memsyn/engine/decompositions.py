"""Operations that contain several layers (attention, recurrent networks), written out in plain operations.

In the plain operations, every use of a weight is visible to the tracer. Each decomposition must compute the same as the
original in eval mode.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memsyn.torch_private import without_function_modes


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask that is added to attention scores. A boolean mask becomes minus infinity where it is True."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _merged(mask: Tensor | None, padding: Tensor | None, num_heads: int, *, num_added: int) -> Tensor | None:
    """A mask (1 or B H, T, S) and the padding (B, S) as one mask; added source positions are visible to all (0)."""
    if num_added:
        mask, padding = (None if m is None else F.pad(m, (0, num_added)) for m in (mask, padding))
    if padding is None:
        return mask
    num_samples, num_sources = padding.shape
    padding = padding.view(num_samples, 1, 1, num_sources).expand(-1, num_heads, -1, -1)
    padding = padding.reshape(num_samples * num_heads, 1, num_sources)
    return padding if mask is None else mask + padding


def _projected(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Project queries, keys and values by one weight (3 E, E). Inputs that are the same tensor share one product."""
    size = query.shape[-1]

    def project_jointly(inputs: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> Tensor:
        # For three parts: (T, B, 3 E) -> (T, B, 3, E) -> (1, T, B, 3, E) -> (3, T, B, 1, E) -> (3, T, B, E).
        projected: Tensor = F.linear(inputs, weight, bias).unflatten(-1, (parts, size))
        return projected.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()

    if key is value and query is key:
        own = project_jointly(query, weight, bias, 3)
        return own[0], own[1], own[2]
    if key is value:
        parts, biases = weight.split([size, 2 * size]), (None, None) if bias is None else bias.split([size, 2 * size])
        own = project_jointly(key, parts[1], biases[1], 2)
        return F.linear(query, parts[0], biases[0]), own[0], own[1]
    parts, biases = weight.chunk(3), (None, None, None) if bias is None else bias.chunk(3)
    projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), parts, biases, strict=True)]
    return projected[0], projected[1], projected[2]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """`F.multi_head_attention_forward` in plain operations, for inputs (T, B, E), or (T, E) for one sample.

    The shapes, with T target and S source positions, B samples and H heads:

        query (T, B, E) -> projected (T, B, E) -> split into heads (B H, T, E / H)
        scores (B H, T, S) = query keys^T / sqrt(E / H) + masks; softmax; times values -> (B H, T, E / H)
        -> (T B, E) -> output projection -> (T, B, E)
    """
    if static_k is not None or static_v is not None or training:  # nn.MultiheadAttention in eval mode has none of these
        return NotImplemented
    is_batched = query.ndim == 3
    if not is_batched:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    num_targets, num_samples, width = query.shape
    padding = _additive(key_padding_mask, query.dtype)
    # F.scaled_dot_product_attention makes the causal mask itself, if there is no other one.
    is_causal = is_causal and padding is None
    mask = None if is_causal and not need_weights else _additive(attn_mask, query.dtype)
    mask = mask.unsqueeze(0) if mask is not None and mask.ndim == 2 else mask
    if use_separate_proj_weight:
        separate = (q_proj_weight, k_proj_weight, v_proj_weight)
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), separate, biases, strict=True))  # type: ignore[arg-type]
    else:
        assert in_proj_weight is not None
        q, k, v = _projected(query, key, value, in_proj_weight, in_proj_bias)
    num_sources = len(k)
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([x, b.repeat(1, num_samples, 1)]) for x, b in ((k, bias_k), (v, bias_v)))
    head = width // num_heads
    q, k, v = (x.view(len(x), num_samples * num_heads, head).transpose(0, 1) for x in (q, k, v))
    if add_zero_attn:
        zeros = torch.zeros((num_samples * num_heads, 1, head), dtype=k.dtype, device=k.device)
        k, v = torch.cat([k, zeros], 1), torch.cat([v, zeros], 1)
    mask = _merged(mask, padding, num_heads, num_added=k.shape[1] - num_sources)
    return _attended(
        q, k, v, mask, out_proj_weight, out_proj_bias, (num_targets, num_samples, num_heads), is_batched=is_batched,
        weights="mean" if need_weights and average_attn_weights else "each" if need_weights else None,
        is_causal=is_causal,
    )  # fmt: skip


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int, int],
    *,
    is_batched: bool,
    weights: str | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output for queries, keys and values (B H, positions, E / H), and the attention weights if asked for."""
    (num_targets, num_samples, num_heads), num_sources, head = shape, k.shape[1], q.shape[-1]
    found = None
    if weights is None:
        if mask is not None:
            # F.scaled_dot_product_attention takes (1, 1, T, S) for a mask that all samples share, else (B, H, T, S).
            is_shared = mask.shape[0] == 1
            mask = mask.unsqueeze(0) if is_shared else mask.view(num_samples, num_heads, -1, num_sources)
        q = q.view(num_samples, num_heads, num_targets, head)
        k, v = (x.view(num_samples, num_heads, num_sources, head) for x in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal).permute(2, 0, 1, 3)
    else:
        scaled = q * math.sqrt(1.0 / float(head))
        scores = (
            torch.bmm(scaled, k.transpose(-2, -1)) if mask is None else torch.baddbmm(mask, scaled, k.transpose(-2, -1))
        )
        found = F.softmax(scores, dim=-1)
        attended = torch.bmm(found, v).transpose(0, 1)
        found = found.view(num_samples, num_heads, num_targets, num_sources)
        found = found.mean(dim=1) if weights == "mean" else found
    flat = attended.reshape(num_targets * num_samples, num_heads * head)
    output = F.linear(flat, weight, bias).view(num_targets, num_samples, -1)
    if not is_batched:
        output, found = output.squeeze(1), None if found is None else found.squeeze(0)
    return output, found


Weights = Sequence[Tensor]
CellStep = Callable[[Tensor, tuple[Tensor, ...], Tensor, Tensor | None], tuple[Tensor, ...]]
"""(input part of the gates (B, gates), state, recurrent weight, recurrent bias) -> next state, the output first."""


def _lstm_step(gates: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    hidden, cell = state
    input_gate, forget_gate, candidate, output_gate = (gates + F.linear(hidden, weight, bias)).chunk(4, -1)
    cell = torch.sigmoid(forget_gate) * cell + torch.sigmoid(input_gate) * torch.tanh(candidate)
    return torch.sigmoid(output_gate) * torch.tanh(cell), cell


class _Steps(NamedTuple):
    """The results of all steps of an LSTM layer in one direction, without a graph."""

    outputs: Tensor
    """(T, B, H), the hidden state after each step."""
    cells: Tensor
    """(T, B, H), the cell state after each step."""
    active: Tensor
    """(T, B, 4, H), the gates after their nonlinearities."""


class _Recurrence(torch.autograd.Function):
    """All steps of one LSTM layer in one direction, as one node of the graph.

    A graph of all steps is several times slower. The inputs are the input part and the recurrent part of the gates,
    each (T, B, 4 H). They are separate arguments, so the recurrent weight has a use of its own. The outputs are the
    hidden states (T, B, H) and the last cell state (B, H).
    """

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, recurrent: Tensor, hidden: Tensor, cell: Tensor, weight: Tensor, steps: _Steps
    ) -> tuple[Tensor, Tensor]:
        # `_run_lstm` has run the steps without a graph. This node gives their results a derivative: `backward`.
        ctx.save_for_backward(weight, cell, steps.active, steps.cells)
        return steps.outputs, steps.cells[-1].clone()

    @staticmethod
    def backward(ctx: Any, from_outputs: Tensor, from_cell: Tensor) -> tuple[Tensor | None, ...]:
        with without_function_modes():
            weight, first, active, cells = ctx.saved_tensors
            input_gate, forget_gate, candidate, output_gate = active.unbind(2)
            previous_cells, tanh_cells = torch.cat([first.unsqueeze(0), cells[:-1]]), torch.tanh(cells)
            # c_t = f c_{t-1} + i g and h_t = o tanh(c_t), with i, f, o = sigmoid and g = tanh of the gates' inputs.
            # factors: d c_t / d (inputs of i, f, g), and d h_t / d (input of o), (T, B, 4, H).
            factors = torch.stack(
                [
                    candidate * input_gate * (1 - input_gate),
                    previous_cells * forget_gate * (1 - forget_gate),
                    input_gate * (1 - candidate.square()),
                    tanh_cells * output_gate * (1 - output_gate),
                ],
                2,
            )
            to_cell = output_gate * (1 - tanh_cells.square())
            grads = torch.empty_like(factors)
            # Backwards from the last step. of_hidden and of_cell are the gradients of h_t and c_t from all later steps.
            of_cell, of_hidden = from_cell.clone(), torch.zeros_like(first)
            for t in range(len(grads) - 1, -1, -1):
                of_hidden = of_hidden + from_outputs[t]
                of_cell = torch.addcmul(of_cell, of_hidden, to_cell[t])
                torch.mul(of_cell.unsqueeze(1), factors[t, :, :3], out=grads[t, :, :3])
                torch.mul(of_hidden, factors[t, :, 3], out=grads[t, :, 3])
                of_cell = of_cell * forget_gate[t]
                of_hidden = grads[t].flatten(1) @ weight
            flat = grads.flatten(2)
            # The input part and the recurrent part of the gates are added, so both have the same gradient.
            return flat, flat, of_hidden, of_cell, None, None


def _run_lstm(gates: Tensor, hidden: Tensor, cell: Tensor, weight: Tensor, bias: Tensor | None) -> _Steps:
    """Run all steps in-place. `active` starts as the gates' inputs; each step replaces its part by the activations."""
    with torch.no_grad(), without_function_modes():  # the tracer need not see the single steps
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
    """One LSTM layer in one direction, for gate inputs (T, B, 4 H).

    After `_run_lstm`, the hidden state of every step is known. So the recurrent weight has one use for all steps,
    `F.linear` of (T, B, H), and is measured like any other Linear over T tokens.
    """
    hidden, cell = state
    ordered = gates.flip(0) if backwards else gates
    steps = _run_lstm(ordered, hidden, cell, weight, bias)
    # The hidden states carry no graph here: `_Recurrence` sends the gradient from step to step.
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
    step: CellStep,
    inputs: Tensor,
    state: tuple[Tensor, ...],
    weights: Weights,
    *,
    biased: bool,
    backwards: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One recurrent layer in one direction, for inputs (T, B, features): the outputs (T, B, H) and the last state."""
    bias, recurrent_bias = weights[2:4] if biased else (None, None)
    # One direction of an LSTM has 2 weights, 4 with biases, and one more with `proj_size`: an odd number.
    projection = weights[-1] if len(weights) % 2 else None
    gates = F.linear(inputs, weights[0], bias)
    if step is _lstm_step and projection is None:
        return _lstm(gates, state, weights[1], recurrent_bias, backwards=backwards)
    by_step = gates.unbind(0)  # indexing would allocate a gradient of full size in every step
    outputs: list[Tensor] = []
    for t in range(len(by_step) - 1, -1, -1) if backwards else range(len(by_step)):
        new = step(by_step[t], state, weights[1], recurrent_bias)
        if projection is not None:
            new = (F.linear(new[0], projection), *new[1:])
        state = new
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _layers(
    step: CellStep,
    sequence: Tensor,
    starts: Sequence[Tensor],
    weights: Weights,
    *,
    biased: bool,
    num_layers: int,
    bidirectional: bool,
) -> tuple[Tensor, list[Tensor]]:
    """All layers, for inputs (T, B, features): the outputs, and the last states (layers * directions, B, features)."""
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


def _network(step: CellStep) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if not isinstance(args[3], bool):  # packed sequences: their rows are not ordered by sample
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


def _cell(step: CellStep) -> Callable[..., Any]:
    def run(
        inputs: Tensor,
        state: Tensor | tuple[Tensor, ...],
        input_weight: Tensor,
        recurrent: Tensor,
        bias: Tensor | None = None,
        recurrent_bias: Tensor | None = None,
    ) -> Any:
        if isinstance(state, Tensor):
            return step(F.linear(inputs, input_weight, bias), (state,), recurrent, recurrent_bias)[0]
        return step(F.linear(inputs, input_weight, bias), tuple(state), recurrent, recurrent_bias)

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
"""The decompositions without `_Recurrence`, so the tracer sees every operation."""
