"""How each parameter's importance is computed, and the passes over a batch that compute it.

Owns the ladder: by rule, by differentiating single operations, by whole passes over single samples. Must not know
about loaders, progress or files.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from memsyn.batches import samples
from memsyn.errors import BatchError, ModelError, OutputError, SamplesInteractError
from memsyn.products import Magnitude
from memsyn.rules import OPERATIONS, Axis, NoRuleError, Rule, Use, per_sample, signed, tied
from memsyn.tracer import Call, Group, Path, Recorder, Split, arguments, changes_its_input, replaced, rule_of

BY_RULE: Final = "rule"
"""By a formula, for all samples of a batch at once."""
BY_OPERATION: Final = "operation"
"""By differentiating the operations that use the parameter, each for one sample at a time."""
BY_SAMPLE: Final = "one sample at a time"
"""By forward and backward passes of the whole model."""
UNUSED: Final = "unused"
"""Zero: no output depends on it."""

TOLERANCE: Final = 0.05
"""By how much of the largest a sample's objective may differ alone and among others, in any precision."""

Sums = dict[str, Tensor]
Uses = Sequence[tuple[Call, str]]


class Scores(Protocol):
    """Runs the shadow: batch -> the objectives of each of its samples."""

    def __call__(self, batch: Any, first_sample: int = 0, /) -> Tensor:
        """(B, R): R objectives a sample. `first_sample` is the place of the batch's first sample."""
        ...


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What sums over samples are held in: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


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
    """Add sum_k f(w_k g_k), all samples at once.

    A parameter may be used in parts (views of it), if they do not overlap.

    Raises:
        NoRuleError: no rule holds; nothing was added.
    """
    parts: dict[tuple[Any, ...], list[tuple[Call, str]]] = {}
    for call, place in uses:
        value = call.values[place].tensor
        if value is not parameter and (value._base is not parameter or 0 in value.stride()):
            raise NoRuleError
        parts.setdefault((value.shape, value.stride(), value.storage_offset()), []).append((call, place))
    whole = (parameter.shape, parameter.stride(), parameter.storage_offset())
    if set(parts) - {whole} and (total.stride() != parameter.stride() or _overlap(parameter, parts)):
        raise NoRuleError
    found = {part: _join(own, part[0], num_samples, magnitude, weights) for part, own in parts.items()}
    for (shape, stride, offset), result in found.items():
        offset += total.storage_offset() - parameter.storage_offset()
        total.as_strided(shape, stride, offset).add_(result)


def _overlap(parameter: Tensor, parts: Iterable[tuple[Any, ...]]) -> bool:
    count = torch.zeros_like(parameter, dtype=torch.uint8)
    for shape, stride, offset in parts:
        count.as_strided(shape, stride, offset - parameter.storage_offset()).add_(1)
    return bool((count > 1).any())


def _join(uses: Uses, shape: torch.Size, num_samples: int, magnitude: Magnitude, weights: Tensor | None) -> Tensor:
    found = [(rule_of(call.function, place), call, place) for call, place in uses]
    rules = [rule for rule, _, _ in found if rule is not None]
    if len(rules) < len(found):
        raise NoRuleError
    made = [_make_use(call, place, rule, num_samples, weights) for rule, call, place in found if rule is not None]
    if all(rule.join == rules[0].join for rule in rules):
        return rules[0].join(made, shape, num_samples, magnitude)
    if all(rule.term is not None for rule in rules):
        return magnitude(_sum_of_terms(rules, made, shape, num_samples)).sum(0)
    table, linear = (OPERATIONS[f].rules["weight"] for f in (nn.functional.embedding, nn.functional.linear))
    if all(rule in (table, linear) for rule in rules):
        tables = [use for rule, use in zip(rules, made, strict=True) if rule is table]
        maps = [use for rule, use in zip(rules, made, strict=True) if rule is linear]
        return tied(tables, maps, shape, num_samples, magnitude)
    raise NoRuleError


