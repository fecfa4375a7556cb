"""Forward and backward passes over a batch: all samples together, one at a time, or by the batch mean.

Owns running the measured model forward and backward. Must not know loaders, progress or files.
"""

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from memsyn.batches import Batch
from memsyn.engine.recorder import Plans, Recorder
from memsyn.engine.routes import BY_RULE, BY_SAMPLE, UNUSED, Sums, Uses, add_by_operation, add_by_rule
from memsyn.errors import BatchError, ModelError, OutputError, SamplesInteractError
from memsyn.kernels.outer_products import Magnitude
from memsyn.kernels.rules import NoRuleError, UnseenError
from memsyn.torch_private import is_out_of_memory, without_function_modes

TOLERANCE: Final = 0.05
"""How much a sample's objective alone may differ from its objective in the batch, relative to the largest one.

This one number serves every precision.
"""


class Scores(Protocol):
    """Runs the measured model: batch -> objectives of its samples."""

    def __call__(self, batch: Batch, first_sample: int = 0, recorder: Recorder | None = None, /) -> Tensor:
        """(B, R): R objectives per sample.

        `first_sample` is the index of this batch's first sample in the whole batch. With a recorder, the function may
        differentiate parts of the model itself. Then its result has no gradient.
        """
        ...


class Passed(NamedTuple):
    """The result of one pass over a batch."""

    scores: Tensor
    """(B, R), the objectives of each sample."""
    refused: set[str]
    """The parameters with a route that does not hold for this batch. Nothing was added for them."""
    unknown: set[str]
    """The refused parameters with a use that the route check has not seen."""


def add_by_uses(
    sums: Sums,
    parameters: Mapping[str, nn.Parameter],
    scores: Scores,
    batch: Batch,
    magnitude: Magnitude,
    *,
    routes: Mapping[str, str],
    plans: Plans,
    unproven: Collection[str] = (),
    only: Container[str] | None = None,
) -> Passed:
    """Add sum_k f(g_k) of one batch, by one forward pass and one backward pass to the activations per objective.

    Args:
        sums: parameter name -> running sum, added to in-place.
        parameters: name -> parameter of the measured model, for the parameters to measure.
        scores: runs the model.
        batch: the batch.
        magnitude: f.
        routes: parameter name -> route. Parameters with the route "one sample at a time" are left out.
        plans: the plan of each operation, from the route check.
        unproven: parameters for which the route check has seen only zero gradients. If a gradient is not zero now, the
            parameter counts as unknown.
        only: add nothing for other parameters, and refuse those of `only` that are still unknown.
    """
    refused: set[str] = set()
    unknown: set[str] = set()
    num_samples = batch.num_samples or 0

    def consume(names: frozenset[str], uses: Uses) -> None:
        own = {*map(routes.__getitem__, names)}  # no comprehension: every parameter and batch comes through here
        # The check saw no use of this parameter, so no route was compared with autograd: a new check must run first.
        if UNUSED in own and uses:
            unknown.update(names)
            return
        # A group is measured as a whole: if one parameter needs single samples, so do the others. In the second pass
        # over a batch (with `only`), the first pass has already added all other parameters.
        if BY_SAMPLE in own or (only is not None and not any(n in only for n in names)):
            refused.update(name for name in names if routes[name] != BY_SAMPLE and only is None)
            return
        try:
            for call, _ in uses:
                if not call.is_intact():
                    raise NoRuleError
            # The check has compared only zeros for an unproven parameter. So its sums are collected apart, and dropped
            # if they are not zero.
            is_unproven = bool(unproven) and any(name in unproven for name in names)
            totals = {name: torch.zeros_like(sums[name]) for name in names} if is_unproven else sums
            # A rule gives the gradient of one tensor. If a value is computed from several parameters, only autograd can
            # go on from the value to each of them.
            if len(names) == 1 and BY_RULE in own:
                (name,) = names
                add_by_rule(totals[name], parameters[name], uses, num_samples, magnitude)
            elif uses:
                add_by_operation(totals, parameters, names, uses, num_samples, magnitude)
            if is_unproven and any(bool(totals[name].any()) for name in names):
                raise UnseenError
        except UnseenError:
            unknown.update(names)
        except NoRuleError:
            refused.update(names)

    recorder = Recorder(parameters, plans, consume)
    # The hooks must run in this thread, on CUDA too: function modes and scratch memory belong to a thread.
    with torch.autograd.set_multithreading_enabled(False), recorder:
        values = scores(batch, 0, recorder)
        # `consume` reads this during the backward pass. A batch without tensors has no number of samples before.
        num_samples = len(values)
        backward_to_activations(recorder, values, parameters.values())
    unknown |= recorder.unknown
    return Passed(values.detach(), refused | unknown, unknown)


