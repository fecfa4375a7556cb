"""The projected form on adapters of LoRA: A by the inputs x of the weight, B by its own inputs A x and the outputs.

Owns the directions of A and B. They are two linear layers, so each is projected as one. Must not know optimizers.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, NamedTuple

import torch
from torch import nn

from memsyn.adapters import AdaptedLayer, LowRank
from memsyn.errors import ProtectionError
from memsyn.matrices import Layout, Matrix
from memsyn.sharding.exchange import gathered
from memsyn.sharding.parts import local_part
from memsyn.sharding.sums import largest_over_parts
from memsyn.values.directions import Directions, LayerDirections
from memsyn.values.spectra import spectrum_of
from memsyn.weights_in_effect import adapted_weights

USUAL_SIZE: Final = 1 / 3
"""The mean squared length of a row of A, as LoRA draws it: n uniform numbers up to 1 / sqrt(n)."""


class AdaptedMatrix(NamedTuple):
    """An adapter of LoRA on a weight that is protected by directions."""

    path: str
    """Of the layer in the base model, with a number if it has several adapters."""
    term: LowRank
    directions: LayerDirections
    """Of the weight, without its bias."""

    def of_down(self) -> LayerDirections:
        """The directions of A: the inputs of the weight."""
        rank = len(self.term.down)
        own = self.directions
        layout = Layout(1, rank, own.inputs.width, False, own.matrix.layout.is_table)
        return replace(own, matrix=Matrix(f"{self.path} A", None, layout), outputs=None)

    def of_up(self) -> LayerDirections:
        """The directions of B: the inputs A x, with second moment A E[x x^T] A^T, and the outputs of the weight.

        Relative to the usual size of A: as long as A is in the free directions alone, B is free. If A is sharded, it is
        gathered, and all processes must call this together.
        """
        own, down = self.directions, gathered(self.term.down).flatten(1)
        inputs = own.inputs.to(down.device, torch.promote_types(down.dtype, torch.float32))
        wide = down.to(inputs.values)
        if inputs.vectors is None:
            moment = (wide * inputs.values[0]) @ wide.T
        else:
            kept = wide @ inputs.vectors[0]
            moment = (kept * (inputs.values[0] - inputs.rest[0])) @ kept.T + inputs.rest[0] * (wide @ wide.T)
        size = wide.square().sum(1).mean().clamp_min(USUAL_SIZE)
        spectrum = spectrum_of((moment / size).unsqueeze(0), None, scaled=False)[0]
        outputs = own.matrix.layout.outputs
        layout = Layout(1, outputs, len(down), False, False)
        return replace(own, matrix=Matrix(f"{self.path} B", None, layout), inputs=spectrum)


def adapted_matrices(model: nn.Module, directions: Directions) -> Iterator[AdaptedMatrix]:
    """The adapters of LoRA on the weights of some directions.

    Raises:
        ProtectionError: a weight is adapted in another way, is no matrix, or trains too.
    """
    names = directions.names()
    for name, layer in adapted_weights(model, names):
        if not layer.parameters():
            continue
        own = _directions_of(name, layer, directions)
        rows = layer.base.weight.shape[0] if isinstance(layer.base, nn.Embedding) else own.inputs.width
        own = replace(own, inputs=own.inputs.wider(rows))
        for index, term in enumerate(layer.terms() or []):
            yield AdaptedMatrix(f"{layer.path}.{index}", term, own)


def _directions_of(name: str, layer: AdaptedLayer, directions: Directions) -> LayerDirections:
    is_table = isinstance(layer.base, nn.Embedding)
    known = [o for o in directions.layers.values() if o.matrix.weight == name and o.matrix.layout.is_table == is_table]
    cure = (
        f"leave it out: exclude={name!r}; or protect an importance, measured with estimator='mas', by form='gradient'."
    )
    if not layer.is_low_rank():
        raise ProtectionError(
            f"{name} is adapted by PEFT's {layer.kind}, and the projected form is for LoRA alone, whose change of the "
            f"weight is B A. Use LoRA, or {cure}"
        )
    if not known or known[0].matrix.layout.groups > 1:
        raise ProtectionError(f"{name} is no matrix, so that its adapters cannot be projected: {cure}")
    if layer.base.weight.requires_grad:
        raise ProtectionError(
            f"{name} trains, and its adapters too: of two that make one weight, each would be projected alone. Freeze "
            "the weight, as PEFT does."
        )
    return known[0].without_bias({name})


def is_fresh(term: LowRank) -> bool:
    """Whether an adapter adds nothing yet because B is zero, in all processes."""
    return not any(largest_over_parts([float(local_part(term.up).any())], [term.up]))
