"""The operations that have rules, as torch hands them to a function mode.

Owns the names of their arguments and which rule goes with which. All other operations are differentiated by autograd.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memsyn.kernels.rules import (
    Rule,
    as_it_is,
    batch_norm,
    conv_transpose_weight,
    conv_weight,
    elementwise,
    embedding,
    group_norm,
    instance_norm,
    join_prelu,
    layer_norm,
    linear_weight,
    matrix,
    over_operand,
    rms_norm,
    scaled,
    times_operand,
)


@dataclass(frozen=True)
class Operation:
    """An operation's arguments in their order, and the rules of those that a parameter may be."""

    arguments: tuple[str, ...]
    rules: Mapping[str, Rule]


_TERMS = ("input", "other")
_NORM = ("input", "running_mean", "running_var", "weight", "bias")
_ADD = Operation((*_TERMS, "alpha"), {"input": elementwise(as_it_is), "other": elementwise(scaled("alpha"))})
_SUB = Operation((*_TERMS, "alpha"), {"input": elementwise(as_it_is), "other": elementwise(scaled("alpha", -1))})
_MUL = Operation(_TERMS, {"input": elementwise(times_operand, "other"), "other": elementwise(times_operand, "input")})
_DIV = Operation(_TERMS, {"input": elementwise(over_operand, "other")})
_MATMUL = Operation(_TERMS, {"other": Rule("input", matrix)})
_EXPAND = Operation(("input",), {"input": elementwise(as_it_is)})
_CHANNEL_BIAS = elementwise(as_it_is, channels=True)
_CONV = Operation(
    ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    {"weight": Rule("input", conv_weight), "bias": _CHANNEL_BIAS},
)
_CONV_TRANSPOSE = Operation(
    ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    {"weight": Rule("input", conv_transpose_weight), "bias": _CHANNEL_BIAS},
)

OPERATIONS: dict[Callable[..., Any], Operation] = {
    F.linear: Operation(
        ("input", "weight", "bias"), {"weight": Rule("input", linear_weight), "bias": elementwise(as_it_is)}
    ),
    torch.addmm: Operation(
        ("input", "mat1", "mat2", "beta", "alpha"),
        {"input": elementwise(scaled("beta")), "mat2": Rule("mat1", matrix)},
    ),
    F.layer_norm: Operation(
        ("input", "normalized_shape", "weight", "bias", "eps"),
        {"weight": elementwise(layer_norm, "input"), "bias": elementwise(as_it_is)},
    ),
    F.rms_norm: Operation(("input", "normalized_shape", "weight", "eps"), {"weight": elementwise(rms_norm, "input")}),
    F.group_norm: Operation(
        ("input", "num_groups", "weight", "bias", "eps"),
        {"weight": elementwise(group_norm, "input", channels=True), "bias": _CHANNEL_BIAS},
    ),
    F.batch_norm: Operation(
        (*_NORM, "training", "momentum", "eps"),
        {"weight": elementwise(batch_norm, "input", channels=True), "bias": _CHANNEL_BIAS},
    ),
    F.instance_norm: Operation(
        (*_NORM, "use_input_stats", "momentum", "eps"),
        {"weight": elementwise(instance_norm, "input", channels=True), "bias": _CHANNEL_BIAS},
    ),
    torch.bilinear: Operation(("input1", "input2", "weight", "bias"), {"bias": elementwise(as_it_is)}),
    F.prelu: Operation(("input", "weight"), {"weight": Rule("input", join_prelu)}),
    F.embedding: Operation(
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        {"weight": Rule("input", embedding)},
    ),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _CONV),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _CONV_TRANSPOSE),
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm), _MATMUL),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_), _ADD),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.sub_), _SUB),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.mul_), _MUL),
    **dict.fromkeys((torch.div, torch.true_divide, Tensor.div, Tensor.true_divide), _DIV),
    **dict.fromkeys((Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to), _EXPAND),
}
