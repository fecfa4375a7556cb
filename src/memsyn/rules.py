"""One small function per layer type and parameter: from a layer's inputs and output gradients to importance.

Owns the formulas, and how they are tiled. A rule sees only the layer and its uses; it must not touch the
model, autograd or any state.

Words: B samples, T tokens (whatever is neither sample nor feature: sequence positions, pixels, repeated uses), a
use = (input, gradient of the summed objective with respect to the output), both with the samples first.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsyn.products import Magnitude, outer_products


class Use(NamedTuple):
    """One call of a layer: what came in, and the objective's gradient with respect to what went out."""

    inputs: Tensor
    grad: Tensor


Rule = Callable[[nn.Module, Sequence[Use], Magnitude], Tensor]
"""(layer, uses, f) -> sum_k f(g_k), of the parameter's shape, where g_k is the sum over all uses."""

UNFOLD = 64
"""A convolution's kernel is unfolded (copying its input) when it has at most so many inputs per output."""


def absolute(gradient: Tensor) -> Tensor:
    """f(g) = |g|, in place: the magnitude of MAS."""
    return gradient.abs_()


def signed(gradient: Tensor) -> Tensor:
    """f(g) = g: sums of gradients as autograd makes them."""
    return gradient


def token_sums(terms: Sequence[Tensor], shape: torch.Size, magnitude: Magnitude, *, feature_dim: int) -> Tensor:
    """sum_k f(sum_t term_kt): sum a sample's terms over all but its feature dimensions, then over samples.

    Args:
        terms: per use (B, ...), holding the parameter's `shape` from `feature_dim` on.
        shape: of the parameter.
        magnitude: f.
        feature_dim: where the features stand: 1 for channels, -len(shape) for trailing dimensions.
    """
    per_sample: Tensor | float = 0.0
    for term in terms:
        first = feature_dim % term.ndim
        features = range(first, first + len(shape))
        tokens = [dim for dim in range(1, term.ndim) if dim not in features]
        per_sample = per_sample + (term.sum(tokens) if tokens else term)
    assert isinstance(per_sample, Tensor)
    return magnitude(per_sample).sum(0)


# Linear: y = x W^T + b


def linear_weight(layer: nn.Module, uses: Sequence[Use], magnitude: Magnitude) -> Tensor:
    """g_k = sum_t d_kt a_kt^T for inputs (B, ..., in)."""
    lefts, rights = [use.grad.unsqueeze(-2) for use in uses], [use.inputs.unsqueeze(-2) for use in uses]
    return outer_products(lefts, [rights], magnitude)[0][0]


def trailing_bias(layer: nn.Module, uses: Sequence[Use], magnitude: Magnitude) -> Tensor:
    """g_k = sum_t d_kt, features last: the bias of Linear and LayerNorm."""
    shape = layer.bias.shape
    assert isinstance(shape, torch.Size)
    return token_sums([use.grad for use in uses], shape, magnitude, feature_dim=-len(shape))


# Convolution: a Linear over windows


def conv_weight(layer: nn.Module, uses: Sequence[Use], magnitude: Magnitude) -> Tensor:
    """g_k[:, :, o] = sum_t d_kt a_k(t + o)^T for each kernel offset o: shifted views of the padded input.

    Small kernels and patches (windows that do not overlap) are unfolded and become one product instead.
    """
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    groups, spatial = layer.groups, len(layer.kernel_size)
    lefts = [use.grad.movedim(1, -1).contiguous().unflatten(-1, (groups, -1)) for use in uses]
    windows = [_windows(layer, use.inputs, use.grad.shape[2:]) for use in uses]
    offsets = math.prod(layer.kernel_size)
    apart = all(s >= k for s, k in zip(layer.stride, layer.kernel_size, strict=True))
    if groups == 1 and (apart or offsets * layer.in_channels <= UNFOLD):
        rights = [window.flatten(1 + spatial).unsqueeze(-2) for window in windows]
        products = outer_products(lefts, [rights], magnitude)[0][0]  # (out, offsets * in)
        weight = products.unflatten(1, (*layer.kernel_size, layer.in_channels))
    else:
        places: list[tuple[Any, ...]] = [
            (..., *offset, slice(None)) for offset in itertools.product(*map(range, layer.kernel_size))
        ]
        shifted = [[window[place].unflatten(-1, (groups, -1)) for window in windows] for place in places]
        weight = torch.stack(list(outer_products(lefts, shifted, magnitude)), 2).flatten(0, 1)  # (out, offsets, in)
        weight = weight.unflatten(1, layer.kernel_size)
    moved: Tensor = weight.movedim(-1, 1)
    return moved


