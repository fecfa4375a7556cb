"""`examples.json`: the texts that an embedding finds for some test images, after the first task and after the last.

Owns the file's form, its writing and its reading. Knows no training and no page.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from memsyn import MemsynError
from memsyn.storage.atomic_files import replace_file
from memsyn_bench.task import Task

EXAMPLES_FILE = "examples.json"
NUM_IMAGES = 6
NUM_TEXTS = 3


@dataclass(frozen=True)
class Example:
    """An image, and for each method the texts that are nearest to the image, the nearest first."""

    image: str
    """PNG, base64."""
    text: str
    """The right text."""
    first: Mapping[str, tuple[str, ...]]
    """By method, the texts found right after the first task."""
    last: Mapping[str, tuple[str, ...]]
    """By method, the texts found after the last task."""


def add_examples(path: Path, model: nn.Module, task: Task, method: str, *, last: bool) -> None:
    """Write the texts that `method` finds for images of the first task, after the first or the last task.

    The images are the first test images of classes evenly spread over the task. The file is replaced whole.
    """
    chosen = _images(task)
    examples = read_examples(path) or [
        Example(_png(task.test_images[index]), task.class_names[int(task.test_labels[index])], {}, {})
        for index in chosen
    ]
    for example, texts in zip(examples, nearest(model, task, chosen), strict=True):
        found: Mapping[str, tuple[str, ...]] = example.last if last else example.first
        assert isinstance(found, dict)
        found[method] = texts
    with replace_file(path) as file:
        file.write(json.dumps([asdict(example) for example in examples], indent=1).encode())


def _images(task: Task) -> list[int]:
    """The places of the test images that are shown."""
    labels = task.test_labels.unique()
    spread = torch.linspace(0, len(labels) - 1, min(NUM_IMAGES, len(labels))).long()
    return [int((task.test_labels == label).nonzero()[0]) for label in labels[spread]]


@torch.inference_mode()
def nearest(model: nn.Module, task: Task, chosen: list[int]) -> list[tuple[str, ...]]:
    """For some test images the nearest texts of the task, by cosine similarity to the image's embedding."""
    assert task.class_vectors is not None
    model.eval()
    similarities = F.normalize(model(task.test_images[chosen])) @ F.normalize(task.class_vectors).T
    best = similarities.topk(min(NUM_TEXTS, similarities.shape[1])).indices
    return [tuple(task.class_names[label] for label in row) for row in best.tolist()]


def _png(image: Tensor) -> str:
    """An image of a task as PNG in base64: bytes as they are, floats from 0, white paper, to 2, black."""
    pixels = image if image.dtype == torch.uint8 else (255 * (1 - image.clamp(0, 2) / 2)).round().byte()
    pixels = pixels.expand(3, -1, -1).permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def read_examples(path: Path) -> list[Example]:
    """The examples of a run; none if there is no file.

    Raises:
        MemsynError: it is not as `add_examples` writes it.
    """
    if not path.exists():
        return []
    try:
        return [_example(**entry) for entry in json.loads(path.read_bytes())]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise MemsynError(
            f"{path} holds no examples of memsyn-bench: {error!r:.80}. Remove it, or make the run again."
        ) from None


def _example(image: str, text: str, first: Mapping[str, list[str]], last: Mapping[str, list[str]]) -> Example:
    try:
        start = base64.b64decode(image, validate=True)[:8]
    except binascii.Error as error:
        raise ValueError(error) from None
    if start != b"\x89PNG\r\n\x1a\n":
        raise ValueError("an image is no PNG")
    lists = [[text], *first.values(), *last.values()]
    if not all(isinstance(texts, list) and all(isinstance(name, str) for name in texts) for texts in lists):
        raise ValueError("a text is no text")
    return Example(image, text, *({method: tuple(texts) for method, texts in found.items()} for found in (first, last)))