def _sum_of_terms(rules: Sequence[Rule], uses: Sequence[Use], shape: torch.Size, num_samples: int) -> Tensor:
    total: Tensor | None = None
    for rule, use in zip(rules, uses, strict=True):
        assert rule.term is not None
        own = per_sample([(rule.term(use), use.axis)], shape, num_samples, channels=rule.channels)
        total = own if total is None else total.add_(own)
    assert total is not None
    return total


def _make_use(call: Call, place: str, rule: Rule, num_samples: int, weights: Tensor | None = None) -> Use:
    """What a rule is given: in float32 at least, the gradient weighted by sample."""
    split = call.splits[place]
    assert call.grad is not None
    assert split.out is not None
    grad = call.grad.to(wide_dtype(call.grad))
    if weights is not None:
        grad = grad * _along(weights, split.out, grad, num_samples)
    operand = None if rule.operand is None else call.tensors[rule.operand]
    if operand is not None and operand.is_floating_point():
        operand = operand.to(grad.dtype)
    options = {place: value for place, value in arguments(call.function, call.args, call.kwargs) if value is not None}
    options.update(call.tensors)
    axis = None if rule.operand is None else split.args.get(rule.operand)
    return Use(options, operand, axis, grad, split.out)


def _along(weights: Tensor, axis: Axis, tensor: Tensor, num_samples: int) -> Tensor:
    """One weight a sample, as a factor of a tensor."""
    times, rest = divmod(tensor.shape[axis.dim], num_samples)
    if rest:
        raise NoRuleError
    spread = weights.repeat(times) if axis.minor else weights.repeat_interleave(times)
    return spread.to(tensor.dtype).view([-1 if dim == axis.dim else 1 for dim in range(tensor.ndim)])


# By operation


def add_by_operation(
    totals: Sums,
    parameters: Mapping[str, nn.Parameter],
    group: Group,
    num_samples: int,
    magnitude: Magnitude,
    *,
    weights: Tensor | None = None,
) -> None:
    """Add sum_k f(w_k g_k) for every parameter of a group, a sample at a time, by differentiating single operations.

    Raises:
        NoRuleError: an operation cannot be cut into samples; nothing was added.
    """
    names = sorted(group.names & set(parameters))
    for k in range(num_samples):
        values = {id(call.values[place]): call.values[place].tensor for call, place in group.uses}
        grads: dict[int, Tensor] = {}
        for call, place in group.uses:
            grad, key = _sample_gradient(call, place, k, num_samples), id(call.values[place])
            grads[key] = grads[key] + grad if key in grads else grad
        inputs, outputs = [parameters[name] for name in names], [values[key] for key in grads]
        own = torch.autograd.grad(
            outputs,
            inputs,
            [grad.to(out.dtype) for grad, out in zip(grads.values(), outputs, strict=True)],
            retain_graph=True,
            allow_unused=True,
        )
        for name, grad in zip(names, own, strict=True):
            if grad is not None:
                wide = grad.to(totals[name].dtype, copy=True)
                totals[name] += magnitude(wide if weights is None else wide * weights[k])


