"""Protection by a projection: each change of a weight matrix is damped in the directions that the old tasks use.

Owns the projected form: its arithmetic, which parameters it acts on, and when. Reads nothing of the optimizer. Must not
keep state on the model or its parameters, but for hooks on `state_dict` and `load_state_dict`.

Gradients are damped before the step too. An optimizer such as Adam divides them by their size: a gradient that is large
in protected directions would make its steps in the free directions small.
"""

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memsyn.errors import OptionError
from memsyn.matrices import Matrix
from memsyn.parameters import fitted, layer_of, wide_dtype
from memsyn.protecting.adapter_projection import AdaptedMatrix, adapted_matrices, is_fresh
from memsyn.protecting.optimizers import PROJECTED, Stepping
from memsyn.protecting.predicting import Watched
from memsyn.protecting.protection import Protection, Report, check_optimizer, is_protected
from memsyn.protecting.strength import checked_strength
from memsyn.torch_private import version_of
from memsyn.values.directions import (
    DiagonalDirections,
    Directions,
    LayerDirections,
    damping,
    diagonal_damping,
)
from memsyn.values.spectra import Spectrum
from memsyn.weights_in_effect import parameters_by_name, weights_by_name

EVERY: Final = 10
"""Steps between two projections by default; the measurements are in docs/decisions.md."""


@final
class Damping:
    """D -> U [(U^T D V)_ij / (1 + c a_j ((1 - mu) s_i + mu))] V^T, for the kept eigenvectors and the mean of the rest.

    With V of r columns and U of q, let P = D V, Q = U^T D and C = U^T D V, and let h_ij be the damping, where the index
    0 stands for the rest. Then the result is

        h_00 D + U [(h_i0 - h_00) Q + ((h_ij - h_i0 - h_0j + h_00) C) V^T] + ((h_0j - h_00) P) V^T

    Args:
        own: the directions of a layer.
        strength: c.
        device, dtype: of the changes to come.
    """

    def __init__(self, own: LayerDirections, strength: float, device: torch.device, dtype: torch.dtype) -> None:
        inputs = own.inputs.to(device, dtype)
        outputs = None if own.outputs is None else own.outputs.to(device, dtype)
        self._by_column = inputs.vectors is None
        self._vectors = inputs.vectors
        self._output_vectors = None if outputs is None else outputs.vectors
        column_values = _with_rest(inputs)
        row_values = None if outputs is None else _with_rest(outputs)
        gains = damping(column_values, row_values, strength)  # (G, q + 1 or 1, r + 1, or n for a table)
        corner = gains[:, -1:, -1:]
        if self._by_column:
            self._rest = gains[:, -1:, :]
            self._of_rows = gains[:, :-1, :] - self._rest
        else:
            self._rest = corner
            self._of_columns = gains[:, -1:, :-1] - corner
            self._of_rows = gains[:, :-1, -1:] - corner
            self._of_both = gains[:, :-1, :-1] - gains[:, :-1, -1:] - gains[:, -1:, :-1] + corner

    def __call__(self, change: Tensor) -> Tensor:
        """The damped change, (G, m, n)."""
        result = change * self._rest
        u, v = self._output_vectors, self._vectors
        if v is not None:
            by_inputs = change @ v
            result = result.baddbmm_(by_inputs * self._of_columns, v.transpose(1, 2))
        if u is not None:
            rotated = u.transpose(1, 2) @ change
            kept = rotated * self._of_rows
            if v is not None:
                kept = kept.baddbmm_((rotated @ v) * self._of_both, v.transpose(1, 2))
            result = result.baddbmm_(u, kept)
        return result


@final
class UpDamping:
    """The damping of B of an adapter, by A as it is when it is called.

    Args:
        own: the adapter, and the directions of its weight.
        strength: c.
    """

    def __init__(self, own: AdaptedMatrix, strength: float) -> None:
        self._own, self._strength = own, strength

    def __call__(self, change: Tensor) -> Tensor:
        """The damped change, (1, m, r)."""
        return Damping(self._own.of_up(), self._strength, change.device, change.dtype)(change)


def _with_rest(spectrum: Spectrum) -> Tensor:
    """The eigenvalues that are kept and that of the rest, (G, r + 1); of a table, all n."""
    if spectrum.vectors is None:
        return spectrum.values
    return torch.cat([spectrum.values, spectrum.rest.unsqueeze(1)], 1)


