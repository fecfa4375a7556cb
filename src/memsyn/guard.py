"""The check that each route computes what it should, on a few samples, in float64 on a clone of its own.

Owns the comparison of every route with autograd, and of samples alone with the same samples together. Must not add
to any importance, nor leave anything on the user's model.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memsyn.batches import map_tensors, num_samples, take
from memsyn.errors import BatchError, ModelError, OutputError
from memsyn.parameters import named_parameters, trainable_parameters
from memsyn.routes import (
    BY_RULE,
    TOLERANCE,
    Sums,
    add_by_rules,
    add_by_samples,
    check_finite,
    gradients,
    layers_by_rule,
    requiring_grad,
    samples_interact,
    wide_dtype,
)
from memsyn.rules import signed
from memsyn.shadow import shadow

NUM_SAMPLES = 2
"""Enough to tell samples apart, and half the cost of four."""

FLOAT32 = math.sqrt(torch.finfo(torch.float32).eps)
"""What parts of a model that insist on float32 may differ by, in and out of company."""


@dataclass(frozen=True)
class Verdict:
    """What the guard saw, as sets of parameters."""

    trusted: set[str]
    """Their rule holds: it gave autograd's gradient."""
    unproven: set[str]
    """Trusted, but only because the gradient was zero on these samples."""
    failed: set[str]
    """Their rule does not hold."""
    written: set[str]
    """The forward pass writes to them."""


