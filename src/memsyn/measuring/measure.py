"""measure(model, batches) -> Importance: the loop over the data.

Owns the arguments, progress, and the state of random generators. What happens to a batch is in `measurement`.
"""

import os
import random
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from memsyn.batches import Batch, check_iterable, first_samples, labels_of, model_input
from memsyn.errors import ModelError, OptionError, SlowParametersWarning
from memsyn.measuring.distributed import ProcessGroup, fail_together, group_of, rank_and_size
from memsyn.measuring.measurement import Measurement
from memsyn.measuring.model_copy import check_measurable
from memsyn.measuring.objectives import Estimator, Forward, find_estimator
from memsyn.measuring.resume import Checkpoint
from memsyn.parameters import trainable_parameters
from memsyn.storage.reading_and_writing import well_formed
from memsyn.values.importance import Importance


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
) -> Importance:
    """How much each weight matters to what the model computes, from unlabelled data.

    Omega = 1/N sum_k |d s(F(x_k; theta)) / d theta|, s the squared L2 norm of the raw output, summed over every
    non-batch dimension (Aljundi et al. 2018, Eq. 2). The absolute value is taken per sample, so the result does not
    depend on the batch size, the order or the split of the data. The cost is about one ordinary forward and backward
    pass; parameters for which no fast route holds are measured one sample at a time, with a warning that names them.

    With estimator="mas-local" every layer is on its own, and forward passes are enough (the same paper; for ReLU it is
    Hebb's rule): Omega_ij = 1/N sum_k |sum_p 2 y_kip phi'(z_kip) a_kjp|, where a is the layer's input, z = W a + b, y =
    phi(z), p a sample's positions or tokens. phi is every elementwise operation and reshape that follows before y meets
    anything else of the sample: an activation, batch normalisation (in eval mode it is elementwise), a table that is
    added. Layers that do not run, or under no_grad, have zero. Padding is left out as far as tensors are (samples,
    tokens, ...) or (samples * tokens, features); with a decoder it counts.

    Tokens that the batch's `attention_mask` (with a decoder, its `decoder_attention_mask`) says are padding do not
    count in outputs (samples, tokens, ...), unless there is a `forward`, which then has to see to that.

    The model is measured in eval mode on a clone that shares its weights: it stays bit for bit as it was.

    Args:
        model: any module; parameters that do not require a gradient are left out.
        batches: a DataLoader or any iterable of tensors, of (input, target) tuples or lists (the target is not
            looked at), or of mappings (given as keyword arguments, labels left out). The first dimension of every
            tensor is the samples. Batches are moved to the model's device.
        forward: (model, batch) -> output, for everything else. Use the model it is given, not your own.
        max_samples: stop after so many samples.
        estimator: what to measure: one of `ESTIMATORS` by name, or an `Estimator`. "fisher-empirical" looks at labels.
        batched: take the magnitude of each batch's mean gradient in place of each sample's: what most other libraries
            do. It depends on the batch size, and is too small: for comparisons only.
        group: the processes that measure together, each on batches of its own (or none): all get the importance of
            all their samples. Those of a DistributedDataParallel model, unless told.
        progress: show a progress bar.
        checkpoint: a file to go on from if the pass is cut off: killed, by an error of the loader, by Ctrl-C. The same
            call then skips the batches that are done (it reads them, but does not measure), and ends with the sums
            it would have had: bit for bit, on the same machine. It must be given the same weights, and the same
            batches in the same order and sizes: torch's global generator is set as it was when the pass began, for
            loaders that shuffle by it. Weights, settings, and some numbers of every batch are compared. The file is
            an `Importance` of the samples so far, and is removed in the end: save what is returned. In a group each
            process needs a path of its own.
        every: seconds between writes of the checkpoint.

    Returns:
        The importance of every parameter that requires a gradient, as sums and a count.

    Raises:
        BatchError: there are no samples, or the batches cannot be read.
        ModelError: there is nothing to measure, or the model cannot be cloned.
        OutputError: the output is not one finite, differentiable value or vector per sample.
        SamplesInteractError: the output for one sample depends on the others.
        ProcessError: another process of the group has failed.
        MismatchError: the checkpoint is of other weights or settings.
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
    check_measurable(model)
    trainable = trainable_parameters(model)
    if not trainable:
        raise ModelError("the model has no parameter that requires a gradient: there is nothing to measure.")
    device = next(iter(trainable.values())).device
    group = group or group_of(model)
    resumable = None if checkpoint is None else Checkpoint(checkpoint, every)
    with (
        _untouched_generators(),
        nullcontext() if resumable is None else resumable.write_on_failure(),
        fail_together(group, device),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        measurement = Measurement(model, trainable, device, forward, chosen, batched=batched)
        if resumable is not None:
            found = resumable.begin(
                {**measurement.settings(), "max_samples": max_samples, "process": rank_and_size(group)},
                measurement.state,
            )
            if found is not None:
                with well_formed(resumable.path):
                    measurement.restore(*found)
        limited = first_samples(iter(batches), max_samples)
        start = 0 if resumable is None else resumable.num_batches
        bar = tqdm(
            limited if resumable is None else resumable.remaining(limited),
            "measuring",
            _length(batches, max_samples),
            initial=start,
            disable=not progress,
            unit="batch",
        )
        for index, batch in enumerate(bar, start):
            inputs = model_input(batch) if forward is None else batch
            read = Batch.of(inputs, labels_of(batch) if chosen.needs_labels else None)
            with nullcontext() if resumable is None else resumable.batch(batch):
                slow = measurement.add(read, index)
            if slow:
                warnings.warn(measurement.describe(slow), SlowParametersWarning, stacklevel=2)
            bar.set_postfix_str(f"{measurement.num_samples} samples, {len(measurement.table.slow)} slow parameters")
    importance = measurement.importance(group)
    if resumable is not None:
        resumable.finish()
    return importance


def _length(batches: object, max_samples: int | None) -> int | None:
    if max_samples is not None or not isinstance(batches, Sized):
        return None
    try:
        return len(batches)
    except TypeError:  # a DataLoader over a stream has the method, but no length
        return None


@contextmanager
def _untouched_generators() -> Iterator[None]:
    """Leave the global random generators as they were: iterating a DataLoader draws from torch's."""
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
