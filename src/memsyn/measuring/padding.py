"""Padding: which positions of an output, or of a layer's input, are padding.

Owns reading the batch's attention mask, and the own rules of models whose outputs have other positions than their
inputs: speech models of transformers, and virtual tokens of peft. Must not run objectives.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from memsyn.errors import MemsynError, OutputError


def token_mask(inputs: object) -> Tensor | None:
    """The mask (samples, tokens) of the tokens that are not padding: the batch's `attention_mask`, if it has one.

    With an encoder and a decoder, the output has the decoder's tokens. So the mask is `decoder_attention_mask`.
    """
    mask = _mask(inputs)
    return mask if mask is not None and mask.ndim == 2 else None


def layer_mask(model: nn.Module, inputs: Any) -> Tensor | None:
    """The mask (samples, tokens) for the layers of a model without a decoder.

    With a decoder, the layers of encoder and decoder cannot be told apart, so the padding is not left out.

    Raises:
        OutputError: the mask leaves tokens out, but the layers of the model have other positions than its inputs.
    """
    mask = token_mask(inputs)
    if mask is None or inputs.get("attention_mask") is not mask:
        return None
    if not bool((mask != 0).all()) and (_frame_rules(model) or _num_virtual_tokens(model)):
        raise OutputError(
            f"attention_mask leaves padding out, but the layers of {type(model).__name__} have other positions than "
            "its inputs (frames, or virtual tokens in front), so this estimator would count padding. Give batches "
            "without padding (batches of one sample, without attention_mask), or take estimator='mas'."
        )
    return mask


@final
class Padding:
    """Finds the positions of a model's outputs that are not padding. What it learns of the model holds for all batches.

    An output (samples, 5) may be one number for each of 5 tokens, or 5 classes. So the model is once run on one sample
    with half of its tokens: if the output has the same shape, it has no positions that could be padding.
    """

    def __init__(self) -> None:
        self._has_positions: bool | None = None
        self._is_known = False

    def is_unknown_for(self, inputs: Any) -> bool:
        """Whether `mask_of` would run the model for these inputs."""
        mask = _mask(inputs)
        return not self._is_known and mask is not None and mask.ndim == 2 and not bool((mask != 0).all())

    def mask_of(
        self, output: Tensor, model: nn.Module, inputs: Any, run: Callable[[Any], Tensor], batch_index: int
    ) -> Tensor | None:
        """The mask (samples, positions) for an output (samples, positions, ...); None if all of the output counts.

        Args:
            output: what the model gave for `inputs`.
            model, inputs: the model and its inputs.
            run: gives the output of this model for other inputs.
            batch_index: for errors.

        Raises:
            OutputError: the mask leaves tokens out, and it is not known which positions of the output are theirs.
        """
        mask = _mask(inputs)
        if mask is None or output.ndim < 2 or mask.ndim < 1 or len(output) != len(mask):
            return None
        if mask.ndim != 2:
            if output.ndim == 2 and output.shape[1] != mask.shape[-1]:
                return None
            raise _unknown(f"of shape {tuple(mask.shape)}, not (samples, tokens)", output, batch_index)
        if bool((mask != 0).all()):
            return None
        if not self._is_known:
            self._has_positions = _has_positions(run, inputs, mask, output)
            self._is_known = True
        if self._has_positions is False:
            return None
        if output.shape[:2] == mask.shape and (output.ndim > 2 or self._has_positions):
            return mask
        if self._has_positions is None and output.ndim == 2 and output.shape[1] != mask.shape[1]:
            return None  # a classifier that takes inputs of one length alone
        own = _own_mask(model, mask, output.shape[1])
        if own is None:
            raise _unknown(f"for {mask.shape[1]} tokens", output, batch_index)
        return own


def _mask(inputs: object) -> Tensor | None:
    if not isinstance(inputs, Mapping):
        return None
    decodes = any(str(key).startswith("decoder_") for key in inputs)
    mask = inputs.get("decoder_attention_mask" if decodes else "attention_mask")
    return mask if isinstance(mask, Tensor) else None


def _unknown(mask: str, output: Tensor, batch_index: int) -> OutputError:
    return OutputError(
        f"batch {batch_index}: the attention mask is {mask}, and the output has the shape {tuple(output.shape)}, so "
        "it is not known which outputs are padding. Set them to zero yourself: forward=lambda model, batch: "
        "model(**batch)[0] * own_mask[..., None], or give batches without padding."
    )


def _has_positions(
    run: Callable[[Any], Tensor], inputs: Mapping[str, Any], mask: Tensor, output: Tensor
) -> bool | None:
    """Whether the output's shape depends on the number of tokens; None if the model does not take half of them."""

    def shorter(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or len(value) != len(mask):
            return value
        # Features of speech have their frames first, (samples, frames, bins), or last, (samples, bins, frames).
        dims = [dim for dim in range(1, value.ndim) if value.shape[dim] == mask.shape[1]]
        return value[:1].narrow(dims[0], 0, mask.shape[1] // 2) if dims else value[:1]

    try:
        with torch.no_grad():
            found = run({key: shorter(value) for key, value in inputs.items()})
    except MemsynError:  # the model does not take this length
        return None
    return found.shape[1:] != output.shape[1:]


def _own_mask(model: nn.Module, mask: Tensor, num_positions: int) -> Tensor | None:
    """The mask of `num_positions` positions by a rule of the model's; None if it has none for so many."""
    virtual = _num_virtual_tokens(model)
    if virtual and num_positions == virtual + mask.shape[1]:
        return torch.cat([mask.new_ones(len(mask), virtual), mask], 1)
    lengths = (mask != 0).sum(1)
    # The rules count frames from the first sample on, so padding must be at the end.
    if not torch.equal(mask != 0, torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
        return None
    for rule in _frame_rules(model):
        if rule(mask.shape[1]) == num_positions:
            frames = torch.tensor([rule(length) for length in lengths.tolist()], device=mask.device)
            return torch.arange(num_positions, device=mask.device) < frames[:, None]
    return None


def _frame_rules(model: nn.Module) -> list[Callable[[int], int]]:
    """The rules of the speech models inside: the length of a clip -> its number of frames."""

    def frames(rule: Any, length: int) -> int:
        found = rule(torch.tensor(length))
        # Some models return the lengths after each of their parts.
        return int(found[-1] if isinstance(found, tuple) else found)

    found = [getattr(module, "_get_feat_extract_output_lengths", None) for module in model.modules()]
    return [partial(frames, rule) for rule in found if rule is not None]


def _num_virtual_tokens(model: nn.Module) -> int:
    """How many tokens of its own a model of peft puts before those of the batch."""
    configs = [getattr(module, "active_peft_config", None) for module in model.modules()]
    return max(
        # Prefixes are keys and values of attention: no layer has them as positions.
        (
            int(getattr(config, "num_virtual_tokens", None) or 0)
            for config in configs
            if getattr(config, "peft_type", None) != "PREFIX_TUNING"
        ),
        default=0,
    )