def _sample_gradient(call: Call, place: str, k: int, num_samples: int) -> Tensor:
    """The gradient of sample k with respect to a value."""
    split = call.splits[place]
    assert call.grad is not None
    assert split.out is not None
    cut = {
        name: tensor if (axis := split.args.get(name)) is None else axis.sample(tensor, k, num_samples)
        for name, tensor in call.tensors.items()
    }
    grad = split.out.sample(call.grad, k, num_samples)
    rule = rule_of(call.function, place)
    if rule is not None:
        one = Call(call.function, call.args, call.kwargs, call.values, call.splits, cut, {}, call.places, grad)
        try:
            return rule.join([_make_use(one, place, rule, 1)], call.values[place].tensor.shape, 1, signed)
        except NoRuleError:
            pass
    if cut.keys() != call.places:
        raise NoRuleError
    leaf = cut[place] = call.values[place].tensor.detach().requires_grad_()
    if changes_its_input(call.function, call.kwargs):
        cut = {name: tensor if name == place else tensor.clone() for name, tensor in cut.items()}
    args, kwargs = replaced(call.function, call.args, call.kwargs, cut)
    with torch.enable_grad():
        output = call.function(*args, **kwargs)
    output = args[0] if output is None else output
    if output.shape != grad.shape:
        raise NoRuleError
    (found,) = torch.autograd.grad(output, leaf, grad, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found


# Passes over a batch


class Passed(NamedTuple):
    """What a pass met."""

    scores: Tensor
    """(B, R), the objectives of each sample."""
    refused: set[str]
    """The parameters whose route does not hold for this batch: nothing was added for them."""
    unknown: set[str]
    """Those of them that were used where the guard has not seen them."""


def add_by_uses(
    sums: Sums,
    parameters: Mapping[str, nn.Parameter],
    scores: Scores,
    batch: Any,
    magnitude: Magnitude,
    *,
    routes: Mapping[str, str],
    splits: Mapping[Path, Split | None],
    only: Container[str] | None = None,
) -> Passed:
    """Add sum_k f(g_k) of one batch by one forward pass, and a backward pass to the activations per objective.

    Args:
        sums: parameter name -> running sum, added to in place.
        parameters: the shadow's, by name: those to measure.
        scores: runs the shadow.
        batch: what `scores` takes.
        magnitude: f.
        routes: parameter -> how; those that go one sample at a time are left out.
        splits: what the operations do with samples, from the guard.
        only: add nothing for other parameters.
    """
    refused: set[str] = set()
    unknown: set[str] = set()
    num_samples = 0

    def consume(group: Group) -> None:
        names = group.names & set(parameters)
        if group.uses and any(routes[name] == UNUSED for name in names):
            unknown.update(names)
            return
        if any(routes[name] == BY_SAMPLE for name in names) or (only is not None and not any(n in only for n in names)):
            refused.update(name for name in names if routes[name] != BY_SAMPLE and only is None)
            return
        try:
            if not all(call.is_intact() for call, _ in group.uses):
                raise NoRuleError
            if len(group.names) == 1 and all(routes[name] == BY_RULE for name in names):
                (name,) = names
                add_by_rule(sums[name], parameters[name], group.uses, num_samples, magnitude)
            elif group.uses:
                add_by_operation(sums, parameters, group, num_samples, magnitude)
        except NoRuleError:
            refused.update(names)

    recorder = Recorder(parameters, splits, consume)
    with recorder, torch.autograd.set_multithreading_enabled(False):
        values = scores(batch)
        num_samples = len(values)
        backward_to_activations(recorder, values, parameters.values())
    unknown |= recorder.unknown
    return Passed(values.detach(), refused | unknown, unknown)


def backward_to_activations(recorder: Recorder, values: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """One backward pass for each column of `values` (B, R), from which the recorder gets its gradients."""
    inputs = [*recorder.leaves, *parameters]  # the graph reaches parameters that were used unseen by the recorder
    for column, objective in enumerate(values.unbind(1)):
        last = column == values.shape[1] - 1
        recorder.start_backward(last=last)
        if objective.requires_grad and recorder.leaves:
            _run_backward(objective.sum(), inputs, retain_graph=not last)
            for tensor in inputs:
                tensor.grad = None
        recorder.finish()


def _run_backward(total: Tensor, inputs: Sequence[Tensor], *, retain_graph: bool) -> None:
    """torch.autograd.backward(total, inputs=inputs), but inside the function mode, which that would leave.

    A checkpoint runs its part of the forward pass again during it, and must do there what it did the first time.
    """
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (total,), (torch.ones_like(total),), retain_graph, False, tuple(inputs), True, accumulate_grad=True
    )


def gradients(scores: Tensor, parameters: Mapping[str, nn.Parameter], *, retain_graph: bool = False) -> Sums:
    """d scores / d parameter by autograd; zero where there is no path."""
    if not scores.requires_grad or not parameters:
        return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    grads = torch.autograd.grad(scores, list(parameters.values()), allow_unused=True, retain_graph=retain_graph)
    found = zip(parameters.items(), grads, strict=True)
    return {
        name: torch.zeros_like(p) if grad is None else (grad.to_dense() if grad.is_sparse else grad)
        for (name, p), grad in found
    }


def check_finite(sums: Sums) -> None:
    """Refuse gradients that are NaN or infinite where the output was finite."""
    refuse_broken([name for name, total in sums.items() if not bool(total.isfinite().all())])


def refuse_broken(broken: Sequence[str]) -> None:
    """The error for parameters whose gradient is NaN or infinite."""
    if broken:
        raise OutputError(
            f"the gradient of {', '.join(broken[:5])}{' ...' if len(broken) > 5 else ''} is NaN or infinite for at "
            "least one sample, though the output is finite: look for a square root, logarithm or division at zero "
            "in the forward pass."
        )


def add_by_samples(
    sums: Sums,
    parameters: Mapping[str, nn.Parameter],
    scores: Scores,
    batch: Any,
    magnitude: Magnitude,
    *,
    together: Tensor | None,
) -> Tensor:
    """Add sum_k f(g_k) of one batch, one sample at a time: for any model whatever, at the price of a loop.

    Args:
        sums, scores, batch, magnitude: as in `add_by_uses`.
        parameters: those to measure.
        together: (B, R), the objectives of each sample as they came out of the whole batch, if there was one.

    Returns:
        (B, R), the objectives of each sample alone.

    Raises:
        SamplesInteractError: a sample alone gives something else.
        ModelError: the model fails on a single sample.
    """
    values = []
    for k, sample in enumerate(samples(batch)):
        value = score_alone(scores, sample, k)
        if together is not None:
            check_same_alone(value.detach(), together, k, TOLERANCE)
        for column in range(value.shape[1]):
            last = column == value.shape[1] - 1
            for name, grad in gradients(value[0, column], parameters, retain_graph=not last).items():
                sums[name] += magnitude(grad.to(sums[name].dtype, copy=True))
        values.append(value.detach())
    return torch.cat(values)


def add_batched(
    sums: Sums, parameters: Mapping[str, nn.Parameter], scores: Scores, batch: Any, magnitude: Magnitude
) -> int:
    """Add B f(1/B sum_k g_k) of one batch: what other libraries take for sum_k f(g_k). Returns B."""
    values = scores(batch)
    for column in range(values.shape[1]):
        last = column == values.shape[1] - 1
        for name, grad in gradients(values[:, column].mean(), parameters, retain_graph=not last).items():
            sums[name] += len(values) * magnitude(grad.to(sums[name].dtype, copy=True))
    return len(values)


def score_alone(scores: Scores, sample: Any, k: int) -> Tensor:
    """The objectives of sample k run alone."""
    try:
        return scores(sample, k)
    except BatchError as error:
        raise ModelError(
            f"the model takes the batch, but fails on sample {k} alone, so it cannot be seen whether its "
            f"samples interact: {error.__cause__!r}. Look for a normalisation over the batch, or a squeeze()."
        ) from error


def check_same_alone(value: Tensor, together: Tensor, k: int, tolerance: float) -> None:
    """Refuse a model of which sample k gives something else alone: beyond `tolerance`, of the largest objective."""
    if not float((value[0] - together[k]).abs().max()) <= tolerance * float(together.abs().max()):
        raise samples_interact(f"the objective of sample {k}")


def samples_interact(what: str) -> SamplesInteractError:
    """The error for a batch of which no sample can be looked at alone."""
    return SamplesInteractError(
        f"{what} changes with the other samples of the batch, so there is no importance per sample. Look for a "
        "normalisation that uses batch statistics in eval mode (track_running_stats=False), outputs that compare "
        "samples (a contrastive loss), random numbers in the forward pass, or something in the batch that belongs to "
        "the samples but does not look so (make it a tensor, samples first); or give an output per sample through "
        "forward=."
    )
