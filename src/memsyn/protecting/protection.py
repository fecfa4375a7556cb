"""The handle of a protected optimizer, whatever the form of protection.

Owns the hooks and their removal, and that no optimizer is protected twice.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, final
from weakref import WeakKeyDictionary, WeakMethod, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memsyn.errors import NotProtectedWarning, ProtectionError
from memsyn.parameters import named_parameters, unwrap, wide_dtype
from memsyn.protecting.optimizers import PROJECTED, Stepping, known_kind
from memsyn.protecting.predicting import Watched, of_another_memory
from memsyn.sharding.parts import local_part, reshard
from memsyn.torch_private import num_steps_in_progress
from memsyn.values.display import LayerRow, counted, html_table, html_text, percent, short_name
from memsyn.weights_in_effect import WeightsInEffect, moving_parameters, weights_by_name

_protected: "WeakSet[Optimizer]" = WeakSet()
"""The optimizers with a handle that was not removed."""

_handles: "WeakKeyDictionary[Protection, None]" = WeakKeyDictionary()
"""The handles that were not collected, in order: processes that talk about several take them one after the other."""


def is_protected(optimizer: Optimizer) -> bool:
    """Whether the optimizer has a handle that was not removed."""
    return optimizer in _protected


def check_optimizer(optimizer: Optimizer, model: nn.Module, names: Collection[str]) -> Set[int]:
    """The ids of an optimizer's parameters, after a check that an optimizer holds a parameter of the memory.

    Raises:
        ProtectionError: it holds none.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = moving_parameters(model, names).values()
    if any(id(parameter) in held for parameter in own):
        return held
    cure = "Was it made from another model, or before the model was copied or moved?"
    if own and not any(parameter.requires_grad for parameter in own):
        cure = (
            "They are frozen and do not move. What trains, such as adapters, is not in the memory: measure the model "
            "as it is now, with the parameters that will train, and consolidate."
        )
    raise ProtectionError(f"the optimizer holds none of the memory's {len(names)} parameters. {cure}")


