"""Local importance: every layer's own squared output norm, from forward passes only.

Owns where a layer ends: what its output is, and that nothing is differentiated beyond it. Knows no formulas of
importance: it makes an objective whose gradients are local, and the routes of exact importance measure those.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsyn.batches import Batch, tensors
from memsyn.engine.calls import Value, arguments, changes_its_input, tensors_of, with_tensors
from memsyn.engine.decompositions import PLAIN_DECOMPOSITIONS
from memsyn.engine.passes import run_backward
from memsyn.engine.recorder import Recorder, unique
from memsyn.engine.tracer import Tracer
from memsyn.errors import BatchError, ModelError, OutputError
from memsyn.kernels.operations import Function, name_of, operation_of
from memsyn.measuring.objectives import Position, Scorer, token_mask
from memsyn.torch_private import is_custom_function, without_function_modes


class _Squared(torch.autograd.Function):
    """sum y^2, whose gradient 2 y is made at once: y itself may be overwritten later."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.gradient = 2 * y
        return _squared_norm(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.gradient * grad.to(ctx.gradient.dtype)  # type: ignore[no-any-return]


def _squared_norm(y: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(y, dtype=torch.promote_types(y.dtype, torch.float32))
    return norm.square()


class _Alias(torch.autograd.Function):
    """The memory of `value` under another gradient: it goes on to `value`, and times `factor` to `source`.

    Without a factor the source gets none: then its graph only marks the alias as computed of samples.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor, factor: Tensor | None) -> Tensor:
        ctx.factor = factor
        return value.new_empty(0).set_(value)  # type: ignore[call-overload, no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        return None if ctx.factor is None else grad * ctx.factor, grad, None


def _alias(source: Tensor, value: Tensor, factor: Tensor | None = None) -> Tensor:
    alias: Tensor = _Alias.apply(source, value, factor)  # type: ignore[no-untyped-call]
    return alias


class _Layer:
    """An operation with parameters, and what follows it as far as that reads nothing else of the samples.

    In `x -> linear -> relu -> reshape -> linear -> + x`, the first layer is `linear, relu, reshape`: it ends where the
    second `linear` reads it. The second layer is that `linear` alone, since the addition also reads x.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(names)
        """Of its operation's parameters."""
        self.parts: dict[int, Tensor] = {}
        """Everything from its operation's result on, by id."""

    @property
    def last(self) -> Tensor:
        """The newest part that has a gradient."""
        return [part for part in self.parts.values() if part.is_floating_point()][-1]


@final
class LayerTracer(Tracer):
    """Runs a forward pass in which no gradient leaves a layer, and adds up the squared norms of all their outputs.

    A layer is an operation that takes parameters (or what is computed of parameters alone) and something of the
    samples. Its output y is what follows the operation through elementwise operations and reshapes that read no other
    tensor of the samples (parameters and constants they may read), as it is when any other operation first reads it.
    """

    decompositions = PLAIN_DECOMPOSITIONS

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        batch: Iterable[Tensor],
        mask: Tensor | None,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(parameters)
        self.recorder = recorder
        """What gets each layer's gradients as soon as the layer ends; without one, autograd can be asked for them."""
        self.squares: list[tuple[Tensor, _Layer]] = []
        """The squared norm of each layer's output over all samples, with a graph to the layer's parameters; with a
        recorder only of those at the end, without a graph."""
        self.used: set[str] = set()
        """The parameters of the layers that ran."""
        self._mask = mask
        self._marker = torch.zeros((), requires_grad=True)
        self._layers: dict[int, _Layer] = {}
        """Part -> its layer, until that is closed."""
        self._samples = {id(tensor): tensor for tensor in batch}
        """What is of the samples and has no gradient to show it."""

    def run_without_values(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """An operation without parameters."""
        of_samples = self._sample_tensors(arguments(function, args, kwargs))
        if of_samples and torch.is_grad_enabled() and function is not Tensor.detach:
            return self._run(function, args, kwargs, of_samples, {})
        output = function(*args, **kwargs)
        if of_samples:  # without a gradient, maybe inside a custom function: no layer ends by it
            self._samples.update((id(tensor), tensor) for tensor in tensors_of(output))
        return output

    def run_with_values(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A layer, if it reads something of the samples."""
        given = arguments(function, args, kwargs)
        values = {place: value for place, argument in given.items() if (value := self.values.get(id(argument)))}
        of_samples = self._sample_tensors(given)
        if any(t.ndim or t.is_floating_point() for t in of_samples.values()):  # a number may choose among weights
            return self._run(function, args, kwargs, of_samples, values)
        output = function(*args, **kwargs)
        self._follow(function, values, output)
        return output

    def _sample_tensors(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """What is of the samples, by place."""
        return {place: t for place, t in given.items() if isinstance(t, Tensor) and self._depends_on_samples(t)}

    def _depends_on_samples(self, tensor: Tensor) -> bool:
        return id(tensor) in self._samples or (tensor.requires_grad and id(tensor) not in self.values)

    def _run(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        of_samples: Mapping[str, Tensor],
        values: Mapping[str, Value],
    ) -> Any:
        names = frozenset[str]().union(*(value.names for value in values.values()))
        self.used |= names
        for tensor in of_samples.values():
            self._claim_custom_result(tensor)
        layers = unique(layer for t in of_samples.values() if (layer := self._layers.get(id(t))))
        if len(layers) == 1 and self._continues_layer(function, args, kwargs, of_samples.values()):
            (layer,) = layers
            output = self._run_inside_layer(function, args, kwargs)
            return self._extend(layer, self._without_padding(output) if names else output)
        changes = changes_its_input(function, kwargs)
        if changes:
            self._close(of_samples.values())
        cut = {place: tensor.detach() for place, tensor in of_samples.items()}
        if function is F.group_norm:  # in channels_last, torch's gradient for the weights alone crashes the process
            cut = {place: tensor.contiguous() for place, tensor in cut.items()}
        new_args, new_kwargs = with_tensors(function, args, kwargs, cut)
        output = function(*new_args, **new_kwargs)
        if changes:
            self._samples[id(args[0])] = args[0]
            if output is None:
                self._begin(new_args[0], names, closed=True)
                return None
        elif not tensors_of(output):
            return output  # it asked for a shape
        else:
            self._close(of_samples.values())
        return self._begin(output, names, closed=changes) if names else _change_tensors(output, self._marked_as_samples)

    def _continues_layer(
        self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], of_samples: Iterable[Tensor]
    ) -> bool:
        if not operation_of(function).elementwise:
            return False
        if function is F.batch_norm:
            given = arguments(function, args, kwargs)
            if given.get("training") or given.get("running_mean") is None:
                return False
        return all(id(tensor) in self._layers for tensor in of_samples)

    def _run_inside_layer(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run it as a part of a layer; the derivatives of what is met most often are known here."""
        relu = name_of(function).strip("_") == "relu"
        if self.recorder is None or not (relu or function is F.batch_norm):
            return function(*args, **kwargs)
        given = arguments(function, args, kwargs)
        place = next(iter(given))
        z = given[place]
        new_args, new_kwargs = with_tensors(function, args, kwargs, {place: z.detach()})
        y = function(*new_args, **new_kwargs)
        if relu:
            return _alias(z, y, y > 0)
        scale = (given["running_var"] + given.get("eps", 1e-5)).rsqrt()
        if given.get("weight") is not None:
            scale = scale * given["weight"].detach()
        return _alias(z, y, scale.view(-1, *[1] * (z.ndim - 2)))  # autograd's own takes three times as long

    def _begin(self, output: Any, names: Iterable[str], *, closed: bool) -> Any:
        """The results of an operation with parameters: a layer each."""

        def begin(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return self._marked_as_samples(tensor)
            part: Tensor = self._extend(_Layer(names), self._without_padding(tensor))
            if closed:  # its user may go on with the tensor that was written to, not with this one
                self._close([part])
            return part

        return _change_tensors(output, begin)

    def _claim_custom_result(self, tensor: Tensor) -> None:
        """A custom autograd function, which nobody sees, may have made it of a layer's output: then it is a part."""
        if id(tensor) in self._layers or not is_custom_function(tensor):
            return
        open_parts = [(key, layer.parts[key]) for key, layer in self._layers.items()]
        owners = {part.grad_fn: self._layers[key] for key, part in open_parts}
        found: set[_Layer] = set()
        nodes: list[Any] = [tensor.grad_fn]
        while nodes:
            following = [node for node, _ in nodes.pop().next_functions if node is not None]
            found.update(owners[node] for node in following if node in owners)
            nodes += [node for node in following if node not in owners]
        if len(found) == 1:
            self._extend(found.pop(), tensor)

    def _extend(self, layer: _Layer, output: Any) -> Any:
        for tensor in tensors_of(output):
            layer.parts.pop(id(tensor), None)
            layer.parts[id(tensor)] = tensor
            self._layers[id(tensor)] = layer
        return output

    def _marked_as_samples(self, tensor: Tensor) -> Tensor:
        """What shows that it is of samples, whatever is computed of it."""
        if not tensor.is_floating_point():
            self._samples[id(tensor)] = tensor
            return tensor
        return _alias(self._marker, tensor.detach())

    def _without_padding(self, tensor: Tensor) -> Tensor:
        """Without a gradient at padding, if it is (samples, tokens, ...) or (samples * tokens, features)."""
        mask = self._mask
        if mask is None or tensor.ndim < 2:
            return tensor
        if tensor.ndim > 2 and tensor.shape[:2] == mask.shape:
            counts = mask.view(*mask.shape, *[1] * (tensor.ndim - 2)) != 0
        elif tensor.ndim == 2 and len(tensor) == mask.numel() and mask.shape[1] > 1:
            counts = mask.reshape(-1, 1) != 0
        else:
            return tensor
        return _alias(tensor, tensor.detach(), counts)

    def _close(self, read: Iterable[Tensor], *, last: bool = False) -> None:
        """The layers of which these are parts end with them."""
        ids = {id(tensor) for tensor in read}
        for layer in unique(layer for key in ids if (layer := self._layers.get(key))):
            parts = [part for key, part in layer.parts.items() if key in ids and part.is_floating_point()]
            y = parts[-1] if parts else layer.last
            for key in layer.parts:
                del self._layers[key]
            if self.recorder is None:
                self.squares.append((_Squared.apply(y), layer))  # type: ignore[no-untyped-call]
            else:
                if y.requires_grad:
                    run_backward(y, (self.recorder.root,), retain_graph=False, gradient=2 * y.detach())
                    self.recorder.root.grad = None
                if last:  # if anything was NaN or infinite, so are these
                    self.squares.append((_squared_norm(y.detach()), layer))
            layer.parts.clear()

    def scores(self, outputs: Iterable[Tensor], num_samples: int | None, batch_index: int) -> Tensor:
        """(B, 1): the squared norms of all layers and samples in the first row, zeros in the others.

        In which dimension a layer keeps its samples is not known here.

        Raises:
            BatchError: it is not known how many samples there are.
            OutputError: an output is NaN or infinite.
        """
        if num_samples is None:
            raise BatchError(
                f"batch {batch_index}: local importance needs batches made of tensors, to tell the samples."
            )
        with without_function_modes():
            for tensor in outputs:
                self._claim_custom_result(tensor)
            self._close([layer.last for layer in self._layers.values()], last=True)
            total = torch.zeros(())
            for square, _ in self.squares:
                total = total.to(square.device) + square
            if not bool(total.isfinite()):
                names = next(", ".join(layer.names) for square, layer in self.squares if not bool(square.isfinite()))
                raise OutputError(
                    f"batch {batch_index}: the output of the layer of {names} is NaN or infinite, or overflows when "
                    "squared. Look at the batch, or leave it out: one such sample would spoil the whole importance."
                )
            return F.pad(total.view(1, 1), (0, 0, 0, num_samples - 1))


def _change_tensors(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An operation's result with every tensor changed."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (tuple, list)):
        return type(output)([change(part) if isinstance(part, Tensor) else part for part in output])
    return output


@final
class LocalScorer(Scorer):
    """The squared norm of every layer's own output: sums over layers, whose batch axis is not known here."""

    tells_samples_apart = False

    def scores(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batch: Batch,
        position: Position,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """(B, 1): the squared norms of all layers and samples in the first row, zeros in the others.

        With a recorder, each layer is differentiated as soon as it ends, and the scores have no gradient.
        """
        mask = token_mask(batch.inputs) if self.masks_padding else None
        encoded = mask is not None and batch.inputs.get("attention_mask") is mask  # a decoder's padding counts
        layers = LayerTracer(parameters, batch.tensors, mask if encoded else None, recorder)
        with layers:
            output = self.output(model, batch.inputs, position.batch_index)
        return layers.scores(tensors(output), batch.num_samples, position.batch_index)

    def check_complete(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, batch_index: int
    ) -> None:
        """Refuse parameters on which the output depends, though no operation was seen to use them.

        Raises:
            ModelError: names them.
        """
        layers = LayerTracer(parameters, batch.tensors, None)
        with layers:
            self.output(model, batch.copied().inputs, batch_index)
        refuse_unseen_uses(
            partial(self.output, model, batch.copied().inputs, batch_index),
            {name: p for name, p in parameters.items() if name not in layers.used},
        )


def refuse_unseen_uses(run: Callable[[], Any], unused: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters on which what `run` gives depends, though no operation was seen to use them.

    Raises:
        ModelError: names them.
    """
    outputs = [tensor for tensor in tensors(run()) if tensor.requires_grad] if unused else []
    if not outputs:
        return
    total = torch.stack([tensor.float().sum().to(outputs[0].device) for tensor in outputs]).sum()
    found = torch.autograd.grad(total, list(unused.values()), allow_unused=True)
    hidden = [name for name, grad in zip(unused, found, strict=True) if grad is not None]
    if hidden:
        raise ModelError(
            f"{', '.join(hidden[:5])}{' ...' if len(hidden) > 5 else ''}: the output depends on it, but no operation "
            "that torch lets others see uses it, so it has no local importance. Look for a custom autograd function; "
            "freeze the parameter, or write the function in torch's own operations."
        )