def choices(batch: Any) -> Iterator[Any]:
    """Samples to look at, from the start, the end and the middle of a batch: the next when the last were not enough."""
    total = num_samples(batch)
    if total is None:
        yield batch
        return
    for start in dict.fromkeys((0, max(0, total - NUM_SAMPLES), total // 2)):
        yield take(batch, start, start + NUM_SAMPLES)


def check(
    model: nn.Module, routes: Mapping[str, str], run: Callable[[nn.Module, Any, int], Tensor], batch: Any
) -> Verdict:
    """See which of the rules in `routes` hold for a few samples.

    With sample weights w, the signed sum_k w_k g_k of each rule must equal autograd's gradient of sum_k w_k s_k. Since
    the rules see the gradient of the unweighted sum, this fails wherever the samples are not where the rule looks for
    them, where a weight is used outside its layer, and where samples interact. Weights are powers of two, so that they
    change no rounding. Each sample's objective must also be the same alone as among others.

    All this runs in float64 on a private clone, where rounding cannot be taken for an error; in the model's own
    precision only if its forward pass insists on that.

    Args:
        model: the user's; it is not changed.
        routes: parameter -> route, of all that is to be measured.
        run: (model, batch, place of the first sample) -> the objective of each sample.
        batch: a few samples.

    Raises:
        ModelError: the forward pass uses the user's model in place of the one it is given.
        OutputError: the objective does not depend on the parameters.
        SamplesInteractError: the samples interact, or the forward pass draws random numbers.
    """
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        try:
            return _check(model, _private(model, torch.float64), routes, run, map_tensors(batch, _double))
        except BatchError:  # a forward pass with a precision of its own
            return _check(model, _private(model, None), routes, run, batch)
    except ModelError:
        with torch.no_grad():
            for buffer, value in before:  # it may have been the user's own model that ran
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        raise


def _check(
    model: nn.Module,
    clone: nn.Module,
    routes: Mapping[str, str],
    run: Callable[[nn.Module, Any, int], Tensor],
    batch: Any,
) -> Verdict:
    parameters = {name: p for name, p in named_parameters(clone).items() if name in routes}
    precise = all(p.dtype == torch.float64 for p in parameters.values())

    def scores(batch: Any, first_sample: int = 0) -> Tensor:
        return run(clone, batch, first_sample)

    with requiring_grad(parameters.values()):
        values = scores(batch)
        _check_dependence(values, trainable_parameters(model).values())
        weights = torch.tensor([1.0, 4.0, 2.0, 8.0]).repeat(len(values) // 4 + 1)[: len(values)].to(values)
        expected = gradients((weights * values).sum(), parameters)
    check_finite(expected)
    if precise:
        _check_not_constant(values, parameters, expected)
    ruled = {name for name, route in routes.items() if route == BY_RULE}
    found = {name: torch.zeros_like(grad, dtype=wide_dtype(grad)) for name, grad in expected.items()}
    layers = layers_by_rule(clone, routes)
    passed = add_by_rules(found, layers, scores, batch, signed, trusted=ruled, weights=weights)
    failed = passed.refused | _differing({name: found[name] for name in ruled}, expected, exactly=precise)
    slow = {name: p for name, p in parameters.items() if name in failed or name not in ruled}
    if slow or num_samples(batch) is not None:
        alone = {name: torch.zeros_like(found[name]) for name in slow}
        tolerance = FLOAT32 if precise else TOLERANCE
        add_by_samples(
            alone, slow, scores, batch, signed, together=values.detach(), tolerance=tolerance, weights=weights
        )
        differing = _differing(alone, expected, exactly=False)
        if differing:
            raise samples_interact(f"the gradient of {', '.join(sorted(differing)[:3])}")
    trusted = (passed.used & ruled) - failed
    own = named_parameters(model)
    return Verdict(
        trusted=trusted,
        unproven={name for name in trusted if not bool(expected[name].any())},
        failed=failed,
        written={n for n, p in named_parameters(clone).items() if not torch.equal(p, own[n].detach().to(p.dtype))},
    )


def _private(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A clone that shares nothing with the model, in another precision if one is given."""
    clone = shadow(model, private=named_parameters(model))
    for tensor in (*clone.parameters(), *clone.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype or tensor.dtype)
    return clone


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _check_dependence(values: Tensor, own: Iterable[nn.Parameter]) -> None:
    """The objective must depend on the clone it was asked of, and not on the user's model."""
    if values.requires_grad:
        _check_graph(values)
        strays = torch.autograd.grad(values.sum(), list(own), retain_graph=True, allow_unused=True)
        if any(stray is not None for stray in strays):
            raise ModelError(
                "the forward pass uses your model itself in place of the one it is given: in forward=lambda model, "
                "batch: ..., use that model; in a module, a hook or a patched method, use self in place of a name "
                "from outside."
            )
    else:
        raise OutputError(
            "the model's output has no gradient with respect to any trainable parameter. Does its forward run "
            "under torch.no_grad(), detach the output, or skip the trainable part?"
        )


def _check_graph(values: Tensor) -> None:
    """Reentrant checkpoints hide their parameters from autograd.grad."""
    seen, nodes = set(), [values.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise ModelError(
                "the forward pass uses reentrant checkpoints, whose parameters cannot be measured: call "
                "torch.utils.checkpoint with use_reentrant=False."
            )
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]


def _check_not_constant(values: Tensor, parameters: Mapping[str, nn.Parameter], gradients: Sums) -> None:
    """A squared norm that no weight can change has only rounding for a gradient."""
    size = _norm(gradients.values()) * _norm(parameters.values())
    if 0 < size < 1e-9 * float(values.detach().sum()):
        raise OutputError(
            "the squared norm of the output is the same whatever the weights are, as of outputs that were normalised, "
            "so it says nothing about their importance. Measure an earlier output: forward=lambda model, batch: ..."
        )


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(tensor.detach().norm()) for tensor in tensors))


def _differing(found: Sums, expected: Sums, *, exactly: bool) -> set[str]:
    """The parameters whose error is beyond rounding: relative to their norm, or to a part of the model's."""
    whole = _norm(expected.values())
    differing = set()
    for name, value in found.items():
        reference = expected[name].to(value.dtype)
        tolerance, floor = (1e-6, 1e-4) if exactly else (_rounding(expected[name]),) * 2
        scale = max(_norm([reference]), floor * whole)  # a gradient of zero in exact arithmetic is only rounding
        if not _norm([value - reference]) <= tolerance * scale:
            differing.add(name)
    return differing


def _rounding(gradient: Tensor) -> float:
    """What the numbers behind a gradient may differ by: on CUDA, float32 may mean TF32's ten bits."""
    if gradient.is_cuda and gradient.dtype == torch.float32:
        return 2.0**-5
    return max(FLOAT32, math.sqrt(torch.finfo(gradient.dtype).eps))