@dataclass(frozen=True)
class Report:
    """What protection does, and what it does not prevent: the predicted change of outputs on the remembered data.

    `print(report)` says it in words, `scalars()` gives the numbers for a logger. A report leaves weights and optimizer
    bit for bit as they are. docs/performance.md has what it costs.
    """

    penalty: float
    """lambda sum Omega (theta - theta*)^2; 0 in the projected form, which has no anchor."""
    bound: float
    """sum Omega |theta - theta*|: to first order, the mean squared output norm on the measured data has changed by at
    most this. It does not bound the change of single outputs. 0 in the projected form."""
    layers: dict[str, float]
    """Layer -> its part of the bound. A parameter of the model itself is a layer by its own name. In the projected
    form, layer -> the share of its last change that was taken away, 1 - ||projected change||^2 / ||change||^2."""
    held: float
    """The share of the protected weights that a step pulls back by more than half of their distance to the anchor: 0 if
    all weights are free, 1 if none can move, NaN with an optimizer whose steps are not known. In the projected form,
    the share of the last change that was taken away."""
    room: dict[str, float] = field(default_factory=dict)
    """In the projected form, layer -> the share of its directions in which more than half of a step remains."""
    moved_statistics: int = 0
    """How many statistics (buffers such as a running mean) are not as the memory remembers them. Unless it is 0,
    outputs on old data have changed, however well the weights are held. See `freeze_statistics`."""
    form: str = ""
    """The form of protection."""
    strength: float = 0.0
    """lambda, or c in the projected form."""
    num_weights: int = 0
    """The weights that are protected now: those of the optimizer that have importance, or directions."""
    change: float | None = None
    """sqrt(E ||y' - y||^2 / E ||y||^2): the relative change of outputs on the remembered data since they were measured,
    predicted to second order from the memory's directions, as by `memsyn gate`. Steps that wait for their projection
    count as projected. Only protected parameters count, and no statistics. Infinite if a weight is NaN or infinite.
    None if it is not known."""
    changes: dict[str, float] = field(default_factory=dict)
    """Layer -> `change` for the change of this layer alone."""
    unknown: str = ""
    """Why `change` is None, and what to do."""

    def __repr__(self) -> str:
        said = f"{self.form} form, {counted(self.num_weights, 'weight')}"
        moved = f", {counted(self.moved_statistics, 'moved statistic')}" if self.moved_statistics else ""
        change = "" if self.change is None else f", outputs changed by {percent(self.change)}"
        numbers = f"penalty {self.penalty:.3g}, bound {self.bound:.3g}, {self.held:.1%} held"
        return f"Report({said}, {numbers}{change}{moved})"

    def __str__(self) -> str:
        words = self._words_of_change()
        if not self.strength and self.form:
            return "\n".join([*words, "Nothing is protected: the strength is 0."])
        if not self.num_weights:
            nothing = "protection was removed, or the optimizer holds no weight that has importance."
            return "\n".join([*words, f"Nothing is protected: {nothing}"])
        weights = counted(self.num_weights, "weight")
        words.append(f"Protected: {weights}, by the {self.form} form at strength {self.strength:.4g}.")
        words += self._words_of_projection() if self.form == PROJECTED else self._words_of_penalty()
        if self.moved_statistics:
            words.append(
                f"Not protected: {counted(self.moved_statistics, 'statistic')}, such as running means. Their values "
                "are not those that the memory remembers, and the outputs on old data have changed with them."
            )
        return "\n".join(words)

    def scalars(self) -> dict[str, float]:
        """The numbers for a logger: those of the whole model that are known and finite.

        `memsyn/predicted_change` is `change`, `memsyn/held` and `memsyn/moved_statistics` are as above, and
        `memsyn/penalty` is that of the penalty forms.

        Example:
            >>> for name, value in report.scalars().items():            # doctest: +SKIP
            ...     writer.add_scalar(name, value, step)                # TensorBoard
            >>> mlflow.log_metrics(report.scalars(), step=step)         # doctest: +SKIP
        """
        is_projected = self.form == PROJECTED
        found = {
            "predicted_change": self.change,
            "held": None if is_projected and not self.layers else self.held,  # nothing was projected so far
            "penalty": None if is_projected else self.penalty,
            "moved_statistics": float(self.moved_statistics),
        }
        return {f"memsyn/{name}": own for name, own in found.items() if own is not None and math.isfinite(own)}

    def _repr_html_(self) -> str:
        if self.form == PROJECTED and self.num_weights:
            columns = {"predicted change": self.changes, "taken away": self.layers, "room": self.room}
            columns = {name: own for name, own in columns.items() if own or name != "predicted change"}
            rows = [
                LayerRow(
                    layer,
                    [percent(own[layer]) if layer in own else "" for own in columns.values()],
                    self.changes.get(layer, 0.0) if self.changes else 1 - self.room.get(layer, 2.0),
                )
                for layer in {**self.room, **self.layers, **self.changes}
            ]
            others = "with a smaller change each" if self.changes else "without matrices or with more room each"
            return html_table(str(self), ["layer", *columns], rows, others)
        if not (self.layers and self.num_weights):
            return html_text(str(self))
        rows = [
            LayerRow(layer, [f"{part:.3g}", f"{self._share(part):.1%}"], part) for layer, part in self.layers.items()
        ]
        return html_table(str(self), ["layer", "moved", "share of what moved"], rows, "with a smaller share each")

    def _share(self, part: float) -> float:
        return part / self.bound if self.bound else 0.0

    def _words_of_change(self) -> list[str]:
        outputs = "Outputs on the remembered data"
        if self.change is None:
            words = f"How far outputs on the remembered data have changed is not known: {self.unknown}"
            return [words] if self.unknown else []
        if not math.isfinite(self.change):
            return [f"{outputs} are lost: a weight is NaN or infinite."]
        words = f"{outputs} are predicted to be as they were: no remembered weight has moved."
        if self.change:
            size = percent(self.change) if self.change >= 0.001 else "less than 0.1%"
            words = f"{outputs} are predicted to have changed by {size}, most by {_largest(self.changes)}."
        if self.moved_statistics:
            moved = counted(self.moved_statistics, "statistic")
            words += f" The {moved} that moved change them too, and are not counted."
        return [words]

    def _words_of_penalty(self) -> list[str]:
        held = (
            f"Held: {self.held:.1%}. A step pulls these weights back by more than half of their distance to the "
            f"anchor. The other {1 - self.held:.1%} have room to move."
        )
        if math.isnan(self.held):
            held = "Held: not known. How far a step moves these weights is not known."
        if not self.bound:
            return [held, "Moved: nothing. All weights stand at the anchor."]
        moved = (
            f"Moved: the penalty is {self.penalty:.3g}. To first order, the mean squared output norm on the measured "
            f"data has changed by at most {self.bound:.3g}."
        )
        shares = {layer: self._share(part) for layer, part in self.layers.items()}
        return [held, moved, f"Moved most: {_largest(shares)}."]

    def _words_of_projection(self) -> list[str]:
        taken = "nothing so far. No step has been projected yet."
        if self.layers:
            taken = f"{self.held:.1%} of the last change; most in {_largest(self.layers)}."
        if not self.room:
            return [f"Taken away: {taken}"]
        least, most = min(self.room, key=self.room.__getitem__), max(self.room, key=self.room.__getitem__)
        room = (
            f"Room: more than half of a step remains in {self.room[least]:.1%} ({short_name(least)}) to "
            f"{self.room[most]:.1%} ({short_name(most)}) of the directions of a layer."
        )
        return [f"Taken away: {taken}", room]


