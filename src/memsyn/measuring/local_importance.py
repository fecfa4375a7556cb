"""Local importance: the objective is the squared norm of each layer's own output. Only forward passes are needed.

Owns where a layer ends, which tensor is its output, and that no gradient leaves the layer. Must not know formulas of
importance: it gives objectives with local gradients, and the routes of exact importance measure these.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
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
from memsyn.kernels.rules import MAGNITUDES
from memsyn.measuring.objectives import Estimator, Forward, Position, Scorer, check_holds_samples
from memsyn.measuring.padding import layer_mask
from memsyn.torch_private import is_custom_function, without_function_modes


class _Squared(torch.autograd.Function):
    """sum y^2. The gradient 2 y is computed in the forward pass, since y may be overwritten later."""

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
    """An alias of `value` with two inputs: `value` gets the gradient, `source` gets the gradient times `factor`.

    If `factor` is None, the source gets no gradient. Then it only gives the alias a graph, which marks the alias as
    depending on samples.
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
    """An operation with parameters, and the elementwise operations and reshapes after it.

    The layer ends when another kind of operation reads its output, or an operation that also reads another tensor that
    depends on samples. In `x -> linear -> relu -> reshape -> linear -> + x`, the first layer is `linear, relu,
    reshape`, since the second `linear` reads its output. The second layer is only `linear`, since the addition also
    reads x.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(names)
        """The names of the operation's parameters."""
        self.parts: dict[int, Tensor] = {}
        """id -> tensor: the result of the operation, and everything in the layer after it."""

    @property
    def last(self) -> Tensor:
        """The newest part that has a gradient."""
        return [part for part in self.parts.values() if part.is_floating_point()][-1]


