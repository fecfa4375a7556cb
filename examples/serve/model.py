"""What is served: a body, a head for each section of the drawings, and the names in it; all in one file.

Owns the file and what grows in it. Knows nothing of training, requests or nights.
"""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import nn

import memsyn
from memsyn_bench.data.drawings import load_emoji8, load_pretrained
from memsyn_bench.sequences.networks import MultiHead, SmallConvNet, draw_weights
from memsyn_bench.sequences.pretrained import PretrainedBackbone, efficientnet_lite0
from memsyn_bench.sequences.sequences import SHORT_NAMES
from memsyn_bench.task import Task

FILE = "model.safetensors"
"""In the service's folder: the version that is served."""


def small() -> SmallConvNet:
    """A network of 0.65M weights, for machines and tests without time."""
    body = SmallConvNet()
    body.load_state_dict(load_pretrained())
    return body


Body = PretrainedBackbone | SmallConvNet

BODIES: dict[str, Callable[[], Body]] = {"efficientnet-lite0": efficientnet_lite0, "small": small}


@dataclass(frozen=True)
class Served:
    """A version: `network(images, head)` are logits, in the order of the section's names."""

    network: MultiHead
    body: str
    side: int
    sections: dict[str, tuple[str, ...]]
    """Section -> the names of its drawings, in the order of the heads."""
    version: int
    parent: str | None = None
    """The fingerprint of the version from which it learned on; None of the first."""

    def head(self, section: str) -> int:
        """Which head answers for a section."""
        return list(self.sections).index(section)


@cache
def drawings(side: int) -> dict[str, Task]:
    """The labelled drawings of each section: 40 objects, to learn from and, by another studio, to test on."""
    tasks = {task.name: task for task in load_emoji8(side)}
    return {short: tasks[name] for short, name in SHORT_NAMES.items()}


def begin(body: str, side: int, sections: dict[str, tuple[str, ...]], seed: int = 0) -> Served:
    """The first version, before it has learned anything."""
    network = _network(body, sections)
    draw_weights(network.heads, torch.Generator().manual_seed(seed))
    return Served(network, body, side, sections, version=1)


def grown(served: Served, section: str, names: tuple[str, ...], seed: int) -> Served:
    """The next version, with weights of its own and a head for one section more, before it has learned that."""
    network = copy.deepcopy(served.network)
    num_features = network.get_parameter("heads.0.weight").shape[1]
    network.heads.append(nn.Linear(num_features, len(names)))
    draw_weights(network.heads[-1], torch.Generator().manual_seed(seed))
    sections = {**served.sections, section: names}
    parent = memsyn.fingerprint(served.network)
    return replace(served, network=network, sections=sections, version=served.version + 1, parent=parent)


def save(served: Served, path: Path) -> None:
    """Write a version, whole or not at all."""
    facts = {name: getattr(served, name) for name in ("body", "side", "sections", "version", "parent")}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(served.network.state_dict(), partial, {"served": json.dumps(facts)})
    with open(partial, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path) -> Served:
    """Read a version.

    Raises:
        ValueError: the file is not one that `save` wrote.
        OSError: it cannot be read.
    """
    try:
        content = path.read_bytes()  # not mapped: a file that is overwritten in place would end the process
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts, state = json.loads(header["__metadata__"]["served"]), load_tensors(content)
        sections = {section: tuple(names) for section, names in facts["sections"].items()}
        version, side = int(facts["version"]), int(facts["side"])
        if not 0 < side <= 512:
            raise ValueError(f"{path} is not a model of this service: its images have a side of {side} pixels.")
        network = _network(facts["body"], sections)
        network.load_state_dict(state)
    except (SafetensorError, TypeError, KeyError, AttributeError, json.JSONDecodeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a model of this service ({error}): make one by train.py.") from error
    return Served(network, facts["body"], side, sections, version, facts.get("parent"))


def adopt(network: MultiHead, fresh: MultiHead) -> None:
    """Give a network the weights and heads of another with the same body: in place, so that hooks stay."""
    network.body.load_state_dict(fresh.body.state_dict())
    network.heads = fresh.heads


def _network(name: str, sections: dict[str, tuple[str, ...]]) -> MultiHead:
    body = BODIES[name]()
    return MultiHead(body, body.num_features, head_sizes=[len(names) for names in sections.values()]).eval()
