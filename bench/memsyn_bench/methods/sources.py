"""Which unlabelled images a task's memory is measured on: the task's own, others, those of the next task, or noise.

Owns the images, and when a memory is measured on them. What is measured is in `penalties` and `projections`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import final

import torch
from torch import Tensor

from memsyn import Memory, OptionError
from memsyn_bench.data.drawings import load_emoji8
from memsyn_bench.data.mixed import LETTER_SIDE, as_drawings, as_letters
from memsyn_bench.data.scripts import load_scripts8
from memsyn_bench.methods.method import Method, TaskTraining
from memsyn_bench.task import Task

MIXED = ("mixed8-pretrained",)
"""Sequences of drawings and letters both, for which there are no public images."""


@final
@dataclass(frozen=True)
class ImageSource:
    """Images that a task's memory is measured on.

    Attributes:
        words: what they are.
        images: (task, generator) -> the images, without labels.
        of_next_task: whether they are of the next task. The memory is then measured when that task begins, before its
            first step and through the head of the task before. The last task has no memory.
        sees_test: whether they are test images.
    """

    words: str
    images: Callable[[Task, torch.Generator], Tensor]
    of_next_task: bool = False
    sees_test: bool = False


class MeasuringMethod(Method):
    """Measures a memory of each task on the images of a source, and protects it from the next task on."""

    def __init__(self, strength: float, source: ImageSource) -> None:
        super().__init__(strength)
        self._source = source

    def begin(self, training: TaskTraining) -> None:
        """Measure the task before, if its images are of this one; protect what the memory holds.

        Raises:
            OptionError: the source has no images for such tasks. This is said before the first task is learned.
        """
        if training.index == 0:
            if self._source is PUBLIC and training.settings.sequence in MIXED:
                raise OptionError(
                    f"{training.settings.sequence} has drawings and letters, so no public images are of something "
                    "else. Use a method that measures on other data, such as mas or mas-new."
                )
            self._source.images(training.task, torch.Generator())
        elif self._source.of_next_task:
            self._measure(replace(training, index=training.index - 1))
        super().begin(training)

    def end(self, training: TaskTraining) -> None:
        """End the protection, and measure the task."""
        super().end(training)
        if not self._source.of_next_task:
            self._measure(training)

    def _measure(self, training: TaskTraining) -> None:
        images = self._source.images(training.task, training.method_generator)
        self.memory = self.remembered(training, images)

    def remembered(self, training: TaskTraining, images: Tensor) -> Memory:
        """The memory with what is measured on the images, through the head of `training.index`."""
        raise NotImplementedError


def images_in_use(task: Task, generator: torch.Generator) -> Tensor:
    """The training images of the classes in use."""
    return task.train_images[task.uses(task.train_labels)]


def public_images(task: Task, generator: torch.Generator) -> Tensor:
    """Images of something else that everybody has, at most as many as the task is learned from, drawn at random.

    In colour they are the letters of `scripts8`, in grey the drawings of `emoji8`. A sequence that mixes both has no
    such images (`MIXED`).

    Raises:
        OptionError: the task's inputs are no square images of one or three channels.
    """
    own = task.train_images
    if not (own.is_floating_point() and own.ndim == 4 and own.shape[1] in (1, 3) and own.shape[2] == own.shape[3]):
        raise OptionError(
            f"there are public images of shape (N, 1, S, S) and (N, 3, S, S), and the inputs of task {task.name} are "
            f"{tuple(own.shape)}, {own.dtype}. Use a method that measures on other data, such as mas or mas-new."
        )
    channels, side = own.shape[1:3]
    pool = _letters() if channels == 3 else _drawings()
    chosen = pool[torch.randperm(len(pool), generator=generator)[: len(own)]]
    return (as_drawings(chosen, side) if channels == 3 else as_letters(chosen, side)).to(own)


@cache
def _letters() -> Tensor:
    return torch.cat([task.train_images for task in load_scripts8(LETTER_SIDE)])


@cache
def _drawings() -> Tensor:
    return torch.cat([task.train_images for task in load_emoji8(LETTER_SIDE)])


def noise(task: Task, generator: torch.Generator) -> Tensor:
    """As many images as the task is learned from: normal, each pixel with the mean and deviation of the task's images.

    Raises:
        OptionError: the task's inputs are whole numbers.
    """
    own = task.train_images
    if not own.is_floating_point():
        raise OptionError(
            f"noise is of images in floating point, and the inputs of task {task.name} are {own.dtype}. Use a method "
            "that measures on other data, such as mas or mas-new."
        )
    drawn = torch.randn(own.shape, generator=generator, dtype=own.dtype)
    return own.mean(0) + own.std(0, correction=0) * drawn


TRAINING = ImageSource("the training images", lambda task, generator: task.train_images)
TEST = ImageSource("the test images without their labels", lambda task, generator: task.test_images, sees_test=True)
ALL = ImageSource(
    "training and test images", lambda task, generator: torch.cat([task.train_images, task.test_images]), sees_test=True
)
IN_USE = ImageSource("the training images of the classes in use alone", images_in_use)
PUBLIC = ImageSource("public images of something else: letters, or drawings in grey", public_images)
NEXT = ImageSource(
    "the next task's images, before it is learned", lambda task, generator: task.train_images, of_next_task=True
)
NOISE = ImageSource("noise with the mean and deviation of each pixel", noise)
