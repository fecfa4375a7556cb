"""IMM: the tasks' weights are merged at a task's end (Lee et al. 2017).

Owns the running sums that the merged weights are computed from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from memsyn import measure
from memsyn.parameters import trainable_parameters
from memsyn_bench.methods.method import Method, TaskTraining
from memsyn_bench.methods.penalties import MEASURE_BATCH, l2, through_head

Weigh = Callable[[TaskTraining], dict[str, Tensor]]
"""training -> how much each of the weights just learned counts in the merge."""


def by_mean(training: TaskTraining) -> dict[str, Tensor]:
    """1 for a weight that the task has trained: mean-IMM, theta = 1/T sum_t theta_t (Lee et al. 2017)."""
    parameters = trainable_parameters(training.model)
    return {name: torch.full_like(p, float(p.grad is not None)) for name, p in parameters.items()}


def by_fisher(training: TaskTraining) -> dict[str, Tensor]:
    """The exact Fisher information F_t: mode-IMM, theta = sum_t F_t theta_t / sum_t F_t (Lee et al. 2017)."""
    batches = training.task.train_images.split(MEASURE_BATCH)
    found = measure(training.model, batches, forward=through_head(training), estimator="fisher", progress=False)
    return found.mean()


@final
class WeightMerging(Method):
    """Each task is learned from the weights of the task before, and the network in use is the merge of all of them.

    Tasks count alike. A weight that none of them counts (a head to come) stays. "Weight transfer": a task starts from
    the last one's own weights, not from the merged ones; "L2 transfer": it is held to them with the strength given.
    """

    merges = True

    def __init__(self, strength: float, weigh: Weigh) -> None:
        super().__init__(strength)
        self._weigh = weigh

    @torch.no_grad()
    def begin(self, training: TaskTraining) -> None:
        """Back from the merged weights to the last task's own."""
        parameters = trainable_parameters(training.model)
        for name, own in self.memory.anchor.items():
            parameters[name].copy_(own)
        super().begin(training)

    @torch.no_grad()
    def end(self, training: TaskTraining) -> None:
        """Count the task's weights in, and leave the merged ones in the model."""
        super().end(training)
        self.memory = l2(training, self.memory)
        weights, own = self._weigh(training), self.memory.anchor
        products = {name: weight * own[name] for name, weight in weights.items()}
        if self.kept:
            products = {name: value + self.kept["products"][name] for name, value in products.items()}
            weights = {name: value + self.kept["weights"][name] for name, value in weights.items()}
        self.kept = {"products": products, "weights": weights}
        parameters = trainable_parameters(training.model)
        for name, weight in weights.items():
            parameters[name].copy_(torch.where(weight > 0, products[name] / weight, own[name]))
