"""How each parameter's importance is computed: by its layer's rule, or one sample at a time.

Owns the choice, and the two passes over a batch that follow from it. Must not know about loaders, progress or files.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn

from memsyn.batches import samples
from memsyn.errors import BatchError, ModelError, OutputError, SamplesInteractError
from memsyn.parameters import named_parameters
from memsyn.products import Magnitude
from memsyn.rules import RULES, Use, num_batched_dims

BY_RULE: Final = "rule"
BY_SAMPLE: Final = "one sample at a time"

TOLERANCE: Final = 0.05
"""By how much of the largest a sample's objective may differ alone and among others, in any precision."""

Sums = dict[str, Tensor]


class Scores(Protocol):
    """Runs the shadow: batch -> the objective of each of its samples."""

    def __call__(self, batch: Any, first_sample: int = 0, /) -> Tensor:
        """`first_sample` is the place of the batch's first sample, for errors."""
        ...


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What sums over samples are held in: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def plan(model: nn.Module) -> dict[str, str]:
    """The first choice for every parameter: a rule where a single layer with one owns it, else one sample at a time."""
    owners: dict[str, list[tuple[type[nn.Module], str]]] = {}
    for layer, local, name in _owned(model):
        owners.setdefault(name, []).append((type(layer), local))
    return {
        name: BY_RULE if len(owner) == 1 and owner[0][1] in RULES.get(owner[0][0], {}) else BY_SAMPLE
        for name, owner in owners.items()
    }


def layers_by_rule(model: nn.Module, routes: Mapping[str, str]) -> dict[nn.Module, dict[str, str]]:
    """layer -> local name -> full name of each of its parameters that goes by a rule."""
    layers: dict[nn.Module, dict[str, str]] = {}
    for layer, local, name in _owned(model):
        if routes.get(name) == BY_RULE:
            layers.setdefault(layer, {})[local] = name
    return layers


