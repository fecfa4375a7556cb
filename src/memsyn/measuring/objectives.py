"""From a model's output to the scalars per sample whose gradients are measured.

Owns the choice of the tensor inside a dict, tuple or ModelOutput, the objectives, the estimators made of them, and the
checks that make their values usable. Must not know where the output comes from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from memsyn.errors import BatchError, OptionError, OutputError

EMBEDDINGS = ("embeddings", "sentence_embedding", "image_embeds", "text_embeds")
HIDDEN = "last_hidden_state"


def output_tensor(output: object) -> Tensor:
    """The tensor that stands for a model's output.

    Itself; of a mapping (a ModelOutput is one) its `logits`, else its embeddings, else its `last_hidden_state`; else
    the only tensor in it.
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
            if found:
                break
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
        f"expected a tensor, something with 'logits' or one kind of embeddings, or something with a single tensor as "
        f"the model's output; got {named}. Say which tensor counts: forward=lambda model, batch: model(batch[0])[...]"
    )


def token_mask(inputs: object) -> Tensor | None:
    """Where the tokens of a batch are not padding, (samples, tokens), if it says so: in `attention_mask`.

    For an encoder and a decoder the output's tokens are the decoder's: `decoder_attention_mask`.
    """
    if not isinstance(inputs, Mapping):
        return None
    decodes = any(str(key).startswith("decoder_") for key in inputs)
    mask = inputs.get("decoder_attention_mask" if decodes else "attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


@dataclass(frozen=True)
class Place:
    """What an objective may know about the samples beside the output."""

    first_sample: int
    """The number of the first sample since measuring began."""
    labels: Tensor | None = None
    """(samples, ...), as the batch gave them."""


Objective = Callable[[Tensor, Place], Tensor]
"""(output (B, ...), place) -> (B,), or (B, R) for R scalars a sample, each with a gradient of its own."""


def squared_l2_norm(output: Tensor, place: Place) -> Tensor:
    """s_k = ||y_k||^2, over all of a sample's output: the objective of MAS (Aljundi et al. 2018, section 4.1)."""
    return output.square().flatten(1).sum(1)


def squared_l2_norm_of_probabilities(output: Tensor, place: Place) -> Tensor:
    """s_k = ||softmax(y_k)||^2, classes last: MAS on what a softmax makes of the output."""
    return output.softmax(-1).square().flatten(1).sum(1)


def each_output(output: Tensor, place: Place) -> Tensor:
    """Every output on its own, (B, R): as many backward passes as outputs."""
    return output.flatten(1)


def log_likelihood(output: Tensor, place: Place) -> Tensor:
    """log p(label_k | x_k) of logits (B, classes): the empirical Fisher's objective (Kirkpatrick et al. 2017)."""
    labels = place.labels
    if labels is None or labels.is_floating_point() or labels.shape != output.shape[:1]:
        given = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise BatchError(
            "this estimator needs one class number per sample: give (input, label) batches, or mappings with 'labels'. "
            f"Got {given}."
        )
    return _log_probabilities(output).gather(1, labels.unsqueeze(1)).squeeze(1)


def sampled_log_likelihood(output: Tensor, place: Place) -> Tensor:
    """log p(c_k | x_k) for a class c_k drawn from p(. | x_k): an unbiased estimate of the Fisher information.

    Sample number k draws with a generator seeded by k, so that neither batch size nor split change what it draws.
    """
    log_p = _log_probabilities(output)
    drawn = []
    for k, row in enumerate(log_p.detach().exp().cpu()):
        drawn.append(torch.multinomial(row, 1, generator=torch.Generator().manual_seed(place.first_sample + k)))
    return log_p.gather(1, torch.stack(drawn).to(log_p.device)).squeeze(1)


def expected_log_likelihood(output: Tensor, place: Place) -> Tensor:
    """sqrt(p_c) log p_c for every class c, (B, classes), with p_c held: squares sum to sum_c p_c (d log p_c)^2."""
    log_p = _log_probabilities(output)
    return (0.5 * log_p.detach()).exp() * log_p


def _log_probabilities(output: Tensor) -> Tensor:
    if output.ndim != 2 or output.shape[1] < 2:
        raise OutputError(
            f"this estimator needs logits of shape (samples, classes), two classes or more; got {tuple(output.shape)}. "
            "Pick them with forward=lambda model, batch: ..."
        )
    return output.log_softmax(1)


@dataclass(frozen=True)
class Estimator:
    """What is measured: sum_k sum_r f(d s_kr / d theta), a magnitude f of the gradients of an objective s.

    Attributes:
        objective: (output (B, ...), place) -> (B,) or (B, R). Its name goes into the memory: give custom ones a name.
        magnitude: "abs" or "square".
        local: take the objective of every layer's own output, differentiated by that layer's parameters alone. Only for
            the squared L2 norm.

    Raises:
        OptionError: the magnitude is neither, or a local objective is another.
    """

    objective: Objective
    magnitude: str = "abs"
    local: bool = False

    def __post_init__(self) -> None:
        if self.local and self.objective is not squared_l2_norm:
            raise OptionError(f"only squared_l2_norm can be taken layer by layer, not {self.name}.")
        if self.magnitude not in ("abs", "square"):
            raise OptionError(f"magnitude must be 'abs' or 'square', got {self.magnitude!r}.")

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
}
"""The estimators by name: MAS, layer by layer (local), on probabilities, and per output; the diagonal Fisher
information: exact over the model's own distribution (as many backward passes as classes), with one label drawn from it,
and with the batch's."""


