"""Objectives: from a model and a batch to the scalars per sample that are differentiated.

Owns running the model, choosing the tensor in its output (a dict, tuple or ModelOutput), the objectives and the
estimators. Also owns the checks of the objective values: finite, one per sample, dependent on the weights.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn

from memsyn.batches import Batch, call
from memsyn.engine.recorder import Recorder
from memsyn.errors import BatchError, MemsynError, ModelError, OptionError, OutputError
from memsyn.kernels.rules import MAGNITUDES
from memsyn.measuring.padding import Padding
from memsyn.torch_private import is_out_of_memory, without_function_modes

EMBEDDINGS = ("embeddings", "sentence_embedding", "image_embeds", "text_embeds")
HIDDEN = "last_hidden_state"


def output_tensor(output: object) -> Tensor:
    """Choose the tensor to measure in a model's output.

    A tensor is taken as it is. In a mapping (a ModelOutput is one), the first of these that exists is taken: `logits`,
    embeddings, `last_hidden_state`. Otherwise the output must hold exactly one tensor, and beside it only None, numbers
    and text: any other object (a distribution, a cache, a nested tuple) may hold tensors that count too.

    Raises:
        OutputError: no single tensor can be chosen.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        entries = dict(output)
        for keys in (("logits",), EMBEDDINGS, (HIDDEN,)):
            found = [entries[key] for key in keys if isinstance(entries.get(key), Tensor)]
            if len(found) == 1:
                chosen: Tensor = found[0]
                return chosen
            # Several embeddings, for instance of image and text: none of them is the output.
            if found:
                break
        named = f"a mapping with keys {', '.join(map(repr, entries)) or '(none)'}"
    elif isinstance(output, Sequence) and not isinstance(output, str):
        entries = dict(enumerate(output))
        named = f"a {type(output).__name__} of {', '.join(type(entry).__name__ for entry in output) or 'nothing'}"
    else:
        entries, named = {}, f"a {type(output).__name__}"
    candidates = [entry for entry in entries.values() if not _is_plain(entry)]
    if len(candidates) == 1 and isinstance(candidates[0], Tensor):
        return candidates[0]
    raise OutputError(
        f"expected as the model's output a tensor, a mapping with 'logits' or one kind of embeddings, or a mapping or "
        f"sequence with a single tensor and nothing else that may hold one; got {named}. Say which tensor counts: "
        "forward=lambda model, batch: model(batch[0])[...]"
    )


def _is_plain(entry: object) -> bool:
    """Whether a part of an output holds no tensor for certain: None, a number, text, or a container of these."""
    if isinstance(entry, Mapping):
        return all(map(_is_plain, entry.values()))
    if isinstance(entry, (tuple, list, set, frozenset)):
        return all(map(_is_plain, entry))
    return entry is None or isinstance(entry, (str, bytes, int, float, complex, np.generic, torch.dtype, torch.device))


@dataclass(frozen=True)
class SampleInfo:
    """What an objective gets besides the output."""

    first_sample: int
    """The index of the first sample, counted over all batches."""
    labels: Tensor | None = None
    """(samples, ...), the labels from the batch."""


Objective = Callable[[Tensor, SampleInfo], Tensor]
"""(output (B, ...), info) -> (B,), or (B, R) for R scalars per sample. Each scalar is differentiated separately."""


def squared_l2_norm(output: Tensor, info: SampleInfo) -> Tensor:
    """s_k = ||y_k||^2, summed over all outputs of sample k: the objective of MAS (Aljundi et al. 2018, section 4.1)."""
    return output.square().flatten(1).sum(1)


def squared_l2_norm_of_probabilities(output: Tensor, info: SampleInfo) -> Tensor:
    """s_k = ||softmax(y_k)||^2: MAS on probabilities. The classes are the last dimension."""
    return output.softmax(-1).square().flatten(1).sum(1)


def each_output(output: Tensor, info: SampleInfo) -> Tensor:
    """Every output separately, (B, R). This needs one backward pass per output."""
    return output.flatten(1)


def log_likelihood(output: Tensor, info: SampleInfo) -> Tensor:
    """log p(label_k | x_k) of logits (B, classes): the empirical Fisher's objective (Kirkpatrick et al. 2017)."""
    labels = info.labels
    if labels is None or labels.is_floating_point() or labels.shape != output.shape[:1]:
        given = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise BatchError(
            "this estimator needs one class number per sample: give (input, label) batches, or mappings with 'labels'. "
            f"Got {given}."
        )
    return _log_probabilities(output).gather(1, labels.unsqueeze(1)).squeeze(1)


