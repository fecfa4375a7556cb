"""Local importance: every layer's own squared output norm, from forward passes only.

Owns where a layer ends: what its output is, and that nothing is differentiated beyond it. Knows no formulas of
importance: it makes an objective whose gradients are local, and the routes of exact importance measure those.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from memsyn.batches import tensors
from memsyn.engine.calls import Function, Value, arguments, changes_its_input, name_of, replaced, tensors_of
from memsyn.engine.decompositions import PLAIN_DECOMPOSITIONS
from memsyn.engine.recorder import Recorder
from memsyn.engine.tracer import Tracer
from memsyn.errors import BatchError, ModelError, OutputError

_ACTIVATIONS = """
    relu relu6 leaky_relu rrelu prelu elu selu celu gelu silu mish sigmoid logsigmoid log_sigmoid tanh softplus softsign
    softshrink hardshrink tanhshrink hardtanh hardswish hardsigmoid threshold dropout dropout1d dropout2d dropout3d
    alpha_dropout feature_alpha_dropout batch_norm"""
_ARITHMETIC = """
    add iadd radd sub isub rsub subtract mul imul rmul multiply div idiv rdiv truediv rtruediv itruediv true_divide
    divide pow ipow rpow square sqrt rsqrt reciprocal neg negative abs absolute exp expm1 log log1p erf erfc sin cos
    sinh cosh atan asinh clamp clamp_min clamp_max clip minimum maximum where lt le gt ge eq ne lerp addcmul addcdiv"""
_RESHAPES = """
    view reshape view_as reshape_as flatten unflatten permute transpose swapaxes swapdims movedim moveaxis t squeeze
    unsqueeze contiguous clone to float double half bfloat16 type type_as"""

FOLLOWED: Final = frozenset(f"{_ACTIVATIONS} {_ARITHMETIC} {_RESHAPES}".split())
"""Elementwise operations and reshapes, by the names of torch's functions without underscores at their ends."""


class _Squared(torch.autograd.Function):
    """1/2 sum y^2, whose gradient is a copy of y: that may be overwritten later."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.gradient = y.clone()
        return _half_square(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.gradient * grad.to(ctx.gradient.dtype)  # type: ignore[no-any-return]


def _half_square(y: Tensor) -> Tensor:
    half: Tensor = torch.linalg.vector_norm(y, dtype=torch.promote_types(y.dtype, torch.float32)).square() / 2
    return half


class _Rectified(torch.autograd.Function):
    """relu(z), as computed before: if its gradient is the very y, that has its zeros already."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        ctx.y = y
        return y.new_empty(0).set_(y)  # type: ignore[call-overload, no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        same = grad.data_ptr() == ctx.y.data_ptr() and grad.stride() == ctx.y.stride()
        return grad if same else grad * (ctx.y > 0), None


