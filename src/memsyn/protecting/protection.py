"""The handle of a protected optimizer, whatever the form of protection.

Owns the hooks and their removal, and that no optimizer is protected twice.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet, ref

from torch.optim import Optimizer

from memsyn.protecting.optimizers import PROJECTED
from memsyn.values.display import LayerRow, counted, html_table, html_text, short_name

_protected: "WeakSet[Optimizer]" = WeakSet()
"""The optimizers with a handle that was not removed."""


def is_protected(optimizer: Optimizer) -> bool:
    """Whether the optimizer has a handle that was not removed."""
    return optimizer in _protected


@dataclass(frozen=True)
class Report:
    """What protection does: how far the weights are from the anchor, or how much of the steps was taken away.

    `print(report)` says it in words.
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
    all weights are free, 1 if none can move. In the projected form, the share of the last change that was taken
    away."""
    room: dict[str, float] = field(default_factory=dict)
    """In the projected form, layer -> the share of its directions in which more than half of a step remains."""
    form: str = ""
    """The form of protection."""
    strength: float = 0.0
    """lambda, or c in the projected form."""
    num_weights: int = 0
    """The weights that are protected now: those of the optimizer that have importance, or directions."""

    def __repr__(self) -> str:
        said = f"{self.form} form, {counted(self.num_weights, 'weight')}"
        return f"Report({said}, penalty {self.penalty:.3g}, bound {self.bound:.3g}, {self.held:.1%} held)"

    def __str__(self) -> str:
        if not self.strength and self.form:
            return "Nothing is protected: the strength is 0."
        if not self.num_weights:
            return "Nothing is protected: protection was removed, or the optimizer holds no weight that has importance."
        weights = counted(self.num_weights, "weight")
        first = f"Protected: {weights}, by the {self.form} form at strength {self.strength:.4g}."
        return "\n".join(
            [first, *(self._words_of_projection() if self.form == PROJECTED else self._words_of_penalty())]
        )

    def _repr_html_(self) -> str:
        if self.form == PROJECTED and self.num_weights:
            rows = [
                LayerRow(
                    layer,
                    [f"{own[layer]:.1%}" if layer in own else "" for own in (self.layers, self.room)],
                    1 - self.room.get(layer, 2.0),
                )
                for layer in {**self.room, **self.layers}
            ]
            others = "without matrices or with more room each"
            return html_table(str(self), ["layer", "taken away", "room"], rows, others)
        if not (self.layers and self.num_weights):
            return html_text(str(self))
        rows = [
            LayerRow(layer, [f"{part:.3g}", f"{self._share(part):.1%}"], part) for layer, part in self.layers.items()
        ]
        return html_table(str(self), ["layer", "moved", "share of what moved"], rows, "with a smaller share each")

    def _share(self, part: float) -> float:
        return part / self.bound if self.bound else 0.0

    def _words_of_penalty(self) -> list[str]:
        held = (
            f"Held: {self.held:.1%}. A step pulls these weights back by more than half of their distance to the "
            f"anchor. The other {1 - self.held:.1%} have room to move."
        )
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
    named = ", ".join(f"{short_name(layer)} ({shares[layer]:.1%})" for layer in order[:3])
    return f"{named} and {counted(len(order) - 3, 'more layer')}" if len(order) > 3 else named


class Protection(ABC):
    """The handle of one protected optimizer.

    Attributes:
        strength: as `protect` took it, as a number.
        form: a key of `FORMS`.
    """

    strength: float
    form: str

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = ref(optimizer)  # the optimizer's hooks refer to this object: no reference cycle
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        _protected.add(optimizer)

    def __repr__(self) -> str:
        optimizer = self._optimizer()
        of = "an optimizer that is gone" if optimizer is None else type(optimizer).__name__
        return f"Protection({self.form} form, strength {self.strength:.4g}, of {of})"

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    @abstractmethod
    def value(self) -> float:
        """The penalty now: lambda sum Omega (theta - theta*)^2; 0 in the projected form, which has none."""

    @abstractmethod
    def report(self) -> Report:
        """What protection does to the weights, layer by layer."""

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
        """Project the changes of the last steps that are not projected yet; only the projected form delays any."""

    def remove(self) -> None:
        """Stop protecting; a second call does nothing."""
        optimizer = self._optimizer()
        if self._hooks and optimizer is not None:
            self.flush()
            for hook in self._hooks:
                hook.remove()
            _protected.discard(optimizer)
        self._hooks = []

    @abstractmethod
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The optimizer is about to step."""

    @abstractmethod
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The optimizer has stepped."""
