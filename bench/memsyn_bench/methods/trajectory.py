"""Importance from the path of the weights during training: Synaptic Intelligence and RWalk.

Owns their arithmetic: gradients and weights come in step by step, an importance for a `Memory` comes out. Must not know
models or optimizers.
"""

from collections.abc import Mapping
from typing import Final, final

import torch
from torch import Tensor

from memsyn.parameters import wide_dtype

Weights = Mapping[str, Tensor]
"""Parameter name -> tensor."""

SI_DAMPING: Final = 1e-3
"""xi of Zenke et al. (2017) on split MNIST."""
WALK_DAMPING: Final = 1e-3
WALK_DECAY: Final = 0.9
"""epsilon and alpha as in the code of Chaudhry et al. (2018)."""
WALK_INTERVAL: Final = 10
"""Steps between two looks at the Riemannian distance."""


@final
class PathIntegral:
    """Synaptic Intelligence: how much each weight's path through one task has lowered the loss.

    omega = sum_t -g_t (theta_{t+1} - theta_t), g_t the gradient of the task's loss, without any penalty, at theta_t.
    Omega = max(0, omega) / ((theta_end - theta_start)^2 + xi), which is added to that of the tasks before. Zenke, Poole
    and Ganguli 2017; a negative omega (the weight made the loss worse) counts as 0, as in the public code.

    Args:
        weights: theta_start.
        before: Omega of the tasks before.
        damping: xi, in units of a weight squared.

    Example:
        >>> import torch
        >>> path = PathIntegral({"w": torch.tensor([0.0])}, damping=1.0)
        >>> path.add({"w": torch.tensor([-2.0])}, {"w": torch.tensor([3.0])})
        >>> path.finish()["w"]  # 2 * 3 / (3^2 + 1)
        tensor([0.6000])
    """

    def __init__(self, weights: Weights, before: Weights | None = None, *, damping: float = SI_DAMPING) -> None:
        self.damping, self.before = damping, before or {}
        self.start = _copies(weights)
        self.last = _copies(weights)
        self.omega = {name: torch.zeros_like(value) for name, value in self.start.items()}

    @torch.no_grad()
    def add(self, gradients: Weights, weights: Weights) -> None:
        """Take in one step: the gradients before it, and the weights after it. Weights without a gradient stay put."""
        for name, gradient in gradients.items():
            self.omega[name].sub_(gradient * (weights[name] - self.last[name]))
            self.last[name].copy_(weights[name])

    def finish(self) -> dict[str, Tensor]:
        """Omega of all tasks so far, not negative, in units of the loss per weight squared."""
        return {
            name: self.before.get(name, 0.0)
            + omega.clamp(min=0) / ((self.last[name] - self.start[name]).square() + self.damping)
            for name, omega in self.omega.items()
        }

    def carried(self) -> dict[str, dict[str, Tensor]]:
        """What the next task's path needs besides the importance: nothing."""
        return {}

    def held(self) -> dict[str, dict[str, Tensor]]:
        """The tensors it holds while the task is learned."""
        return {"start": self.start, "last": self.last, "omega": self.omega}


@final
class RiemannianWalk:
    """RWalk: a running Fisher information and a path score in the distance that it defines (Chaudhry et al. 2018).

    After every interval of steps, F <- alpha mean_t g_t^2 + (1 - alpha) F (the first time: F = mean_t g_t^2), and
    s <- s + max(0, sum_t -g_t (theta_{t+1} - theta_t)) / (1/2 F Delta^2 + epsilon), Delta the change of the
    weights in the interval. At the task's end the score is averaged with the score of the tasks before,
    s <- (s_before + s) / 2, and

        Omega = F / max F + s / max s,

    the maxima over the whole network: both parts lie in [0, 1]. F goes on over the tasks, s starts at 0 in each. A
    weight that gets no gradient in an interval (a head of another task) keeps its F, in a task its s.

    Args:
        weights: theta at the task's start.
        fisher, score: `carried()` of the task before, if there was one.
        damping: epsilon.
        decay: alpha.
        interval: in steps; the last of a task may be shorter.
    """

    def __init__(
        self,
        weights: Weights,
        fisher: Weights | None = None,
        score: Weights | None = None,
        *,
        damping: float = WALK_DAMPING,
        decay: float = WALK_DECAY,
        interval: int = WALK_INTERVAL,
    ) -> None:
        self.damping, self.decay, self.interval = damping, decay, interval
        self.fisher, self.score = _copies(fisher or {}), _copies(score or {})
        self.start, self.last = _copies(weights), _copies(weights)
        self.energy = {name: torch.zeros_like(value) for name, value in self.start.items()}
        self.squares = {name: torch.zeros_like(value) for name, value in self.start.items()}
        self.gained: dict[str, Tensor] = {}
        self.num_steps: dict[str, int] = {}
        """Per weight, its steps with a gradient in this interval."""
        self.length = 0

    @torch.no_grad()
    def add(self, gradients: Weights, weights: Weights) -> None:
        """Take in one step: the gradients before it, and the weights after it. Weights without a gradient stay put."""
        for name, gradient in gradients.items():
            self.energy[name].sub_(gradient * (weights[name] - self.last[name]))
            self.squares[name].add_(gradient.square())
            self.last[name].copy_(weights[name])
            self.num_steps[name] = self.num_steps.get(name, 0) + 1
        self.length += 1
        if self.length == self.interval:
            self._close()

    def finish(self) -> dict[str, Tensor]:
        """Omega after the task, from 0 to 2; once, at its end."""
        self._close()
        for name, gained in self.gained.items():
            self.score[name] = (self.score[name] + gained) / 2 if name in self.score else gained
        zeros = {name: torch.zeros_like(value) for name, value in self.start.items()}
        fisher, score = _scaled({**zeros, **self.fisher}), _scaled({**zeros, **self.score})
        return {name: fisher[name] + score[name] for name in zeros}

    def carried(self) -> dict[str, dict[str, Tensor]]:
        """What the next task's path needs besides the importance."""
        return {"fisher": self.fisher, "score": self.score}

    def held(self) -> dict[str, dict[str, Tensor]]:
        """The tensors it holds while the task is learned."""
        return {
            "start": self.start,
            "last": self.last,
            "energy": self.energy,
            "squares": self.squares,
            "gained": self.gained,
            **self.carried(),
        }

    @torch.no_grad()
    def _close(self) -> None:
        """At an interval's end: update the Fisher information and the score."""
        for name, count in self.num_steps.items():
            mean = self.squares[name] / count
            old = self.fisher.get(name, mean)
            self.fisher[name] = self.decay * mean + (1 - self.decay) * old
            distance = 0.5 * self.fisher[name] * (self.last[name] - self.start[name]).square()
            gained = self.energy[name].clamp(min=0) / (distance + self.damping)
            self.gained[name] = self.gained[name] + gained if name in self.gained else gained
            self.start[name].copy_(self.last[name])
            self.energy[name].zero_()
            self.squares[name].zero_()
        self.num_steps, self.length = {}, 0


def _copies(weights: Weights) -> dict[str, Tensor]:
    """Copies in float32 at least."""
    return {name: value.detach().to(wide_dtype(value), copy=True) for name, value in weights.items()}


def _scaled(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values divided by their maximum, if it is not 0."""
    largest = max((float(value.max()) for value in values.values() if value.numel()), default=0.0)
    return {name: value / largest if largest else value for name, value in values.items()}
