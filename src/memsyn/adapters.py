"""Models with adapters of PEFT, seen as the base model: its names, and its weights in effect.

Owns all that is known of PEFT: which modules it puts around the layers of a model, and what weight a layer has in
effect. Must not import PEFT (a model that has adapters has imported it), and must not change a model.

    base_model.model.q_proj                      a layer of LoRA; in the base model: q_proj
    base_model.model.q_proj.base_layer.weight    W, frozen; in the base model: q_proj.weight
    base_model.model.q_proj.lora_A.default       A, (r, inputs)
    base_model.model.q_proj.lora_B.default       B, (outputs, r); in effect is W + s B A
"""

import copy
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor, nn

from memsyn.closures import rebind_closures
from memsyn.errors import ModelError
from memsyn.torch_private import modules_of


class _Classes(NamedTuple):
    """The classes of PEFT that are recognised."""

    models: tuple[Any, ...]
    tuners: tuple[Any, ...]
    layers: tuple[Any, ...]
    wrappers: tuple[Any, ...]
    lora: tuple[Any, ...]
    others: tuple[Any, ...]
    """Layers of LoRA whose factors are not those of a weight."""


_PLACES: Final = (
    (("peft", "PeftModel"), ("peft", "PeftMixedModel")),
    (("peft.tuners.tuners_utils", "BaseTuner"),),
    (("peft.tuners.tuners_utils", "BaseTunerLayer"),),
    (("peft.utils.other", "AuxiliaryTrainingWrapper"),),
    (("peft.tuners.lora.layer", "LoraLayer"),),
    (("peft.tuners.lora.layer", "MultiheadAttention"), ("peft.tuners.lora.layer", "ParamWrapper")),
)
"""Where the classes are, in the order of `_Classes`."""


def _classes() -> _Classes | None:
    """PEFT's classes; None if nobody has imported it, so that no model can have its adapters."""
    if "peft" not in sys.modules:
        return None

    def found(places: tuple[tuple[str, str], ...]) -> tuple[Any, ...]:
        classes = (getattr(sys.modules.get(module), name, None) for module, name in places)
        return tuple(one for one in classes if one is not None)

    return _Classes(*map(found, _PLACES))


class ModuleInUse(NamedTuple):
    """A module of the base model."""

    name: str
    """In the base model."""
    module: nn.Module
    adapted: "AdaptedLayer | None"
    """The adapters around it."""


def _known() -> _Classes:
    """PEFT's classes, for a model that has its adapters."""
    known = _classes()
    assert known is not None
    return known


def modules_in_use(model: nn.Module) -> Iterator[ModuleInUse]:
    """Each module of the base model, without those that PEFT has around it; of `modules_to_save`, the copy in use.

    Without adapters these are `named_modules()`.
    """
    if has_adapters(model):
        yield from _walk(model, "", _known(), set())
    else:
        yield from (ModuleInUse(name, module, None) for name, module in model.named_modules())


def _walk(module: nn.Module, path: str, known: _Classes, seen: set[int]) -> Iterator[ModuleInUse]:
    if id(module) in seen:
        return
    seen.add(id(module))
    inner, adapted = module, None
    while (next_inner := _inside(inner, known)) is not None:
        if adapted is None and isinstance(inner, known.layers):
            adapted = AdaptedLayer(path, inner)
        inner = next_inner
    yield ModuleInUse(path, inner, adapted)
    for name, child in inner.named_children():
        yield from _walk(child, f"{path}.{name}".lstrip("."), known, seen)


def _inside(module: Any, known: _Classes) -> nn.Module | None:
    """The module of the base model, or its copy in use, that a module of PEFT stands around; None for other modules."""
    if isinstance(module, known.models):
        return module.base_model  # type: ignore[no-any-return]
    if isinstance(module, known.tuners):
        return module.model  # type: ignore[no-any-return]
    if isinstance(module, known.layers):
        return module.base_layer  # type: ignore[no-any-return]
    if not isinstance(module, known.wrappers):
        return None
    if module.disable_adapters:
        return module.original_module  # type: ignore[no-any-return]
    parts = dict(module.named_children())
    copies = parts.get("modules_to_save")
    if copies is None:
        return parts.get("token_adapter", module.original_module)  # type: ignore[no-any-return]
    used = [name for name in module.active_adapters if name in copies]
    return copies[used[0]] if used else module.original_module  # type: ignore[no-any-return]


def has_adapters(model: nn.Module) -> bool:
    """Whether a module of the model is a layer of PEFT, or a copy of `modules_to_save`."""
    known = _classes()
    return known is not None and any(isinstance(m, known.layers + known.wrappers) for m in model.modules())


