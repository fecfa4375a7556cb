"""The handle of a protected optimizer, whatever the form of protection.

Owns the hooks and their removal, and that no optimizer is protected twice.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet, ref

from torch.nn import Parameter
from torch.optim import Optimizer

from memsyn.errors import ProtectionError

_protected: "WeakSet[Optimizer]" = WeakSet()
"""The optimizers with a handle that was not removed."""


def is_protected(optimizer: Optimizer) -> bool:
    """Whether the optimizer has a handle that was not removed."""
    return optimizer in _protected


def check_optimizer(optimizer: Optimizer, parameters: Mapping[str, Parameter], names: Collection[str]) -> None:
    """Check that an optimizer holds a parameter of the memory.

    Raises:
        ProtectionError: it holds none.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = [parameters[name] for name in names if name in parameters]
    if any(id(parameter) in held for parameter in own):
        return
    cure = "Was it made from another model, or before the model was copied or moved?"
    if own and not any(parameter.requires_grad for parameter in own):
        cure = (
            "They are frozen and do not move. What trains, such as adapters, is not in the memory: measure the model "
            "as it is now, with the parameters that will train, and consolidate."
        )
    raise ProtectionError(f"the optimizer holds none of the memory's {len(names)} parameters. {cure}")


@dataclass(frozen=True)
class Report:
    """What protection does: how far the weights are from the anchor, or how much of the steps was taken away."""

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
