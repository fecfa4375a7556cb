"""What helps where all classes share one head, and no task sees the classes of the others.

Cross-entropy over all classes teaches a task that its images are of no old class, so old classes are never named again.
Owns the corrections; where tasks have heads of their own they change nothing, or the head alone.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from memsyn_bench.methods.method import Method, TaskTraining
from memsyn_bench.methods.penalties import MEASURE_BATCH


@final
class OwnClasses(Method):
    """The cross-entropy of a task's images runs over the task's own classes alone.

    The "labels trick" (Zeno et al. 2018): the logits of other classes get no gradient from it. Stored images keep the
    loss over all classes; with rehearsal this is ER-ACE (Caccia et al. 2022).
    """

    def loss_outputs(self, training: TaskTraining, outputs: Tensor) -> Tensor:
        """The logits of the task's classes, (N, its classes): they come first."""
        return outputs[:, : len(training.task.class_names)]


class Align(Method):
    @torch.no_grad()
    def end(self, training):
        super().end(training)
        if training.index:
            first = training.model.first_classes[training.index]
            n = len(training.task.class_names)
            w = training.model.heads[0].weight
            norms = w.norm(dim=1)
            w[first : first + n] *= norms[:first].mean() / norms[first : first + n].mean()


class Means(Method):
    def __init__(self, shrink=1e-2, init=True):
        super().__init__()
        self.shrink = shrink

    @torch.no_grad()
    def end(self, training):
        super().end(training)
        model, task = training.model.eval(), training.task
        f = torch.cat([model.body(x) for x in task.train_images.split(MEASURE_BATCH)]).double()
        means = torch.stack([f[task.train_labels == c].mean(0) for c in range(len(task.class_names))])
        d = f - means[task.train_labels]
        old = self.kept.get("classes")
        scatter = d.T @ d
        if old:
            means = torch.cat([old["means"], means])
            scatter = scatter + old["scatter"]
            n = old["n"] + len(f)
        else:
            n = torch.tensor(float(len(f)))
        self.kept = {"classes": {"means": means, "scatter": scatter, "n": n}}
        sigma = scatter / n
        sigma = (1 - self.shrink) * sigma + self.shrink * sigma.diagonal().mean() * torch.eye(len(sigma)).double()
        w = torch.linalg.solve(sigma, means.T).T
        b = -0.5 * (w * means).sum(1)
        head = model.heads[0]
        head.weight[: len(w)] = w.float()
        head.bias[: len(w)] = b.float()
