"""measure(model, batches) -> Importance: the loop over the data.

Owns the arguments, the progress bar, and the state of random generators. `measurement` processes each batch.
"""

import os
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, final, overload

import numpy as np
import torch
from torch import nn

from memsyn.adapters import has_adapters
from memsyn.batches import (
    Batch,
    BatchSplit,
    Samples,
    are_items,
    check_iterable,
    first_samples,
    in_samples,
    labels_of,
    model_input,
)
from memsyn.errors import MemsynError, ModelError, OptionError, SlowParametersWarning
from memsyn.measuring.distributed import ProcessGroup, fail_together, group_of, rank_and_size
from memsyn.measuring.factor_scorer import FactorScorer
from memsyn.measuring.in_effect import EFFECTIVE, in_base_names, model_to_measure
from memsyn.measuring.measurement import Measurement, describe_slow
from memsyn.measuring.model_copy import check_measurable
from memsyn.measuring.objectives import Estimator, Forward, OutputScorer, Scorer, find_estimator
from memsyn.measuring.resume import Checkpoint
from memsyn.measuring.sharded_measurement import ShardedMeasurement, measure_in_place
from memsyn.measuring.sharded_model import ShardedModel, is_sharded_model, lost_processes
from memsyn.parameters import refuse_other_sharding, trainable_parameters
from memsyn.progress import progress_bar
from memsyn.values.factors import KroneckerFactors
from memsyn.values.importance import Importance


@overload
def measure(  # type: ignore[overload-overlap]
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: Literal["kronecker", "inputs"],
    forward: Forward | None = ...,
    max_samples: int | None = ...,
    batched: bool = ...,
    group: ProcessGroup | None = ...,
    progress: bool = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    every: float = ...,
    rank: int | None = ...,
    split: BatchSplit | None = ...,
    weights: str | None = ...,
) -> KroneckerFactors: ...