def find_estimator(estimator: str | Estimator) -> Estimator:
    """The estimator of that name."""
    if isinstance(estimator, Estimator):
        return estimator
    if estimator not in ESTIMATORS:
        raise OptionError(f"estimator must be one of {', '.join(ESTIMATORS)}, or an Estimator; got {estimator!r}.")
    return ESTIMATORS[estimator]


def scores(
    objective: Objective,
    output: Tensor,
    place: Place,
    *,
    num_samples: int | None,
    mask: Tensor | None,
    batch_index: int,
    first_in_batch: int,
) -> Tensor:
    """The objective of every sample, checked.

    Args:
        objective: what to compute.
        output: (samples, ...), the raw output; half precision is widened to float32.
        place: for the objective.
        num_samples: the samples that went in, if known.
        mask: (samples, tokens): where an output (samples, tokens, ...) counts.
        batch_index, first_in_batch: where this is, for errors.

    Returns:
        (samples, R), with a gradient if the output has one.

    Raises:
        OutputError: the first dimension is not the number of samples, or a sample's objective is not finite.
    """
    where = f"batch {batch_index}"
    if output.ndim == 0 or (num_samples is not None and output.shape[0] != num_samples):
        raise OutputError(
            f"{where}: the output's first dimension must be the samples; for {num_samples or 'some'} "
            f"samples its shape is {tuple(output.shape)}. A mean loss will not do: importance is taken per sample. "
            "Return the raw outputs, or pick them with forward=lambda model, batch: ..."
        )
    if not output.is_floating_point():
        raise OutputError(
            f"{where}: the output is {output.dtype}, which has no gradient. Return the raw outputs "
            "(logits), not classes or flags, or pick them with forward=lambda model, batch: ..."
        )
    if output.dtype in (torch.float16, torch.bfloat16):
        output = output.float()
    if mask is not None and output.ndim > 2 and output.shape[:2] == mask.shape:
        counts = mask.view(*mask.shape, *[1] * (output.ndim - 2)) != 0
        output = torch.where(counts, output, torch.zeros((), dtype=output.dtype, device=output.device))
    if output.ndim == 1:
        output = output.unsqueeze(1)
    values = objective(output, place)
    if values.shape[:1] != output.shape[:1] or values.ndim > 2:
        raise OutputError(
            f"{where}: the objective must give one scalar per sample, or a row of them; for {len(output)} samples its "
            f"shape is {tuple(values.shape)}."
        )
    if not bool(values.isfinite().all()):
        bad = ~values.reshape(len(values), -1).isfinite().all(1)
        sample = int(bad.nonzero()[0, 0])
        what = "overflows when squared" if bool(output[sample].isfinite().all()) else "is NaN or infinite"
        raise OutputError(
            f"{where}, sample {first_in_batch + sample}: the output {what}. Look at that input, or leave it "
            "out: one such sample would spoil the whole importance."
        )
    return values.reshape(len(values), -1)
