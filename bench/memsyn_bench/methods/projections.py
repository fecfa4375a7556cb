"""Methods that keep new tasks out of the directions that old tasks use.

Owns when factors are measured and how tasks are added up. The factors and the projection are memsyn's.
"""

from __future__ import annotations

from typing import final

from memsyn import measure
from memsyn_bench.methods.method import Method, TaskTraining
from memsyn_bench.methods.penalties import MEASURE_BATCH, through_head

STRENGTH = 10.0
"""c: the default of `memsyn.protect`, the same for every sequence."""


@final
class Projection(Method):
    """The factors of a task are measured when it has been learned, and projected away from the next task on.

    Args:
        estimator: as `memsyn.measure` takes it.
        rank: the number of eigenvectors that are kept; None: all.
        every: steps between two projections.
    """

    def __init__(
        self, strength: float = STRENGTH, *, estimator: str = "kronecker", rank: int | None = 64, every: int = 10
    ) -> None:
        super().__init__(strength)
        self.options = {"every": every}
        self._estimator, self._rank = estimator, rank

    def end(self, training: TaskTraining) -> None:
        """Measure the factors on the task's training images, and consolidate them."""
        super().end(training)
        factors = measure(
            training.model,
            training.task.train_images.split(MEASURE_BATCH),
            forward=through_head(training),
            estimator=self._estimator,
            progress=False,
        )
        self.memory = self.memory.consolidate(training.model, factors, rank=self._rank)