@overload
def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = ...,
    max_samples: int | None = ...,
    estimator: str | Estimator = ...,
    batched: bool = ...,
    group: ProcessGroup | None = ...,
    progress: bool = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    every: float = ...,
    rank: int | None = ...,
    split: BatchSplit | None = ...,
    weights: str | None = ...,
) -> Importance: ...


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_samples: int | None = None,
    estimator: str | Estimator = "mas",
    batched: bool = False,
    group: ProcessGroup | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    every: float = 60.0,
    rank: int | None = None,
    split: BatchSplit | None = None,
    weights: str | None = None,
) -> Importance | KroneckerFactors:
    """Measure what a model relies on, from unlabelled data: an importance per weight, or directions per weight matrix.

    Omega = 1/N sum_k |d s(F(x_k; theta)) / d theta|, where s is the squared L2 norm of the raw output, summed over
    every non-batch dimension (Aljundi et al. 2018, Eq. 2). The absolute value is taken per sample. So the result does
    not depend on the batch size, the order or the split of the data. What it costs is in docs/performance.md.
    Parameters without a fast route are measured one sample at a time, and a warning names them.

    estimator="mas-local" takes every layer's own output, and needs only forward passes (same paper; for ReLU it is
    Hebb's rule): Omega_ij = 1/N sum_k |sum_p 2 y_kip phi'(z_kip) a_kjp|. Here a is the layer's input, z = W a + b, y =
    phi(z), and p runs over the positions or tokens of a sample. phi is the chain of elementwise operations and reshapes
    after the layer (activations, batch normalisation in eval mode, the addition of a table). phi ends before an
    operation that reads another tensor of the sample. Layers that do not run, or run under no_grad, have zero
    importance. Padding is left out in tensors (samples, tokens, ...) and (samples * tokens, features). In models with a
    decoder it is not left out.

    estimator="kronecker" takes, for each weight matrix, the second moments of its inputs and of the gradients of its
    outputs: A = E[x x^T] and S = E[d d^T]. Here d = J^T v for random signs v at the outputs, so that on average S =
    sum_o J_o^T J_o. They are sums over samples, tokens, positions and uses, so that batch size, order and split do not
    matter. The signs belong to the place of a sample in the data. Linear layers, convolutions and their transposes,
    tables, attention and recurrent layers are matrices, with their biases. Norms and all other parameters get 1/N sum_k
    (d sum_o v_o y_o / d theta)^2. estimator="inputs" takes A alone, and needs only forward passes. Their result is for
    `protect(form="projected")` and `Memory.predicted_change`. Padding tokens are not counted as inputs, as for
    "mas-local".

    Padding tokens in outputs (samples, tokens, ...) are left out, if the batch has an `attention_mask` (for a decoder,
    a `decoder_attention_mask`). Speech models of transformers leave out the frames of padding, by their own rule; with
    peft's prompt tuning, the virtual tokens count. A mask that cannot be applied to the output is an error. If you pass
    `forward`, mask padding yourself.

    The model is measured in eval mode, on a clone that shares its weights. The model itself stays bit for bit the same.

    Args:
        model: any module. Parameters that do not require a gradient are left out.
        batches: a DataLoader or any iterable of batches. A batch is a tensor, an (input, target) tuple or list (the
            target is ignored), or a mapping (passed as keyword arguments, without labels). The first dimension of every
            tensor is the samples. Batches are moved to the model's device. These batches are taken apart, and measured
            one sample at a time: a list of tensors of unlike sizes, a PackedSequence, a nested tensor, a batch of
            torch_geometric, and rows of packed sequences (`position_ids` that start again, or `cu_seqlens`). A batch
            with one output row, as a bag of images has, is one sample.
        forward: (model, batch) -> output, for all other batches and models. Use the model that it gets, not your own.
        max_samples: stop after this many samples.
        estimator: what to measure: a name in `ESTIMATORS`, or an `Estimator`. "fisher-empirical" needs labels.
        batched: take the magnitude of each batch's mean gradient, not of each sample's gradient, as most other
            libraries do. The result depends on the batch size and is too small. Use it for comparisons only.
        group: the process group that measures together. Each process has its own batches, or none, and all get the
            importance of all samples. By default, the group of a DistributedDataParallel model.
        progress: show a progress bar.
        checkpoint: a file from which the same call continues after an interruption: a kill, an error of the loader,
            Ctrl-C. It reads the finished batches without measuring them. The final sums are bit for bit the same, on
            the same machine. Give the same weights, and the same batches in the same order and sizes: torch's global
            generator is set to its state at the start of the pass, for loaders that shuffle with it. Weights,
            settings and some numbers of every batch are compared. The file is an `Importance` of the samples so far. It
            is removed at the end, so save the result. In a group, each process needs its own path.
        every: seconds between writes of the checkpoint.
        rank: for "kronecker" and "inputs": matrices wider than four times the rank keep a sketch of 2 * rank columns in
            place of their second moments. By default, those wider than 2,048 keep a sketch of 256 columns. What a
            sketch lost is known: see `KroneckerFactors.lost`.
        split: batch -> a list of batches of one sample each, for batches that memsyn cannot take apart. They are
            measured one at a time.
        weights: what is measured of a model with adapters of PEFT, which must be said. "effective": the weights of the
            base model in effect, W + s B A, under the names of the base model, also those that PEFT has frozen. The
            model is measured with its adapters merged, on a copy. Of a quantised base, "inputs" and "kronecker" are
            measured at A and B, without W: the weights that are not adapted are then left out. "adapters": A, B and
            what else trains, under its own names. Other models have their weights in effect, and it may be left out.

    Returns:
        The importance of every parameter that requires a gradient, as sums and a count; `KroneckerFactors` for
        estimators of factors.

    Raises:
        BatchError: there are no samples, or the batches cannot be read.
        ModelError: there is nothing to measure, or the model cannot be cloned.
        OutputError: the output is not one finite, differentiable value or vector per sample.
        SamplesInteractError: the output for one sample depends on the other samples.
        ProcessError: another process of the group has failed.
        MismatchError: the checkpoint belongs to other weights or settings.
        MemoryFileError: the checkpoint cannot be read or written.

    Example:
        >>> import torch, memsyn
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = [torch.tensor([[1.0, 2.0], [3.0, -3.0]])]  # outputs 3 and 0: d y^2 / d w = 2 y x
        >>> memsyn.measure(model, data, progress=False).mean()["weight"].tolist()
        [[3.0, 6.0]]
    """
    check_iterable(batches)
    if max_samples is not None and (not isinstance(max_samples, int) or max_samples < 1):
        raise OptionError(f"max_samples must be a whole number, at least 1; got {max_samples!r}.")
    chosen = find_estimator(estimator)
    _check_options(chosen, batched=batched, checkpoint=checkpoint, rank=rank)
    check_measurable(model)
    refuse_other_sharding(model)
    length, read = length_of(batches, max_samples), _read(batches, split, max_samples, has_forward=forward is not None)
    if is_sharded_model(model):
        refused = {"batched": batched, "checkpoint": checkpoint, "group": group}
        refused |= {"weights": weights == EFFECTIVE and has_adapters(model)}
        _check_sharded_options(chosen, refused)
        model_to_measure(model, weights, chosen)
        scorer = FactorScorer(forward, chosen, rank) if chosen.factors else OutputScorer(forward, chosen)
        bar = progress_bar(read, "measuring", total=length, unit="batch", shown=progress)
        return _measure_sharded(model, bar, scorer)
    group, given = group or group_of(model), model
    model = model_to_measure(model, weights, chosen)
    trainable = trainable_parameters(model)
    if not trainable:
        raise ModelError("the model has no parameter that requires a gradient: there is nothing to measure.")
    device = next(iter(trainable.values())).device
    resumable = None if checkpoint is None else Checkpoint(checkpoint, every)
    # The order matters. `fail_together` ends before `write_on_failure`, so that a process also writes its file if only
    # another process has failed.
    with (
        untouched_generators(),
        nullcontext() if resumable is None else resumable.write_on_failure(),
        fail_together(group, device),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        measurement = Measurement(model, trainable, device, forward, chosen, batched=batched, rank=rank)
        if resumable is not None:
            settings = {**measurement.settings(), "max_samples": max_samples, "process": rank_and_size(group)}
            settings |= {"whether there is a split": True} if split is not None else {}
            resumable.begin(settings, measurement.state, measurement.restore)
        reader = _Reader(measurement, can_guess=max_samples is None)
        _add_batches(reader, read, resumable, length=length, progress=progress)
    result = measurement.result(group)
    if resumable is not None:
        resumable.finish()
    return in_base_names(result, given, weights)


def _read(
    batches: Iterable[Any], split: BatchSplit | None, max_samples: int | None, *, has_forward: bool
) -> Iterator[Any]:
    """The batches in samples. Nothing is read before the first is asked for: a DataLoader then draws random numbers."""
    yield from first_samples((in_samples(batch, split, has_forward=has_forward) for batch in batches), max_samples)


def _check_sharded_options(estimator: Estimator, refused: Mapping[str, object]) -> None:
    """Refuse what is not for sharded models: an estimator, or an option that was given.

    Raises:
        OptionError: says which.
    """
    given = [f"{name}=" for name, value in refused.items() if value]
    given += ["estimator='mas-local'"] if estimator.local else []
    if given:
        cure = "leave it out."
        if given[0] == "checkpoint=":
            cure = "measure the data in parts, save what each gives, and add them up."
        raise OptionError(f"{given[0]} is not for a sharded model: {cure}")


def _measure_sharded(
    model: nn.Module, batches: Iterable[Any], scorer: OutputScorer | FactorScorer
) -> Importance | KroneckerFactors:
    """`measure` of a model of which each process holds a part, in place."""
    sharded = ShardedModel(model)
    trainable = {name: p for name, p in sharded.weights.items() if p.requires_grad}
    if not trainable:
        raise ModelError("the model has no parameter that requires a gradient: there is nothing to measure.")

    def parts(batch: Any) -> list[Batch]:
        if isinstance(batch, Samples):
            return [batch_to_measure(scorer, sample, whole=True) for sample in batch]
        return [batch_to_measure(scorer, batch, whole=False)]

    def warn(slow: set[str]) -> None:
        warnings.warn(describe_slow(model, slow, len(trainable)), SlowParametersWarning, stacklevel=5)

    with (
        untouched_generators(),
        lost_processes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(sharded.device.type, enabled=False),
        sharded.in_evaluation(),
    ):
        measurement = ShardedMeasurement(sharded, trainable, scorer)
        measure_in_place(measurement, sharded, map(parts, batches), warn)
        return measurement.result()


def _check_options(estimator: Estimator, *, batched: bool, checkpoint: object, rank: object) -> None:
    """Refuse options that do not go with the estimator.

    Raises:
        OptionError: says which.
    """
    if estimator.factors is None:
        if rank is not None:
            raise OptionError("rank is for estimator='kronecker' and 'inputs': leave it out.")
        return
    if batched:
        raise OptionError("batched=True takes the magnitude of a mean gradient: factors have none. Leave it out.")
    if checkpoint is not None:
        raise OptionError(
            "factors are measured without a checkpoint: measure the data in parts, save each part, and add them up."
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise OptionError(f"rank must be a whole number, at least 1, or None; got {rank!r}.")


@final
class _Reader:
    """Reads batches as the loader gives them, and adds them to a measurement.

    Args:
        measurement: the measurement.
        can_guess: whether the model's output may show that a batch holds other samples than its first dimension. Not
            with `max_samples`, which has cut the batch by its first dimension.
    """

    def __init__(self, measurement: Measurement, *, can_guess: bool) -> None:
        self.measurement, self._can_guess = measurement, can_guess
        self._has_checked_rows = False

    def add(self, batch: Any, index: int) -> set[str]:
        """Add one batch. Returns the parameters that are newly found to need one sample at a time."""
        if isinstance(batch, Samples):
            if batch.joined is not None and not self._has_checked_rows:
                rows, sequences = batch.joined
                self.measurement.check_rows(self._read(rows), [self._read(own) for own in sequences], index)
                self._has_checked_rows = True
            return set[str]().union(*[self.measurement.add(self._read(sample, whole=True), index) for sample in batch])
        try:
            return self.measurement.add(self._read(batch), index, can_guess=self._can_guess)
        except MemsynError:
            # Images of unlike sizes have as many channels each, so their list looks like an input and its target.
            if not (self._can_guess and self._masks_padding and are_items(batch)):
                raise
            return self.measurement.add(Batch.of(list(batch)), index, can_guess=True)

    @property
    def _masks_padding(self) -> bool:
        return self.measurement.scorer.masks_padding

    def _read(self, batch: Any, *, whole: bool = False) -> Batch:
        return batch_to_measure(self.measurement.scorer, batch, whole=whole)


def batch_to_measure(scorer: Scorer, batch: Any, *, whole: bool) -> Batch:
    """A batch as the loader gave it, in the form that is measured."""
    # With a `forward` of the user's, the batch is passed on as the loader gave it.
    inputs = model_input(batch) if scorer.masks_padding else batch
    return Batch.of(inputs, labels_of(batch) if scorer.estimator.needs_labels else None, whole=whole)


def _add_batches(
    reader: _Reader, batches: Iterator[Any], resumable: Checkpoint | None, *, length: int | None, progress: bool
) -> None:
    """Add all batches to the measurement, with a progress bar; those that a checkpoint holds are only read."""
    start = 0 if resumable is None else resumable.num_batches
    bar = progress_bar(
        batches if resumable is None else resumable.remaining(batches),
        "measuring",
        total=length,
        unit="batch",
        shown=progress,
        initial=start,
    )
    measurement = reader.measurement
    for index, batch in enumerate(bar, start):
        with nullcontext() if resumable is None else resumable.batch(batch):
            slow = reader.add(batch, index)
        if slow:
            words = describe_slow(measurement.model, slow, len(measurement.table.routes))
            warnings.warn(words, SlowParametersWarning, stacklevel=3)
        bar.set_postfix_str(f"{measurement.num_samples} samples, {len(measurement.table.slow)} slow parameters")


def length_of(batches: object, max_samples: int | None) -> int | None:
    """The number of batches for a progress bar; None if it is not known."""
    if max_samples is not None or not isinstance(batches, Sized):
        return None
    try:
        return len(batches)
    except TypeError:  # a DataLoader over an IterableDataset has __len__, but no length
        return None


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Restore the global random generators afterwards, since iterating a DataLoader draws from torch's generator."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