def backward_to_activations(recorder: Recorder, values: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Run one backward pass for each column of `values` (B, R). The recorder's hooks receive the gradients."""
    # If the recorder missed a use of V, as in `F.linear(custom(x, V), W)`, the graph of the Linear ends at V, not at
    # the root. Without V among the inputs, autograd would skip this part, and the hook of W's call would not run.
    inputs = [recorder.root, *parameters]
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
    """Add the gradient of `total` to `.grad` of `inputs`; function modes stay on during the backward pass.

    `gradient` is the gradient of `total` itself; by default, ones. If `torch.autograd.backward` gets a tensor, torch
    passes the whole call to the function mode, and switches the mode off inside. If it gets gradient edges, the mode
    stays on. So the recorder also sees the operations that an activation checkpoint runs again.

    Raises:
        ModelError: autograd cannot differentiate the model.
    """
    with without_function_modes():
        edges = _edges([total, *inputs])
        start = torch.ones_like(total) if gradient is None else gradient
    try:
        torch.autograd.backward([edges[0]], [start], retain_graph=retain_graph, inputs=edges[1:])
    except RuntimeError as error:
        # Want of memory is a RuntimeError too, but it says nothing about the model.
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"autograd cannot differentiate the model, so it cannot be measured: {error} Look for an in-place change "
            "of a tensor that the backward pass needs, or for an operation without a derivative."
        ) from error


class _Join(torch.autograd.Function):
    """A node after some tensors. It is never differentiated."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return torch.zeros(())


def _edges(tensors: Sequence[Tensor]) -> list[GradientEdge]:
    """Where each tensor's gradient arrives in the graph: what `get_gradient_edge` gives, for all tensors at once.

    `get_gradient_edge` makes a view of each parameter, which takes several microseconds for each parameter and batch.
    """
    with torch.enable_grad():
        node = _Join.apply(*tensors).grad_fn  # type: ignore[no-untyped-call]
    return [GradientEdge(before, number) for before, number in node.next_functions]


def gradients(scores: Tensor, parameters: Mapping[str, nn.Parameter], *, retain_graph: bool = False) -> Sums:
    """d scores / d parameter by autograd, by name; zero if the scores do not depend on the parameter."""
    if not scores.requires_grad or not parameters:
        return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    grads = torch.autograd.grad(scores, list(parameters.values()), allow_unused=True, retain_graph=retain_graph)
    found = zip(parameters.items(), grads, strict=True)
    return {
        name: torch.zeros_like(p) if grad is None else (grad.to_dense() if grad.is_sparse else grad)
        for (name, p), grad in found
    }


def check_finite(sums: Sums) -> None:
    """Refuse sums that are NaN or infinite.

    Raises:
        OutputError: names the parameters.
    """
    refuse_nonfinite([name for name, total in sums.items() if not bool(total.isfinite().all())])


def refuse_nonfinite(broken: Sequence[str]) -> None:
    """Refuse the named parameters, because their gradient is NaN or infinite.

    Raises:
        OutputError: there is at least one name.
    """
    if broken:
        raise OutputError(
            f"the gradient of {', '.join(broken[:5])}{' ...' if len(broken) > 5 else ''} is NaN or infinite for at "
            "least one sample, although the output is finite. Look for a square root, logarithm or division at zero "
            "in the forward pass. If the model is in half precision, its numbers may overflow: measure model.float()."
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
    """Add sum_k f(g_k) of one batch, one sample at a time. This works for every model, but is slow.

    Args:
        sums, scores, batch, magnitude: as in `add_by_uses`.
        parameters: the parameters to measure, by name.
        together: (B, R), the objectives of each sample in the whole batch, to compare with; None skips the comparison.

    Returns:
        (B, R), the objectives of each sample alone.

    Raises:
        SamplesInteractError: the objective of a sample alone differs from its objective in the batch.
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
                # A copy, since the magnitude works in place, and gradients may share memory: for s = sum (a + b)^2,
                # autograd returns one memory block for both d s / d a and d s / d b.
                sums[name] += magnitude(grad.to(sums[name].dtype, copy=True))
        values.append(value.detach())
    return torch.cat(values)