class _Normalised(torch.autograd.Function):
    """scale z + shift, as computed before: autograd's own takes three times as long for the gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return y.new_empty(0).set_(y)  # type: ignore[call-overload, no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad * ctx.scale, grad, None


class _Marked(torch.autograd.Function):
    """The same numbers in the same memory, with a graph that leads nowhere: what is computed of it is of samples."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mark: Tensor) -> Tensor:
        return tensor.new_empty(0).set_(tensor)  # type: ignore[call-overload, no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class _Counted(torch.autograd.Function):
    """The same numbers in the same memory, of which those at padding do not count."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, counts: Tensor) -> Tensor:
        ctx.counts = counts
        return tensor.new_empty(0).set_(tensor)  # type: ignore[call-overload, no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.counts.to(grad.dtype), None


class _Layer:
    """An operation with parameters, and what follows it as far as that reads nothing else of the samples."""

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
class Locally(Tracer):
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
        """Half the squared norm of each layer's output over all samples, with a graph to the layer's parameters; with a
        recorder only of those at the end, without a graph."""
        self.used: set[str] = set()
        """The parameters of the layers that ran."""
        self._mask = mask
        self._mark = torch.zeros((), requires_grad=True)
        self._layers: dict[int, _Layer] = {}
        """Part -> its layer, until that is closed."""
        self._samples = {id(tensor): tensor for tensor in batch}
        """What is of the samples and has no gradient to show it."""

    def pass_by(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """An operation without parameters."""
        own = self._own(arguments(function, args, kwargs))
        if own and torch.is_grad_enabled() and function is not Tensor.detach:
            return self._run(function, args, kwargs, own, {})
        output = function(*args, **kwargs)
        if own:  # without a gradient, maybe inside a custom function: no layer ends by it
            self._samples.update((id(tensor), tensor) for tensor in tensors_of(output))
        return output

    def meet(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A layer, if it reads something of the samples."""
        given = arguments(function, args, kwargs)
        met = {place: value for place, argument in given.items() if (value := self.values.get(id(argument)))}
        own = self._own(given)
        if any(t.ndim or t.is_floating_point() for t in own.values()):  # a number may choose among weights
            return self._run(function, args, kwargs, own, met)
        output = function(*args, **kwargs)
        self._follow(function, met, output)
        return output

    def _own(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """What is of the samples, by place."""
        return {place: t for place, t in given.items() if isinstance(t, Tensor) and self._is_of_samples(t)}

    def _is_of_samples(self, tensor: Tensor) -> bool:
        return id(tensor) in self._samples or (tensor.requires_grad and id(tensor) not in self.values)

    def _run(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        own: Mapping[str, Tensor],
        met: Mapping[str, Value],
    ) -> Any:
        names = frozenset[str]().union(*(value.names for value in met.values()))
        self.used |= names
        for tensor in own.values():
            self._adopt(tensor)
        layers = {id(layer): layer for t in own.values() if (layer := self._layers.get(id(t)))}
        if len(layers) == 1 and self._follows(function, args, kwargs, own.values()):
            (layer,) = layers.values()
            output = self._continue(function, args, kwargs)
            return self._grow(layer, self._counted(output) if names else output)
        changes = changes_its_input(function, kwargs)
        if changes:
            self._close(own.values())
        cut = {place: tensor.detach() for place, tensor in own.items()}
        if function is F.group_norm:  # in channels_last, torch's gradient for the weights alone crashes the process
            cut = {place: tensor.contiguous() for place, tensor in cut.items()}
        new_args, new_kwargs = replaced(function, args, kwargs, cut)
        output = self._call(function, new_args, new_kwargs)
        if changes:
            self._samples[id(args[0])] = args[0]
            if output is None:
                self._begin(new_args[0], names, closed=True)
                return None
        elif not tensors_of(output):
            return output  # it asked for a shape
        else:
            self._close(own.values())
        return self._begin(output, names, closed=changes) if names else _changed(output, self._marked)

    def _follows(
        self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], own: Iterable[Tensor]
    ) -> bool:
        if name_of(function).strip("_") not in FOLLOWED:
            return False
        if function is F.batch_norm:
            given = arguments(function, args, kwargs)
            if given.get("training") or given.get("running_mean") is None:
                return False
        return all(id(tensor) in self._layers for tensor in own)

    def _call(self, function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run it; a use that the recorder makes of it is that of a layer."""
        if self.recorder is None:
            return function(*args, **kwargs)
        self.recorder.newest = None
        output = function(*args, **kwargs)
        if self.recorder.newest is not None:
            self.recorder.begun.add(self.recorder.newest)
        return output

    def _continue(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run it as a part of a layer; the derivatives of what is met most often are known here."""
        relu = name_of(function).strip("_") == "relu"
        if self.recorder is None or not (relu or function is F.batch_norm):
            return self._call(function, args, kwargs)
        given = arguments(function, args, kwargs)
        place = next(iter(given))
        z = given[place]
        y = self._call(function, *replaced(function, args, kwargs, {place: z.detach()}))
        if relu:
            return _Rectified.apply(z, y)  # type: ignore[no-untyped-call]
        scale = (given["running_var"] + given.get("eps", 1e-5)).rsqrt()
        if given.get("weight") is not None:
            scale = scale * given["weight"].detach()
        return _Normalised.apply(z, y, scale.view(-1, *[1] * (z.ndim - 2)))  # type: ignore[no-untyped-call]

    def _begin(self, output: Any, names: Iterable[str], *, closed: bool) -> Any:
        """The results of an operation with parameters: a layer each."""

        def begin(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return self._marked(tensor)
            part: Tensor = self._grow(_Layer(names), self._counted(tensor))
            if closed:  # its user may go on with the tensor that was written to, not with this one
                self._close([part])
            return part

        return _changed(output, begin)

    def _adopt(self, tensor: Tensor) -> None:
        """A custom autograd function, which nobody sees, may have made it of a layer's output: then it is a part."""
        if id(tensor) in self._layers or not isinstance(tensor.grad_fn, BackwardCFunction):
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
            self._grow(found.pop(), tensor)

    def _grow(self, layer: _Layer, output: Any) -> Any:
        for tensor in tensors_of(output):
            layer.parts.pop(id(tensor), None)
            layer.parts[id(tensor)] = tensor
            self._layers[id(tensor)] = layer
        return output

    def _marked(self, tensor: Tensor) -> Tensor:
        """What shows that it is of samples, whatever is computed of it."""
        if not tensor.is_floating_point():
            self._samples[id(tensor)] = tensor
            return tensor
        marked: Tensor = _Marked.apply(tensor, self._mark)  # type: ignore[no-untyped-call]
        return marked

    def _counted(self, tensor: Tensor) -> Tensor:
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
        counted: Tensor = _Counted.apply(tensor, counts)  # type: ignore[no-untyped-call]
        return counted

    def _close(self, read: Iterable[Tensor], *, last: bool = False) -> None:
        """The layers of which these are parts end with them."""
        ids = {id(tensor) for tensor in read}
        for layer in {id(layer): layer for key in ids if (layer := self._layers.get(key))}.values():
            parts = [part for key, part in layer.parts.items() if key in ids and part.is_floating_point()]
            y = parts[-1] if parts else layer.last
            for key in layer.parts:
                del self._layers[key]
            if self.recorder is None:
                self.squares.append((_Squared.apply(y), layer))  # type: ignore[no-untyped-call]
            else:
                self.recorder.differentiate(y)
                if last:  # if anything was NaN or infinite, so are these
                    self.squares.append((_half_square(y.detach()), layer))
            layer.parts.clear()

    def scores(self, outputs: Iterable[Tensor], num_samples: int | None, batch_index: int) -> Tensor:
        """(B, 1): half the squared norms of all layers and samples in the first row, zeros in the others.

        In which dimension a layer keeps its samples is not known here.

        Raises:
            BatchError: it is not known how many samples there are.
            OutputError: an output is NaN or infinite.
        """
        if num_samples is None:
            raise BatchError(
                f"batch {batch_index}: local importance needs batches made of tensors, to tell the samples."
            )
        with torch._C.DisableTorchFunction():
            for tensor in outputs:
                self._adopt(tensor)
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


def _changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An operation's result with every tensor changed."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (tuple, list)):
        return type(output)([change(part) if isinstance(part, Tensor) else part for part in output])
    return output


def check_seen(run: Callable[[], Any], unused: Mapping[str, nn.Parameter]) -> None:
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