def sampled_log_likelihood(output: Tensor, info: SampleInfo) -> Tensor:
    """log p(c_k | x_k) for a class c_k drawn from p(. | x_k): an unbiased estimate of the Fisher information.

    Sample k, counted over all batches, uses a generator with seed k. So its class does not depend on the batch size or
    the split.
    """
    log_p = _log_probabilities(output)
    drawn = []
    for k, row in enumerate(log_p.detach().exp().cpu()):
        # On the CPU, since the generators of other devices give other numbers for the same seed.
        drawn.append(torch.multinomial(row, 1, generator=torch.Generator().manual_seed(info.first_sample + k)))
    return log_p.gather(1, torch.stack(drawn).to(log_p.device)).squeeze(1)


def expected_log_likelihood(output: Tensor, info: SampleInfo) -> Tensor:
    """sqrt(p_c) log p_c for every class c, (B, classes). The factor sqrt(p_c) is detached.

    So the squared gradients add up to the Fisher information: sum_c p_c (d log p_c / d theta)^2.
    """
    log_p = _log_probabilities(output)
    return (0.5 * log_p.detach()).exp() * log_p


def signed_outputs(output: Tensor, info: SampleInfo) -> Tensor:
    """sum_o v_ko y_ko with random signs v, (B,): with d = J^T v, the mean of d d^T over the signs is sum_o J_o^T J_o.

    The signs of sample k, counted over all batches, depend on k alone: not on the batch size, the split or the device.
    """
    flat = output.flatten(1)
    return (flat * _signs(info.first_sample, len(flat), flat.shape[1], flat.device).to(flat)).sum(1)