def add_one_sample(
    sums: Sums,
    parameters: Mapping[str, nn.Parameter],
    scores: Scores,
    sample: Batch,
    magnitude: Magnitude,
    new: Container[str] = (),
) -> set[str]:
    """Add f(g) of a batch of one sample, by an ordinary backward pass that a recorder watches.

    Returns:
        Those parameters in `new` that the sample uses. Nothing was added for them.
    """
    used: set[str] = set()
    recorder = Recorder({}, Plans({}), lambda names, uses: None)
    with torch.autograd.set_multithreading_enabled(False), recorder:
        values = scores(sample, 0, recorder)
        if values.requires_grad:
            run_backward(values.sum(), [recorder.root, *parameters.values()], retain_graph=False)
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            if name in new:
                used.add(name)
            else:
                sums[name] += magnitude(parameter.grad.to_dense().to(sums[name].dtype, copy=True))
            parameter.grad = None
    return used


def add_batched(
    sums: Sums, parameters: Mapping[str, nn.Parameter], scores: Scores, batch: Batch, magnitude: Magnitude
) -> int:
    """Add B f(1/B sum_k g_k) of one batch, as other libraries do in place of sum_k f(g_k). Returns B."""
    values = scores(batch)
    for column in range(values.shape[1]):
        last = column == values.shape[1] - 1
        for name, grad in gradients(values[:, column].mean(), parameters, retain_graph=not last).items():
            sums[name] += len(values) * magnitude(grad.to(sums[name].dtype, copy=True))
    return len(values)


def score_alone(scores: Callable[[Batch, int], Tensor], sample: Batch, k: int) -> Tensor:
    """The objectives of sample k alone.

    Raises:
        ModelError: the model fails on a single sample.
    """
    try:
        return scores(sample, k)
    except BatchError as error:
        raise ModelError(
            f"the model takes the batch, but fails on sample {k} alone, so memsyn cannot check whether samples "
            f"interact: {error.__cause__!r}. Look for a normalisation over the batch, or a squeeze()."
        ) from error


def check_same_alone(value: Tensor, together: Tensor, k: int, tolerance: float) -> None:
    """Refuse the model if the objective of sample k alone differs from its objective in the batch.

    The difference may be at most `tolerance` times the largest objective of the batch.

    Raises:
        SamplesInteractError: it is larger.
    """
    # `not a <= b` instead of `a > b`, since every comparison with NaN is False: NaN must be refused.
    if not float((value[0] - together[k]).abs().max()) <= tolerance * float(together.abs().max()):
        raise samples_interact(f"the objective of sample {k}")


def samples_interact(what: str) -> SamplesInteractError:
    """The error for a batch in which `what` depends on the other samples."""
    return SamplesInteractError(
        f"{what} changes with the other samples of the batch, so no importance per sample exists. Look for: a "
        "normalisation that uses batch statistics in eval mode (track_running_stats=False); an output that compares "
        "samples (a contrastive loss); random numbers in the forward pass; data of single samples in the batch that is "
        "not a tensor with samples first (make it one). Or return one output per sample with forward=."
    )
