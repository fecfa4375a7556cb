"""Methods that keep the old heads' outputs on the new task's images: LwF and EBLL.

Owns the distillation loss, and EBLL's encoders with their training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from memsyn_bench.methods.method import Method, TaskTraining
from memsyn_bench.methods.penalties import MEASURE_BATCH
from memsyn_bench.sequences.networks import Network

DISTILLATION_TEMPERATURE = 2.0
"""The temperature of Li and Hoiem (2016)."""
CODE_WEIGHT = 1.0
"""Weight of EBLL's code loss relative to its distillation; its strength multiplies both."""
FEATURES_PER_CODE = 4
"""The number of features for each output of an encoder."""
FIT_STEPS, FIT_LR = 300, 1e-2
"""The steps and learning rate of an autoencoder's training: Adam on all features of a task at once."""

Classify = Callable[[Tensor], Tensor]
"""Features (N, F) -> the logits of a task's classes."""
Encoder = Mapping[str, Tensor]
"""`weight` (codes, features) and `bias` (codes,), which take unstandardised features."""


def distillation(logits: Tensor, recorded: Tensor) -> Tensor:
    """-1/N sum_k sum_c q_kc log p_kc, both softmax(. / T) with T = 2, q of `recorded` (Li and Hoiem 2016)."""
    q = (recorded / DISTILLATION_TEMPERATURE).softmax(1)
    return -(q * (logits / DISTILLATION_TEMPERATURE).log_softmax(1)).sum(1).mean()


def codes(encoder: Encoder, features: Tensor) -> Tensor:
    """sigmoid(W f + b), (N, codes), of features (N, features)."""
    return F.linear(features, encoder["weight"], encoder["bias"]).sigmoid()


def code_loss(encoder: Encoder, features: Tensor, recorded: Tensor) -> Tensor:
    """1/N sum_k 1/2 ||code(f_k) - code(f*_k)||^2 (Rannen et al. 2017)."""
    return 0.5 * (codes(encoder, features) - codes(encoder, recorded)).square().sum(1).mean()


def fit_encoder(features: Tensor, labels: Tensor, head: Classify, generator: torch.Generator) -> dict[str, Tensor]:
    """Train an under-complete autoencoder on a task's features, and return its encoder (Rannen et al. 2017).

    With z the features standardised, c = sigmoid(W z + b) and r = V c + d, it minimises mean (r - z)^2 + the
    cross-entropy of what the task's head makes of r, unstandardised. The standardisation is folded into W and b.
    """
    num_features = features.shape[1]
    num_codes = max(1, num_features // FEATURES_PER_CODE)
    mean, deviation = features.mean(0), features.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    z = (features - mean) / deviation

    def drawn(*shape: int) -> Tensor:
        bound = 1 / math.sqrt(shape[-1])
        values = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 * bound - bound
        return values.to(features).requires_grad_()

    weight, back = drawn(num_codes, num_features), drawn(num_features, num_codes)
    bias, shift = (torch.zeros(size, dtype=z.dtype, requires_grad=True) for size in (num_codes, num_features))
    optimizer = torch.optim.Adam([weight, back, bias, shift], lr=FIT_LR)
    for _ in range(FIT_STEPS):
        r = F.linear(torch.sigmoid(F.linear(z, weight, bias)), back, shift)
        loss = (r - z).square().mean() + F.cross_entropy(head(r * deviation + mean), labels)
        optimizer.zero_grad()
        loss.backward(inputs=[weight, back, bias, shift])
        optimizer.step()
    folded = weight.detach() / deviation
    return {"weight": folded, "bias": bias.detach() - folded @ mean}


@final
class Distillation(Method):
    """LwF: the old heads' outputs on the new task's images are kept as they were before (Li and Hoiem 2016).

    The outputs from before are computed on the images of the step, by a copy of the network from the start of the task.
    With encoders this is EBLL: an encoder for each old task keeps the features' codes near too (Rannen et al. 2017).
    The loss added is strength * sum over old tasks of distillation + CODE_WEIGHT * code loss.
    """

    def __init__(self, strength: float, *, encodes: bool = False) -> None:
        super().__init__(strength)
        self._encodes = encodes
        self._teacher: Network | None = None

    def begin(self, training: TaskTraining) -> None:
        """Copy the network."""
        if training.index > 0:
            self._teacher = copy.deepcopy(training.model).eval().requires_grad_(False)
            self.working = {"teacher": dict(self._teacher.state_dict())}

    def before_step(self, training: TaskTraining, images: Tensor) -> None:
        """Add the gradients of the loss that keeps the outputs."""
        if self._teacher is not None:
            (self.strength * self.loss(training, self._teacher, images)).backward()

    def loss(self, training: TaskTraining, teacher: Network, images: Tensor) -> Tensor:
        """The sum over the old tasks."""
        features, recorded = training.model.body(images), teacher.body(images)
        terms = [
            distillation(head(features), old(recorded))
            for head, old in zip(training.model.heads[: training.index], teacher.heads[: training.index], strict=True)
        ]
        terms += [CODE_WEIGHT * code_loss(encoder, features, recorded) for encoder in self.kept.values()]
        return torch.stack(terms).sum()

    def end(self, training: TaskTraining) -> None:
        """Drop the copy, and for EBLL train the task's encoder."""
        super().end(training)
        self._teacher = None
        if self._encodes:
            model, task = training.model.eval(), training.task
            with torch.no_grad():
                features = torch.cat([model.body(images) for images in task.train_images.split(MEASURE_BATCH)])
            head = partial(model.classify, task=training.index)
            encoder = fit_encoder(features, task.train_labels, head, training.method_generator)
            self.kept = {**self.kept, f"encoder{training.index}": encoder}
