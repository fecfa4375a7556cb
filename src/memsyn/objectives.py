"""From a model's output to one scalar per sample.

Owns the choice of the tensor inside a dict, tuple or ModelOutput, the objective itself, and the checks that make
its value usable. Must not know where the output comes from.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from memsyn.errors import OutputError

OBJECTIVE = "squared_l2_norm"


def output_tensor(output: object) -> Tensor:
    """The tensor that stands for a model's output: itself, its `logits`, or the only tensor in it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        entries = dict(output)
        logits = entries.get("logits")
        if isinstance(logits, Tensor):
            return logits
        named = f"a mapping with keys {', '.join(map(repr, entries)) or '(none)'}"
    elif isinstance(output, Sequence) and not isinstance(output, str):
        entries = dict(enumerate(output))
        named = f"a {type(output).__name__} of {', '.join(type(entry).__name__ for entry in output) or 'nothing'}"
    else:
        entries, named = {}, f"a {type(output).__name__}"
    tensors = [entry for entry in entries.values() if isinstance(entry, Tensor)]
    if len(tensors) == 1:
        return tensors[0]
    raise OutputError(
        f"expected a tensor, something with 'logits', or something with a single tensor as the model's output; got "
        f"{named}. Say which tensor counts: forward=lambda model, batch: model(batch[0])[...]"
    )


def squared_norm(output: Tensor, *, num_samples: int | None, batch_index: int, first_sample: int = 0) -> Tensor:
    """The objective of MAS for every sample: s_k = sum of the squares of sample k's raw outputs.

    Aljundi et al. 2018, section 4.1: the squared L2 norm of the learned function's output.

    Args:
        output: (samples, ...), the raw output; half precision is widened to float32.
        num_samples: the samples that went in, if known.
        batch_index: where this is, for errors.
        first_sample: the place of the first of these samples in the batch.

    Returns:
        (samples,), with a gradient if the output has one.

    Raises:
        OutputError: the first dimension is not the number of samples, or a sample's objective is not finite.
    """
    if output.ndim == 0 or (num_samples is not None and output.shape[0] != num_samples):
        raise OutputError(
            f"batch {batch_index}: the output's first dimension must be the samples; for {num_samples or 'some'} "
            f"samples its shape is {tuple(output.shape)}. A mean loss will not do: importance is taken per sample. "
            "Return the raw outputs, or pick them with forward=lambda model, batch: ..."
        )
    if not output.is_floating_point():
        raise OutputError(
            f"batch {batch_index}: the output is {output.dtype}, which has no gradient. Return the raw outputs "
            "(logits), not classes or flags, or pick them with forward=lambda model, batch: ..."
        )
    if output.dtype in (torch.float16, torch.bfloat16):
        output = output.float()
    scores = output.square().reshape(output.shape[0], -1).sum(1)
    if not bool(scores.isfinite().all()):
        sample = int((~scores.isfinite()).nonzero()[0, 0])
        finite = bool(output[sample].isfinite().all())
        what = "overflows when squared" if finite else "is NaN or infinite"
        raise OutputError(
            f"batch {batch_index}, sample {first_sample + sample}: the output {what}. Look at that input, or leave it "
            "out: one such sample would spoil the whole importance."
        )
    return scores
