"""What helps where all classes share one head, and no task sees the classes of the others.

Cross-entropy over all classes teaches that no image is of an old class, and the head's rows of old and new classes are
never compared. Owns the two parts of the answer: the loss over a task's own classes, and a head made of class means.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from memsyn_bench.methods.method import Method, TaskTraining, TensorGroups
from memsyn_bench.methods.penalties import MEASURE_BATCH

SHRINKAGE = 0.01
"""The share of the features' covariance that is replaced by a multiple of the identity; chosen on validation data."""
HEAD, WITHIN = "head", "within"
"""Groups of what is kept: sums and counts for each head, and the scatter within classes, (F, F)."""


@final
class OwnClasses(Method):
    """The cross-entropy of a task's images runs over the task's own classes alone.

    The "labels trick" (Zeno et al. 2018): the logits of other classes get no gradient from it. Stored images keep the
    loss over all classes; with rehearsal this is the asymmetric loss of ER-ACE (Caccia et al. 2022).
    """

    def loss_outputs(self, training: TaskTraining, outputs: Tensor) -> Tensor:
        """The logits of the task's classes, (N, its classes): they come first."""
        return outputs[:, : len(training.task.class_names)]


@final
class DiscriminantHead(Method):
    """After each task the head of all classes so far is that of linear discriminant analysis.

    With the mean features mu_c of class c and the covariance S of the features within classes, over all tasks:
    w_c = S^-1 mu_c and b_c = -1/2 mu_c^T S^-1 mu_c, so that every class has the same prior. As in streaming LDA (Hayes
    and Kanan 2020); S is shrunk to (1 - e) S + e tr(S)/F I, e = 0.01. Kept are sums of features, no image. They are of
    the network as it was when a class was learned: something else must hold the features still.
    """

    @torch.no_grad()
    def end(self, training: TaskTraining) -> None:
        """Add the task's training images to the sums, and set the head."""
        super().end(training)
        model, task = training.model.eval(), training.task
        features = torch.cat([model.body(images) for images in task.train_images.split(MEASURE_BATCH)])
        head, first = model.place_of(training.index)
        linear = model.heads[head]
        assert isinstance(linear, nn.Linear)
        labels = task.train_labels + first
        self.kept = _with_features(self.kept, f"{HEAD}{head}", len(linear.weight), features, labels)
        for name, (weight, bias, known) in discriminants(self.kept).items():
            linear = model.heads[int(name.removeprefix(HEAD))]
            assert isinstance(linear, nn.Linear)
            linear.weight[known], linear.bias[known] = weight.to(linear.weight), bias.to(linear.bias)


def _with_features(kept: TensorGroups, head: str, num_rows: int, features: Tensor, labels: Tensor) -> TensorGroups:
    """The sums with those of more features (N, F) in them; `labels` (N,) are rows of the head."""
    features = features.double()
    own = features.new_zeros(num_rows, features.shape[1]).index_add(0, labels, features)
    counts = labels.bincount(minlength=num_rows)
    deviations = features - (own / counts.clamp_min(1).unsqueeze(1))[labels]
    scatter = deviations.T @ deviations
    old = kept.get(head)
    if old is not None:
        own, counts = own + old["sums"], counts + old["counts"]
    if WITHIN in kept:
        scatter = scatter + kept[WITHIN]["scatter"]
    return {**kept, head: {"sums": own, "counts": counts}, WITHIN: {"scatter": scatter}}


def discriminants(kept: TensorGroups) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For each head of the sums: weights (K, F), biases (K,), and which K of its rows these are, (rows,) bool."""
    heads = {name: group for name, group in kept.items() if name != WITHIN}
    num = sum(int(group["counts"].sum()) for group in heads.values())
    covariance = kept[WITHIN]["scatter"] / num
    identity = torch.eye(len(covariance)).to(covariance)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.diagonal().mean() * identity
    found = {}
    for name, group in heads.items():
        known = group["counts"] > 0
        means = group["sums"][known] / group["counts"][known].unsqueeze(1)
        weight = torch.linalg.solve(covariance, means.T).T
        found[name] = weight, -(weight * means).sum(1) / 2, known
    return found