@final
class LayerTracer(Tracer):
    """Runs a forward pass in which no gradient leaves a layer, and sums the squared norms of all layer outputs.

    A layer starts with an operation that takes a value (a parameter, or a tensor computed only from parameters) and a
    tensor that depends on samples. Elementwise operations and reshapes continue the layer, if all their tensors that
    depend on samples are in this layer. They may also read parameters and constants. The output y of the layer is the
    tensor that another operation reads first, as it is at that time.
    """

    decompositions = PLAIN_DECOMPOSITIONS

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        batch: Iterable[Tensor],
        mask: Tensor | None,
        recorder: Recorder | None = None,
        single_use: Container[str] = (),
    ) -> None:
        super().__init__(parameters)
        self.recorder = recorder
        """Receives each layer's gradients as soon as the layer ends. Without a recorder, differentiate `squares`."""
        self.squares: list[tuple[Tensor, _Layer]] = []
        """The squared norm of each layer's output over all samples, with a graph to the layer's parameters.

        With a recorder: only of the layers that are open at the end of the forward pass, and without a graph.
        """
        self.num_uses: Counter[str] = Counter()
        """How often each parameter was used, for the parameters of the layers that ran."""
        self._single_use = single_use
        """Parameters that are used once: they are measured as soon as their layer ends, and their tensors freed."""
        self._measured: set[str] = set()
        self._mask = mask
        self._marker = torch.zeros((), requires_grad=True)
        self._layers: dict[int, _Layer] = {}
        """id of a part -> its layer, as long as the layer is open."""
        self._samples = {id(tensor): tensor for tensor in batch}
        """id -> tensor that depends on samples, but has no graph that shows it."""

    def run_without_values(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation without values: continue a layer, or end the layers that it reads."""
        of_samples = self._sample_tensors(arguments(function, args, kwargs))
        # Code that only looks at a tensor, under no_grad or through `detach`, must not end its layer.
        if of_samples and torch.is_grad_enabled() and function is not Tensor.detach:
            return self._run(function, args, kwargs, of_samples, {})
        output = function(*args, **kwargs)
        # The result has no graph that shows where it came from, so note it.
        if of_samples:
            self._samples.update((id(tensor), tensor) for tensor in tensors_of(output))
        return output

    def run_with_values(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation with values. If it also reads samples, it starts a layer, or continues one."""
        given = arguments(function, args, kwargs)
        values = {place: value for place, argument in given.items() if (value := self.values.get(id(argument)))}
        of_samples = self._sample_tensors(given)
        # An integer scalar only selects weights, as in `table[x.max()]`: the result is still a value.
        if any(t.ndim or t.is_floating_point() for t in of_samples.values()):
            return self._run(function, args, kwargs, of_samples, values)
        output = function(*args, **kwargs)
        self._follow(function, values, output)
        return output

    def _sample_tensors(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Place -> tensor, for the tensors that depend on samples."""
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
        for value in values.values():
            self.num_uses.update(value.names)
        if names & self._measured:
            raise ModelError(
                f"{', '.join(sorted(names & self._measured))}: used once in the batch that was checked first, and more "
                "than once in a later one. Let the first batch be one in which it is used more often."
            )
        for tensor in of_samples.values():
            self._claim_custom_result(tensor)
        layers = unique(layer for t in of_samples.values() if (layer := self._layers.get(id(t))))
        if len(layers) == 1 and self._continues_layer(function, args, kwargs, of_samples.values()):
            (layer,) = layers
            output = self._run_inside_layer(function, args, kwargs)
            return self._extend(layer, self._without_padding(output) if names else output)
        changes = changes_its_input(function, kwargs)
        # The output of a layer must be read before an in-place operation overwrites it.
        if changes:
            self._close(of_samples.values())
        cut = {place: tensor.detach() for place, tensor in of_samples.items()}
        # In channels_last, torch's gradient for the weights of a group norm alone crashes the process.
        if function is F.group_norm:
            cut = {place: tensor.contiguous() for place, tensor in cut.items()}
        new_args, new_kwargs = with_tensors(function, args, kwargs, cut)
        output = function(*new_args, **new_kwargs)
        if changes:
            self._samples[id(args[0])] = args[0]
            if output is None:
                self._begin(new_args[0], names, closed=True)
                return None
        elif not tensors_of(output):
            # No tensors, for instance a shape: such a read ends no layer.
            return output
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
            # Only with fixed statistics it is a scale and a shift per channel, like an elementwise operation.
            if given.get("training") or given.get("running_mean") is None:
                return False
        return all(id(tensor) in self._layers for tensor in of_samples)

    def _run_inside_layer(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation as a part of a layer. ReLU and batch normalisation have faster derivatives here."""
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
        # (C,) -> (C, 1, 1) for images. This derivative is three times faster than the one of autograd.
        return _alias(z, y, scale.view(-1, *[1] * (z.ndim - 2)))

    def _begin(self, output: Any, names: Iterable[str], *, closed: bool) -> Any:
        """Start a layer for each result of an operation with parameters."""

        def begin(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return self._marked_as_samples(tensor)
            part: Tensor = self._extend(_Layer(names), self._without_padding(tensor))
            # After an in-place operation, the model may go on with the tensor that was written to, not with this one.
            if closed:
                self._close([part])
            return part

        return _change_tensors(output, begin)

    def _claim_custom_result(self, tensor: Tensor) -> None:
        """Add the result of a custom autograd function to the layer that it was computed from.

        Function modes do not see operations inside a custom autograd function. So follow the graph back from the
        result: if it reaches exactly one open layer, the result is a part of this layer.
        """
        if id(tensor) in self._layers or not is_custom_function(tensor):
            return
        open_parts = [(key, layer.parts[key]) for key, layer in self._layers.items()]
        owners = {part.grad_fn: self._layers[key] for key, part in open_parts}
        found: set[_Layer] = set()
        nodes: list[Any] = [tensor.grad_fn]
        seen = set(nodes)  # a graph in which branches meet again has exponentially many paths
        while nodes:
            following = {node for node, _ in nodes.pop().next_functions if node is not None} - seen
            found.update(owners[node] for node in following if node in owners)
            nodes += [node for node in following if node not in owners]
            seen |= following
        if len(found) == 1:
            self._extend(found.pop(), tensor)

    def _extend(self, layer: _Layer, output: Any) -> Any:
        for tensor in tensors_of(output):
            # An in-place operation returns a part again. Move it to the end, since `last` takes the newest part.
            layer.parts.pop(id(tensor), None)
            layer.parts[id(tensor)] = tensor
            self._layers[id(tensor)] = layer
        return output

    def _marked_as_samples(self, tensor: Tensor) -> Tensor:
        """The tensor, marked as depending on samples. Everything computed from it is marked too."""
        if not tensor.is_floating_point():
            self._samples[id(tensor)] = tensor
            return tensor
        return _alias(self._marker, tensor.detach())

    def _without_padding(self, tensor: Tensor) -> Tensor:
        """Stop the gradient at padding in a tensor (samples, tokens, ...) or (samples * tokens, features)."""
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
        """End the layers of these parts; the parts are the layers' outputs."""
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
                    self._measured |= self.recorder.hand_over_early(self._single_use)
                # Only the last layers are checked: a NaN or infinity in any layer also reaches them.
                if last:
                    self.squares.append((_squared_norm(y.detach()), layer))
            layer.parts.clear()

    def scores(self, outputs: Iterable[Tensor], num_samples: int | None, batch_index: int) -> Tensor:
        """(B, 1): the first row holds the squared norms of all layers and samples, the other rows are zero.

        The norms cannot be split by sample, since the batch axes of the layers are not known here.

        Raises:
            BatchError: the number of samples is not known.
            OutputError: the output of a layer is NaN or infinite.
        """
        if num_samples is None:
            raise BatchError(
                f"batch {batch_index}: local importance needs batches made of tensors, to count the samples. Give "
                "tensors, or tuples, lists or mappings of tensors, samples first."
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
                    "squared. Check the batch, or leave it out: one such sample makes the whole importance useless."
                )
            return F.pad(total.view(1, 1), (0, 0, 0, num_samples - 1))


def _change_tensors(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output of an operation, with every tensor changed."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (tuple, list)):
        return type(output)([change(part) if isinstance(part, Tensor) else part for part in output])
    return output


@final
class LocalScorer(Scorer):
    """The squared norm of every layer's own output, summed over layers and samples."""

    tells_samples_apart = False

    def __init__(self, forward: Forward | None, estimator: Estimator) -> None:
        super().__init__(forward, estimator)
        self._num_uses: Counter[str] = Counter()
        """The most uses of each parameter in a forward pass, as the checks have seen it."""

    def scores(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batch: Batch,
        position: Position,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """(B, 1): the first row holds the squared norms of all layers and samples, the other rows are zero.

        With a recorder, each layer is differentiated as soon as it ends, and the scores have no graph.
        """
        mask = layer_mask(model, batch.inputs) if self.masks_padding else None
        single_use = {name for name, count in self._num_uses.items() if count == 1}
        layers = LayerTracer(parameters, batch.tensors, mask, recorder, single_use)
        with layers:
            output = self.output(model, batch.inputs, position.batch_index)
        check_holds_samples(output, batch, position.batch_index)
        return layers.scores(tensors(output), batch.num_samples, position.batch_index)

    def check_complete(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, batch_index: int
    ) -> None:
        """Refuse parameters that the output depends on, if the tracer saw no operation that uses them.

        Raises:
            ModelError: names the parameters.
        """
        layers = LayerTracer(parameters, batch.tensors, None)
        with layers:
            self.output(model, batch.copied().inputs, batch_index)
        refuse_unseen_uses(
            partial(self.output, model, batch.copied().inputs, batch_index),
            {name: p for name, p in parameters.items() if name not in layers.num_uses},
        )
        self._num_uses |= layers.num_uses  # the larger count of the two


def refuse_unseen_uses(run: Callable[[], Any], unused: Mapping[str, nn.Parameter]) -> None:
    """Refuse the `unused` parameters that the output of `run` depends on: the tracer saw no use of them.

    Raises:
        ModelError: names the parameters.
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
            "that memsyn can see uses it, so its local importance is unknown. Look for a custom autograd function. "
            "Write the function in torch's own operations, or freeze the parameter."
        )


def remainder_scale(estimator: Estimator) -> float:
    """By what to multiply the remainder in a checkpoint of format 1, written by memsyn 0.1.0.

    There each layer was differentiated with y in place of 2 y: the sums were multiplied by f(2) when they were saved,
    the remainder was not.
    """
    return float(MAGNITUDES[estimator.magnitude](torch.tensor(2.0))) if estimator.local else 1.0
