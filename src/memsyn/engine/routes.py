"""The routes: how the importance of a parameter is computed from its uses.

Owns two of the three routes: by rule, for all samples at once; and by operation, which differentiates single
operations. The third route runs the whole model one sample at a time (in `passes`). All routes are exact, and differ
only in cost.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from memsyn.engine.calls import Call, changes_its_input, with_tensors
from memsyn.kernels.operations import operation_of
from memsyn.kernels.outer_products import Magnitude, signed
from memsyn.kernels.rules import Axis, NoRuleError, Rule, Use, add_terms, per_sample, tied
from memsyn.parameters import wide_dtype
from memsyn.torch_private import base_of

BY_RULE: Final = "rule"
"""A formula, for all samples of a batch at once."""
BY_OPERATION: Final = "operation"
"""The derivative of each operation that uses the parameter, one sample at a time."""
BY_SAMPLE: Final = "one sample at a time"
"""Forward and backward passes of the whole model, one sample at a time."""
BY_FACTORS: Final = "Kronecker factors"
"""The second moments of a matrix, for all samples at once, without any per-sample gradient."""
UNUSED: Final = "unused"
"""Nothing to compute: the importance is zero, since no output depends on the parameter."""

Sums = dict[str, Tensor]
Uses = Sequence[tuple[Call, str]]


# By rule


def add_by_rule(
    total: Tensor,
    parameter: nn.Parameter,
    uses: Uses,
    num_samples: int,
    magnitude: Magnitude,
    *,
    weights: Tensor | None = None,
) -> None:
    """Add sum_k f(w_k g_k) to `total`, all samples at once. Without `weights`, every w_k is 1.

    The uses may read parts of the parameter (views), if the parts do not overlap.

    Raises:
        NoRuleError: no rule applies; nothing was added.
    """
    if not uses:
        return
    first, place = uses[0]
    if (len(uses) == 1 and first.values[place].tensor is parameter) or all(
        call.values[place].tensor is parameter for call, place in uses
    ):
        return _join(uses, total, num_samples, magnitude, weights)
    # Uses of the same part are joined. A part is known by its shape, strides and offset: for W (16, 4), `W[:8]` is
    # ((8, 4), (4, 1), 0) and `W[8:]` is ((8, 4), (4, 1), 32).
    parts: dict[tuple[Any, ...], list[tuple[Call, str]]] = {}
    for call, place in uses:
        value = call.values[place].tensor
        # An expanded view has a stride of 0: all rows of `w.expand(4, 8)`, for w (1, 8), are one row in memory. So
        # `found` has no separate place for the gradient of each row.
        if value is not parameter and (base_of(value) is not parameter or 0 in value.stride() or value.is_complex()):
            raise NoRuleError
        parts.setdefault((value.shape, value.stride(), value.storage_offset()), []).append((call, place))
    # The parts of `total` are found by the strides of the parameter, so both must lie in memory in the same way. Parts
    # must not overlap: `W[:8]` and `W[4:]` share rows 4 to 7, where |g_1| + |g_2| would be added, not |g_1 + g_2|.
    if total.stride() != parameter.stride() or _overlap(parameter, parts):
        raise NoRuleError
    found = torch.zeros_like(total)
    for (shape, stride, offset), own in parts.items():
        part = found.as_strided(shape, stride, offset - parameter.storage_offset())
        _join(own, part, num_samples, magnitude, weights)
    total += found


def _overlap(parameter: Tensor, parts: Iterable[tuple[Any, ...]]) -> bool:
    count = torch.zeros_like(parameter, dtype=torch.uint8)
    for shape, stride, offset in parts:
        count.as_strided(shape, stride, offset - parameter.storage_offset()).add_(1)
    return bool((count > 1).any())


def _join(uses: Uses, total: Tensor, num_samples: int, magnitude: Magnitude, weights: Tensor | None) -> None:
    """Add sum_k f(w_k g_k) for uses of the same tensor, by one rule or by a combination of rules.

    Raises:
        NoRuleError: no rule applies; nothing was added.
    """
    if len(uses) == 1:  # as most often: every parameter and batch comes through here
        ((call, place),) = uses
        rule = operation_of(call.function).rules.get(place)
        if rule is None:
            raise NoRuleError
        rule.join([_make_use(call, place, rule, num_samples, weights)], total, num_samples, magnitude)
        return
    found = [operation_of(call.function).rules.get(place) for call, place in uses]
    rules = [rule for rule in found if rule is not None]
    if len(rules) < len(found):
        raise NoRuleError
    made = [_make_use(*use, rule, num_samples, weights) for use, rule in zip(uses, rules, strict=True)]
    if all(rule.join == rules[0].join for rule in rules):
        rules[0].join(made, total, num_samples, magnitude)
    elif all(rule.term is not None for rule in rules):
        # Different elementwise operations, as in `x * p + p`: both gradients are summed before f is applied.
        add_terms(_sum_of_terms(rules, made, total.shape, num_samples), total, magnitude)
    elif all(rule.shared_as is not None for rule in rules):
        tables = [use for rule, use in zip(rules, made, strict=True) if rule.shared_as == "table"]
        maps = [use for rule, use in zip(rules, made, strict=True) if rule.shared_as == "map"]
        tied(tables, maps, total, num_samples, magnitude)
    else:
        raise NoRuleError


def _sum_of_terms(rules: Sequence[Rule], uses: Sequence[Use], shape: torch.Size, num_samples: int) -> Tensor:
    total: Tensor | None = None
    for rule, use in zip(rules, uses, strict=True):
        assert rule.term is not None
        own = per_sample([(rule.term(use), use.axis)], shape, num_samples, channels=rule.channels)
        total = own if total is None else total + own
    assert total is not None
    return total


def _make_use(call: Call, place: str, rule: Rule, num_samples: int, weights: Tensor | None = None) -> Use:
    """Make the use that a rule gets, with the output gradient of sample k multiplied by w_k.

    In float32 at least, unless the rule takes half precision: then it widens what it must, and no copy is made for it.
    """
    split = call.splits[place]
    assert call.grad is not None
    assert split.out is not None
    keeps_half = rule.takes_half and weights is None
    grad = call.grad if keeps_half else call.grad.to(wide_dtype(call.grad))
    if weights is not None:
        grad = grad * _along(weights, split.out, grad, num_samples)
    operand = None if rule.operand is None else call.tensors[rule.operand]
    if grad.is_complex() or (operand is not None and operand.is_complex()):
        raise NoRuleError
    if operand is not None and operand.is_floating_point() and not keeps_half:
        operand = operand.to(grad.dtype)
    axis = None if rule.operand is None else split.args.get(rule.operand)
    # Rules read small tensors by name too: batch_norm takes its `running_mean` from here.
    return Use({**call.options, **call.tensors}, operand, axis, grad, split.out)


def _along(weights: Tensor, axis: Axis, tensor: Tensor, num_samples: int) -> Tensor:
    """The sample weights, in a shape that broadcasts to the tensor.

    For B = 2 and a folded axis of length 4 in (4, 8): (4, 1) with the weights a, a, b, b; if `minor`, a, b, a, b.
    """
    times, rest = divmod(tensor.shape[axis.dim], num_samples)
    if rest:
        raise NoRuleError
    spread = weights.repeat(times) if axis.minor else weights.repeat_interleave(times)
    return spread.to(tensor.dtype).view([-1 if dim == axis.dim else 1 for dim in range(tensor.ndim)])


# By operation


def add_by_operation(
    totals: Sums,
    parameters: Mapping[str, nn.Parameter],
    group: Iterable[str],
    uses: Uses,
    num_samples: int,
    magnitude: Magnitude,
    *,
    weights: Tensor | None = None,
) -> None:
    """Add sum_k f(w_k g_k) for every parameter of a group, one sample at a time. Without `weights`, every w_k is 1.

    Differentiates only the operations that use the parameters, not the whole model.

    Raises:
        NoRuleError: an operation cannot be cut into samples; nothing was added.
    """
    names = sorted(group)
    # Collected apart: if a later sample raises NoRuleError, nothing may have been added to `totals`.
    found = {name: torch.zeros_like(totals[name]) for name in names}
    for k in range(num_samples):
        # First compute the gradient of each value (for instance, a normalised weight), summed over its uses. Then go on
        # from the values to the parameters, through the graph that the forward pass has left between them.
        values = {id(call.values[place]): call.values[place].tensor for call, place in uses}
        grads: dict[int, Tensor] = {}
        for call, place in uses:
            grad, key = _sample_gradient(call, place, k, num_samples), id(call.values[place])
            grads[key] = grads[key] + grad if key in grads else grad
        inputs, outputs = [parameters[name] for name in names], [values[key] for key in grads]
        own = torch.autograd.grad(
            outputs,
            inputs,
            [grad.to(out.dtype) for grad, out in zip(grads.values(), outputs, strict=True)],
            # The graph from the parameters to the values is needed again for the next sample.
            retain_graph=True,
            allow_unused=True,
        )
        for name, grad in zip(names, own, strict=True):
            if grad is not None:
                wide = grad.to(totals[name].dtype, copy=True)
                found[name] += magnitude(wide if weights is None else wide * weights[k])
    for name, total in found.items():
        totals[name] += total


def _sample_gradient(call: Call, place: str, k: int, num_samples: int) -> Tensor:
    """The gradient of sample k's objective with respect to the value at this place, from this call alone.

    By the value's rule, for a batch of one, if it has one. Otherwise the operation runs again on sample k.

    Raises:
        NoRuleError: the call did not keep all tensors, or its output cannot be cut into samples.
    """
    split = call.splits[place]
    assert call.grad is not None
    assert split.out is not None
    cut = {
        name: tensor if (axis := split.args.get(name)) is None else axis.sample(tensor, k, num_samples)
        for name, tensor in call.tensors.items()
    }
    grad = split.out.sample(call.grad, k, num_samples)
    rule = operation_of(call.function).rules.get(place)
    if rule is not None:
        one = Call(call.function, call.options, call.values, call.splits, cut, {}, None, grad)
        try:
            found = torch.zeros_like(call.values[place].tensor, dtype=wide_dtype(grad))
            # With one sample and f(g) = g, a rule gives the plain gradient.
            rule.join([_make_use(one, place, rule, 1)], found, 1, signed)
            return found
        except NoRuleError:
            pass
    if call.again is None:
        raise NoRuleError
    leaf = cut[place] = call.values[place].tensor.detach().requires_grad_()
    changed = changes_its_input(call.function, call.again[1])
    if changed:
        # The operation will write to its input, which may be a view of a kept tensor. So it gets copies.
        cut = {name: tensor if name == place else tensor.clone() for name, tensor in cut.items()}
    args, kwargs = with_tensors(call.function, *call.again, cut)
    with torch.enable_grad():
        output = call.function(*args, **kwargs)
    output = args[0] if output is None else output
    # An argument may hold the batch size: `torch.tile(p, (4, 1))` gives 4 rows for a batch of one, too.
    if output.shape != grad.shape:
        raise NoRuleError
    (gradient,) = torch.autograd.grad(output, leaf, grad, allow_unused=True)
    return torch.zeros_like(leaf) if gradient is None else gradient.to_dense()
