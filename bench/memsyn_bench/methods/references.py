"""References that methods are compared with: a frozen backbone, and each task alone.

Owns these two; joint training, the ceiling, is rehearsal of everything and lives in `rehearsal`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import final

from memsyn_bench.methods.method import Method, TaskTraining, frozen


@final
class FrozenBackbone(Method):
    """After the first task only heads learn: tasks with heads of their own forget nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._open = ExitStack()

    def begin(self, training: TaskTraining) -> None:
        """Freeze the backbone from the second task on."""
        if training.index > 0:
            self._open.enter_context(frozen(training.model.body))

    def end(self, training: TaskTraining) -> None:
        """Leave the model as it was found."""
        self._open.close()


@final
class Alone(Method):
    """Each task is learned from the first weights, as a reference. The accuracies on old tasks mean nothing here."""

    def begin(self, training: TaskTraining) -> None:
        """Back to the weights before the first task."""
        if not self.kept:
            self.kept = {"start": {name: value.clone() for name, value in training.model.state_dict().items()}}
        training.model.load_state_dict(self.kept["start"])