def _owned(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(layer, local name, full name) for every place that holds a parameter."""
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    for layer in model.modules():
        for local, parameter in layer.named_parameters(recurse=False):
            yield layer, local, names[id(parameter)]


class _Seen(NamedTuple):
    """What came into a layer, and its version then: a later change in place would spoil it."""

    inputs: Tensor
    version: int


@final
class _Recorder:
    """The uses of layers in one forward pass; hands each layer's over, and lets go of them, when their gradients came.

    Nothing but the graph may hold a tensor longer than that: freshly freed memory is what makes the pass fast.
    """

    def __init__(self, consume: Callable[[nn.Module, list[_Seen], list[Tensor]], None]) -> None:
        self.consume = consume
        self.leaves: list[Tensor] = []
        self._seen: dict[nn.Module, list[_Seen]] = {}
        self._grads: dict[nn.Module, dict[int, Tensor]] = {}

    def on_forward(self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], output: Any) -> Any:
        if not torch.is_grad_enabled() or not isinstance(output, Tensor):  # a hook may have made it something else
            return output
        inputs = args[0] if args else next(iter(kwargs.values()))
        if not output.requires_grad:  # nothing before this layer is differentiable: the graph begins here
            leaf = output.detach().requires_grad_()
            self.leaves.append(leaf)
            output = leaf.clone()  # a leaf could not be changed in place by what follows
        uses = self._seen.setdefault(layer, [])
        output.register_hook(partial(self._on_grad, layer, len(uses)))
        uses.append(_Seen(inputs.detach(), inputs._version))
        return output

    def _on_grad(self, layer: nn.Module, use: int, grad: Tensor) -> None:
        grads = self._grads.setdefault(layer, {})
        grads[use] = grad
        if len(grads) == len(self._seen[layer]):
            self._hand_over(layer)

    def _hand_over(self, layer: nn.Module) -> None:
        grads, seen = self._grads.pop(layer), self._seen.pop(layer)
        self.consume(layer, [seen[use] for use in grads], list(grads.values()))

    def finish(self) -> None:
        """Hand over the layers of which some outputs had no part in the objective."""
        for layer in list(self._grads):
            self._hand_over(layer)


@contextmanager
def _recording(layers: Iterable[nn.Module], recorder: _Recorder) -> Iterator[None]:
    handles = [layer.register_forward_hook(recorder.on_forward, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Passed(NamedTuple):
    """What a pass by rules met."""

    scores: Tensor
    """The objective of each sample."""
    used: set[str]
    """The parameters whose layers had a part in the objective."""
    refused: set[str]
    """The parameters whose rule does not hold for this batch: nothing was added for them."""


def add_by_rules(
    sums: Sums,
    layers: Mapping[nn.Module, Mapping[str, str]],
    scores: Scores,
    batch: Any,
    magnitude: Magnitude,
    *,
    trusted: Container[str],
    weights: Tensor | None = None,
) -> Passed:
    """Add sum_k f(g_k) of one batch by one forward and one backward pass to the activations.

    Args:
        sums: parameter name -> running sum, added to in place.
        layers: layer -> its parameters' local name -> their full name.
        scores: runs the shadow, whose parameters must all be frozen.
        batch: what `scores` takes.
        magnitude: f.
        trusted: the parameters whose rule the guard has seen to hold.
        weights: (B,), multiplied to g_k before f.
    """
    used: set[str] = set()
    refused: set[str] = set()
    num_samples = 0

    def consume(layer: nn.Module, seen: list[_Seen], grads: list[Tensor]) -> None:
        names = layers[layer]
        used.update(names.values())
        intact = all(
            len(grad) == num_samples and grad.ndim >= num_batched_dims(layer) and _is_intact(before, num_samples)
            for before, grad in zip(seen, grads, strict=True)
        )
        uses = (
            [_widen(before.inputs, grad, weights) for before, grad in zip(seen, grads, strict=True)] if intact else []
        )
        for local, name in names.items():
            if intact and name in trusted:
                sums[name] += RULES[type(layer)][local](layer, uses, magnitude)
            else:
                refused.add(name)

    recorder = _Recorder(consume)
    with _recording(layers, recorder):
        values = scores(batch)
        num_samples = len(values)
        if recorder.leaves and values.requires_grad:
            torch.autograd.grad(values.sum(), recorder.leaves, allow_unused=True)
        recorder.finish()
    return Passed(values.detach(), used, refused)


def _is_intact(seen: _Seen, num_samples: int) -> bool:
    """Whether the samples come first, and nothing changed since the layer saw it."""
    inputs = seen.inputs
    return inputs.ndim > 0 and len(inputs) == num_samples and inputs._version == seen.version


def _widen(inputs: Tensor, grad: Tensor, weights: Tensor | None) -> Use:
    """The use in float32 at least, its gradient weighted by sample."""
    if grad.dtype in (torch.float16, torch.bfloat16):
        grad = grad.float()
    if inputs.is_floating_point():
        inputs = inputs.to(grad.dtype)
    if weights is not None:
        grad = grad * weights.to(grad.dtype).view(-1, *[1] * (grad.ndim - 1))
    return Use(inputs, grad)


def gradients(scores: Tensor, parameters: Mapping[str, nn.Parameter]) -> Sums:
    """d scores / d parameter by autograd; zero where there is no path."""
    if not scores.requires_grad:
        return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    grads = torch.autograd.grad(scores, list(parameters.values()), allow_unused=True)
    found = zip(parameters.items(), grads, strict=True)
    return {
        name: torch.zeros_like(p) if grad is None else (grad.to_dense() if grad.is_sparse else grad)
        for (name, p), grad in found
    }


def check_finite(sums: Sums) -> None:
    """Refuse gradients that are NaN or infinite where the output was finite."""
    broken = [name for name, total in sums.items() if not bool(total.isfinite().all())]
    if broken:
        raise OutputError(
            f"the gradient of {', '.join(broken[:5])}{' ...' if len(broken) > 5 else ''} is NaN or infinite for at "
            "least one sample, though the output is finite: look for a square root, logarithm or division at zero "
            "in the forward pass."
        )


@contextmanager
def requiring_grad(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let the shadow's parameters take part in autograd for a while."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def add_by_samples(
    sums: Sums,
    parameters: Mapping[str, nn.Parameter],
    scores: Scores,
    batch: Any,
    magnitude: Magnitude,
    *,
    together: Tensor,
    tolerance: float = TOLERANCE,
    weights: Tensor | None = None,
) -> None:
    """Add sum_k f(w_k g_k) of one batch, one sample at a time: for any model whatever, at the price of a loop.

    Args:
        sums, scores, batch, magnitude, weights: as in `add_by_rules`.
        parameters: those to measure; none only checks that the samples do not interact.
        together: (B,), the objective of each sample as it came out of the whole batch.
        tolerance: by how much of the largest a sample alone may differ from that.

    Raises:
        SamplesInteractError: a sample alone gives something else.
        ModelError: the model fails on a single sample.
    """
    with requiring_grad(parameters.values()):
        for k, sample in enumerate(samples(batch)):
            try:
                score = scores(sample, k).sum()
            except BatchError as error:
                raise ModelError(
                    f"the model takes the batch, but fails on sample {k} alone, so it cannot be seen whether its "
                    f"samples interact: {error.__cause__!r}. Look for a normalisation over the batch, or a squeeze()."
                ) from error
            if not float((score.detach() - together[k]).abs()) <= tolerance * float(together.abs().max()):
                raise samples_interact(f"the objective of sample {k}")
            if parameters:
                for name, grad in gradients(score, parameters).items():
                    wide = grad.to(sums[name].dtype, copy=True)
                    sums[name] += magnitude(wide if weights is None else wide * weights[k])


def samples_interact(what: str) -> SamplesInteractError:
    """The error for a batch of which no sample can be looked at alone."""
    return SamplesInteractError(
        f"{what} changes with the other samples of the batch, so there is no importance per sample. Look for a "
        "normalisation that uses batch statistics in eval mode (track_running_stats=False), outputs that compare "
        "samples (a contrastive loss), random numbers in the forward pass, or something in the batch that belongs to "
        "the samples but does not look so (make it a tensor, samples first); or give an output per sample through "
        "forward=."
    )
