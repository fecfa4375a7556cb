"""Protection by a projection: each change of a weight matrix is damped in the directions that the old tasks use.

Owns the projected form: its arithmetic, which parameters it acts on, and when. Reads nothing of the optimizer. Must not
keep state on the model or its parameters, but for hooks on `state_dict` and `load_state_dict`.

Gradients are damped before the step too. An optimizer such as Adam divides them by their size: a gradient that is large
in protected directions would make its steps in the free directions small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, final
from warnings import warn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memsyn.errors import MemsynError, OptionError, OutputSideWarning
from memsyn.matrices import Matrix
from memsyn.parameters import fitted, layer_of, wide_dtype
from memsyn.protecting.adapter_projection import AdaptedMatrix, adapted_matrices, is_fresh
from memsyn.protecting.held_layers import D_V, U_D, held_layer, placed_directions
from memsyn.protecting.optimizers import PROJECTED, Stepping
from memsyn.protecting.penalty import check_placed
from memsyn.protecting.predicting import Watched
from memsyn.protecting.protection import Protection, Report, check_optimizer, is_protected
from memsyn.protecting.strength import checked_strength
from memsyn.sharding.exchange import part_beside
from memsyn.sharding.parts import any_sharded, is_sharded, local_part, reshard
from memsyn.sharding.sums import largest_over_parts, summed_over_parts, summed_over_parts_
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

BUCKET_BYTES: Final = 32 * 2**20
"""What layers sum over processes is summed together, about so much at a time."""


class Projections(NamedTuple):
    """What a damped change is computed from, beside the change."""

    by_inputs: Tensor | None
    """D V, (G, m, r)."""
    by_outputs: list[Tensor] | None
    """U^T D, as (G, q, n) for each part of the columns."""

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return ([] if self.by_inputs is None else [self.by_inputs]) + (self.by_outputs or [])


@final
class Damping:
    """D -> U [(U^T D V)_ij / (1 + c a_j ((1 - mu) s_i + mu))] V^T, for the kept eigenvectors and the mean of the rest.

    With V of r columns and U of q, let P = D V, Q = U^T D and C = U^T D V, and let h_ij be the damping, where the index
    0 stands for the rest. Then the result is

        h_00 D + [(h_0j - h_00) P + U ((h_ij - h_i0 - h_0j + h_00) C)] V^T + U [(h_i0 - h_00) Q]

    Four products of m n r or m n q take nearly all the time. The last two are added to D in place. Its columns come in
    parts, those of the weight and that of the bias, so that these need not be copied into one matrix.

    Args:
        own: the directions of a layer; of a cut weight, those of the part that this process holds.
        strength: c.
        device, dtype: of the changes to come.
        summed: `U_D` or `D_V` if it is a sum over processes, of which each has the term of its part.
    """

    def __init__(
        self,
        own: LayerDirections,
        strength: float,
        device: torch.device,
        dtype: torch.dtype,
        summed: str | None = None,
    ) -> None:
        self.summed = summed
        inputs = own.inputs.to(device, dtype)
        outputs = None if own.outputs is None else own.outputs.to(device, dtype)
        widths = [own.matrix.layout.inputs] + ([] if own.matrix.bias is None else [1])
        vectors = None if inputs.vectors is None else inputs.vectors.split(widths, 1)
        self._vectors = None if vectors is None else [part.contiguous() for part in vectors]
        self._output_vectors = None if outputs is None else outputs.vectors
        column_values = _with_rest(inputs)
        row_values = None if outputs is None else _with_rest(outputs)
        gains = damping(column_values, row_values, strength)  # (G, q + 1 or 1, r + 1, or n for a table)
        corner = gains[:, -1:, -1:]
        if self._vectors is None:
            self._rests = gains[:, -1:, :].split(widths, 2)
            self._of_rows = (gains[:, :-1, :] - gains[:, -1:, :]).split(widths, 2)
        else:
            self._rests = (corner,) * len(widths)
            self._of_columns = gains[:, -1:, :-1] - corner
            self._of_rows = (gains[:, :-1, -1:] - corner,) * len(widths)
            self._of_both = gains[:, :-1, :-1] - gains[:, :-1, -1:] - gains[:, -1:, :-1] + corner
        # A number can be given to the product, which then does in one pass what would be two. To read it from an
        # accelerator would wait for all that was asked of it so far.
        is_number = device.type == "cpu" and corner.numel() == 1 and vectors is not None
        self._rest = float(corner) if is_number else None

    def projections(self, parts: Sequence[Tensor]) -> Projections:
        """D V and U^T D of a change, or of what this process holds of it.

        Args:
            parts: D by its columns: (G, m, n) of the weight, and (G, m, 1) of the bias if there is one.
        """
        u, v = self._output_vectors, self._vectors
        by_inputs = None
        if v is not None:
            by_inputs = parts[0] @ v[0]
            if len(parts) > 1:
                by_inputs.addcmul_(parts[1], v[1])
        return Projections(by_inputs, None if u is None else [u.transpose(1, 2) @ part for part in parts])

    def to_sum(self, found: Projections) -> list[Tensor]:
        """Those tensors of the projections that are sums over processes."""
        if self.summed == U_D:
            return found.by_outputs or []
        if self.summed != D_V or found.by_inputs is None:
            return []
        # The column of the bias belongs to no part of the inputs: each process holds some of its numbers.
        return [found.by_inputs, *(found.by_outputs or [])[1:]]

    def damp_(self, parts: Sequence[Tensor], found: Projections | None = None) -> None:
        """Damp a change in place.

        Args:
            parts: as `projections` takes them.
            found: the projections, if they were summed over processes.
        """
        u, v, (by_inputs, by_outputs) = self._output_vectors, self._vectors, found or self.projections(parts)
        of_inputs = None
        if v is not None and by_inputs is not None:
            of_inputs = by_inputs * self._of_columns
            if u is not None and by_outputs is not None:
                of_inputs.baddbmm_(u, self._both(by_inputs, by_outputs).mul_(self._of_both))
        for index, part in enumerate(parts):
            if v is None or of_inputs is None:
                part.mul_(self._rests[index])
            elif self._rest is not None:
                part.baddbmm_(of_inputs, v[index].transpose(1, 2), beta=self._rest)
            else:
                part.mul_(self._rests[index]).baddbmm_(of_inputs, v[index].transpose(1, 2))
            if u is not None and by_outputs is not None:
                part.baddbmm_(u, by_outputs[index] * self._of_rows[index])

    def _both(self, by_inputs: Tensor, by_outputs: Sequence[Tensor]) -> Tensor:
        """C = U^T D V, (G, q, r), from that of the two projections which has all of D."""
        assert self._output_vectors is not None
        assert self._vectors is not None
        if self.summed != U_D:
            return self._output_vectors.transpose(1, 2) @ by_inputs
        both: Tensor = by_outputs[0] @ self._vectors[0]
        return both if len(by_outputs) == 1 else both.baddbmm_(by_outputs[1], self._vectors[1])


@final
class UpDamping:
    """The damping of B of an adapter, by A as it is when it is called.

    Args:
        own: the adapter, and the directions of its weight.
        strength: c.
    """

    def __init__(self, own: AdaptedMatrix, strength: float) -> None:
        self._own, self._strength = own, strength

    def damp_(self, parts: Sequence[Tensor]) -> None:
        """Damp a change, [(1, m, r)], in place."""
        (change,) = parts
        Damping(self._own.of_up(), self._strength, change.device, change.dtype).damp_(parts)

    def of_part(self) -> Damping:
        """The damping of what this process holds of B, by all of A. All processes must call it together."""
        up = self._own.term.up
        held = held_layer(self._own.of_up(), up, None)
        return Damping(held.directions, self._strength, up.device, wide_dtype(up), held.summed)


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
    """Of what this process holds. None for a parameter that is no matrix."""
    damping: Damping | UpDamping | Tensor
    """Of a parameter that is no matrix, the factor of each weight."""
    num_rows: tuple[int, ...]
    """The rows of each parameter that the memory knows, of those that this process holds."""
    num_known: tuple[int, ...]
    """The same of the whole parameters."""
    bias_rows: slice | None = None
    """As in `HeldLayer`."""
    is_cut: bool = False
    """Whether a parameter is sharded."""
    leaves_out_outputs: bool = False
    """As in `HeldLayer`."""

    @property
    def is_summed(self) -> bool:
        """Whether all processes must damp a change together."""
        return isinstance(self.damping, Damping) and self.damping.summed is not None

    def part(self, tensor: Tensor) -> Tensor:
        """What this process holds of a tensor like a parameter."""
        return local_part(tensor) if self.is_cut else tensor.detach()

    def versions(self) -> tuple[int, ...]:
        """They change if somebody writes to a parameter. A DTensor and its part count different writes."""
        own = tuple(map(version_of, self.parameters))
        return (*own, *(version_of(local_part(p)) for p in self.parameters)) if self.is_cut else own

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What this process holds of tensors like the parameters, without the rows that the memory does not know."""
        found = zip(map(self.part, tensors), self.num_rows, strict=True)
        return [part[:count] if part.ndim else part for part, count in found]

    def columns(self, changes: Sequence[Tensor]) -> list[Tensor]:
        """Changes of the parts as the columns of a matrix: (G, m, n) of the weight, (G, m, 1) of the bias.

        They are views of the changes where these can be viewed so.
        """
        assert self.matrix is not None
        layout = self.matrix.layout
        weight = layout.matrix(changes[0])
        if len(changes) == 1:
            return [weight]
        bias = changes[1]
        if self.bias_rows is not None:
            bias = changes[1].new_zeros(layout.outputs)
            bias[self.bias_rows] = changes[1]
        return [weight, bias.reshape(*weight.shape[:2], 1).to(weight)]

    def parts_of(self, columns: Sequence[Tensor], changes: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `columns`, in the shapes of the changes."""
        assert self.matrix is not None
        found = [self.matrix.layout.weight(columns[0], changes[0].shape)]
        if len(changes) > 1:
            bias = columns[1].flatten()
            found.append((bias if self.bias_rows is None else bias[self.bias_rows]).reshape(changes[1].shape))
        return found

    def num_weights(self) -> dict[int, int]:
        """id of a parameter -> how many of its numbers the memory knows, in all processes together."""
        pairs = zip(self.parameters, self.num_known, strict=True)
        return {id(p): min(count, len(p)) * (p.numel() // max(1, len(p))) if p.ndim else 1 for p, count in pairs}

    def has_moved(self, befores: Mapping[int, Tensor]) -> bool:
        """Whether a parameter may have changed. The version does not tell: fused optimizers do not count it up."""
        # On an accelerator, a comparison would wait for all that was asked of it so far.
        return any(p.device.type != "cpu" or not torch.equal(self.part(p), befores[id(p)]) for p in self.parameters)

    def of_gradients(self) -> _Change | None:
        """The gradients of a matrix, those that are there. Other parameters keep theirs."""
        gradients = [parameter.grad for parameter in self.parameters]
        if isinstance(self.damping, Tensor) or any(g is not None and g.is_sparse for g in gradients):
            return None
        if all(gradient is None for gradient in gradients):
            return None
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None and self.is_cut:
                check_placed(gradient, parameter, self.matrix.weight if self.matrix is not None else self.name)
        whole = zip(self.parameters, gradients, strict=True)
        return _Change(self, [torch.zeros_like(p) if gradient is None else gradient for p, gradient in whole])

    def is_as_remembered(self, befores: Mapping[int, Tensor]) -> bool:
        """Whether the parameters have the shape and device of `befores`."""
        pairs = [(befores[id(p)], self.part(p)) for p in self.parameters]
        return all(old.shape == own.shape and old.device == own.device for old, own in pairs)

    def since(self, befores: Mapping[int, Tensor]) -> _Change:
        """The change of the parameters since `befores`, which has their parts."""
        return _Change(self, self.parameters, [befores[id(p)] for p in self.parameters])


@final
class _Change(NamedTuple):
    """What is to be damped in place: gradients, or weights since their values before."""

    layer: _Protected
    tensors: Sequence[Tensor]
    befores: Sequence[Tensor] | None = None
    """What this process holds of the values before; None for gradients."""

    def values(self) -> list[Tensor]:
        """The change of each tensor, in float32 at least."""
        dtypes = [wide_dtype(parameter) for parameter in self.layer.parameters]
        parts = [own.to(dtype) for own, dtype in zip(self.layer.parts(self.tensors), dtypes, strict=True)]
        if self.befores is None:
            return parts
        olds = zip(parts, self.layer.parts(self.befores), strict=True)
        return [own - old.to(own.dtype) for own, old in olds]

    def projections(self) -> Projections:
        """Those of the part that this process holds."""
        assert isinstance(self.layer.damping, Damping)
        return self.layer.damping.projections(self.layer.columns(self.values()))

    def damp(self, found: Projections | None = None) -> tuple[Tensor, Tensor] | None:
        """Damp it, with projections that were summed if there are any.

        Returns:
            ||change||^2 before and after, of what this process holds; None for gradients.
        """
        changes = self.values()
        if not any(change.numel() for change in changes):
            return (changes[0].new_zeros(()),) * 2
        if self.befores is None:
            for own, change in zip(self.layer.parts(self.tensors), self._damped(changes, found), strict=True):
                # A gradient that can be read as a matrix, and is wide enough, was damped where it is.
                if change.data_ptr() != own.data_ptr():
                    own.copy_(change)
            return None
        before = _squares(changes)
        damped = self._damped(changes, found)
        after = _squares(damped)
        for own, old, change in zip(
            self.layer.parts(self.tensors), self.layer.parts(self.befores), damped, strict=True
        ):
            torch.add(change, old, out=own) if own.dtype == change.dtype else own.copy_(change.add_(old))
        return before, after

    def _damped(self, changes: Sequence[Tensor], found: Projections | None) -> list[Tensor]:
        """The damped changes, in the memory of the changes where that can be."""
        layer = self.layer
        if isinstance(layer.damping, Tensor):
            return [changes[0].mul_(layer.damping)]
        columns = layer.columns(changes)
        if isinstance(layer.damping, Damping):
            assert found is not None or not layer.is_summed
            layer.damping.damp_(columns, found)
        else:
            layer.damping.damp_(columns)
        return layer.parts_of(columns, changes)


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of all squares, without a tensor of them."""
    return torch.stack([torch.linalg.vector_norm(own) for own in tensors]).square().sum()


def _damp_all(changes: Iterable[_Change]) -> list[tuple[Tensor, Tensor] | None]:
    """Damp changes, one after the other. Returns what `_Change.damp` returns of each.

    What several of them sum over processes is summed together, up to `BUCKET_BYTES`. A tied weight is in two changes:
    the second is not looked at before the first is damped.
    """
    found: dict[int, tuple[Tensor, Tensor] | None] = {}
    waiting: list[tuple[int, _Change, Projections]] = []
    touched: set[int] = set()
    size = 0
    for index, change in enumerate(map(_as_it_is, changes)):
        if touched and touched & {id(parameter) for parameter in change.layer.parameters}:
            found |= _damp_together(waiting)
            waiting, touched, size = [], set(), 0
        if not change.layer.is_summed:
            found[index] = change.damp()
            continue
        projections = change.projections()
        waiting.append((index, change, projections))
        touched |= {id(parameter) for parameter in change.layer.parameters}
        size += sum(own.nbytes for own in projections.tensors())
        if size > BUCKET_BYTES:
            found |= _damp_together(waiting)
            waiting, touched, size = [], set(), 0
    found |= _damp_together(waiting)
    return [found[index] for index in sorted(found)]


def _as_it_is(change: _Change) -> _Change:
    """Of the part of B of an adapter, with the damping that A as it is asks for; it holds until B is damped."""
    layer = change.layer
    if layer.is_cut and isinstance(layer.damping, UpDamping):
        return change._replace(layer=replace(layer, damping=layer.damping.of_part()))
    return change


def _damp_together(waiting: Sequence[tuple[int, _Change, Projections]]) -> dict[int, tuple[Tensor, Tensor] | None]:
    """Sum over processes what each change needs, and damp them."""
    sums: dict[Any, list[Tensor]] = {}
    likes: dict[Any, Tensor] = {}
    for _, change, projections in waiting:
        like = change.layer.parameters[0]
        assert isinstance(change.layer.damping, Damping)
        assert is_sharded(like)
        own = change.layer.damping.to_sum(projections)
        key = like.device_mesh, like.placements, own[0].dtype, own[0].device
        sums.setdefault(key, []).extend(own)
        likes[key] = like
    for key, tensors in sums.items():
        summed_over_parts_(tensors, likes[key])
    return {index: change.damp(projections) for index, change, projections in waiting}


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
        """id of a parameter -> its values after the last projection, or those of the part that this process holds."""
        self._versions: dict[str, tuple[int, ...]] = {}
        """Layer -> its versions when `_befores` was taken: others if somebody has written to a parameter."""
        self._num_waiting = 0
        """Steps that are not projected yet."""
        self._removed: dict[str, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        """Layer -> a parameter, and ||change||^2 before and after its last projection, of what this process holds."""
        check_optimizer(found.optimizer, model, directions.names())
        self._averaged: dict[int, Tensor] = {}
        """id of a parameter -> schedule-free's `z` before the step."""
        super().__init__(found, model, directions.names(), watched)
        try:
            self._find_layers(found.optimizer)
        except MemsynError:
            self._let_go()
            raise
        self._take_norms()  # fresh adapters were damped

    def value(self) -> float:
        """0: a projection adds no penalty to the loss."""
        return 0.0

    def report(self) -> Report:
        """How far outputs are predicted to have changed, how much of the last change was taken away, and the room."""
        self._check_acted()
        layers: dict[str, list[tuple[float, float]]] = {}
        sums = summed_over_parts(
            [torch.stack(own) for _, own in self._removed.values()], [p for p, _ in self._removed.values()]
        )
        for name, own in zip(self._removed, sums, strict=True):
            before, after = own.tolist()
            layers.setdefault(layer_of(name), []).append((before, after))
        removed = {layer: _share_removed(parts) for layer, parts in layers.items()}
        room = {layer_of(key): share for key, share in self._directions.room(self.strength).items()}
        optimizer = self._optimizer()
        if optimizer is not None:
            self._find_layers(optimizer)
        # A tied weight is in two layers.
        held = {key: count for layer in self._layers for key, count in layer.num_weights().items()}
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
        directions = placed_directions(directions, parameters_by_name(self._model, directions.names()))
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
        moved = self._moved_layers()
        norms = _damp_all(layer.since(self._befores) for layer in moved)
        for layer, own in zip(moved, norms, strict=True):
            if own is not None:
                self._removed[layer.name] = layer.parameters[0], own
        # Not before, since a tied weight is in two layers: both damp the same change, one after the other.
        for layer in moved:
            self._remember(layer)

    def _moved_layers(self) -> list[_Protected]:
        """The layers that may have changed in one of the processes: all of them damp a change together."""
        moved = [layer.has_moved(self._befores) for layer in self._layers]
        cut = [layer for layer in self._layers if layer.is_cut]
        likes = [p for layer in cut for p in layer.parameters if p.device.type == "cpu"]
        if likes:
            moved = list(map(bool, largest_over_parts(list(map(float, moved)), likes)))
        return [layer for layer, has_moved in zip(self._layers, moved, strict=True) if has_moved]

    @torch.no_grad()
    def _waiting_values(self) -> dict[int, Tensor]:
        if self._num_waiting == 0:
            return {}
        found = {id(p): p.detach().clone() for layer in self._layers for p in layer.parameters}
        befores = {id(copy): self._befores[key] for key, copy in found.items()}
        copies = [replace(layer, parameters=tuple(found[id(p)] for p in layer.parameters)) for layer in self._layers]
        _damp_all(layer.since(befores) for layer in copies)
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
        self._averaged = {id(p): local_part(z).clone() for p, z in self._zs(optimizer)}
        # What was changed since the last projection, and not by a step, is not to be projected: it is taken over.
        if self._num_waiting == 0:
            for layer in self._layers:
                if self._versions.get(layer.name) != layer.versions():
                    self._remember(layer)
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
        changes = (layer.of_gradients() for layer in self._layers)
        _damp_all(change for change in changes if change is not None)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.strength:
            return
        self._num_waiting += 1
        if self._num_waiting >= self.every:
            self.flush()

    @torch.no_grad()
    def _remember(self, layer: _Protected) -> None:
        self._versions[layer.name] = layer.versions()
        for parameter in layer.parameters:
            old, own = self._befores.get(id(parameter)), layer.part(parameter)
            if old is None or old.shape != own.shape or old.device != own.device:
                self._befores[id(parameter)] = own.clone()
            else:
                old.copy_(own)

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
        changes: list[_Change] = []
        for layer in self._layers:
            if all(id(p) in zs for p in layer.parameters):
                # In its first step, z begins at the weights.
                befores = {id(zs[id(p)]): self._averaged.get(id(p), self._befores[id(p)]) for p in layer.parameters}
                changes.append(replace(layer, parameters=tuple(zs[id(p)] for p in layer.parameters)).since(befores))
        _damp_all(changes)

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
        seen = [key for p in held for key in (id(p), p.data_ptr(), p.shape, p.dtype, p.device, p.requires_grad)]
        if seen == self._seen:
            return
        if self._num_waiting and all(id(p) in self._befores for layer in self._layers for p in layer.parameters):
            same = [layer for layer in self._layers if layer.is_as_remembered(self._befores)]
            self._layers = same
            self.flush()
        self._num_waiting = 0
        reshard(self._model)
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
        reduced = [layer.name for layer in self._layers if layer.leaves_out_outputs]
        if reduced:
            warn(
                f"{len(reduced)} matrices (the first is {reduced[0]}) are projected by "
                "their inputs alone: the model is cut between processes along their outputs, of which the memory keeps "
                "so many directions that each step would sum nearly as many numbers as the weight has. Consolidate "
                "with a smaller rank to project by the outputs too.",
                OutputSideWarning,
                stacklevel=4,
            )
        for layer in self._layers:
            self._remember(layer)

    def _layer(self, key: str, own: LayerDirections, parameters: Mapping[str, nn.Parameter]) -> _Protected | None:
        matrix = own.matrix
        weight = parameters.get(matrix.weight)
        if weight is None:
            bias_alone = None if matrix.bias is None else parameters.get(matrix.bias)
            return None if bias_alone is None else self._bias(key, own, bias_alone)
        bias = None if matrix.bias is None else parameters.get(matrix.bias)
        # If the bias does not move, only the part of A without it counts.
        return self._held(key, own.without_bias(parameters), weight, bias)

    def _held(self, key: str, own: LayerDirections, weight: Tensor, bias: Tensor | None) -> _Protected:
        held, layout = held_layer(own, weight, bias), own.matrix.layout
        damped = Damping(held.directions, self.strength, weight.device, wide_dtype(weight), held.summed)
        parameters = (weight,) if bias is None else (weight, bias)
        known = (layout.rows, layout.groups * layout.outputs)[: len(parameters)]
        return _Protected(
            key,
            parameters,
            held.directions.matrix,
            damped,
            held.num_rows,
            known,
            held.bias_rows,
            any_sharded(parameters),
            held.leaves_out_outputs,
        )

    def _bias(self, key: str, own: LayerDirections, bias: nn.Parameter) -> _Protected:
        """A bias that moves without its weight."""
        return self._held(key, own.of_bias(), bias, None)

    def _adapter(self, own: AdaptedMatrix, learning: Set[int]) -> Iterator[_Protected]:
        """A and B of an adapter. If it adds nothing yet, A is damped itself, so that B A x is small for old inputs."""
        down, up = own.term.down, own.term.up
        if id(down) in learning:
            part = self._held(f"{own.path} A", own.of_down(), down, None)
            if id(down) not in self._befores and self.strength and is_fresh(own.term):
                with torch.no_grad():
                    part.since({id(down): torch.zeros_like(part.part(down))}).damp()
            yield part
        if id(up) in learning:
            part = self._held(f"{own.path} B", own.of_up(), up, None)
            yield replace(part, damping=UpDamping(own, self.strength))

    def _single(self, name: str, own: DiagonalDirections, parameters: Mapping[str, nn.Parameter]) -> _Protected | None:
        parameter = parameters.get(name)
        if parameter is None:
            return None
        squares = part_beside(own.squares, parameter).to(parameter.device, wide_dtype(parameter))
        factor = diagonal_damping(squares, own.mass, self.strength)
        rows = (len(squares) if squares.ndim else 1,)
        known = (len(own.squares) if squares.ndim else 1,)
        return _Protected(name, (parameter,), None, factor, rows, known, is_cut=is_sharded(parameter))


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
