"""A model of which each process holds a part of every weight, made by `torch.distributed.fsdp.fully_shard`.

Owns what memsyn does with such a model in place, since it cannot be cloned: evaluation mode and back, the weights as
the forward pass sees them, the moments at which sums are handed over, and what the processes agree on. Must not know
estimators or importance.

Words: a unit is a module that `fully_shard` was called on. Its weights are whole while it runs, and are freed then.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memsyn.batches import Batch, map_tensors
from memsyn.errors import BatchError, ModelError, ProcessError
from memsyn.measuring.distributed import gather_text
from memsyn.measuring.route_check import unchanged_buffers
from memsyn.parameters import named_parameters, unwrap
from memsyn.sharding.parts import any_sharded, is_sharded
from memsyn.torch_private import without_function_modes


@dataclass(eq=False)
class _Unit:
    """A module whose weights are gathered together."""

    module: Any
    """An FSDPModule."""
    places: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    """Name of a parameter -> the module that holds it, and its attribute there."""


class _AtInputs(torch.autograd.Function):
    """The inputs of a unit, unchanged. Its backward pass runs once the gradients of the whole unit have arrived."""

    @staticmethod
    def forward(ctx: Any, arrived: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.arrived = arrived
        return inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.arrived()
        return (None, *grads)


@final
class ShardedModel:
    """A sharded model, to be run in place.

    Args:
        model: a model with parameters that are DTensors.

    Attributes:
        module: the model without wrappers.
        device: where it computes.
        weights: name -> parameter as `named_parameters` gives it: a DTensor, or a plain tensor that all processes hold.

    Raises:
        ModelError: a parameter is a DTensor that `fully_shard` did not make, or that it made of a DTensor.
    """

    def __init__(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule

        self.module = unwrap(model)
        modules = [m for m in self.module.modules() if isinstance(m, FSDPModule)]
        for module in modules:
            module.reshard()
        self.weights = named_parameters(self.module)
        self.units = [_Unit(module) for module in modules]
        names = {id(p): name for name, p in self.weights.items()}
        unit_of = {id(unit.module): unit for unit in self.units}
        self._place(self.module, None, unit_of, names, {})
        self._check()
        mesh = next(p for p in self.weights.values() if is_sharded(p)).device_mesh
        self.groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        kind = mesh.device_type
        self.device = torch.device(kind)
        if kind != "cpu":
            self.device = torch.device(kind, torch.get_device_module(kind).current_device())

    def _place(
        self,
        module: nn.Module,
        unit: _Unit | None,
        unit_of: dict[int, _Unit],
        names: dict[int, str],
        taken: dict[str, _Unit],
    ) -> None:
        """Find the unit of each parameter: the innermost around the module that holds it."""
        unit = unit_of.get(id(module), unit)
        for attribute, parameter in module.named_parameters(recurse=False):
            name = names[id(parameter)]
            if unit is not None and is_sharded(parameter) and name not in taken:
                unit.places[name] = (module, attribute)
                taken[name] = unit
        for child in module.children():
            self._place(child, unit, unit_of, names, taken)

    def _check(self) -> None:
        placed = {name for unit in self.units for name in unit.places}
        for name, parameter in self.weights.items():
            if is_sharded(parameter) and name not in placed:
                raise ModelError(
                    f"{name} is a DTensor that fully_shard did not make, as of tensor parallelism (parallelize_module)."
                    " Its layer computes with parts of weights, which memsyn does not measure. Measure the model with "
                    "fully_shard alone."
                )
            if is_sharded(parameter) and not all(p.is_replicate() or p.is_shard() for p in parameter.placements):
                raise ModelError(
                    f"{name} is cut by tensor parallelism and by fully_shard, which memsyn does not measure. Measure "
                    "the model with fully_shard alone."
                )
        for module in self.module.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
                raise ModelError(
                    "an embedding with max_norm writes to its weights in the forward pass, so a sharded model with it "
                    "cannot be measured in place. Set max_norm to None: the rows that were used are short already."
                )

    def gathered_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> the parameter as the forward pass sees it: the whole weight, which exists while its unit runs.

        All processes must call it together. One unit is gathered at a time. The objects stay the same in all passes.
        """
        found = {name: p for name, p in self.weights.items() if not is_sharded(p)}
        for unit in self.units:
            unit.module.unshard()
            found.update((name, getattr(module, attribute)) for name, (module, attribute) in unit.places.items())
            unit.module.reshard()
        for name, parameter in found.items():
            if is_sharded(parameter):
                raise ModelError(
                    f"{name} is still cut while its layer runs, by tensor parallelism: it is not measured."
                )
        return {name: found[name] for name in self.weights}

    @contextmanager
    def in_evaluation(self) -> Iterator[None]:
        """Evaluation mode, without what would change gradients; afterwards the model is bit for bit as it was."""
        flags = [(module, module.training) for module in self.module.modules()]
        learning = {name: parameter.requires_grad for name, parameter in self.weights.items()}
        options = [
            (module, name, getattr(module, name))
            for module in self.module.modules()
            for kinds, names in _PLAIN.items()
            if isinstance(module, kinds)
            for name in names
        ]
        try:
            with unchanged_buffers(self.module, served=False):
                for module, _ in flags:
                    module.training = False
                for module, name, _ in options:
                    setattr(module, name, False)
                yield
        except BaseException:
            # A pass that was broken off leaves gathered weights and marks behind. Older versions of torch have no
            # reset, and before the first pass there is nothing to reset.
            with suppress(AttributeError, RuntimeError):
                self.units[0].module.reset_iter_state()
            raise
        finally:
            for module, training in flags:
                module.training = training
            for module, name, value in options:
                setattr(module, name, value)
            for unit in self.units:
                unit.module.reshard()
            for name, requires_grad in learning.items():
                self.weights[name].requires_grad_(requires_grad)

    def is_innermost(self, unit: _Unit) -> bool:
        """Whether no other unit lies inside of a unit."""
        inside = {id(module) for module in unit.module.modules()}
        return not any(id(other.module) in inside for other in self.units if other is not unit)

    def freeze(self, names: Collection[str]) -> None:
        """Let some parameters take no gradient, until `in_evaluation` ends."""
        for name in names:
            self.weights[name].requires_grad_(False)

    @contextmanager
    def handing_over(
        self, after_forward: Callable[[_Unit], None] | None, after_backward: Callable[[_Unit], None] | None
    ) -> Iterator[None]:
        """Call back when a unit has run, and when the gradients of its uses have arrived.

        Every process calls in the same order, between the same collectives of the unit's own. A unit whose inputs have
        no gradient, such as an embedding, is not called back in the backward pass.
        """
        handles = []
        for unit in self.units:
            if after_backward is not None:
                hook = _before(unit, after_backward)
                handles.append(unit.module.register_forward_pre_hook(hook, with_kwargs=True))
            if after_forward is not None:
                handles.append(unit.module.register_forward_hook(lambda *_, own=unit: after_forward(own)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # What the processes agree on

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes."""
        with without_function_modes():
            found = torch.tensor(numbers, dtype=torch.int64, device=self.device)
            for group in self.groups:
                dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
            return [int(number) for number in found.tolist()]

    def total(self, number: int) -> int:
        """The sum of a number over all processes."""
        found = torch.tensor([number], dtype=torch.int64, device=self.device)
        for group in self.groups:
            dist.all_reduce(found, group=group)
        return int(found)

    def added_up(self, tensor: Tensor) -> Tensor:
        """The sum of a plain tensor over all processes, where the tensor is."""
        found = tensor.to(self.device, copy=True)
        for group in self.groups:
            dist.all_reduce(found, group=group)
        return found.to(tensor.device)

    def any_of(self, names: Collection[str], known: Collection[str]) -> list[str]:
        """Those of the known names, sorted, that are among the names in at least one process."""
        order = sorted(known)
        marks = self.largest(*(int(name in names) for name in order)) if order else []
        return [name for name, mark in zip(order, marks, strict=True) if mark]

    def from_everyone(self, text: str) -> list[str]:
        """The text of every process, in the same order everywhere."""
        texts = [text]
        for group in self.groups:
            texts = [own for part in gather_text(json.dumps(texts), self.device, group) for own in json.loads(part)]
        return texts

    def batch_of_another(self, batch: Batch | None) -> Batch | None:
        """One sample of the first process that has a batch, for those that have none; None if no process has one.

        Raises:
            BatchError: it holds objects that are neither tensors nor numbers nor text.
        """
        data = ""
        if batch is not None:
            own = batch.take(0, 1)
            file = io.BytesIO()
            plain = [map_tensors(part, lambda t: t.cpu()) for part in (own.inputs, own.labels)]
            torch.save([*plain, own.whole], file)
            data = base64.b64encode(file.getvalue()).decode()
        offered = [text for text in self.from_everyone(data) if text]
        if not offered:
            return None
        if batch is not None:
            return batch.take(0, 1)
        try:
            inputs, labels, whole = torch.load(io.BytesIO(base64.b64decode(offered[0])), weights_only=True)
        except Exception as error:
            raise BatchError(
                f"this process has no samples, and cannot take part with one of another process: {error}. Give each "
                "process at least one sample, or batches of tensors, numbers and text."
            ) from error
        return Batch.of(inputs, labels, whole=whole).to(self.device)


def _before(unit: _Unit, arrived: Callable[[_Unit], None]) -> Callable[..., Any]:
    """A hook before a unit's forward pass that puts `_AtInputs` around its inputs."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        found: list[Tensor] = []
        _with_replaced([args, kwargs], {}, found)
        if not torch.is_grad_enabled() or not found:
            return None
        with without_function_modes():
            wrapped = _AtInputs.apply(lambda: arrived(unit), *found)  # type: ignore[no-untyped-call]
        new = {id(old): tensor for old, tensor in zip(found, wrapped, strict=True)}
        return tuple(_with_replaced([args, kwargs], new, []))

    return hook


def _with_replaced(value: Any, new: dict[int, Tensor], found: list[Tensor]) -> Any:
    """A value with its tensors replaced by id; `found` gets those with a gradient. Objects of other types stay."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            found.append(value)
        return new.get(id(value), value)
    if type(value) in (tuple, list):
        return type(value)(_with_replaced(part, new, found) for part in value)
    return {key: _with_replaced(part, new, found) for key, part in value.items()} if type(value) is dict else value


_PLAIN: dict[Any, tuple[str, ...]] = {
    # These options change the gradient or its layout, or use nested tensors, which have no backward pass.
    (nn.Embedding, nn.EmbeddingBag): ("scale_grad_by_freq", "sparse"),
    nn.TransformerEncoder: ("use_nested_tensor",),
}


def is_sharded_model(model: nn.Module) -> bool:
    """Whether each process holds a part of a parameter of the model."""
    return any_sharded(list(unwrap(model).parameters()))


@contextmanager
def lost_processes() -> Iterator[None]:
    """Say that another process has ended, in place of what torch.distributed says of its connection.

    Raises:
        ProcessError: a connection was lost, or a process did not answer in time.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, dist.DistError) or "gloo" in str(cause).lower():
                raise ProcessError(
                    "another process has ended or does not answer, so that the sharded model cannot run. Read the error"
                    f" of the process that failed first, and start all processes again. Here: {cause!s:.200}"
                ) from error
            cause = cause.__cause__
        raise