def _largest(shares: Mapping[str, float]) -> str:
    """The three layers with the largest shares, and how many more there are."""
    order = sorted(shares, key=lambda layer: -shares[layer])
    named = ", ".join(f"{short_name(layer)} ({percent(shares[layer])})" for layer in order[:3])
    return f"{named} and {counted(len(order) - 3, 'more layer')}" if len(order) > 3 else named


@final
class Guard:
    """A hook that calls a method of a handle, as long as the handle lives. A copy of the hook does nothing."""

    def __init__(self, method: Callable[[], None] | None = None) -> None:
        self._method = None if method is None else WeakMethod(method)

    def __call__(self, *_: Any) -> None:
        """Call the method."""
        method = None if self._method is None else self._method()
        if method is not None:
            method()

    def __reduce__(self) -> Any:
        return Guard, ()


class Protection(ABC):
    """The handle of one protected optimizer.

    Attributes:
        strength: as `protect` took it, as a number.
        form: a key of `FORMS`.
        wrappers: the names of the classes around the optimizer that is protected, from the outside in. `protect` was
            given the first, or the optimizer itself if there is none.
    """

    strength: float
    form: str
    wrappers: tuple[str, ...]

    def __init__(self, found: Stepping, model: nn.Module, names: Collection[str], watched: Watched) -> None:
        optimizer = found.optimizer
        self.wrappers = tuple(type(wrapper).__name__ for wrapper in found.wrappers)
        self._optimizer = ref(optimizer)  # the optimizer's hooks refer to this object: no reference cycle
        self._depth = 0
        """How many calls of `step` are in progress: 2 in a `step` that calls `super().step()`."""
        # A step that is known calls its hooks once.
        known = known_kind(optimizer) is not None
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step if known else self._before_outermost_step),
            optimizer.register_step_post_hook(self._after_step if known else self._after_outermost_step),
        ]
        self._acted = False
        """Whether the optimizer has stepped; also set once it is said that it has not."""
        self._model = model
        self._names = set(names)
        own = unwrap(model)
        self._guards = [
            own.register_state_dict_pre_hook(Guard(self._before_saving)),
            optimizer.register_state_dict_pre_hook(Guard(self.flush)),
            own.register_load_state_dict_post_hook(Guard(self._weights_loaded)),
        ]
        self._norms: dict[tuple[str, torch.dtype, torch.device], Tensor] | None = self._norms_now()
        """Of the parameters when protection began; None if they were loaded since."""
        _protected.add(optimizer)
        _handles[self] = None
        self._watched = watched
        watched.statistics.begin(optimizer)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer in whose step protection acts: that inside of `wrappers`. None if it was collected."""
        return self._optimizer()

    def __repr__(self) -> str:
        optimizer = self._optimizer()
        of = "an optimizer that is gone" if optimizer is None else type(optimizer).__name__
        inside = "".join(f" in {wrapper}" for wrapper in reversed(self.wrappers))
        return f"Protection({self.form} form, strength {self.strength:.4g}, of {of}{inside})"

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    @abstractmethod
    def value(self) -> float:
        """The penalty now: lambda sum Omega (theta - theta*)^2; 0 in the projected form, which has none.

        Of a model under `fully_shard`, all processes must call it together.
        """

    @abstractmethod
    def report(self) -> Report:
        """What protection does to the weights, layer by layer.

        Of a model under `fully_shard`, all processes must call it together, and all get the same.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Strength, form and the memory's values, as tensors and plain values, for `load_state_dict`."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a saved handle had.

        Raises:
            OptionError: the state did not come from `state_dict`, or is of another form.
            MismatchError: the state is of another architecture.
        """

    def flush(self) -> None:  # noqa: B027 (the penalty forms have nothing to do)
        """Project the changes of the last steps that are not projected yet; only the projected form delays any.

        Of a model under `fully_shard`, all processes must call it together.
        """

    def remove(self) -> None:
        """Stop protecting; a second call does nothing."""
        self._watched.statistics.end()
        optimizer = self._optimizer()
        if self._hooks and optimizer is not None:
            self.flush()
            self._check_acted()
            for other in _handles if self._acted else ():
                if unwrap(other._model) is unwrap(self._model):
                    other._norms = None  # this handle has let the weights move
        self._let_go()

    def _let_go(self) -> None:
        """Take every hook away, also of a handle that could not be made: then another call of `protect` may follow."""
        self._watched.statistics.end()
        optimizer = self._optimizer()
        if optimizer is not None and self._hooks:
            _protected.discard(optimizer)
        _handles.pop(self, None)
        for hook in (*self._hooks, *self._guards):
            hook.remove()
        self._hooks, self._guards = [], []

    def _with_outputs(self, report: Report) -> Report:
        """The report with what is known of the outputs on the remembered data."""
        statistics, predictor = self._watched
        report = replace(report, moved_statistics=statistics.num_moved(), unknown=predictor.unknown)
        if predictor.unknown:
            return report
        with self._weights_after_flush() as weights:
            found = predictor.change(weights)
        return replace(report, change=found.whole, changes=found.layers)

    def _restored(self, *, is_same: bool) -> None:
        """The state of a saved handle was loaded: of another memory, no old weights are known."""
        if not is_same:
            self._watched = self._watched._replace(predictor=of_another_memory())

    @contextmanager
    def _weights_after_flush(self) -> Iterator[Mapping[str, Tensor]]:
        """The weights in effect, with the values that `flush` of all handles of the model would give them."""
        waiting: dict[int, Tensor] = {}
        reshard(self._model)
        for handle in list(_handles):
            if unwrap(handle._model) is unwrap(self._model):
                waiting |= handle._waiting_values()
        weights = weights_by_name(self._model, self._names)
        if not isinstance(weights, WeightsInEffect):
            yield {name: waiting.get(id(p), p.detach()) for name, p in weights.items()}
            return
        # Adapters are read where they are: in this block, those whose steps wait hold their values after the flush.
        moved = [(p, p.data, waiting[id(p)]) for p in named_parameters(self._model).values() if id(p) in waiting]
        try:
            for parameter, _, after in moved:
                parameter.data = after
            yield weights
        finally:
            for parameter, now, _ in moved:
                parameter.data = now

    def _waiting_values(self) -> dict[int, Tensor]:
        """id of a parameter -> the values that `flush` would give it; only the projected form delays any."""
        return {}

    def _before_saving(self) -> None:
        self.flush()
        self._check_acted()

    def _weights_loaded(self) -> None:
        """The weights were replaced, so that how large they were says nothing of steps."""
        self._norms = None

    def _take_norms(self) -> None:
        self._norms = self._norms_now()

    def _norms_now(self) -> dict[tuple[str, torch.dtype, torch.device], Tensor]:
        """By values and not by versions: fused optimizers do not count them up.

        Moved to another device or dtype, a parameter has another key: its norm is another by rounding.
        """
        optimizer = self._optimizer()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else set()
        reshard(self._model)
        moving = moving_parameters(self._model, self._names)
        local = {name: local_part(p) for name, p in moving.items() if id(p) in held}
        return {
            (name, p.dtype, p.device): torch.linalg.vector_norm(p, dtype=wide_dtype(p)) for name, p in local.items()
        }

    def _check_acted(self) -> None:
        """Warn once if protected weights have moved, and no protected optimizer of the model has stepped."""
        if self._acted or any(other._acted for other in _handles if unwrap(other._model) is unwrap(self._model)):
            return
        if self._norms is None:
            self._norms = self._norms_now()
        now, old = self._norms_now(), self._norms
        moved = [key[0] for key in now.keys() & old.keys() if not torch.equal(now[key], old[key])]
        if not moved:
            return
        self._acted = True
        warnings.warn(
            f"{len(moved)} protected parameters, {min(moved)} among them, have moved since protect was called, and the "
            "optimizer that is protected has made no step: nothing was protected. Pass protect the optimizer that "
            "steps, after it was made, copied or loaded; with a trainer, the one that the trainer holds. If you have "
            "loaded a part of the weights yourself since then, nothing is lost.",
            NotProtectedWarning,
            stacklevel=4,
        )

    def _before_outermost_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A `step` of somebody else's may end in `super().step()`, for which torch calls all hooks again.
        if self._depth and num_steps_in_progress(optimizer) < 2:
            self._depth = 0  # the step before this one ended in an exception
        self._depth += 1
        return self._before_step(optimizer, args, kwargs) if self._depth == 1 else None

    def _after_outermost_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._after_step(optimizer, args, kwargs)

    @abstractmethod
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The optimizer is about to step."""

    @abstractmethod
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The optimizer has stepped."""
