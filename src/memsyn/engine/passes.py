"""The passes over a batch: of all samples together, of one at a time, and the batched kind of other libraries.

Owns running the measured model forward and backward. Must not know about loaders, progress or files.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from memsyn.batches import Batch
from memsyn.engine.recorder import ParameterGroup, Plans, Recorder
from memsyn.engine.routes import BY_RULE, BY_SAMPLE, UNUSED, Sums, add_by_operation, add_by_rule
from memsyn.errors import BatchError, ModelError, OutputError, SamplesInteractError
from memsyn.kernels.outer_products import Magnitude
from memsyn.kernels.rules import NoRuleError, UnseenError
from memsyn.torch_private import without_function_modes

TOLERANCE: Final = 0.05
"""By how much of the largest a sample's objective may differ alone and among others, in any precision."""


class Scores(Protocol):
    """Runs the measured model: batch -> the objectives of each of its samples."""

    def __call__(self, batch: Batch, first_sample: int = 0, recorder: Recorder | None = None, /) -> Tensor:
        """(B, R): R objectives a sample. `first_sample` is the place of the batch's first sample in the whole batch.

        With a recorder, it may differentiate parts of the model by itself; what it gives then has no gradient.
        """
        ...


class Passed(NamedTuple):
    """What a pass met."""

    scores: Tensor
    """(B, R), the objectives of each sample."""
    refused: set[str]
    """The parameters whose route does not hold for this batch: nothing was added for them."""
    unknown: set[str]
    """The refused ones that were used where the route check has not seen them."""


def add_by_uses(
    sums: Sums,
    parameters: Mapping[str, nn.Parameter],
    scores: Scores,
    batch: Batch,
    magnitude: Magnitude,
    *,
    routes: Mapping[str, str],
    plans: Plans,
    unproven: Container[str] = (),
    only: Container[str] | None = None,
) -> Passed:
    """Add sum_k f(g_k) of one batch by one forward pass, and a backward pass to the activations per objective.

    Args:
        sums: parameter name -> running sum, added to in place.
        parameters: the measured model's, by name: those to measure.
        scores: runs the model.
        batch: what `scores` takes.
        magnitude: f.
        routes: parameter -> how; those that go one sample at a time are left out.
        plans: what the operations do with samples, from the route check.
        unproven: parameters whose route has given nothing but zeros so far; if it gives more now, they are unknown.
        only: add nothing for other parameters, and refuse what is still unknown of these.
    """
    refused: set[str] = set()
    unknown: set[str] = set()
    num_samples = batch.num_samples or 0

    def consume(group: ParameterGroup) -> None:
        names = group.names
        if group.uses and any(routes[name] == UNUSED for name in names):
            unknown.update(names)
            return
        if any(routes[name] == BY_SAMPLE for name in names) or (only is not None and not any(n in only for n in names)):
            refused.update(name for name in names if routes[name] != BY_SAMPLE and only is None)
            return
        try:
            if not all(call.is_intact() for call, _ in group.uses):
                raise NoRuleError
            is_unproven = any(name in unproven for name in names)
            totals = {n: torch.zeros_like(sums[n]) if is_unproven else sums[n] for n in names}
            if len(group.names) == 1 and all(routes[name] == BY_RULE for name in names):
                (name,) = names
                add_by_rule(totals[name], parameters[name], group.uses, num_samples, magnitude)
            elif group.uses:
                add_by_operation(totals, parameters, group, num_samples, magnitude)
            if is_unproven and any(bool(total.any()) for total in totals.values()):
                raise UnseenError
        except UnseenError:
            unknown.update(names)
        except NoRuleError:
            refused.update(names)

    recorder = Recorder(parameters, plans, consume)
    with torch.autograd.set_multithreading_enabled(False), recorder:
        values = scores(batch, 0, recorder)
        num_samples = len(values)
        backward_to_activations(recorder, values, parameters.values())
    unknown |= recorder.unknown
    return Passed(values.detach(), refused | unknown, unknown)


def backward_to_activations(recorder: Recorder, values: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """One backward pass for each column of `values` (B, R), from which the recorder gets its gradients."""
    inputs = [recorder.root, *parameters]  # the graph reaches parameters that were used unseen by the recorder
    for column, objective in enumerate(values.unbind(1)):
        last = column == values.shape[1] - 1
        recorder.start_backward(last=last)
        if objective.requires_grad:
            run_backward(objective.sum(), inputs, retain_graph=not last)
            with without_function_modes():
                for tensor in inputs:
                    if tensor.grad is not None:
                        tensor.grad = None
        recorder.finish()


def run_backward(
    total: Tensor, inputs: Sequence[Tensor], *, retain_graph: bool, gradient: Tensor | None = None
) -> None:
    """Add the gradient of `total` to `.grad` of `inputs`, with function modes on; `gradient` is what `total` gets.

    `torch.autograd.backward(total)` hands itself over to the function mode, which is off inside. On gradient edges it
    does not: a checkpoint that runs its part of the forward pass again is seen by the recorder, as it was at first.

    Raises:
        ModelError: autograd cannot differentiate the model.
    """
    with without_function_modes():
        edges = [get_gradient_edge(tensor) for tensor in (total, *inputs)]
        start = torch.ones_like(total) if gradient is None else gradient
    try:
        torch.autograd.backward([edges[0]], [start], retain_graph=retain_graph, inputs=edges[1:])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ModelError(f"autograd cannot differentiate the model, so it cannot be measured: {error}") from error


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
    refuse_nonfinite([name for name, total in sums.items() if not bool(total.isfinite().all())])


def refuse_nonfinite(broken: Sequence[str]) -> None:
    """The error for parameters whose gradient is NaN or infinite."""
    if broken:
        raise OutputError(
            f"the gradient of {', '.join(broken[:5])}{' ...' if len(broken) > 5 else ''} is NaN or infinite for at "
            "least one sample, though the output is finite: look for a square root, logarithm or division at zero "
            "in the forward pass; in half precision also for numbers too large for it: measure model.float()."
        )


def add_by_samples(
    sums: Sums,
    parameters: Mapping[str, nn.Parameter],
    scores: Scores,
    batch: Batch,
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
    for k, sample in enumerate(batch.one_by_one()):
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
    sums: Sums, parameters: Mapping[str, nn.Parameter], scores: Scores, batch: Batch, magnitude: Magnitude
) -> int:
    """Add B f(1/B sum_k g_k) of one batch: what other libraries take for sum_k f(g_k). Returns B."""
    values = scores(batch)
    for column in range(values.shape[1]):
        last = column == values.shape[1] - 1
        for name, grad in gradients(values[:, column].mean(), parameters, retain_graph=not last).items():
            sums[name] += len(values) * magnitude(grad.to(sums[name].dtype, copy=True))
    return len(values)


def score_alone(scores: Callable[[Batch, int], Tensor], sample: Batch, k: int) -> Tensor:
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
