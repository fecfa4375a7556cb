"""The methods by name: what `--methods` takes.

Owns names, one line about each, and the strengths that they have unless told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from memsyn import Memory
from memsyn_bench.methods.distillation import Distilling
from memsyn_bench.methods.merging import Merging, by_fisher, by_mean
from memsyn_bench.methods.method import FineTuning, Method, Together
from memsyn_bench.methods.penalties import (
    Remembering,
    Watching,
    all_images,
    ewc,
    images_in_use,
    l2,
    mas,
    mas_batched,
    mas_local,
    rwalk,
    si,
    test_images,
)
from memsyn_bench.methods.references import Alone, FrozenBody
from memsyn_bench.methods.rehearsal import PER_TASK, Rehearsing
from memsyn_bench.task import Task


@dataclass(frozen=True)
class Rival:
    """A method that can be run.

    Attributes:
        summary: one line for `memsyn-bench list`.
        make: strength -> the method before its first task.
        strength: what its own loss is multiplied by unless told; None for methods that have none.
        stores_data: whether it keeps images of earlier tasks, and so is no rival to those that keep none.
        sees_test: whether it looks at the test images, though not at their labels; so is no rival either.
        classifies: whether it takes what the network puts out for logits of classes.
    """

    summary: str
    make: Callable[[float], Method]
    strength: float | None = None
    stores_data: bool = False
    sees_test: bool = False
    classifies: bool = False


def _on(remember: Callable[..., Memory], images: Callable[[Task], Tensor], summary: str) -> Rival:
    """One more way to be told by importance: of other images of the task."""
    sees_test = images in (test_images, all_images)
    return Rival(
        summary, lambda strength: Remembering(strength, partial(remember, images=images)), 1.0, sees_test=sees_test
    )


METHODS: dict[str, Rival] = {
    "finetune": Rival(
        "train on each task and protect nothing: how much is forgotten without help", lambda _: FineTuning()
    ),
    "joint": Rival(
        "train on all tasks so far, which stores all data: the ceiling",
        lambda _: Rehearsing(per_task=None),
        stores_data=True,
    ),
    "alone": Rival("each task from the first weights: a reference for what can be learned", lambda _: Alone()),
    "frozen": Rival(
        "only the heads learn after the first task: the floor, if each task has its own",
        lambda _: FrozenBody(),
    ),
    "l2": Rival("hold every weight to its last value alike", lambda strength: Remembering(strength, l2), 1.0),
    "lwf": Rival(
        "Learning without Forgetting (Li and Hoiem 2016): keep the old heads' outputs",
        Distilling,
        1.0,
        classifies=True,
    ),
    "ebll": Rival(
        "Encoder-based lifelong learning (Rannen et al. 2017): LwF, and the features' codes kept",
        lambda strength: Distilling(strength, encodes=True),
        1.0,
        classifies=True,
    ),
    "imm-mean": Rival(
        "IMM (Lee et al. 2017): the mean of the tasks' weights", lambda strength: Merging(strength, by_mean), 1.0
    ),
    "imm-mode": Rival(
        "IMM (Lee et al. 2017): their mean weighted by Fisher information",
        lambda strength: Merging(strength, by_fisher),
        1.0,
        classifies=True,
    ),
    "ewc": Rival(
        "Elastic weight consolidation (Kirkpatrick et al. 2017): the exact Fisher information, online",
        lambda strength: Remembering(strength, ewc),
        100.0,
        classifies=True,
    ),
    "si": Rival(
        "Synaptic Intelligence (Zenke et al. 2017): the loss's path integral",
        lambda strength: Watching(strength, si),
        1.0,
    ),
    "rwalk": Rival(
        "RWalk (Chaudhry et al. 2018): running Fisher information and path score",
        lambda strength: Watching(strength, rwalk),
        1.0,
    ),
    "mas": Rival(
        "Memory Aware Synapses (Aljundi et al. 2018): importances of all tasks so far are summed",
        lambda strength: Remembering(strength, mas),
        1.0,
    ),
    "mas-local": Rival(
        "local MAS: every layer's own output counts, forward passes only",
        lambda strength: Remembering(strength, mas_local),
        1.0,
    ),
    "mas-test": _on(mas, test_images, "MAS, importance from the test images without their labels"),
    "mas-both": _on(mas, all_images, "MAS, importance from training and test images"),
    "mas-local-test": _on(mas_local, test_images, "local MAS, importance from the test images without their labels"),
    "mas-local-both": _on(mas_local, all_images, "local MAS, importance from training and test images"),
    "mas-in-use": _on(mas, images_in_use, "MAS, importance from the training images of the classes in use alone"),
    "mas-batched": Rival(
        "MAS with the absolute value after the mean over a batch, as other libraries have it",
        lambda strength: Remembering(strength, mas_batched),
        1.0,
    ),
    "rehearsal": Rival(
        f"store {PER_TASK} images of each task and train on them beside", lambda _: Rehearsing(), stores_data=True
    ),
    "mas-rehearsal": Rival(
        f"MAS, and {PER_TASK} images of each task stored",
        lambda strength: Together(Remembering(strength, mas), Rehearsing()),
        1.0,
        stores_data=True,
    ),
}
"""A method that takes importance in another way (lesson, memory) -> memory is one more `Remembering`."""
