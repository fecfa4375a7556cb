"""Which weights of a model with adapters are measured: those of its base model in effect, or the adapters themselves.

Owns the choice, and the names of what was measured. Must not measure.
"""

from dataclasses import replace
from typing import Final, TypeVar

from torch import Tensor, nn

from memsyn.adapters import AdaptedLayer, has_adapters, modules_in_use, plain_model
from memsyn.errors import OptionError
from memsyn.matrices import Layout, Matrix
from memsyn.measuring.objectives import Estimator
from memsyn.parameters import canonical_name, named_parameters, unwrap
from memsyn.values.factors import KroneckerFactors
from memsyn.values.importance import Importance

EFFECTIVE: Final = "effective"
ADAPTERS: Final = "adapters"
WEIGHTS: Final = {
    EFFECTIVE: "the weights of the base model in effect, W + s B A, under its names",
    ADAPTERS: "what trains, such as A and B, under its own names",
}
"""What can be measured of a model with adapters of PEFT."""

_Result = TypeVar("_Result", bound=Importance | KroneckerFactors)


def model_to_measure(model: nn.Module, weights: str | None, estimator: Estimator) -> nn.Module:
    """The model whose trainable parameters are measured: with weights="effective" one without adapters.

    Of a quantised model it is the model itself: the adapters meet the inputs of the weights, see `in_base_names`.

    Raises:
        OptionError: the model has adapters and it is not said what is measured, or the other way round; or the weights
            are quantised, and have no gradient.
    """
    if not has_adapters(model):
        if weights not in (None, EFFECTIVE):
            raise OptionError(f"weights={weights!r} is for models with adapters of PEFT, and this one has none.")
        return model
    if weights not in WEIGHTS:
        choices = "; ".join(f"weights={name!r}: {what}" for name, what in WEIGHTS.items())
        given = "it was not said" if weights is None else f"got weights={weights!r}"
        raise OptionError(
            f"the model has adapters of PEFT. What is to be measured? Give one of {choices}. Now {given}."
        )
    if weights == ADAPTERS:
        return model
    if not _quantised(model):
        return plain_model(unwrap(model))
    if estimator.factors is None:
        raise OptionError(
            "the weights of the base model are quantised, and have no gradient. Measure with estimator='inputs' or "
            "'kronecker', which look at what goes in and comes out, or measure the model before it is quantised."
        )
    return model


def _quantised(model: nn.Module) -> list[AdaptedLayer]:
    layers = [layer for _, _, layer in modules_in_use(unwrap(model)) if layer is not None]
    return [layer for layer in layers if layer.is_quantised]


def in_base_names(result: _Result, model: nn.Module, weights: str | None) -> _Result:
    """What was measured, with the factors of A and B of quantised layers as those of the base weights.

    A has the inputs of W. B has its output gradients, times the scale s: y = W x + s B A x.
    """
    layers = _quantised(model) if weights == EFFECTIVE else []
    if not layers or not isinstance(result, KroneckerFactors):
        return result
    names = {id(p): name for name, p in named_parameters(model).items()}
    sums: dict[str, Tensor] = {}
    matrices: dict[str, Matrix] = {}
    for layer in layers:
        term = next(iter(layer.terms() or ()), None)
        down = None if term is None else names.get(id(term.down))
        if term is None or down not in result.matrices:
            continue
        name, up = canonical_name(layer.name), names[id(term.up)]
        sizes = term.up.shape[0], term.down.shape[1]
        matrices[name] = Matrix(name, None, Layout(1, *sizes, inputs_first=layer.is_transposed, is_table=False))
        for side in ("positions", "inputs", "inputs_sketch", "inputs_trace"):
            sums |= {f"{side}/{name}": total for key, total in result.sums.items() if key == f"{side}/{down}"}
        for side in ("outputs", "outputs_sketch", "outputs_trace"):
            found = {f"{side}/{name}": total for key, total in result.sums.items() if key == f"{side}/{up}"}
            sums |= {key: total / term.scale**2 for key, total in found.items()}
    routes = dict.fromkeys(matrices, "by the inputs of its adapter")
    return replace(result, sums=sums, matrices=matrices, routes=routes, fingerprint=None)
