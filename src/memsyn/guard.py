"""The check that each route computes what it should, on a few samples of the first batch.

Owns the comparison of every route with autograd. Must not add to any importance.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memsyn.errors import OutputError, SamplesInteractError
from memsyn.routes import (
    Scores,
    Sums,
    add_by_rules,
    add_by_samples,
    check_finite,
    gradients,
    requiring_grad,
    wide_dtype,
)
from memsyn.rules import signed

NUM_SAMPLES = 4


def failing(
    parameters: Mapping[str, nn.Parameter],
    layers: Mapping[nn.Module, Mapping[str, str]],
    scores: Scores,
    batch: Any,
) -> tuple[set[nn.Module], set[str]]:
    """The layers that `batch` used, and the parameters whose rule does not give their gradient on it.

    With random sample weights w, the signed sum_k w_k g_k of each rule must equal autograd's gradient of
    sum_k w_k s_k. Since the rules see the gradient of the unweighted sum, this fails wherever the samples are not
    where the rule looks for them, where a weight is used outside its layer, and where samples interact. What fails
    must be measured one sample at a time, which is checked in turn: if one sample alone gives something else than
    the same sample among others, no importance per sample exists.

    Args:
        parameters: the shadow's, by name: all that are to be measured.
        layers: those with a rule, as in `add_by_rules`.
        scores: runs the shadow.
        batch: a few samples.

    Raises:
        OutputError: the output does not depend on any of the parameters.
        SamplesInteractError: the samples interact, or the forward pass draws random numbers.
    """
    with requiring_grad(parameters.values()):
        values = scores(batch)
        if not values.requires_grad:
            raise OutputError(
                "the model's output has no gradient with respect to any trainable parameter. Does its forward run "
                "under torch.no_grad(), detach the output, or skip the trainable part?"
            )
        weights = 0.5 + torch.rand(len(values), generator=torch.Generator().manual_seed(0)).to(values)
        expected = gradients((weights * values).sum(), parameters)
    check_finite(expected)
    by_rules = {name: torch.zeros_like(grad, dtype=wide_dtype(grad)) for name, grad in expected.items()}
    passed = add_by_rules(by_rules, layers, scores, batch, signed, trusted=layers, weights=weights)
    ruled = {name for names in layers.values() for name in names.values()}
    failed = passed.refused | _differing({name: by_rules[name] for name in ruled}, expected)
    alone = {name: p for name, p in parameters.items() if name in failed or name not in ruled}
    if alone:
        one_by_one = {name: torch.zeros_like(by_rules[name]) for name in alone}
        add_by_samples(one_by_one, alone, scores, batch, signed, weights=weights)
        _check_alone(one_by_one, expected)
    return passed.used, failed


def _check_alone(alone: Sums, together: Sums) -> None:
    interacting = sorted(_differing(alone, together))
    if interacting:
        raise SamplesInteractError(
            f"a sample's gradient changes with the other samples of its batch (seen at {', '.join(interacting[:3])}"
            f"{' ...' if len(interacting) > 3 else ''}), so it has no importance of its own. Look for a normalisation "
            "that uses batch statistics in eval mode (track_running_stats=False), outputs that compare samples (a "
            "contrastive loss), or random numbers in the forward pass; give an output per sample through forward=, or "
            "batches of one."
        )


def _differing(found: Sums, expected: Sums) -> set[str]:
    """The parameters whose error is beyond rounding, in the precision of the model."""
    model_norm = torch.stack([grad.norm().double() for grad in expected.values()]).norm()
    differing = set()
    for name, value in found.items():
        reference = expected[name].to(value.dtype)
        tolerance = _epsilon(expected[name]) ** 0.5
        floor = tolerance * model_norm  # a gradient that is zero in exact arithmetic is only rounding
        scale = torch.maximum(reference.norm().double(), floor)
        if not bool((value - reference).norm().double() <= tolerance * scale):
            differing.add(name)
    return differing


def _epsilon(gradient: Tensor) -> float:
    """The relative spacing of numbers as this gradient was computed: on CUDA, float32 may mean TF32's ten bits."""
    return 2.0**-10 if gradient.is_cuda and gradient.dtype == torch.float32 else torch.finfo(gradient.dtype).eps
