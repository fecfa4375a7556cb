"""Methods that penalise the change of important weights: L2, EWC, MAS, SI, RWalk.

Owns when importance is measured and how tasks are added up. The importance itself comes from memsyn's `measure`, or
from `trajectory` for the methods that follow the weights during training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from memsyn import Memory, measure
from memsyn.parameters import trainable_parameters
from memsyn_bench.methods.method import Method, TaskTraining
from memsyn_bench.methods.sources import TRAINING, ImageSource, MeasuringMethod
from memsyn_bench.methods.trajectory import PathIntegral, RiemannianWalk

MEASURE_BATCH = 64
"""Images in one pass of measuring or evaluating: it changes the speed and nothing else."""

Consolidate = Callable[[TaskTraining, Memory, Tensor], Memory]
"""(training, memory of the tasks before, images) -> the memory with this task in it, the anchor at the present weights.

The images are unlabelled; importance is measured on them, through the task's head."""


def through_head(training: TaskTraining) -> Callable[[nn.Module, Tensor], Tensor]:
    """The forward function of measuring: images to the logits of the task's own head."""

    def forward(model: nn.Module, images: Tensor) -> Tensor:
        logits: Tensor = model(images, training.index)
        return logits

    return forward


def _measured(training: TaskTraining, memory: Memory, images: Tensor, *, estimator: str) -> Memory:
    """Add the importance over images, through the task's head, and move the anchor."""
    batches = images.split(MEASURE_BATCH)
    found = measure(training.model, batches, forward=through_head(training), estimator=estimator, progress=False)
    return memory.consolidate(training.model, found, rule="sum")


def mas(training: TaskTraining, memory: Memory, images: Tensor) -> Memory:
    """Omega = sum over tasks of 1/N sum_k |d ||y_k||^2 / d theta|, exact (Aljundi et al. 2018, Eq. 2)."""
    return _measured(training, memory, images, estimator="mas")


def mas_local(training: TaskTraining, memory: Memory, images: Tensor) -> Memory:
    """The same with each layer's own output: local MAS, forward passes only (Aljundi et al. 2018, section 4.3)."""
    return _measured(training, memory, images, estimator="mas-local")


def ewc(training: TaskTraining, memory: Memory, images: Tensor) -> Memory:
    """Omega = sum over tasks of 1/N sum_k sum_c p_c (d log p_c / d theta)^2: the exact diagonal Fisher information.

    The online variant: one sum, nothing decays, and one anchor that moves with each task (Kirkpatrick et al. 2017;
    Schwarz et al. 2018 with gamma = 1). Their penalty has a factor 1/2: strength is half their lambda.
    """
    return _measured(training, memory, images, estimator="fisher")


def mas_batched(training: TaskTraining, memory: Memory, images: Tensor) -> Memory:
    """MAS with the absolute value after the mean over a training batch: what most other libraries do."""
    batches = images.split(training.settings.batch_size)
    found = measure(training.model, batches, forward=through_head(training), batched=True, progress=False)
    return memory.consolidate(training.model, found, rule="sum")


def l2(training: TaskTraining, memory: Memory) -> Memory:
    """Omega = 1 for every weight trained so far, the head's included; weights of heads to come are free."""
    parameters = trainable_parameters(training.model)
    omega = {name: torch.full_like(p, float(p.grad is not None)) for name, p in parameters.items()}
    omega = {name: value.maximum(memory.importance.get(name, value)) for name, value in omega.items()}
    return Memory(present_weights(training.model), omega)


@final
class ImportancePenalty(MeasuringMethod):
    """Importance is measured when a task has been learned, and protected from the next task on."""

    def __init__(self, strength: float, remember: Consolidate, source: ImageSource = TRAINING) -> None:
        super().__init__(strength, source)
        self._remember = remember

    def remembered(self, training: TaskTraining, images: Tensor) -> Memory:
        """The memory with the importance over the images."""
        return self._remember(training, self.memory, images)


StartPath = Callable[[dict[str, Tensor], Method], PathIntegral | RiemannianWalk]
"""(weights at the task's start, the method) -> the path that follows the task."""


def si(weights: dict[str, Tensor], method: Method) -> PathIntegral:
    """The path integral of Zenke et al. 2017, on top of the importance of the tasks before."""
    return PathIntegral(weights, method.memory.importance)


def rwalk(weights: dict[str, Tensor], method: Method) -> RiemannianWalk:
    """The walk of Chaudhry et al. 2018, from where the task before left it."""
    return RiemannianWalk(weights, method.kept.get("fisher"), method.kept.get("score"))


@final
class PathPenalty(Method):
    """Importance is gathered while a task is learned, from gradients of its loss without any penalty."""

    def __init__(self, strength: float, start_path: StartPath) -> None:
        super().__init__(strength)
        self._start_path = start_path
        self._path: PathIntegral | RiemannianWalk | None = None

    def begin(self, training: TaskTraining) -> None:
        """Protect the tasks before, and start a new path."""
        super().begin(training)
        self._path = self._start_path(present_weights(training.model), self)
        self.working = {"gradients": {}, **self._path.held()}

    def before_step(self, training: TaskTraining, images: Tensor) -> None:
        """Put the gradients aside: the penalty is added to them inside the step."""
        parameters = trainable_parameters(training.model)
        self.working["gradients"] = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}

    def after_step(self, training: TaskTraining) -> None:
        """Add the step to the path."""
        assert self._path is not None
        self._path.add(self.working["gradients"], trainable_parameters(training.model))

    def end(self, training: TaskTraining) -> None:
        """Measure the importance."""
        super().end(training)
        assert self._path is not None
        self.memory = Memory(present_weights(training.model), self._path.finish())
        self.kept, self._path = self._path.carried(), None


def present_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable weights by name."""
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
