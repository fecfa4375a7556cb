"""Simulated users: they draw, ask the service what it is, and know themselves what they drew.

They keep what they asked, with its label, as `yesterday.safetensors`: the service itself keeps nothing. A real one has
labelled drawings from elsewhere: of users who agreed to that and corrected the answers, or of people paid for it.
"""

import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from memsyn_bench.data.drawings import augment
from model import drawings

YESTERDAY = "yesterday.safetensors"


def png(pixels: Tensor) -> bytes:
    """A drawing (3, S, S) of uint8 as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def drawn(sections: Sequence[str], count: int, side: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """What users draw: unseen drawings, each moved and recoloured: pixels, places of their sections, and labels."""
    generator = torch.Generator().manual_seed(seed)
    tasks = [drawings(side)[section] for section in sections]
    places = torch.randint(len(sections), (count,), generator=generator)
    images, labels = [], []
    for place in places.tolist():
        k = int(torch.randint(len(tasks[place].test_labels), (), generator=generator))
        images.append(tasks[place].test_images[k])
        labels.append(tasks[place].test_labels[k])
    ink = augment(torch.stack(images), generator)
    return (255 - ink * 127.5).round().to(torch.uint8), places, torch.stack(labels)


def ask(ports: Sequence[int], sections: Sequence[str], pixels: Tensor, places: Tensor) -> list[dict[str, Any]]:
    """Send every drawing to one of the replicas, two users at a time for each; their answers, in order."""
    num_users = 2 * len(ports)
    progress = tqdm(total=len(pixels), desc="requests", leave=False)

    def user(number: int) -> dict[int, dict[str, Any]]:
        connection, answers = HTTPConnection("127.0.0.1", ports[number % len(ports)], timeout=60), {}
        for k in range(number, len(pixels), num_users):
            connection.request("POST", f"/predict/{sections[int(places[k])]}", png(pixels[k]))
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {body.decode()}")
            answers[k] = json.loads(body)
            progress.update()
        connection.close()
        return answers

    found: dict[int, dict[str, Any]] = {}
    with ThreadPoolExecutor(num_users) as pool, progress:
        for answers in pool.map(user, range(num_users)):
            found |= answers
    return [found[k] for k in range(len(pixels))]


def day(folder: Path, ports: Sequence[int], sections: Sequence[str], count: int, side: int, seed: int) -> float:
    """A day of requests; keeps them for the night, and returns the share that was answered rightly."""
    pixels, places, labels = drawn(sections, count, side, seed)
    answers = ask(ports, sections, pixels, places)
    names = [drawings(side)[section].class_names for section in sections]
    truth = [names[place][label] for place, label in zip(places.tolist(), labels.tolist(), strict=True)]
    tensors = {"pixels": pixels, "places": places, "labels": labels}
    save_file(tensors, folder / YESTERDAY, {"sections": json.dumps(list(sections))})
    right = [found["names"][0] == name for found, name in zip(answers, truth, strict=True)]
    return right.count(True) / count