@dataclass(frozen=True, eq=False)
class _Protected:
    """A layer in its optimizer: the parameters that are changed together, and how."""

    name: str
    parameters: tuple[Tensor, ...]
    """The weight, and its bias if both are protected together."""
    matrix: Matrix | None
    """None for a parameter that is no matrix."""
    damping: Damping | UpDamping | Tensor
    """Of a parameter that is no matrix, the factor of each weight."""
    num_rows: int
    """The rows of the weight that the memory knows."""

    def rows(self, parameter: Tensor) -> Tensor:
        """The part of a parameter that the memory knows."""
        return parameter.detach()[: self.num_rows] if parameter.ndim else parameter.detach()

    def project_gradients(self) -> None:
        """Damp the gradients of a matrix in place, those that are there. Other parameters keep theirs."""
        gradients = [parameter.grad for parameter in self.parameters]
        if isinstance(self.damping, Tensor) or any(g is not None and g.is_sparse for g in gradients):
            return
        if all(gradient is None for gradient in gradients):
            return
        assert self.matrix is not None
        rows = [
            torch.zeros_like(self.rows(p), dtype=wide_dtype(p)) if g is None else self.rows(g).to(wide_dtype(p))
            for p, g in zip(self.parameters, gradients, strict=True)
        ]
        damped = self.matrix.split(self.damping(self.matrix.joined(*rows)), rows)
        for gradient, own in zip(gradients, damped, strict=True):
            if gradient is not None:
                self.rows(gradient).copy_(own)

    def has_moved(self, befores: Mapping[int, Tensor]) -> bool:
        """Whether a parameter may have changed. The version does not tell: fused optimizers do not count it up."""
        # On an accelerator, a comparison would wait for all that was asked of it so far.
        return any(p.device.type != "cpu" or not torch.equal(p, befores[id(p)]) for p in self.parameters)

    def project(self, befores: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Damp the change since `befores`, in place. Returns ||change||^2 before and after."""
        changes = []
        for parameter in self.parameters:
            rows, dtype = self.rows(parameter), wide_dtype(parameter)
            changes.append(rows.to(dtype) - self.rows(befores[id(parameter)]).to(dtype))
        before = torch.stack([change.square().sum() for change in changes]).sum()
        if isinstance(self.damping, Tensor):
            damped = [changes[0] * self.damping]
        else:
            assert self.matrix is not None
            damped = self.matrix.split(self.damping(self.matrix.joined(*changes)), changes)
        after = torch.stack([change.square().sum() for change in damped]).sum()
        for parameter, change in zip(self.parameters, damped, strict=True):
            old = self.rows(befores[id(parameter)])
            self.rows(parameter).copy_(old.to(change.dtype) + change)
        return before, after


@final
class Projecting(Protection):
    """The projected form: the directions of a memory are protected by damping the optimizer's changes."""

    form = PROJECTED

    def __init__(
        self,
        found: Stepping,
        model: nn.Module,
        directions: Directions,
        strength: float,
        every: int,
        in_each_step: bool,
        watched: Watched,
    ) -> None:
        self.strength = strength
        self._in_each_step = in_each_step
        self.every = 1 if in_each_step else every
        self._directions = directions
        self._layers: list[_Protected] = []
        self._seen: list[Any] = []
        self._befores: dict[int, Tensor] = {}
        """id of a parameter -> its values after the last projection."""
        self._versions: dict[int, int] = {}
        """id of a parameter -> its version when `_befores` was taken: another one if somebody has written to it."""
        self._num_waiting = 0
        """Steps that are not projected yet."""
        self._removed: dict[str, tuple[Tensor, Tensor]] = {}
        """Layer -> ||change||^2 before and after its last projection."""
        check_optimizer(found.optimizer, model, directions.names())
        self._averaged: dict[int, Tensor] = {}
        """id of a parameter -> schedule-free's `z` before the step."""
        super().__init__(found, model, directions.names(), watched)
        self._find_layers(found.optimizer)
        self._take_norms()  # fresh adapters were damped

    def value(self) -> float:
        """0: a projection adds no penalty to the loss."""
        return 0.0

    def report(self) -> Report:
        """How far outputs are predicted to have changed, how much of the last change was taken away, and the room."""
        self._check_acted()
        layers: dict[str, list[tuple[float, float]]] = {}
        for name, (before, after) in self._removed.items():
            layers.setdefault(layer_of(name), []).append((float(before), float(after)))
        removed = {layer: _share_removed(parts) for layer, parts in layers.items()}
        room = {layer_of(key): share for key, share in self._directions.room(self.strength).items()}
        optimizer = self._optimizer()
        if optimizer is not None:
            self._find_layers(optimizer)
        # A tied weight is in two layers.
        held = {id(p): layer.rows(p).numel() for layer in self._layers for p in layer.parameters}
        report = Report(
            0.0,
            0.0,
            removed,
            _share_removed([own for parts in layers.values() for own in parts]),
            room,
            form=PROJECTED,
            strength=self.strength,
            num_weights=sum(held.values()) if optimizer is not None and is_protected(optimizer) else 0,
        )
        return self._with_outputs(report)

    def state_dict(self) -> dict[str, Any]:
        """Strength, form and the memory's values, as tensors and plain values. Steps that wait are projected first."""
        self.flush()
        return {
            "strength": self.strength,
            "form": PROJECTED,
            "every": self.every,
            "directions": self._directions.header(),
            "groups": self._directions.groups(),
            "statistics": dict(self._watched.statistics.remembered),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the strength and directions of a saved handle."""
        if not state.keys() >= {"strength", "form", "every", "directions", "groups"} or state["form"] != PROJECTED:
            raise OptionError(f"expected the state of a projected form, got the keys {', '.join(map(str, state))}.")
        try:
            directions = Directions.from_file(state["directions"], dict(state["groups"]))
        except (LookupError, TypeError, ValueError) as error:
            raise OptionError(f"the state holds no directions: {error}.") from error
        parameters = weights_by_name(self._model, directions.names() | directions.free)
        fit = fitted(directions.names() | directions.free, parameters)
        directions = directions.renamed(fit.names)
        directions.check(parameters)
        self.flush()
        every = checked_every(state["every"])
        self.strength, self.every = checked_strength(state["strength"]), 1 if self._in_each_step else every
        self._restored(is_same=not self._directions.differs(directions))
        self._directions, self._seen = directions, []
        own = {fit.own(name): values for name, values in dict(state.get("statistics", {})).items()}
        self._watched.statistics.take(own if "statistics" in state else self._watched.statistics.remembered)
        self._restart()

    @torch.no_grad()
    def flush(self) -> None:
        """Project the changes of the steps that wait for it."""
        if self._num_waiting == 0:
            return
        self._num_waiting = 0
        self._project_z()
        moved = [layer for layer in self._layers if layer.has_moved(self._befores)]
        for layer in moved:
            self._removed[layer.name] = layer.project(self._befores)
        # Not before, since a tied weight is in two layers: both damp the same change, one after the other.
        for layer in moved:
            self._remember(layer.parameters)

    @torch.no_grad()
    def _waiting_values(self) -> dict[int, Tensor]:
        if self._num_waiting == 0:
            return {}
        found = {id(p): p.detach().clone() for layer in self._layers for p in layer.parameters}
        befores = {id(copy): self._befores[key] for key, copy in found.items()}
        for layer in self._layers:
            replace(layer, parameters=tuple(found[id(p)] for p in layer.parameters)).project(befores)
        return found

    def remove(self) -> None:
        """Project what waits, and stop protecting; a second call does nothing."""
        super().remove()
        self._befores, self._versions, self._averaged = {}, {}, {}

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._acted = True
        if not self.strength:
            return None
        self._find_layers(optimizer)
        self._averaged = {id(p): z.clone() for p, z in self._zs(optimizer)}
        # What was changed since the last projection, and not by a step, is not to be projected: it is taken over.
        if self._num_waiting == 0:
            for layer in self._layers:
                if any(self._versions.get(id(p)) != version_of(p) for p in layer.parameters):
                    self._remember(layer.parameters)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._project_gradients()
            return None
        # The closure computes the gradients after this hook, so they are projected at its end.
        projected = self._with_projection(closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": projected}
        return (args[0], projected, *args[2:]), kwargs

    def _with_projection(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            loss = closure()
            self._project_gradients()
            return loss

        return run

    @torch.no_grad()
    def _project_gradients(self) -> None:
        for layer in self._layers:
            layer.project_gradients()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.strength:
            return
        self._num_waiting += 1
        if self._num_waiting >= self.every:
            self.flush()

    @torch.no_grad()
    def _remember(self, parameters: tuple[Tensor, ...]) -> None:
        for parameter in parameters:
            old = self._befores.get(id(parameter))
            if old is None or old.shape != parameter.shape or old.device != parameter.device:
                self._befores[id(parameter)] = parameter.detach().clone()
            else:
                old.copy_(parameter.detach())
            self._versions[id(parameter)] = version_of(parameter)

    def _zs(self, optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
        """Each parameter that schedule-free has stepped, with its `z`."""
        if not self._in_each_step:
            return []
        parameters = [p for layer in self._layers for p in layer.parameters]
        return [(p, optimizer.state[p]["z"]) for p in parameters if "z" in optimizer.state.get(p, {})]

    def _project_z(self) -> None:
        """Damp the changes of schedule-free's `z` like those of the weights y.

        The weights that are kept, x = (y - (1 - beta) z) / beta, then change by the damped change too: the map is
        linear. With y alone, z would go its own way, and x would follow it.
        """
        optimizer = self._optimizer()
        zs = {} if optimizer is None else {id(p): z for p, z in self._zs(optimizer)}
        for layer in self._layers:
            if all(id(p) in zs for p in layer.parameters):
                # In its first step, z begins at the weights.
                befores = {id(zs[id(p)]): self._averaged.get(id(p), self._befores[id(p)]) for p in layer.parameters}
                replace(layer, parameters=tuple(zs[id(p)] for p in layer.parameters)).project(befores)

    def _weights_loaded(self) -> None:
        super()._weights_loaded()
        self._restart()

    def _restart(self) -> None:
        """Forget the steps that wait: the weights were replaced."""
        self._num_waiting = 0
        self._versions = {}

    def _find_layers(self, optimizer: Optimizer) -> None:
        """Look for the protected parameters again if the optimizer's parameters have changed."""
        held = [p for group in optimizer.param_groups for p in group["params"]]
        seen = [key for p in held for key in (id(p), p.data_ptr(), p.shape, p.device, p.requires_grad)]
        if seen == self._seen:
            return
        if self._num_waiting and all(id(p) in self._befores for layer in self._layers for p in layer.parameters):
            same = [
                layer for layer in self._layers if all(_is_as_remembered(p, self._befores) for p in layer.parameters)
            ]
            self._layers = same
            self.flush()
        self._num_waiting = 0
        learning = {id(p) for p in held if p.requires_grad}
        names = self._directions.names()
        parameters = {name: p for name, p in parameters_by_name(self._model, names).items() if id(p) in learning}
        self._directions.check(weights_by_name(self._model, names))
        made = [self._layer(key, own, parameters) for key, own in self._directions.layers.items()]
        made += [self._single(name, own, parameters) for name, own in self._directions.diagonal.items()]
        made += [
            part for own in adapted_matrices(self._model, self._directions) for part in self._adapter(own, learning)
        ]
        self._layers = [layer for layer in made if layer is not None]
        self._seen = seen
        for layer in self._layers:
            self._remember(layer.parameters)

    def _layer(self, key: str, own: LayerDirections, parameters: Mapping[str, nn.Parameter]) -> _Protected | None:
        matrix = own.matrix
        weight = parameters.get(matrix.weight)
        if weight is None:
            bias_alone = None if matrix.bias is None else parameters.get(matrix.bias)
            return None if bias_alone is None else self._bias(key, own, bias_alone)
        bias = None if matrix.bias is None else parameters.get(matrix.bias)
        # If the bias does not move, only the part of A without it counts.
        own = own.without_bias(parameters)
        damped = Damping(own, self.strength, weight.device, wide_dtype(weight))
        return _Protected(key, (weight,) if bias is None else (weight, bias), own.matrix, damped, matrix.layout.rows)

    def _bias(self, key: str, own: LayerDirections, bias: nn.Parameter) -> _Protected:
        """A bias that moves without its weight."""
        alone = own.of_bias()
        damped = Damping(alone, self.strength, bias.device, wide_dtype(bias))
        return _Protected(key, (bias,), alone.matrix, damped, alone.matrix.layout.rows)

    def _adapter(self, own: AdaptedMatrix, learning: Set[int]) -> Iterator[_Protected]:
        """A and B of an adapter. If it adds nothing yet, A is damped itself, so that B A x is small for old inputs."""
        down, up = own.term.down, own.term.up
        matrix = own.of_down()
        damped = Damping(matrix, self.strength, down.device, wide_dtype(down))
        if id(down) in learning:
            part = _Protected(f"{own.path} A", (down,), matrix.matrix, damped, len(down))
            if id(down) not in self._befores and self.strength and is_fresh(own.term):
                with torch.no_grad():
                    part.project({id(down): torch.zeros_like(down)})
            yield part
        if id(up) in learning:
            matrix = own.of_up()
            rows = matrix.matrix.layout.rows
            yield _Protected(f"{own.path} B", (up,), matrix.matrix, UpDamping(own, self.strength), rows)

    def _single(self, name: str, own: DiagonalDirections, parameters: Mapping[str, nn.Parameter]) -> _Protected | None:
        parameter = parameters.get(name)
        if parameter is None:
            return None
        squares = own.squares.to(parameter.device, wide_dtype(parameter))
        factor = diagonal_damping(squares, own.mass, self.strength)
        return _Protected(name, (parameter,), None, factor, len(squares) if squares.ndim else 1)


def _is_as_remembered(parameter: Tensor, befores: Mapping[int, Tensor]) -> bool:
    old = befores[id(parameter)]
    return old.shape == parameter.shape and old.device == parameter.device


def _share_removed(parts: list[tuple[float, float]]) -> float:
    before, after = (sum(side) for side in zip(*parts, strict=True)) if parts else (0.0, 0.0)
    return 1 - after / before if before else 0.0


def checked_every(every: object) -> int:
    """Steps between two projections.

    Raises:
        OptionError: it is not a whole number, or below 1.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise OptionError(f"every must be a whole number of steps, at least 1; got {every!r}.")
    return every