def _windows(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor, out_size: torch.Size) -> Tensor:
    """The input each output position sees, as a view: (B, *out_size, *kernel_size, channels)."""
    if isinstance(layer.padding, str):
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(t // 2, t - t // 2) if layer.padding == "same" else (0, 0) for t in totals]
    else:
        sides = [(p, p) for p in layer.padding]
    pad = [side for pair in reversed(sides) for side in pair]  # F.pad wants the last dimension first
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = (F.pad(inputs, pad, mode=mode) if any(pad) else inputs).movedim(1, -1).contiguous()
    sample, *steps, channel = padded.stride()
    return padded.as_strided(
        (len(padded), *out_size, *layer.kernel_size, padded.shape[-1]),
        (
            sample,
            *(step * s for step, s in zip(steps, layer.stride, strict=True)),
            *(step * d for step, d in zip(steps, layer.dilation, strict=True)),
            channel,
        ),
    )


def channel_bias(layer: nn.Module, uses: Sequence[Use], magnitude: Magnitude) -> Tensor:
    """g_k = sum_t d_kt, channels second: the bias of convolutions, GroupNorm and BatchNorm."""
    shape = layer.bias.shape
    assert isinstance(shape, torch.Size)
    return token_sums([use.grad for use in uses], shape, magnitude, feature_dim=1)


# Normalisations: y = w * normalised(x) + b


def layer_norm_weight(layer: nn.Module, uses: Sequence[Use], magnitude: Magnitude) -> Tensor:
    """g_k = sum_t d_kt * normalised(a_kt)."""
    assert isinstance(layer, nn.LayerNorm)
    shape = torch.Size(layer.normalized_shape)
    terms = [use.grad * F.layer_norm(use.inputs, shape, eps=layer.eps) for use in uses]
    return token_sums(terms, shape, magnitude, feature_dim=-len(shape))


def rms_norm_weight(layer: nn.Module, uses: Sequence[Use], magnitude: Magnitude) -> Tensor:
    """g_k = sum_t d_kt * a_kt / rms(a_kt)."""
    assert isinstance(layer, nn.RMSNorm)
    shape = torch.Size(layer.normalized_shape)
    eps = torch.finfo(layer.weight.dtype).eps if layer.eps is None else layer.eps
    terms = [use.grad * F.rms_norm(use.inputs, shape, eps=eps) for use in uses]
    return token_sums(terms, shape, magnitude, feature_dim=-len(shape))


def group_norm_weight(layer: nn.Module, uses: Sequence[Use], magnitude: Magnitude) -> Tensor:
    """g_k = sum_t d_kt * normalised(a_kt), channels second."""
    assert isinstance(layer, nn.GroupNorm)
    terms = [use.grad * F.group_norm(use.inputs, layer.num_groups, eps=layer.eps) for use in uses]
    return token_sums(terms, layer.weight.shape, magnitude, feature_dim=1)


def batch_norm_weight(layer: nn.Module, uses: Sequence[Use], magnitude: Magnitude) -> Tensor:
    """g_k = sum_t d_kt * (a_kt - mean) / sqrt(var + eps), with the running statistics."""
    assert isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    mean, var = layer.running_mean, layer.running_var
    if mean is not None and var is not None:
        mean, var = mean.to(uses[0].inputs.dtype), var.to(uses[0].inputs.dtype)
    training = mean is None  # without running statistics the layer uses the batch's, even in eval mode
    terms = [use.grad * F.batch_norm(use.inputs, mean, var, training=training, eps=layer.eps) for use in uses]
    return token_sums(terms, layer.weight.shape, magnitude, feature_dim=1)


# Others


def prelu_weight(layer: nn.Module, uses: Sequence[Use], magnitude: Magnitude) -> Tensor:
    """g_k = sum_t d_kt * min(a_kt, 0), for one slope or one per channel."""
    assert isinstance(layer, nn.PReLU)
    terms = [use.grad * use.inputs.clamp(max=0) for use in uses]
    if layer.num_parameters == 1:
        terms = [term.reshape(len(term), 1, -1) for term in terms]
    return token_sums(terms, layer.weight.shape, magnitude, feature_dim=1)


def embedding_weight(layer: nn.Module, uses: Sequence[Use], magnitude: Magnitude) -> Tensor:
    """g_k[v] = sum of d_kt over the tokens t with index v: one signed sum for a token that occurs twice."""
    assert isinstance(layer, nn.Embedding)
    rows, size = layer.num_embeddings, layer.embedding_dim
    indices = torch.cat([use.inputs.reshape(len(use.inputs), -1) for use in uses], 1)
    grads = torch.cat([use.grad.reshape(len(use.grad), -1, size) for use in uses], 1)
    keys = indices + rows * torch.arange(len(indices), device=indices.device).unsqueeze(1)
    cells, cell_of_token = keys.flatten().unique(return_inverse=True)  # one cell a (sample, index)
    sums = grads.new_zeros(len(cells), size).index_add_(0, cell_of_token, grads.flatten(0, 1))
    total = grads.new_zeros(rows, size).index_add_(0, cells % rows, magnitude(sums))
    if layer.padding_idx is not None:
        total[layer.padding_idx] = 0
    return total


RULES: dict[type[nn.Module], dict[str, Rule]] = {
    nn.Linear: {"weight": linear_weight, "bias": trailing_bias},
    nn.Conv1d: {"weight": conv_weight, "bias": channel_bias},
    nn.Conv2d: {"weight": conv_weight, "bias": channel_bias},
    nn.Conv3d: {"weight": conv_weight, "bias": channel_bias},
    nn.LayerNorm: {"weight": layer_norm_weight, "bias": trailing_bias},
    nn.RMSNorm: {"weight": rms_norm_weight},
    nn.GroupNorm: {"weight": group_norm_weight, "bias": channel_bias},
    nn.BatchNorm1d: {"weight": batch_norm_weight, "bias": channel_bias},
    nn.BatchNorm2d: {"weight": batch_norm_weight, "bias": channel_bias},
    nn.BatchNorm3d: {"weight": batch_norm_weight, "bias": channel_bias},
    nn.PReLU: {"weight": prelu_weight},
    nn.Embedding: {"weight": embedding_weight},
}
"""Exact types only: a subclass may compute something else."""


def num_batched_dims(layer: nn.Module) -> int:
    """The fewest dimensions an output of `layer` has when its first one is the samples."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return 2 + len(layer.kernel_size)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return 1 + len(layer.normalized_shape)
    return 2
