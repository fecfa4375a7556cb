"""What memsyn knows about each torch operation: one record per function that torch passes to a function mode.

To add an operation, add an entry to OPERATIONS: the names of its arguments, the rules for the arguments that may be
parameters, and further facts. Operations without an entry are measured exactly too, but more slowly: autograd
differentiates them one sample at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from memsyn.kernels.rules import (
    Rule,
    batch_norm,
    conv_transpose_weight,
    conv_weight,
    divided_by_operand,
    elementwise,
    embedding,
    group_norm,
    instance_norm,
    join_prelu,
    layer_norm,
    linear_weight,
    matrix,
    output_gradient,
    rms_norm,
    scaled,
    times_operand,
)
from memsyn.kernels.second_moments import MatrixUse, channels, features, gradients_of_table, rows_of_table, windows
from memsyn.torch_private import PACKED_SEQUENCES

Function = Callable[..., Any]

DependsOnSamples = Callable[[Tensor], bool]
"""tensor -> whether it was computed from the samples of the batch."""

Selects = Callable[[Sequence[Tensor], DependsOnSamples], bool]
"""(tensors of the operation, which tensors depend on samples) -> whether the data choose the rows of the result."""


@dataclass(frozen=True)
class Operation:
    """The facts about one operation.

    Attributes:
        arguments: the argument names, in order.
        rules: argument -> the rule if this argument is a parameter.
        saves_output: whether the backward pass reads the output. Such an output must not be aliased.
        activations: the arguments that hold activations. They are kept only for rules that need them.
        elementwise: whether the operation is elementwise or a reshape. For local importance, the result of such an
            operation belongs to the same layer as its input.
        matrices: argument -> how the operation uses it as a matrix, for Kronecker factors.
        selects: tells whether the data choose which rows of the result belong to which sample; None means never.
    """

    arguments: tuple[str, ...] = ()
    rules: Mapping[str, Rule] = field(default_factory=dict)
    saves_output: bool = True
    activations: frozenset[str | None] = frozenset(("input", "other", "mat1"))
    elementwise: bool = False
    matrices: Mapping[str, MatrixUse] = field(default_factory=dict)
    selects: Selects | None = None


def name_of(function: Function) -> str:
    """The name of a function that torch passes to a function mode."""
    return getattr(function, "__name__", type(function).__name__)


def _by_mask_or_computed_index(tensors: Sequence[Tensor], depends_on_samples: DependsOnSamples) -> bool:
    """Whether rows are chosen by a mask, or by indices that were computed from the samples."""
    chosen = any(index.dtype in (torch.bool, torch.uint8) for index in tensors[1:])
    return depends_on_samples(tensors[0]) and (chosen or (len(tensors) > 1 and depends_on_samples(tensors[1])))


def _always(tensors: Sequence[Tensor], depends_on_samples: DependsOnSamples) -> bool:
    return True


def _by_repeat_counts(tensors: Sequence[Tensor], depends_on_samples: DependsOnSamples) -> bool:
    """Whether a tensor says how many times each row is repeated."""
    return len(tensors) > 1


_TERMS = ("input", "other")
_NORM = ("input", "running_mean", "running_var", "weight", "bias")
_ADD = Operation(
    (*_TERMS, "alpha"), {"input": elementwise(output_gradient), "other": elementwise(scaled("alpha"))}, elementwise=True
)
_SUB = Operation(
    (*_TERMS, "alpha"),
    {"input": elementwise(output_gradient), "other": elementwise(scaled("alpha", -1))},
    elementwise=True,
)
_MUL = Operation(
    _TERMS,
    {"input": elementwise(times_operand, "other"), "other": elementwise(times_operand, "input")},
    elementwise=True,
)
_DIV = Operation(_TERMS, {"input": elementwise(divided_by_operand, "other")}, elementwise=True)
_FROM_THE_RIGHT = {"other": MatrixUse("input", features, features, inputs_first=True)}
_MATMUL = Operation(_TERMS, {"other": Rule("input", matrix)}, saves_output=False, matrices=_FROM_THE_RIGHT)
_MM = Operation(_TERMS, {"other": Rule("input", matrix)}, matrices=_FROM_THE_RIGHT)
_EXPAND = Operation(("input",), {"input": elementwise(output_gradient)})
_CHANNEL_BIAS = elementwise(output_gradient, channels=True)
_CONV = Operation(
    ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    {"weight": Rule("input", conv_weight), "bias": _CHANNEL_BIAS},
    matrices={"weight": MatrixUse("input", windows, channels, bias="bias")},
)
_CONV_TRANSPOSE = Operation(
    ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    {"weight": Rule("input", conv_transpose_weight), "bias": _CHANNEL_BIAS},
    matrices={"weight": MatrixUse("input", channels, windows, inputs_first=True)},
)
_SELECTION = Operation(selects=_always)

OPERATIONS: dict[Callable[..., Any], Operation] = {
    F.linear: Operation(
        ("input", "weight", "bias"),
        {
            "weight": Rule("input", linear_weight, shared_as="map", takes_half=True),
            "bias": elementwise(output_gradient),
        },
        saves_output=False,
        matrices={"weight": MatrixUse("input", features, features, bias="bias")},
    ),
    torch.addmm: Operation(
        ("input", "mat1", "mat2", "beta", "alpha"),
        {"input": elementwise(scaled("beta")), "mat2": Rule("mat1", matrix)},
        saves_output=False,
        matrices={"mat2": MatrixUse("mat1", features, features, inputs_first=True, bias="input")},
    ),
    F.layer_norm: Operation(
        ("input", "normalized_shape", "weight", "bias", "eps"),
        {"weight": elementwise(layer_norm, "input"), "bias": elementwise(output_gradient)},
    ),
    F.rms_norm: Operation(("input", "normalized_shape", "weight", "eps"), {"weight": elementwise(rms_norm, "input")}),
    F.group_norm: Operation(
        ("input", "num_groups", "weight", "bias", "eps"),
        {"weight": elementwise(group_norm, "input", channels=True), "bias": _CHANNEL_BIAS},
    ),
    F.batch_norm: Operation(
        (*_NORM, "training", "momentum", "eps"),
        {"weight": elementwise(batch_norm, "input", channels=True), "bias": _CHANNEL_BIAS},
        elementwise=True,  # in eval mode
    ),
    F.instance_norm: Operation(
        (*_NORM, "use_input_stats", "momentum", "eps"),
        {"weight": elementwise(instance_norm, "input", channels=True), "bias": _CHANNEL_BIAS},
    ),
    torch.bilinear: Operation(("input1", "input2", "weight", "bias"), {"bias": elementwise(output_gradient)}),
    F.prelu: Operation(("input", "weight"), {"weight": Rule("input", join_prelu)}, elementwise=True),
    F.embedding: Operation(
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        {"weight": Rule("input", embedding, shared_as="table")},
        saves_output=False,
        matrices={"weight": MatrixUse("input", rows_of_table, gradients_of_table, inputs_first=True, is_table=True)},
    ),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _CONV),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _CONV_TRANSPOSE),
    **dict.fromkeys((torch.matmul, Tensor.matmul), _MATMUL),
    **dict.fromkeys((torch.mm, Tensor.mm), _MM),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_), _ADD),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.sub_), _SUB),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.mul_), _MUL),
    **dict.fromkeys((torch.div, torch.true_divide, Tensor.div, Tensor.true_divide), _DIV),
    **dict.fromkeys((Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to), _EXPAND),
    Tensor.__getitem__: Operation(selects=_by_mask_or_computed_index),
    **dict.fromkeys((torch.index_select, Tensor.index_select, torch.masked_select, Tensor.masked_select), _SELECTION),
    **dict.fromkeys((torch.take, Tensor.take, *PACKED_SEQUENCES), _SELECTION),
    **dict.fromkeys((torch.repeat_interleave, Tensor.repeat_interleave), Operation(selects=_by_repeat_counts)),
}
"""Function, as torch passes it to a function mode -> its record."""

_ACTIVATIONS = """
    relu relu6 leaky_relu rrelu prelu elu selu celu gelu silu mish sigmoid logsigmoid log_sigmoid tanh softplus softsign
    softshrink hardshrink tanhshrink hardtanh hardswish hardsigmoid threshold dropout dropout1d dropout2d dropout3d
    alpha_dropout feature_alpha_dropout batch_norm"""
_ARITHMETIC = """
    add iadd radd sub isub rsub subtract mul imul rmul multiply div idiv rdiv truediv rtruediv itruediv true_divide
    divide pow ipow rpow square sqrt rsqrt reciprocal neg negative abs absolute exp expm1 log log1p erf erfc sin cos
    sinh cosh atan asinh clamp clamp_min clamp_max clip minimum maximum where lt le gt ge eq ne lerp addcmul addcdiv"""
_RESHAPES = """
    view reshape view_as reshape_as flatten unflatten permute transpose swapaxes swapdims movedim moveaxis t squeeze
    unsqueeze contiguous clone to float double half bfloat16 type type_as"""

BY_NAME: Final = dict.fromkeys(f"{_ACTIVATIONS} {_ARITHMETIC} {_RESHAPES}".split(), Operation(elementwise=True))
"""Operations that are elementwise or reshapes, with no other known facts.

The key is the function's name, without underscores at its ends: `torch.relu`, `Tensor.relu_` and `F.relu` are `relu`.
"""

_UNKNOWN = Operation()


@lru_cache(maxsize=4096)
def operation_of(function: Function) -> Operation:
    """The record of an operation; an empty record if it has no entry."""
    return OPERATIONS.get(function) or BY_NAME.get(name_of(function).strip("_"), _UNKNOWN)
