"""The formulas: one small function per operation and argument, from inputs and output gradients to importance.

A rule sees only the uses of one parameter by one operation. It must not touch the model, autograd or any state.

Words: B is the number of samples. Tokens are the dimensions that are neither samples nor features: sequence positions,
pixels, repeated uses. A use is one call of an operation with the parameter. d is the gradient of the summed objective
with respect to the operation's output. a is the operand that is combined with the parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memsyn.kernels.convolutions import (
    Geometry,
    Pair,
    add_pointwise_products,
    conv_products,
    conv_products_of_one_sign,
    geometry_of,
)
from memsyn.kernels.outer_products import Magnitude, absolute, add_token_products, magnitudes, square


class NoRuleError(Exception):
    """The rule does not support this call, so another route must be taken. Users never see this error."""


class UnseenError(NoRuleError):
    """The route check has not seen such a call. It must run before the call is measured."""


class Axis(NamedTuple):
    """The batch axis of a tensor.

    Three samples a, b, c with two windows each, folded into a dimension of six:

        a1 a2 b1 b2 c1 c2    Axis(0, folded=True): the samples are the major part
        a1 b1 c1 a2 b2 c2    Axis(0, folded=True, minor=True): neighbours belong to different samples
    """

    dim: int
    folded: bool = False
    """Whether the dimension was longer than the number of samples in the check. If not, it must never be longer."""
    minor: bool = False
    """Whether neighbours in a folded dimension belong to different samples."""

    def first(self, tensor: Tensor, num_samples: int) -> Tensor:
        """Move the samples to the front: (B, ...). The rest of a folded dimension stays in its place.

        For B = 3, Axis(1) turns (5, 3, 8) into (3, 5, 8), and Axis(0, folded=True) turns (6, 8) into (3, 2, 8).
        """
        if tensor.shape[self.dim] == num_samples:
            return tensor.movedim(self.dim, 0) if self.dim else tensor
        self._size(tensor, num_samples)
        sizes = (-1, num_samples) if self.minor else (num_samples, -1)
        first: Tensor = tensor.unflatten(self.dim, sizes).movedim(self.dim + self.minor, 0)
        return first

    def sample(self, tensor: Tensor, k: int, num_samples: int) -> Tensor:
        """Sample k as a batch of one, with the dimensions in the tensor's own order."""
        size = self._size(tensor, num_samples)
        if self.minor:
            own: Tensor = tensor.unflatten(self.dim, (-1, num_samples)).select(self.dim + 1, k)
            return own
        return tensor.narrow(self.dim, k * (size // num_samples), size // num_samples)

    def _size(self, tensor: Tensor, num_samples: int) -> int:
        size = tensor.shape[self.dim]
        if size % num_samples:
            raise NoRuleError
        # The check saw one row per sample. So it could not tell a1 a2 b1 b2 from a1 b1 a2 b2, and a longer dimension
        # needs a new check.
        if size != num_samples > 1 and not self.folded:
            raise UnseenError
        return size


class Use(NamedTuple):
    """One call of an operation with the parameter: the operand a, the output gradient d, and their batch axes."""

    options: Mapping[str, Any]
    """The call's arguments by name, without those that were left out."""
    operand: Tensor | None
    operand_axis: Axis | None
    grad: Tensor
    axis: Axis


MAGNITUDES: dict[str, Magnitude] = {"abs": absolute, "square": square}

Join = Callable[[Sequence[Use], Tensor, int, Magnitude], None]
"""(uses, total, B, f): add sum_k f(g_k) to `total`; g_k is summed over all uses. If it raises, nothing was added."""


@dataclass(frozen=True)
class Rule:
    """How the importance of one argument of one operation is computed."""

    operand: str | None
    """The argument that the rule needs besides the output gradient; None if it needs no other."""
    join: Join
    term: Callable[[Use], Tensor] | None = None
    """For elementwise rules: the gradient before the sum over tokens, in the output's shape."""
    channels: bool = False
    """For elementwise rules: whether the parameter (C,) lies along the second dimension, as in (B, C, H, W)."""
    shared_as: str | None = None
    """"table" (an embedding) or "map" (a Linear): `tied` measures a parameter that is used as both."""
    takes_half: bool = False
    """Whether output gradients and operands may be in half precision, and not of one dtype."""


def samples_first(tensors: Sequence[tuple[Tensor, Axis]], num_samples: int) -> list[Tensor]:
    """Every tensor as (B, ...)."""
    return [axis.first(tensor, num_samples) for tensor, axis in tensors]


def _operands(uses: Sequence[Use], num_samples: int) -> list[Tensor]:
    if len(uses) == 1 and uses[0].operand is not None and uses[0].operand_axis is not None:
        return [uses[0].operand_axis.first(uses[0].operand, num_samples)]
    pairs = [(use.operand, use.operand_axis) for use in uses]
    if any(operand is None or axis is None for operand, axis in pairs):
        raise NoRuleError  # the operand is the same for all samples
    return samples_first(pairs, num_samples)  # type: ignore[arg-type]


def _grads(uses: Sequence[Use], num_samples: int) -> list[Tensor]:
    return [use.axis.first(use.grad, num_samples) for use in uses]


# Elementwise: g_k is the sum of terms over all dimensions along which the parameter was broadcast


def per_sample(terms: Sequence[tuple[Tensor, Axis]], shape: torch.Size, num_samples: int, *, channels: bool) -> Tensor:
    """g_k = sum_t term_kt, (B, *shape): the terms of all uses, summed over the broadcast dimensions.

    Examples for B = 4:

        bias (8,) of a Linear with output (4, 10, 8)                   sums over 10 tokens
        bias (8,) of a Conv2d with output (4, 8, 5, 5), `channels`     sums over 25 pixels
        position table (10, 8) added to (4, 10, 8)                     sums over nothing

    Args:
        terms: per use, a tensor in the shape of the output, and its batch axis.
        shape: the parameter's shape.
        num_samples: B.
        channels: whether the parameter lies along the second dimension. If not, it lies along the last dimensions,
            as in broadcasting.
    """
    total: Tensor | None = None
    for term, axis in terms:
        aligned = (*shape, *[1] * (term.ndim - 2)) if channels else tuple(shape)
        first = axis.first(term, num_samples)
        if len(terms) == 1 and first.shape == (num_samples, *shape):
            # The tensor itself, not a copy: then `magnitudes` computes |d| once for the weight and the bias.
            return first
        # If the batch axis was not folded, moving it to the front has shifted the dimensions on its left by one. Put a
        # dimension of size 1 where it was: (T, B, 8) -> (B, T, 8) -> (B, T, 1, 8). Then (T, 1, 8) lines up with the
        # parameter as (T, B, 8) did.
        if first.ndim == term.ndim:
            first = first.unsqueeze(axis.dim + 1)
        extra = first.ndim - 1 - len(aligned)
        if extra < 0:
            raise NoRuleError
        # The parameter's shape, aligned with the other dimensions. Where it is 1, the parameter was broadcast, and the
        # terms are summed.
        kept = (*[1] * extra, *aligned)
        if any(k not in (1, size) for k, size in zip(kept, first.shape[1:], strict=True)):
            raise NoRuleError
        tokens = [i + 1 for i, (k, size) in enumerate(zip(kept, first.shape[1:], strict=True)) if k == 1 and size != 1]
        summed = (first.sum(tokens) if tokens else first).reshape(num_samples, *shape)
        total = summed if total is None else total + summed
    assert total is not None
    return total


def add_terms(gradients: Tensor, total: Tensor, magnitude: Magnitude) -> None:
    """Add sum_k f(g_k), for gradients (B, *shape of the total)."""
    total += magnitudes(gradients, magnitude).sum(0)


def elementwise(term: Callable[[Use], Tensor], operand: str | None = None, *, channels: bool = False) -> Rule:
    """The rule for a broadcast parameter: sum_k f(sum_t term_kt)."""

    def join(uses: Sequence[Use], total: Tensor, num_samples: int, magnitude: Magnitude) -> None:
        terms = [(term(use), use.axis) for use in uses]
        add_terms(per_sample(terms, total.shape, num_samples, channels=channels), total, magnitude)

    return Rule(operand, join, term, channels)


def output_gradient(use: Use) -> Tensor:
    """y = ... + p has the term d."""
    return use.grad


def scaled(name: str, sign: int = 1) -> Callable[[Use], Tensor]:
    """y = ... + c p has the term c d; `name` is the option that holds c."""

    def term(use: Use) -> Tensor:
        scale = sign * use.options.get(name, 1)
        return use.grad if scale == 1 else use.grad * scale

    return term


def times_operand(use: Use) -> Tensor:
    """y = a p has the term d a."""
    assert use.operand is not None
    return use.grad * use.operand


def divided_by_operand(use: Use) -> Tensor:
    """y = p / a has the term d / a."""
    if use.options.get("rounding_mode") is not None:
        raise NoRuleError
    assert use.operand is not None
    return use.grad / use.operand


def layer_norm(use: Use) -> Tensor:
    """y = p normalised(a) has the term d normalised(a)."""
    assert use.operand is not None
    eps = use.options.get("eps", 1e-5)
    return F.layer_norm(use.operand, use.options["normalized_shape"], eps=eps).mul_(use.grad)


def rms_norm(use: Use) -> Tensor:
    """y = p a / rms(a) has the term d a / rms(a)."""
    assert use.operand is not None
    eps = use.options.get("eps")
    if eps is None:
        # The default of torch is the eps of the model's dtype (0.0078 for bfloat16), but the operand may be wider here.
        eps = torch.finfo(use.options["weight"].dtype).eps
    return F.rms_norm(use.operand, use.options["normalized_shape"], eps=eps).mul_(use.grad)


def group_norm(use: Use) -> Tensor:
    """y = p normalised(a) has the term d normalised(a)."""
    assert use.operand is not None
    return F.group_norm(use.operand, use.options["num_groups"], eps=use.options.get("eps", 1e-5)).mul_(use.grad)


def batch_norm(use: Use) -> Tensor:
    """y = p (a - mean) / sqrt(var + eps) has the term d (a - mean) / sqrt(var + eps).

    The mean and the variance are the running statistics if there are any, else those of the batch.
    """
    assert use.operand is not None
    mean, var = use.options.get("running_mean"), use.options.get("running_var")
    training = bool(use.options.get("training", False)) or mean is None
    if mean is not None and var is not None:
        # Copies, since F.batch_norm in training mode writes to the running statistics that it gets.
        mean, var = mean.to(use.operand.dtype, copy=True), var.to(use.operand.dtype, copy=True)
    eps = use.options.get("eps", 1e-5)
    return F.batch_norm(use.operand, mean, var, training=training, eps=eps).mul_(use.grad)


def instance_norm(use: Use) -> Tensor:
    """y = p normalised(a) has the term d normalised(a); per sample and channel, or with running statistics."""
    if not use.options.get("use_input_stats", True):
        return batch_norm(use)
    assert use.operand is not None
    return F.instance_norm(use.operand, eps=use.options.get("eps", 1e-5)).mul_(use.grad)


def _prelu(use: Use) -> Tensor:
    """y = max(a, 0) + p min(a, 0) has the term d min(a, 0)."""
    assert use.operand is not None
    return use.operand.clamp(max=0).mul_(use.grad)


def join_prelu(uses: Sequence[Use], total: Tensor, num_samples: int, magnitude: Magnitude) -> None:
    """sum_k f(sum_t d_kt min(a_kt, 0)), for one slope or one slope per channel."""
    terms = [(_prelu(use), use.axis) for use in uses]
    add_terms(per_sample(terms, total.shape, num_samples, channels=total.numel() > 1), total, magnitude)


# Products: y = a W^T. A convolution is a Linear over windows.


def linear_weight(uses: Sequence[Use], total: Tensor, num_samples: int, magnitude: Magnitude) -> None:
    """y = a W^T, a (..., in): g_k = sum_t d_kt a_kt^T."""
    add_token_products(_grads(uses, num_samples), _operands(uses, num_samples), total, magnitude)


def matrix(uses: Sequence[Use], total: Tensor, num_samples: int, magnitude: Magnitude) -> None:
    """y = c a W, a (..., in) and W a matrix: g_k = c sum_t a_kt d_kt^T."""
    if total.ndim != 2 or any(use.grad.ndim < 2 for use in uses):
        raise NoRuleError
    grads = samples_first([(scaled("alpha")(use), use.axis) for use in uses], num_samples)
    add_token_products(_operands(uses, num_samples), grads, total, magnitude)


def conv_weight(uses: Sequence[Use], total: Tensor, num_samples: int, magnitude: Magnitude) -> None:
    """g_k[:, :, o] = sum_t d_kt a_k(t + o)^T for each kernel offset o."""
    images, grads = _images(_operands(uses, num_samples), total.ndim), _images(_grads(uses, num_samples), total.ndim)
    pairs, geometry = [Pair(grad, image) for grad, image in zip(grads, images, strict=True)], _geometry(uses, total)
    found = conv_products_of_one_sign(*pairs[0], geometry) if magnitude is absolute and len(pairs) == 1 else None
    if found is not None:
        total += found
    elif not add_pointwise_products(pairs, geometry, total, magnitude):
        total += conv_products(pairs, geometry, magnitude)


def conv_transpose_weight(uses: Sequence[Use], total: Tensor, num_samples: int, magnitude: Magnitude) -> None:
    """As for a convolution, but the inputs and the gradients change places."""
    images, grads = _images(_operands(uses, num_samples), total.ndim), _images(_grads(uses, num_samples), total.ndim)
    pairs = [Pair(image, grad) for grad, image in zip(grads, images, strict=True)]
    total += conv_products(pairs, _geometry(uses, total), magnitude)


def _geometry(uses: Sequence[Use], total: Tensor) -> Geometry:
    geometries = {geometry_of(use.options, tuple(total.shape[2:])) for use in uses}
    if len(geometries) > 1:
        raise NoRuleError
    return geometries.pop()


def _images(uses: Sequence[Tensor], ndim: int) -> list[Tensor]:
    """Tensors (B, channels, *spatial). A dimension that was folded into the batch becomes several uses.

    For a 2-d kernel, (B, 3, channels, H, W) becomes three tensors (B, channels, H, W).
    """
    images: list[Tensor] = []
    for use in uses:
        if use.ndim not in (ndim, ndim + 1):
            raise NoRuleError
        images += [use] if use.ndim == ndim else use.unbind(1)
    return images


# Tables


def embedding(uses: Sequence[Use], total: Tensor, num_samples: int, magnitude: Magnitude) -> None:
    """g_k[v] is the sum of d_kt over the tokens t with index v. An index that occurs twice has one signed sum."""
    # Tokens are summed before f: if a sample looks up row 4 twice, with gradients 1 and -1, then g_k[4] is 0, not 2.
    sums, cells = row_sums(*token_rows(uses, len(total), num_samples), len(total))
    total.index_add_(0, cells % len(total), magnitude(sums).to(total.dtype))


def token_rows(uses: Sequence[Use], num_rows: int, num_samples: int) -> tuple[Tensor, Tensor]:
    """The indices (B, T) of all uses, and their gradients (B, T, features), which are zero at padding."""
    indices, rows = [], []
    for use, index, grad in zip(uses, _operands(uses, num_samples), _grads(uses, num_samples), strict=True):
        if use.options.get("scale_grad_by_freq"):
            raise NoRuleError
        padding = use.options.get("padding_idx")
        # Torch gives no gradient to the padding row. A negative index counts from the end: -1 of 10 rows is row 9.
        own = grad if padding is None else grad * (index != padding % num_rows).unsqueeze(-1)
        indices.append(index.reshape(num_samples, -1))
        rows.append(own.reshape(num_samples, -1, grad.shape[-1]))
    return torch.cat(indices, 1), torch.cat(rows, 1)


def row_sums(indices: Tensor, grads: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """For each pair (sample, index) that occurs: the sum of its gradients, and cell = sample * num_rows + index.

    With num_rows = 10 and indices [[4, 4], [4, 7]], the cells are 4, 14 and 17; cell 4 sums two gradients.
    """
    keys = indices + num_rows * torch.arange(len(indices), device=indices.device).unsqueeze(1)
    cells, cell_of_token = keys.flatten().unique(return_inverse=True)
    sums = grads.new_zeros(len(cells), grads.shape[-1]).index_add_(0, cell_of_token, grads.flatten(0, 1))
    return sums, cells


def tied(tables: Sequence[Use], maps: Sequence[Use], total: Tensor, num_samples: int, magnitude: Magnitude) -> None:
    """One matrix that is used by an embedding and by Linear layers (a tied embedding and head).

    L_k is the gradient from the Linear layers, E_k the gradient from the embedding. First add sum_k f(L_k) for all
    rows. Then add the correction f(L_k + E_k) - f(L_k) for the few rows that a sample looked up.
    """
    sums, cells = row_sums(*token_rows(tables, len(total), num_samples), len(total))
    linear_weight(maps, total, num_samples, magnitude)
    samples, rows = cells // len(total), cells % len(total)
    grads = [grad.reshape(num_samples, -1, len(total)) for grad in _grads(maps, num_samples)]
    inputs = [operand.reshape(num_samples, -1, total.shape[1]) for operand in _operands(maps, num_samples)]
    for k in range(num_samples):
        own = samples == k
        found = rows[own]
        # Maps may be in half precision.
        linear = sum(
            grad[k][:, found].T.to(sums.dtype) @ operand[k].to(sums.dtype)
            for grad, operand in zip(grads, inputs, strict=True)
        )
        assert isinstance(linear, Tensor)
        # `linear` is changed in place by the last call, so the order of the two matters. With L_k = 3 and E_k = -2, the
        # sum already holds |3|, and |3 - 2| - |3| = -2 corrects it to 1.
        total.index_add_(0, found, magnitude(linear + sums[own]).sub_(magnitude(linear)))
