"""What a method is: what it does before a step, after a step and at a task's end. The training loop does the rest.

Owns which tensors a method holds: those kept from task to task, and those for the present task. Knows no single method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memsyn import Memory, Protection, protect
from memsyn_bench.losses import Loss
from memsyn_bench.sequences.networks import Network
from memsyn_bench.settings import Settings
from memsyn_bench.task import Task

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""(images, generator) -> the images as the network is trained on them."""
TensorGroups = dict[str, dict[str, Tensor]]
"""Group -> name -> tensor."""


@dataclass(frozen=True)
class TaskTraining:
    """One task being learned."""

    model: Network
    task: Task
    index: int
    """The place of the task in the sequence, and of its head if each task has one."""
    optimizer: Optimizer
    settings: Settings
    augment: Augment
    loss: Loss
    """The loss of each image; the loop takes its mean."""
    generator: torch.Generator
    """Random numbers of the loop: batches and augmentation, the same for every method."""
    method_generator: torch.Generator
    """Random numbers of the method."""


class Method:
    """What a method does around the training loop. This base class protects the memory, if it holds anything.

    Attributes:
        memory: importance or directions, in methods that protect weights.
        options: further options of `protect`.
        kept: tensors held from task to task, by group and name; saved in checkpoints, and never changed in place.
        working: tensors held while a task is learned.
        merges: whether `end` changes the model's weights.
    """

    merges: ClassVar[bool] = False

    def __init__(self, strength: float = 0.0) -> None:
        self.strength = strength
        self.memory = Memory.empty()
        self.options: dict[str, Any] = {}
        self.kept: TensorGroups = {}
        self.working: TensorGroups = {}
        self._protection: Protection | None = None

    def begin(self, training: TaskTraining) -> None:
        """Before a task's first step: protect what the memory holds, if it holds anything."""
        if self.memory.names:
            self._protection = protect(
                training.optimizer, training.model, self.memory, strength=self.strength, **self.options
            )

    def loss_outputs(self, training: TaskTraining, outputs: Tensor) -> Tensor:
        """What the task's loss is computed of: by default all outputs, (N, D)."""
        return outputs

    def before_step(self, training: TaskTraining, images: Tensor) -> None:
        """After the backward pass: `.grad` holds the gradients of the task's loss on `images`. May add to it."""

    def after_step(self, training: TaskTraining) -> None:
        """After the optimizer's step."""

    def end(self, training: TaskTraining) -> None:
        """After a task's last step: end the protection."""
        if self._protection is not None:
            self._protection.remove()
        self._protection, self.working = None, {}

    def penalty(self) -> float:
        """lambda sum Omega (theta - theta*)^2 now; 0 for methods without."""
        return self._protection.value() if self._protection else 0.0

    def load(self, memory: Memory, kept: TensorGroups) -> None:
        """Continue with what a method of the same kind has kept."""
        self.memory, self.kept = memory, kept

    def num_bytes(self) -> int:
        """The bytes of all tensors held now, beside the model and its optimizer."""
        groups = [*self.memory.groups().values(), *self.kept.values(), *self.working.values()]
        return sum(tensor.numel() * tensor.element_size() for group in groups for tensor in group.values())


@final
class FineTuning(Method):
    """Nothing beside the loop."""


@final
class CombinedMethods(Method):
    """Several methods at once; the first one has the memory."""

    def __init__(self, *parts: Method) -> None:
        super().__init__()
        self.parts = parts

    def begin(self, training: TaskTraining) -> None:
        """Call each part in order."""
        for part in self.parts:
            part.begin(training)

    def loss_outputs(self, training: TaskTraining, outputs: Tensor) -> Tensor:
        """Each part takes what the part before it gives."""
        for part in self.parts:
            outputs = part.loss_outputs(training, outputs)
        return outputs

    def before_step(self, training: TaskTraining, images: Tensor) -> None:
        """Call each part in order."""
        for part in self.parts:
            part.before_step(training, images)

    def after_step(self, training: TaskTraining) -> None:
        """Call each part in order."""
        for part in self.parts:
            part.after_step(training)

    def end(self, training: TaskTraining) -> None:
        """Call each part in order."""
        for part in self.parts:
            part.end(training)
        self.memory = self.parts[0].memory
        self.kept = {
            f"{number}.{group}": members
            for number, part in enumerate(self.parts)
            for group, members in part.kept.items()
        }

    def penalty(self) -> float:
        """The sum over the parts."""
        return sum(part.penalty() for part in self.parts)

    def load(self, memory: Memory, kept: TensorGroups) -> None:
        """Each part gets its own tensors; the first part gets the memory."""
        super().load(memory, kept)
        for number, part in enumerate(self.parts):
            own = {name.partition(".")[2]: group for name, group in kept.items() if name.startswith(f"{number}.")}
            part.load(memory if number == 0 else Memory.empty(), own)

    def num_bytes(self) -> int:
        """The sum over the parts."""
        return sum(part.num_bytes() for part in self.parts)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """While open, no parameter of the module gets a gradient."""
    held = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
