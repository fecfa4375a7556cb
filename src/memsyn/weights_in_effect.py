"""The weights of a model by the names that a memory gives them, also if adapters of PEFT change them.

Owns whether names are those of the model as it is, or of the base model under its adapters, and which parameters move a
weight. Must not change a model.
"""

from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping
from typing import final

from torch import Tensor, nn

from memsyn.adapters import AdaptedLayer, has_adapters, modules_in_use, speaks_of_adapters
from memsyn.parameters import canonical_name, named_parameters, trainable_parameters, unwrap


@final
class WeightsInEffect(Mapping[str, Tensor]):
    """Name in the base model -> the weight in effect, computed when it is asked for: W + s B A with LoRA.

    Made for a moment: the weight that was computed last is kept until another one is asked for. A tied weight has its
    first name, but each use of it around which there are adapters is a weight of its own.

    Attributes:
        parameters: name -> parameter of the base model, or of the copy in use of `modules_to_save`.
        adapted: name -> the layer whose adapters change this weight or bias.
        tied: name of a weight in effect -> the first name of the parameter that it shares.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.adapted: dict[str, AdaptedLayer] = {}
        self.tied: dict[str, str] = {}
        names: dict[tuple[int, AdaptedLayer | None], str] = {}
        first: dict[int, str] = {}
        for path, module, layer in modules_in_use(unwrap(model)):
            for own, parameter in module.named_parameters(recurse=False):
                acting = layer if layer is not None and layer.changes(own) else None
                name = names.setdefault((id(parameter), acting), canonical_name(f"{path}.{own}".lstrip(".")))
                self.parameters[name] = parameter
                if first.setdefault(id(parameter), name) != name:
                    self.tied[name] = first[id(parameter)]
                if acting is not None:
                    self.adapted[name] = acting
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.adapted:
            return self.parameters[name]
        if self._last is None or self._last[0] != name:
            weight, bias = self.adapted[name].in_effect()
            found = bias if name.endswith(".bias") else weight
            self._last = name, self.parameters[name] if found is None else found
        return self._last[1]

    def with_buffers(self, model: nn.Module) -> Mapping[str, Tensor]:
        """These weights, and the floating point buffers that outputs depend on too."""
        buffers = {
            canonical_name(f"{path}.{own}".lstrip(".")): buffer
            for path, module, _ in modules_in_use(unwrap(model))
            for own, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point()
        }
        return ChainMap(self, buffers)  # type: ignore[arg-type]

    def __contains__(self, name: object) -> bool:
        return name in self.parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)


def weights_by_name(model: nn.Module, names: Collection[str]) -> Mapping[str, Tensor]:
    """The parameters of a model; the weights in effect of its base, if it has adapters and the names are not theirs."""
    if has_adapters(model) and not speaks_of_adapters(model, names):
        return WeightsInEffect(model)
    return named_parameters(model)


def adapted_weights(model: nn.Module, names: Collection[str]) -> list[tuple[str, AdaptedLayer]]:
    """Those of some weights that adapters change, each with its layer; none if the names are of adapters.

    A tied weight may be there several times. A use of it that has no name among the names has its first name.
    """
    weights = weights_by_name(model, names)
    if not isinstance(weights, WeightsInEffect):
        return []
    known = [(n if n in names else weights.tied.get(n, n), layer) for n, layer in weights.adapted.items()]
    return [(name, layer) for name, layer in known if name in names]


def parameters_by_name(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """The parameters of a model by the names of a memory: those of the base model if it has adapters."""
    weights = weights_by_name(model, names)
    return weights.parameters if isinstance(weights, WeightsInEffect) else dict(named_parameters(model))


def moving_parameters(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """The parameters that move some weights: themselves, and those of their adapters under their own names."""
    found = {name: p for name, p in parameters_by_name(model, names).items() if name in names}
    adapters = {id(p) for _, layer in adapted_weights(model, names) for p in layer.parameters()}
    return found | {name: p for name, p in named_parameters(model).items() if id(p) in adapters}


def free_names(model: nn.Module, names: Collection[str]) -> list[str]:
    """The trainable weights of a model that are not among the names; of adapters, the weight that they change."""
    weights = weights_by_name(model, names)
    if not isinstance(weights, WeightsInEffect):
        return [name for name in trainable_parameters(model) if name not in names]
    through = {name for name, layer in weights.adapted.items() if layer.parameters()}
    moving = [name for name, p in weights.parameters.items() if p.requires_grad or name in through]
    return [name for name in moving if name not in names and weights.tied.get(name) not in names]