def _signs(first: int, num_samples: int, num_outputs: int, device: torch.device) -> Tensor:
    """Random signs for the samples from `first` on, (B, R). Each 64 signs of a sample are the bits of one number.

    That number is mixed from the places of the sample and of the 64 signs, as SplitMix64 does (Steele et al. 2014), for
    all samples at once. A generator for each sample took a third of a small network's pass.
    """
    samples = torch.arange(first, first + num_samples, device=device).unsqueeze(1)
    blocks = torch.arange(1, math.ceil(num_outputs / 64) + 1, device=device)
    # int64 wraps around. A right shift copies its sign, which the mask takes off again.
    words = samples * -0x61C8864680B583EB + blocks * -0x4B47D0C5A14D4C25
    words = (words ^ (words >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
    words = (words ^ (words >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    words = words ^ (words >> 31 & 2**33 - 1)
    # First bytes, then bits: eight bytes for each output of a large vocabulary would be much memory.
    whole = (words.unsqueeze(2) >> torch.arange(0, 64, 8, device=device)).to(torch.uint8)
    bits = whole.unsqueeze(3) >> torch.arange(8, dtype=torch.uint8, device=device) & 1
    return bits.flatten(1)[:, :num_outputs].to(torch.int8).mul_(2).sub_(1)


def _log_probabilities(output: Tensor) -> Tensor:
    if output.ndim != 2 or output.shape[1] < 2:
        raise OutputError(
            f"this estimator needs logits of shape (samples, classes), two classes or more; got {tuple(output.shape)}. "
            "Choose them with forward=lambda model, batch: ..."
        )
    return output.log_softmax(1)


@dataclass(frozen=True)
class Estimator:
    """What to measure: an objective s and a magnitude f.

    The importance of a weight is 1/N sum_k sum_r f(d s_kr / d theta), over N samples k and the scalars r of a sample.

    Attributes:
        objective: (output (B, ...), info) -> (B,) or (B, R). Its name is stored in the memory, so give a custom
            objective a name.
        magnitude: "abs" or "square".
        local: take the objective of every layer's own output, and differentiate it only by this layer's parameters.
            Only for the squared L2 norm.
        factors: what to sum for weight matrices instead of f. "both" is for the Kronecker factors: the second moments
            of their inputs and of the objective's gradients at their outputs. "inputs" is for the first alone, by
            forward passes. None is for an importance per weight.

    Raises:
        OptionError: the magnitude or the factors are unknown, or a local objective is not the squared L2 norm.

    Example:
        >>> import memsyn
        >>> def entropy(output, info):  # logits (B, classes) -> (B,)
        ...     log_p = output.log_softmax(1)
        ...     return -(log_p.exp() * log_p).sum(1)
        >>> memsyn.Estimator(entropy, "abs").name
        'entropy'
    """

    objective: Objective
    magnitude: str = "abs"
    local: bool = False
    factors: str | None = None

    def __post_init__(self) -> None:
        if self.factors not in (None, "inputs", "both") or (self.factors and self.local):
            raise OptionError(f"factors must be None, inputs or both, and not local; got {self.factors!r}.")
        if self.local and self.objective is not squared_l2_norm:
            raise OptionError(
                f"only squared_l2_norm can be taken layer by layer, not {self.name}. Leave out local=True."
            )
        if self.magnitude not in MAGNITUDES:
            raise OptionError(f"magnitude must be one of {', '.join(MAGNITUDES)}; got {self.magnitude!r}.")

    @property
    def needs_labels(self) -> bool:
        """Whether batches must give labels."""
        return self.objective is log_likelihood

    @property
    def name(self) -> str:
        """The objective's name."""
        own: str = getattr(self.objective, "__name__", type(self.objective).__name__)
        return f"{own} of each layer" if self.local else own


ESTIMATORS: Final = {
    "mas": Estimator(squared_l2_norm),
    "mas-local": Estimator(squared_l2_norm, local=True),
    "mas-probabilities": Estimator(squared_l2_norm_of_probabilities),
    "mas-vector": Estimator(each_output),
    "fisher": Estimator(expected_log_likelihood, "square"),
    "fisher-sampled": Estimator(sampled_log_likelihood, "square"),
    "fisher-empirical": Estimator(log_likelihood, "square"),
    "kronecker": Estimator(signed_outputs, "square", factors="both"),
    "inputs": Estimator(signed_outputs, "square", factors="inputs"),
}
"""The estimators by name.

MAS: on the output, on each layer's own output (local), on probabilities, and on each output separately. The diagonal
Fisher information: exact over the model's own distribution (one backward pass per class), with one label drawn from
this distribution, and with the labels of the batch. Kronecker factors: of inputs and output
gradients, and of inputs alone.
"""


def find_estimator(estimator: str | Estimator) -> Estimator:
    """The estimator with this name; an `Estimator` is returned as it is.

    Raises:
        OptionError: the name is unknown.
    """
    if isinstance(estimator, Estimator):
        return estimator
    if estimator not in ESTIMATORS:
        raise OptionError(f"estimator must be one of {', '.join(ESTIMATORS)}, or an Estimator; got {estimator!r}.")
    return ESTIMATORS[estimator]


def scores(
    objective: Objective,
    output: Tensor,
    info: SampleInfo,
    *,
    num_samples: int | None,
    mask: Tensor | None,
    batch_index: int,
    first_in_batch: int,
) -> Tensor:
    """Compute and check the objective of every sample.

    Args:
        objective: the objective.
        output: (samples, ...), the raw output. Half precision is converted to float32.
        info: passed to the objective.
        num_samples: the number of samples in the batch, if known.
        mask: (samples, positions): the positions of an output (samples, positions, ...) that are not padding; None if
            all count.
        batch_index, first_in_batch: the position of the samples, for errors.

    Returns:
        (samples, R), with a gradient if the output has one.

    Raises:
        OutputError: the first dimension is not the number of samples, or a sample's objective is not finite.
    """
    where = f"batch {batch_index}"
    check_rows_and_dtype(output, num_samples, batch_index)
    # The square of 256 is 65,536, but the largest number in float16 is 65,504.
    if output.dtype in (torch.float16, torch.bfloat16):
        output = output.float()
    if mask is not None:
        counts = mask.view(*mask.shape, *[1] * (output.ndim - 2)) != 0
        # Not a product with the mask: padding may hold NaN or infinity, and NaN * 0 is NaN.
        output = torch.where(counts, output, torch.zeros((), dtype=output.dtype, device=output.device))
    if output.ndim == 1:
        output = output.unsqueeze(1)
    values = objective(output, info)
    if values.shape[:1] != output.shape[:1] or values.ndim > 2:
        raise OutputError(
            f"{where}: the objective must return one scalar per sample, (B,), or several, (B, R); for {len(output)} "
            f"samples its shape is {tuple(values.shape)}."
        )
    if not bool(values.isfinite().all()):
        bad = ~values.reshape(len(values), -1).isfinite().all(1)
        sample = int(bad.nonzero()[0, 0])
        what = "overflows when squared" if bool(output[sample].isfinite().all()) else "is NaN or infinite"
        raise OutputError(
            f"{where}, sample {first_in_batch + sample}: the output {what}. Check this input, or leave it out: "
            "one such sample makes the whole importance useless."
        )
    return values.reshape(len(values), -1)


def check_rows_and_dtype(output: Tensor, num_samples: int | None, batch_index: int) -> None:
    """Refuse an output that is not one row of floating point numbers for each sample.

    Raises:
        OutputError: the first dimension is not the number of samples, or the numbers are whole.
    """
    where = f"batch {batch_index}"
    if output.ndim == 0 or (num_samples is not None and output.shape[0] != num_samples):
        raise OutputError(
            f"{where}: the output's first dimension must be the samples; for {num_samples or 'some'} "
            f"samples its shape is {tuple(output.shape)}. A mean loss is not enough, since each sample counts for "
            "itself. Return the raw outputs, or choose them with forward=lambda model, batch: ... If the batch is one "
            "sample, say so: split=lambda batch: [batch]."
        )
    if not output.is_floating_point():
        raise OutputError(
            f"{where}: the output is {output.dtype}, which has no gradient. Return the raw outputs "
            "(logits), not classes or flags, or choose them with forward=lambda model, batch: ..."
        )


def check_holds_samples(output: object, batch: Batch, batch_index: int) -> None:
    """Refuse a batch if the output has other samples. Time may come before them: (time, samples, features).

    Raises:
        OutputError: no dimension of the output is as long as the batch, the last one of several aside.
    """
    if not isinstance(output, Tensor) or output.ndim == 0 or batch.num_samples is None:
        return
    if batch.num_samples not in output.shape[: max(1, output.ndim - 1)] and not batch.whole:
        raise OutputError(
            f"batch {batch_index}: its first dimension was taken for {batch.num_samples} samples, but no dimension of "
            f"the output {tuple(output.shape)} holds so many. Say what the samples are: split=lambda batch: [...], a "
            "list of batches of one sample each."
        )


# Running a model


Forward = Callable[[nn.Module, Any], Any]
"""(model, batch) -> output: runs a model that does not take the batch itself."""


class Position(NamedTuple):
    """The position of some samples in the data."""

    batch_index: int
    first_sample: int
    """The index of the first sample, counted over all batches."""
    first_in_batch: int = 0
    """The index of the first sample in its batch."""

    def moved(self, num_samples: int) -> "Position":
        """The position `num_samples` later in the same batch."""
        return Position(self.batch_index, self.first_sample + num_samples, self.first_in_batch + num_samples)


class Scorer(ABC):
    """Runs a model on a batch, and returns the objectives of its samples."""

    tells_samples_apart: bool
    """Whether row k of the scores belongs to sample k. If not, only the sum of all rows has a meaning."""

    def __init__(self, forward: Forward | None, estimator: "Estimator") -> None:
        self.forward: Forward = forward or call
        self.masks_padding = forward is None
        self.estimator = estimator

    @abstractmethod
    def scores(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batch: Batch,
        position: Position,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """(B, R), the objectives of each sample.

        Args:
            model: the clone that is measured, or another clone of the user's model.
            parameters: name -> parameter of this model, for the parameters that are measured.
            batch: the batch. The forward pass may change its inputs.
            position: the position of the batch's first sample.
            recorder: records the uses of parameters, if given.
        """

    @abstractmethod
    def check_complete(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, batch_index: int
    ) -> None:
        """Refuse parameters that the output depends on, if the objectives do not depend on them."""

    def output(self, model: nn.Module, inputs: Any, batch_index: int) -> Any:
        """Run the model.

        Raises:
            BatchError: the model failed. The cause is the model's own error.
        """
        try:
            return self.forward(model, inputs)
        except MemsynError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise BatchError(
                f"batch {batch_index}: the model failed on it: {type(error).__name__}: {error}. If the model needs "
                "another call, pass it: forward=lambda model, batch: ..."
            ) from error


@final
class OutputScorer(Scorer):
    """The estimator's objective of the model's output."""

    tells_samples_apart = True

    def __init__(self, forward: Forward | None, estimator: Estimator) -> None:
        super().__init__(forward, estimator)
        self._padding = Padding()

    def scores(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batch: Batch,
        position: Position,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """(B, R), the estimator's objective of each sample's output."""

        output = output_tensor(self.output(model, batch.inputs, position.batch_index))
        with without_function_modes():  # no parameter is used any more
            return scores(
                self.estimator.objective,
                output,
                SampleInfo(position.first_sample, batch.labels),
                num_samples=batch.num_samples,
                mask=self.mask_of(output, model, batch, position.batch_index),
                batch_index=position.batch_index,
                first_in_batch=position.first_in_batch,
            )

    def asks_for_positions(self, batch: Batch) -> bool:
        """Whether `scores` of this batch would run the model once more, to learn which outputs are padding."""
        return self.masks_padding and self._padding.is_unknown_for(batch.inputs)

    def mask_of(self, output: Tensor, model: nn.Module, batch: Batch, batch_index: int) -> Tensor | None:
        """(samples, positions), not 0 where a position of the output is no padding; None if all of the output counts.

        Raises:
            OutputError: the batch has a mask that cannot be applied to the output.
        """

        def run(inputs: Any) -> Tensor:
            return output_tensor(self.output(model, inputs, batch_index))

        inputs = batch.inputs if self.masks_padding else None
        return self._padding.mask_of(output, model, inputs, run, batch_index)

    def check_complete(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, batch_index: int
    ) -> None:
        """Refuse nothing: the objectives are computed from the whole output."""


# Checks that the scores depend on the weights of the clone, along paths that autograd sees


class ConstantError(OutputError):
    """The objective does not depend on any weight."""


def check_dependence(values: Tensor, own: Iterable[nn.Parameter]) -> None:
    """Check that the objective depends on the clone, and not on the user's model.

    Args:
        values: the objectives.
        own: the parameters of the user's model that take a gradient; there may be none.

    Raises:
        ModelError: it depends on the user's model.
        OutputError: it depends on no parameter.
    """
    if values.requires_grad:
        _check_graph(values)
        refuse_users_own(values, own)
    else:
        raise OutputError(
            "the model's output has no gradient with respect to any trainable parameter. Check whether its forward "
            "runs under torch.no_grad(), detaches the output, or skips the trainable part."
        )


def refuse_users_own(values: Tensor, own: Iterable[nn.Parameter]) -> None:
    """Refuse values that depend on the user's model, not on the clone that the forward pass was given.

    Args:
        values: the objectives or the output, with a graph.
        own: the parameters of the user's model that take a gradient; there may be none.

    Raises:
        ModelError: they depend on a parameter of the user's model.
    """
    given = list(own)
    user_grads = torch.autograd.grad(values.sum(), given, retain_graph=True, allow_unused=True) if given else ()
    if any(grad is not None for grad in user_grads):
        raise ModelError(
            "the forward pass uses your model itself, not the model that it gets. In forward=lambda model, batch: "
            "..., use that model. In a module, a hook or a patched method, use self, not a variable from outside."
        )


def check_cached(values: Tensor, cached: Mapping[str, Tensor]) -> None:
    """Refuse tensors that were computed from weights before the forward pass: in the clone they are constants.

    Raises:
        ModelError: the objective depends on such a tensor.
    """
    if cached:
        grads = torch.autograd.grad(values.sum(), list(cached.values()), retain_graph=True, allow_unused=True)
        used = [name for name, grad in zip(cached, grads, strict=True) if grad is not None]
        if used:
            raise ModelError(
                f"{', '.join(used)} was computed from weights before the forward pass and cached, so the importance of "
                "those weights cannot be measured. Compute it in the forward pass, or register it as a parameter."
            )


def _check_graph(values: Tensor) -> None:
    """Refuse reentrant checkpoints, since they hide their parameters from autograd.grad.

    Raises:
        ModelError: the graph holds one.
    """
    seen, nodes = set(), [values.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise ModelError(
                "the forward pass uses reentrant checkpoints. Their parameters cannot be measured. Call "
                "torch.utils.checkpoint with use_reentrant=False."
            )
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]


def check_not_constant(values: Tensor, parameters: Mapping[str, nn.Parameter], total_norm: float) -> None:
    """Refuse an objective that no weight can change: its gradient consists only of rounding errors.

    To first order, a relative change r of the weights theta changes the objective s by at most r |g| |theta|, where g
    is its gradient. The objective counts as constant if |g| |theta| < 1e-9 |s|.

    Raises:
        ConstantError: the objective is constant.
    """
    least, size = 1e-9 * float(values.detach().abs().sum()), 0.0
    # Small parameters first: most often a few of them reach the limit, so the norms of large ones are not needed.
    for parameter in sorted(parameters.values(), key=Tensor.numel):
        size = math.hypot(size, total_norm * float(parameter.detach().norm()))
        if size >= least:
            return
    if size > 0:
        raise ConstantError(
            "the objective is the same for all weights, as the squared norm of a normalised output is, so it says "
            "nothing about their importance. Measure the output before the normalisation: "
            "forward=lambda model, batch: ..."
        )