def speaks_of_adapters(model: nn.Module, names: Collection[str]) -> bool:
    """Whether names are those of adapters themselves, such as `q_proj.lora_A.default.weight`, or of a model's own."""
    known = _classes()
    layers = [m for m in model.modules() if isinstance(m, known.layers)] if known is not None else []
    parts = {part for layer in layers for part in layer.adapter_layer_names}
    return any(parts & set(name.split(".")) for name in names)


class LowRank(NamedTuple):
    """A plain adapter of LoRA: it adds scale * up @ down."""

    down: nn.Parameter
    """A, (r, inputs); of a convolution (r, channels, ...)."""
    up: nn.Parameter
    """B, (outputs, r); of a convolution (outputs, r, 1, ...)."""
    scale: float
    magnitude: nn.Parameter | None
    """m of DoRA, (outputs,): in effect is m (W + s B A) / ||W + s B A||, by rows. None for LoRA."""


@final
@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """A layer of the base model, with the adapters around it.

    Attributes:
        path: the layer's name in the base model.
        layer: the module of PEFT.
    """

    path: str
    layer: Any

    @property
    def name(self) -> str:
        """The name of the weight in the base model."""
        return f"{self.path}.weight"

    @property
    def bias_name(self) -> str:
        """The name of the bias in the base model."""
        return f"{self.path}.bias"

    @property
    def kind(self) -> str:
        """The class of PEFT, for messages."""
        return f"{type(self.layer).__module__.removeprefix('peft.tuners.').split('.')[0]} {type(self.layer).__name__}"

    @property
    def base(self) -> Any:
        """The layer of the base model itself."""
        return self.layer.get_base_layer()

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is (inputs, outputs): a table, or a `Conv1D` of transformers."""
        return isinstance(self.base, nn.Embedding) or bool(getattr(self.layer, "fan_in_fan_out", False))

    @property
    def is_quantised(self) -> bool:
        """Whether the weight holds no floating point numbers of its own."""
        return is_quantised(self.base.weight)

    def changes(self, own: str) -> bool:
        """Whether adapters may change the `weight`, or change the `bias` now."""
        return own == "weight" or (own == "bias" and self.terms() is None)

    def adapters(self) -> list[str]:
        """The adapters that act beside the weight: not those that are switched off, or merged into it."""
        if self.layer.disable_adapters or self.layer.merged:
            return []
        held = [getattr(self.layer, part) for part in self.layer.adapter_layer_names]
        return [name for name in self.layer.active_adapters if any(name in one for one in held)]

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the adapters that act."""
        # A layer with DoRA names its magnitudes twice.
        held = [getattr(self.layer, part) for part in dict.fromkeys(self.layer.adapter_layer_names)]
        own = [one[name] for one in held for name in self.adapters() if name in one]
        found = [p for one in own for p in ([one] if isinstance(one, nn.Parameter) else one.parameters())]
        return [p for p in found if p.requires_grad]

    def terms(self) -> list[LowRank] | None:
        """The adapters that act, if all are of LoRA or DoRA; None if one is of another kind."""
        known = _known()
        layer, found = self.layer, []
        is_lora = isinstance(layer, known.lora) and not isinstance(layer, known.others)
        if not is_lora or layer.base_layer is not self.base or getattr(self.base, "groups", 1) > 1:
            return None if self.adapters() else []
        for name in self.adapters():
            is_table = name in layer.lora_embedding_A
            variant = layer.lora_variant.get(name)
            is_dora = variant is not None and type(variant).__name__ == "DoraLinearVariant"
            if layer.lora_bias.get(name) or (variant is not None and not is_dora):
                return None
            down = layer.lora_embedding_A[name] if is_table else layer.lora_A[name].weight
            up = layer.lora_embedding_B[name] if is_table else layer.lora_B[name].weight
            magnitude = layer.lora_magnitude_vector[name].weight if is_dora else None
            found.append(LowRank(down, up, float(layer.scaling[name]), magnitude))
        return found

    def is_low_rank(self) -> bool:
        """Whether W + s B A is in effect, for each adapter that acts."""
        terms = self.terms()
        return terms is not None and all(term.magnitude is None for term in terms)

    def in_effect(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias in effect, differentiable with respect to the adapters.

        Raises:
            ModelError: the layer is not linear, or no linear layer or table.
        """
        terms = self.terms()
        if terms is None:
            return _by_running(self.layer, self.base, self.kind, self.path)
        weight, bias = self.base_weight(), getattr(self.base, "bias", None)
        changes = []
        for term in terms:
            change = term.scale * (term.up.flatten(1) @ term.down.flatten(1))
            change = (change.T if self.is_transposed else change).reshape(weight.shape).to(weight)
            if term.magnitude is not None:
                dim = 0 if self.is_transposed else 1
                whole = weight + change
                size = term.magnitude.unsqueeze(dim) / torch.linalg.vector_norm(whole, dim=dim, keepdim=True)
                change = size * whole - weight
            changes.append(change)
        return sum(changes, weight), bias

    def base_weight(self) -> Tensor:
        """The weight of the base model; of a quantised layer, in floating point."""
        if self.is_quantised:
            return _by_running(self.base, self.base, self.kind, self.path)[0].detach()
        return self.base.weight  # type: ignore[no-any-return]


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight holds no floating point numbers of its own: integers, or a class of tensors of a library."""
    plain = type(weight.data) is Tensor or hasattr(weight.data, "full_tensor")
    return not (plain and weight.is_floating_point())


def _by_running(layer: Any, base: Any, kind: str, path: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of any linear layer or table, from its outputs for the unit vectors.

    The output for 0 is the bias b, and that for the unit vector e_j is b + W e_j.
    """
    with _without_dropout(layer, base):
        if isinstance(base, nn.Embedding):
            return layer.forward(torch.arange(base.num_embeddings, device=base.weight.device)), None
        if not isinstance(getattr(base, "in_features", None), int):
            raise ModelError(
                f"{path}.weight is adapted by PEFT's {kind}: what weight it has in effect is not known. Use LoRA or "
                f"DoRA for this layer, or leave it out: exclude='{path}.*'."
            )
        floating = [p for p in layer.parameters() if p.is_floating_point()]
        like = floating[0] if floating else torch.zeros((), device=base.weight.device)
        inputs = torch.eye(base.in_features, dtype=like.dtype, device=base.weight.device)
        bias = layer.forward(torch.zeros_like(inputs[:1]))[0]
        probe = torch.linspace(-1, 1, base.in_features).to(inputs).unsqueeze(0)
        weight = (layer.forward(inputs) - bias).T
        found, expected = layer.forward(probe)[0].detach(), (weight @ probe[0] + bias).detach()
    # A quantised layer may round its inputs.
    if float((found - expected).norm()) > _NOT_LINEAR * float(expected.norm()):
        raise ModelError(
            f"{path}.weight is adapted by PEFT's {kind}, which is not linear in its inputs: there is no weight in "
            f"effect. Use LoRA for this layer, or leave it out: exclude='{path}.*'."
        )
    return weight, None if getattr(base, "bias", None) is None and not bias.any() else bias


_NOT_LINEAR: Final = 0.02
"""By how much the output of a layer may differ from that of its weight, relative to it: quantised layers round."""


@contextmanager
def _without_dropout(layer: nn.Module, base: nn.Module) -> Iterator[None]:
    """In evaluation, and with every flag as it was afterwards.

    Not the base layer: one of bitsandbytes may pack its weight in evaluation, for good.
    """
    flags = [(module, module.training) for module in layer.modules()]
    try:
        for module, _ in flags:
            module.training = module is base
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def plain_model(model: nn.Module) -> nn.Module:
    """The base model with the weights in effect, as a model without adapters; all other weights are shared.

    All its floating point parameters require a gradient. A quantised layer around which there is an adapter becomes an
    ordinary one.
    """
    known = _known()
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        shared = parameter if is_quantised(parameter) else nn.Parameter(parameter.detach())
        memo[id(parameter)] = shared
    copied = copy.deepcopy(model, memo)
    rebind_closures(model, copied)  # TRL replaces the `forward` of the model under the adapters
    return _without_adapters(copied, known, {})


def _without_adapters(module: nn.Module, known: _Classes, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    inner = _inside(module, known)
    if isinstance(module, known.layers):
        done[id(module)] = _merged(AdaptedLayer("", module))
    elif inner is not None:
        done[id(module)] = _without_adapters(inner, known, done)
    else:
        done[id(module)] = module
        children = modules_of(module)
        for name, child in children.items():
            if child is not None:
                children[name] = _without_adapters(child, known, done)
    return done[id(module)]


@torch.no_grad()
def _merged(adapted: AdaptedLayer) -> nn.Module:
    """The base layer with the weight in effect."""
    base = adapted.base
    if not adapted.adapters() and not adapted.is_quantised:
        return base  # type: ignore[no-any-return]
    weight, bias = adapted.in_effect()
    if adapted.is_quantised:
        base = nn.Linear(base.in_features, base.out_features, bias is not None, device="meta")
    base.weight = nn.Parameter(weight.clone())
    if bias is not None:
        base.bias = nn.Parameter(bias.clone())
    return base  # type: ignore[no-any-return]
