"""The matrix tracer: sums second moments of what weight matrices meet, and of their output gradients, during a pass.

Owns which parameters are used as matrices, where one part of a parameter begins and ends, and when sums are added. The
formulas are in `kernels.second_moments`.

Unlike importance, second moments need no batch axis: they are sums over all samples and positions alike.
"""

from collections import Counter
from collections.abc import Container, Iterator, Mapping
from functools import partial
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor, nn

from memsyn.engine.calls import Value, arguments, tensors_of, with_tensors
from memsyn.engine.recorder import attach_to_root
from memsyn.engine.tracer import Tracer
from memsyn.errors import ModelError
from memsyn.kernels.operations import Function, name_of, operation_of
from memsyn.kernels.second_moments import (
    MatrixUse,
    add_counts,
    add_second_moments,
    layout_of,
    mirror_,
    zeros,
)
from memsyn.matrices import AS_TABLE, Layout, Matrix
from memsyn.parameters import wide_dtype
from memsyn.torch_private import base_of, without_function_modes


class _Part(NamedTuple):
    """The rows of a parameter that a use reads, for instance one third of an attention's `in_proj_weight`."""

    start: int
    stop: int
    transposed: bool


def part_of(tensor: Tensor, parameter: Tensor) -> _Part | None:
    """The rows of a parameter that a tensor is a view of; None if it is another view, or none.

    For W (12, 4): W is rows 0 to 12, `W[4:8]` rows 4 to 8, `W.T` rows 0 to 12 transposed; `W[:, :2]` is None.
    """
    if tensor is parameter:
        return _Part(0, len(parameter), False)
    if base_of(tensor) is not parameter or tensor.ndim != parameter.ndim or not parameter.is_contiguous():
        return None
    offset, step = tensor.storage_offset() - parameter.storage_offset(), parameter.stride(0)
    if tensor.shape[1:] == parameter.shape[1:] and tensor.stride() == parameter.stride() and offset % step == 0:
        return _Part(offset // step, offset // step + len(tensor), False)
    turned = tensor.ndim == 2 and tensor.shape == parameter.T.shape and tensor.stride() == parameter.T.stride()
    return _Part(0, len(parameter), True) if turned and offset == 0 else None


class _Found(NamedTuple):
    """One use of a parameter as a matrix."""

    name: str
    use: MatrixUse
    part: _Part
    groups: int
    bias: str | None
    others: frozenset[str]
    """The other parameters of the operation, for instance the bias of a transposed convolution."""


@final
class MatrixFinder(Tracer):
    """Watches a forward pass, and finds the parameters that are used as matrices and in no other way.

    Args:
        parameters: name -> parameter of the measured model.
        root: a leaf for the graph, if the caller will differentiate the result. Then `gradients` has the gradients that
            the uses found give, to compare with those of autograd.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], root: Tensor | None = None) -> None:
        super().__init__(parameters)
        self.num_positions: Counter[str] = Counter()
        """Weight -> the positions of all of its uses."""
        self.others: set[str] = set()
        """The parameters that are used in another way."""
        self.gradients: dict[str, Tensor] = {}
        """Weight -> sum d x^T over the uses found, in the weight's shape."""
        self.parameters, self._root = parameters, root
        self._found: dict[tuple[str, bool], list[_Found]] = {}
        """(weight, whether it is used as a table) -> its uses."""

    def run_with_values(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the operation, and note how it uses its parameters."""
        given = arguments(function, args, kwargs)
        values = _values(self.values, given)
        found = matrix_use(function, given, values, self.parameters)
        operand = None if found is None else given[found.use.operand].detach().clone()
        output = function(*args, **kwargs)
        if found is None:
            follow_views(self.values, values, function, output, self.others)
            return output
        self._found.setdefault((found.name, found.use.is_table), []).append(found)
        self.others |= found.others
        self.num_positions[found.name] += output.numel()
        if self._root is None or not output.requires_grad:
            return output
        result = attach_to_root(output, self._root, changed=False, saves_output=operation_of(function).saves_output)
        options = _options(given, found.use, self.parameters[found.name].shape)
        result.register_hook(partial(self._add_gradient, found, options, operand))
        return result

    def _add_gradient(self, found: _Found, options: Mapping[str, Any], operand: Tensor | None, grad: Tensor) -> None:
        assert operand is not None
        with without_function_modes():
            parameter, part = self.parameters[found.name], found.part
            total = self.gradients.setdefault(found.name, torch.zeros_like(parameter))
            shape = parameter.shape[::-1] if part.transposed else (part.stop - part.start, *parameter.shape[1:])
            shape = torch.Size(shape)
            lefts, rights = (
                torch.cat(list(rows(tensor, options, shape)), -2)
                for rows, tensor in (
                    (found.use.outputs, grad),
                    (_one_hot if found.use.is_table else found.use.inputs, operand),
                )
            )
            own = layout_of(found.use, shape, found.groups).weight(lefts.transpose(1, 2) @ rights.to(lefts), shape)
            total[part.start : part.stop] += own.T if part.transposed else own

    def matrices(self) -> dict[str, Matrix]:
        """Key -> matrix. The key is the weight's name; for a tied weight's use as a table, followed by AS_TABLE."""
        biases = [(use.bias, name) for (name, _), uses in self._found.items() for use in uses if use.bias]
        shared = {bias for bias, name in biases if any(b == bias and n != name for b, n in biases)}
        found: dict[str, Matrix] = {}
        for (name, is_table), uses in self._found.items():
            layouts = {self._layout(use) for use in uses}
            bias = {use.bias for use in uses}
            if name in self.others or len(layouts) > 1 or None in layouts:
                continue
            layout = layouts.pop()
            assert layout is not None
            own = bias.pop() if len(bias) == 1 else None
            usable = own is not None and own not in self.others | shared
            is_tied = is_table and (name, False) in self._found
            found[name + AS_TABLE if is_tied else name] = Matrix(name, own if usable else None, layout)
        # A tied weight is a matrix only if both of its uses are.
        tied = {name for name, is_table in self._found if is_table and (name, False) in self._found}
        halves = {name for name in tied if (name in found) != (name + AS_TABLE in found)}
        return {key: matrix for key, matrix in found.items() if matrix.weight not in halves}

    def _layout(self, found: _Found) -> Layout | None:
        use, part = found.use, found.part
        whole = part.stop - part.start == len(self.parameters[found.name])
        if found.groups > 1 and not whole:
            return None
        turned = use if not part.transposed else MatrixUse(use.operand, use.outputs, use.inputs, not use.inputs_first)
        layout = layout_of(turned, self.parameters[found.name].shape, found.groups)
        # A part of the inputs is not a matrix of its own: its second moment lacks the products with the other parts.
        if (layout.inputs_first and not whole) or (found.groups > 1 and layout.inputs == 1):
            return None
        return layout


def matrix_use(
    function: Function,
    given: Mapping[str, Any],
    values: Mapping[str, Value],
    parameters: Mapping[str, nn.Parameter],
) -> _Found | None:
    """How an operation uses its parameters, if it uses one as a matrix; another one may be that matrix's bias."""
    operation = operation_of(function)
    places = [place for place in values if place in operation.matrices]
    if len(places) != 1:
        return None
    (place,) = places
    use, value = operation.matrices[place], values[place]
    others = values.keys() - {place}
    if len(value.names) != 1 or any(given.get(name, 1) != 1 for name in ("alpha", "beta")):
        return None
    (name,) = value.names
    part = part_of(value.tensor, parameters[name])
    if part is None or (value.tensor.ndim != 2 and function in _PRODUCTS) or use.operand in others:
        return None
    bias = None
    if use.bias is not None and use.bias in others and len(values[use.bias].names) == 1:
        (bias_name,) = values[use.bias].names
        bias_part = part_of(values[use.bias].tensor, parameters[bias_name])
        if bias_part is not None and (use.inputs_first or bias_part[:2] == part[:2]):
            bias, others = bias_name, others - {use.bias}
    names = frozenset[str]().union(*(values[other].names for other in others))
    return _Found(name, use, part, given.get("groups", 1), bias, names)


def _options(given: Mapping[str, Any], use: MatrixUse, shape: torch.Size) -> dict[str, Any]:
    """What the rows of output gradients need of a call: its arguments that are no tensors, and which lookups count."""
    options = {place: value for place, value in given.items() if not isinstance(value, Tensor)}
    if use.is_table and options.get("padding_idx") is not None:
        with without_function_modes():
            options["counted"] = given[use.operand] % shape[0] != options["padding_idx"] % shape[0]
    return options


def _one_hot(tensor: Tensor, options: Mapping[str, Any], shape: torch.Size) -> Iterator[Tensor]:
    """The inputs of a lookup as vectors with a single 1, or none for the padding row: (1, positions, rows)."""
    vectors, counted = torch.nn.functional.one_hot(tensor.reshape(-1) % shape[0], shape[0]), options.get("counted")
    yield (vectors if counted is None else vectors[counted.reshape(-1)]).unsqueeze(0)


_PRODUCTS = frozenset((torch.matmul, Tensor.matmul, torch.mm, Tensor.mm))


def _values(known: Mapping[int, Value], given: Mapping[str, Any]) -> dict[str, Value]:
    return {place: value for place, argument in given.items() if (value := known.get(id(argument)))}


CONSTANT: Final = frozenset(
    f"{name}{end}" for name in ("new_", "") for end in ("zeros", "ones", "empty", "full", "tensor")
) | {"detach", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
"""Operations whose results take nothing but the shape, the dtype or the constant value of a parameter."""


def follow_views(
    known: dict[int, Value], values: Mapping[str, Value], function: Function, output: Any, others: set[str]
) -> None:
    """Note views of parameters in an operation's output. All other results use their parameters in another way."""
    if name_of(function) in CONSTANT:
        return
    for tensor in tensors_of(output):
        if id(tensor) in known:  # `W.contiguous()` is W
            continue
        base = base_of(tensor)
        own = None if base is None else known.get(id(base))
        if own is not None and own.tensor is base:
            known[id(tensor)] = Value(tensor, own.names, own.path)
        elif tensor.is_floating_point():
            others.update(*(value.names for value in values.values()))


@final
class MatrixTracer(Tracer):
    """Adds the second moments of a pass to running sums.

    The inputs are added when an operation runs, the output gradients when they arrive in the backward pass.

    Args:
        parameters: name -> parameter of the measured model, for the parameters of the matrices.
        matrices: the result of `MatrixFinder.matrices`.
        sums: name -> sums, from `zero_sums`.
        root: the leaf at which the graph starts; None if there is no backward pass.
        mask: (samples, tokens), the tokens that are not padding.
        excluded: add nothing for these keys of matrices.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        matrices: Mapping[str, Matrix],
        sums: Mapping[str, Tensor],
        root: Tensor | None,
        mask: Tensor | None = None,
        excluded: Container[str] = (),
    ) -> None:
        super().__init__(parameters)
        self.others: set[str] = set()
        """The parameters that are no matrices, and were used."""
        self._parameters, self._matrices = parameters, matrices
        self._sums, self._root, self._mask, self._excluded = sums, root, mask, excluded

    def run_with_values(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the operation on detached parameters, and add the second moment of its inputs."""
        given = arguments(function, args, kwargs)
        values = _values(self.values, given)
        found = matrix_use(function, given, values, self._parameters)
        self.others |= frozenset() if found is None else found.others
        key = "" if found is None else self._key(found)
        if found is None or key not in self._matrices:
            return self._run_other(function, args, kwargs, values)
        adds = key not in self._excluded
        cut = {place: value.tensor.detach() for place, value in values.items()}
        new_args, new_kwargs = with_tensors(function, args, kwargs, cut)
        output = function(*new_args, **new_kwargs)
        if adds:  # after the operation: if its inputs do not fit, the model's own error says so
            with without_function_modes():
                self._add_inputs(key, found, given)
        if self._root is None:
            return output
        saves_output = operation_of(function).saves_output
        result = attach_to_root(output, self._root, changed=False, saves_output=saves_output)
        if adds:
            result.register_hook(partial(self._add_outputs, key, found, _options(given, found.use, self._shape(found))))
        return result

    def _key(self, found: _Found) -> str:
        tied = found.name + AS_TABLE
        return tied if found.use.is_table and tied in self._matrices else found.name

    def _run_other(
        self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], values: Mapping[str, Value]
    ) -> Any:
        output = function(*args, **kwargs)
        others = set[str]()
        follow_views(self.values, values, function, output, others)
        known = {matrix.weight for matrix in self._matrices.values()}
        if others & known:
            raise ModelError(
                f"{', '.join(sorted(others & known))}: the first batch used it as a matrix, and this one uses it in "
                f"another way ({name_of(function)}). Let the first batch take all branches of the forward pass, or "
                "freeze the parameter."
            )
        self.others |= others
        return output

    def _add_inputs(self, key: str, found: _Found, given: Mapping[str, Any]) -> None:
        matrix, use = self._matrices[key], found.use
        operand = self._without_padding(given[use.operand].detach(), use)
        shape = self._shape(found)
        if use.is_table:
            for index in use.inputs(operand, given, shape):
                add_counts(self._sums[f"inputs/{key}"], index)
                self._sums[f"positions/{key}"] += len(index)
            return
        for rows in use.inputs(operand, given, shape):
            add_second_moments(_side(self._sums, "inputs", key), rows, with_bias=matrix.bias is not None)
            self._sums[f"positions/{key}"] += rows.shape[1]

    def _add_outputs(self, key: str, found: _Found, options: Mapping[str, Any], grad: Tensor) -> None:
        with without_function_modes():
            side = _side(self._sums, "outputs", key)
            start, stop, transposed = found.part
            for rows in found.use.outputs(grad, options, self._shape(found)):
                if stop - start < len(self._parameters[found.name]) and not transposed:
                    # The use read a part of the rows: the gradients of all other rows are zero.
                    rows = torch.nn.functional.pad(rows, (start, len(self._parameters[found.name]) - stop))
                add_second_moments(side, rows, with_bias=False)

    def _shape(self, found: _Found) -> torch.Size:
        shape = self._parameters[found.name].shape
        return shape[::-1] if found.part.transposed else shape

    def _without_padding(self, tensor: Tensor, use: MatrixUse) -> Tensor:
        """The tokens that are not padding, of a tensor (samples, tokens, ...) or (samples * tokens, features)."""
        mask, least = self._mask, 2 if use.is_table else 3
        if mask is None or tensor.ndim < 2:
            return tensor
        if tensor.ndim >= least and tensor.shape[:2] == mask.shape:
            return tensor[mask != 0]
        if not use.is_table and tensor.ndim == 2 and len(tensor) == mask.numel() and mask.shape[1] > 1:
            return tensor[mask.reshape(-1) != 0]
        return tensor


def _side(sums: Mapping[str, Tensor], side: str, key: str) -> dict[str, Tensor]:
    """The sums of one side by kind, as `kernels.second_moments` takes them."""
    whole = sums.get(f"{side}/{key}")
    if whole is not None:
        return {"whole": whole}
    return {"sketch": sums[f"{side}_sketch/{key}"], "trace": sums[f"{side}_trace/{key}"]}


def zero_sums(
    matrices: Mapping[str, Matrix], parameters: Mapping[str, Tensor], *, outputs: bool, rank: int | None
) -> dict[str, Tensor]:
    """The sums before the first sample: `inputs/<key>` and so on, and the number of positions, `positions/<key>`."""
    sums: dict[str, Tensor] = {}
    for key, matrix in matrices.items():
        parameter, layout = parameters[matrix.weight], matrix.layout
        like = torch.zeros((), dtype=_sum_dtype(parameter), device=parameter.device)
        sums[f"positions/{key}"] = like.new_zeros((), dtype=torch.float64)
        if layout.is_table:
            sums[f"inputs/{key}"] = like.new_zeros(layout.inputs)
        else:
            own = zeros(layout, layout.inputs, like, with_bias=matrix.bias is not None, rank=rank)
            sums.update(_named(own, "inputs", key))
        if outputs:
            sums.update(_named(zeros(layout, layout.outputs, like, with_bias=False, rank=rank), "outputs", key))
    return sums


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    return wide_dtype(parameter) if parameter.is_floating_point() else torch.float32


def _named(side: Mapping[str, Tensor], name: str, key: str) -> Iterator[tuple[str, Tensor]]:
    for kind, total in side.items():
        yield f"{name}/{key}" if kind == "whole" else f"{name}_{kind}/{key}", total


def complete_(sums: Mapping[str, Tensor]) -> None:
    """Fill in the lower triangles of the whole second moments, once all samples were added."""
    for name, total in sums.items():
        if name.startswith(("inputs/", "outputs/")) and total.ndim == 3:
            mirror_(total)
