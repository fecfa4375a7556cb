"""The sequences of tasks that methods are compared on, by name.

Owns how a sequence's tasks are loaded, its network is built and its images are augmented. Knows no training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memsyn import OptionError
from memsyn_bench.data.drawings import augment, load_emoji8, load_emoji32, load_pretrained, move
from memsyn_bench.data.facts import load_facts, load_kinds, load_sports_in_use
from memsyn_bench.data.fashion import load_permuted_fashion, load_permuted_fashion_30, load_split_fashion
from memsyn_bench.data.mixed import load_mixed8
from memsyn_bench.data.mnist import load_split_mnist
from memsyn_bench.data.paper8 import load_paper8, shift
from memsyn_bench.data.scenes import load_scenes
from memsyn_bench.data.scripts import load_scripts8
from memsyn_bench.data.sixds import load_6ds
from memsyn_bench.data.words import load_words5
from memsyn_bench.extensions import NamedEntries
from memsyn_bench.losses import Loss, cross_entropy, similarity_loss
from memsyn_bench.optimizers import OPTIMIZERS
from memsyn_bench.sequences.networks import (
    MultiHead,
    Network,
    OneHead,
    SharedHead,
    SmallConvNet,
    WordTransformer,
    draw_weights,
    perceptron,
)
from memsyn_bench.sequences.pretrained import PretrainedBackbone, efficientnet_lite0, torchvision_backbone
from memsyn_bench.settings import Settings
from memsyn_bench.task import Task, check_labels


@dataclass(frozen=True)
class TaskSequence:
    """Tasks that one network learns one after the other.

    Attributes:
        summary: one line for `memsyn-bench list`.
        sizes: the sides of the images, in pixels, that it can be loaded at; the first is the default.
        load: size -> the tasks, in their fixed order.
        build: (tasks, generator) -> the network before the first task; `network(images, task)` gives logits.
        augment: (images, generator) -> the images as the network is trained on them.
        loss: the loss of each image; methods that take outputs for logits of classes need `cross_entropy`.
        scorings: keys of `memsyn_bench.running.scoring.SCORINGS`; methods are compared by the first one.
        shares_head: whether one head serves all tasks, so that a frozen backbone forgets too.
        training: the fields of `Settings` for which it has other defaults.
        shows: what results on it show, for the page of results: one sentence without numbers; empty if nobody has said.
        leaves_open: what they do not show, likewise.
        records_plasticity: whether dead units and free directions are recorded after each task.

    Raises:
        OptionError: a value is of a wrong type, or there is no size, or `training` names no field of `Settings`.
    """

    summary: str
    sizes: tuple[int, ...]
    load: Callable[[int], list[Task]]
    build: Callable[[Sequence[Task], torch.Generator], Network]
    augment: Callable[[Tensor, torch.Generator], Tensor]
    loss: Loss = cross_entropy
    scorings: tuple[str, ...] = ("multi-head", "class-incremental")
    shares_head: bool = False
    training: Mapping[str, float | str] = field(default_factory=dict)
    shows: str = ""
    leaves_open: str = ""
    records_plasticity: bool = False

    def __post_init__(self) -> None:
        for name in ("summary", "shows", "leaves_open"):
            if not isinstance(getattr(self, name), str):
                raise OptionError(f"{name} must be one line of text, got {type(getattr(self, name)).__name__}.")
        for name in ("load", "build", "augment", "loss"):
            if not callable(getattr(self, name)):
                raise OptionError(f"{name} must be a function, got {type(getattr(self, name)).__name__}.")
        for name in ("sizes", "scorings"):
            if not (isinstance(getattr(self, name), tuple) and getattr(self, name)):
                raise OptionError(f"{name} must be a tuple with at least one entry, got {getattr(self, name)!r}.")
        known = {setting.name for setting in fields(Settings)} - {"sequence", "size"}
        unknown = sorted(self.training.keys() - known)
        if unknown:
            raise OptionError(f"training must name fields of Settings: {', '.join(sorted(known))}; got {unknown[0]!r}.")

    def tasks(self, size: int) -> list[Task]:
        """The tasks, in their fixed order.

        Raises:
            OptionError: there is none, or a task's labels do not fit its images and classes.
        """
        tasks = self.load(size)
        if not tasks:
            raise OptionError("load must return at least one task, got none.")
        for task in tasks:
            check_labels(task)
        return tasks

    def network(self, tasks: Sequence[Task], generator: torch.Generator) -> Network:
        """The network before the first task.

        Raises:
            OptionError: `build` returns something else.
        """
        network = self.build(tasks, generator)
        if not isinstance(network, (MultiHead, SharedHead, OneHead)):
            raise OptionError(
                f"build must return a MultiHead, a SharedHead or a OneHead, got {type(network).__name__}."
            )
        return network


FINE_TUNING = {"lr": 3e-4, "warmup": 2}
"""Settings for backbones pretrained on ImageNet: a small learning rate, heads first; tried on EfficientNet-Lite0."""


def pretrained_network(tasks: Sequence[Task], generator: torch.Generator) -> MultiHead:
    """The backbone pretrained on other drawings, and a head for each task drawn from `generator`."""
    backbone = SmallConvNet()
    backbone.load_state_dict(load_pretrained())
    return _with_heads(backbone, backbone.num_features, tasks, generator)


def fresh_network(tasks: Sequence[Task], generator: torch.Generator) -> MultiHead:
    """The same network with all its weights drawn from `generator`."""
    backbone = SmallConvNet(num_channels=tasks[0].train_images.shape[1])
    draw_weights(backbone, generator)
    return _with_heads(backbone, backbone.num_features, tasks, generator)


def imagenet_network(
    backbone_of: Callable[[], PretrainedBackbone], tasks: Sequence[Task], generator: torch.Generator
) -> MultiHead:
    """A backbone pretrained on ImageNet, and a head for each task drawn from `generator`."""
    backbone = backbone_of()
    return _with_heads(backbone, backbone.num_features, tasks, generator)


def perceptron_network(width: int, tasks: Sequence[Task], generator: torch.Generator) -> MultiHead:
    """784-width-width, and a head for each task, drawn from `generator`."""
    backbone = perceptron(width)
    draw_weights(backbone, generator)
    return _with_heads(backbone, width, tasks, generator)


def shared_perceptron(tasks: Sequence[Task], generator: torch.Generator) -> SharedHead:
    """784-256-256 and one head for all tasks, drawn from `generator`."""
    model = SharedHead(perceptron(), 256, num_classes=len(tasks[0].class_names))
    draw_weights(model, generator)
    return model


MultiHeadBuild = Callable[[Sequence[Task], torch.Generator], MultiHead]


def with_one_head(build: MultiHeadBuild, tasks: Sequence[Task], generator: torch.Generator) -> OneHead:
    """The backbone of another network, and one head over the classes of all tasks, drawn from `generator`."""
    network = build(tasks, generator)
    num_features = network.heads[0].in_features
    assert isinstance(num_features, int)
    model = OneHead(network.body, num_features, class_counts=[len(task.class_names) for task in tasks])
    draw_weights(model.heads, generator)
    return model


def word_network(tasks: Sequence[Task], generator: torch.Generator) -> MultiHead:
    """A small Transformer over letters, and a head for each task, drawn from `generator`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        backbone = WordTransformer()
    return _with_heads(backbone, backbone.num_features, tasks, generator)


def embedding_network(tasks: Sequence[Task], generator: torch.Generator) -> SharedHead:
    """The backbone pretrained on other drawings, and one linear map into the space of the class vectors for all tasks.

    The embedding is not normalised: the objective of MAS is its squared norm, whose gradient would be zero.
    """
    backbone = SmallConvNet()
    backbone.load_state_dict(load_pretrained())
    return _with_embedding(backbone, backbone.num_features, tasks, generator)


def imagenet_embedding(name: str, side: int, tasks: Sequence[Task], generator: torch.Generator) -> SharedHead:
    """The same with a network of torchvision, pretrained on ImageNet, as the backbone."""
    backbone = torchvision_backbone(name, side)
    return _with_embedding(backbone, backbone.num_features, tasks, generator)


def _with_embedding(
    backbone: nn.Module, num_features: int, tasks: Sequence[Task], generator: torch.Generator
) -> SharedHead:
    vectors = tasks[0].class_vectors
    assert vectors is not None
    model = SharedHead(backbone, num_features, num_classes=vectors.shape[1])
    draw_weights(model.heads, generator)
    return model


def _with_heads(backbone: nn.Module, num_features: int, tasks: Sequence[Task], generator: torch.Generator) -> MultiHead:
    model = MultiHead(backbone, num_features, head_sizes=[len(task.class_names) for task in tasks])
    draw_weights(model.heads, generator)
    return model


def _unchanged(images: Tensor, generator: torch.Generator) -> Tensor:
    return images


def retrieval_sequence(
    summary: str, load: Callable[[int], list[Task]], *, shows: str = "", leaves_open: str = ""
) -> TaskSequence:
    """Images and texts meet in one embedding space, which one network learns task by task."""
    return TaskSequence(
        summary=summary,
        sizes=(32, 48, 64),
        load=load,
        build=embedding_network,
        augment=augment,
        loss=similarity_loss,
        scorings=("retrieval", "retrieval-over-all"),
        shares_head=True,
        training={"epochs": 15},
        shows=shows,
        leaves_open=leaves_open,
    )


def paper8(network: str) -> TaskSequence:
    """The eight data sets of the paper, learned by a network of torchvision, such as `alexnet`."""
    side = 224
    return TaskSequence(
        summary=f"the paper's eight data sets, from folders (see memsyn_bench.data.paper8), {network} of torchvision",
        sizes=(side,),
        load=load_paper8,
        build=partial(imagenet_network, partial(torchvision_backbone, network, side)),
        augment=shift,
        training=FINE_TUNING,
    )


def sixds(network: str) -> TaskSequence:
    """The facts of the paper, learned by a network of torchvision."""
    side = 224
    return replace(
        retrieval_sequence(
            f"the paper's facts, from a folder (see memsyn_bench.data.sixds), {network} of torchvision", load_6ds
        ),
        sizes=(side,),
        build=partial(imagenet_embedding, network, side),
        augment=shift,
        training=FINE_TUNING,
    )


def load_in_use(size: int) -> list[Task]:
    """The tasks of `scripts8`, with one class of each in use, drawn by a fixed seed."""
    tasks = []
    for index, task in enumerate(load_scripts8(size)):
        chosen = int(torch.randint(len(task.class_names), (), generator=torch.Generator().manual_seed(index)))
        tasks.append(replace(task, classes_in_use=(chosen,)))
    return tasks


BUILT_IN_SEQUENCES: dict[str, TaskSequence] = {
    "emoji8": TaskSequence(
        summary="8 tasks of 40 emoji each, learned from four families of studios, tested on a fifth",
        sizes=(32, 64),
        load=load_emoji8,
        build=pretrained_network,
        augment=augment,
        shows="what forgetting costs where a backbone pretrained on other drawings fits the tasks well.",
        leaves_open="how methods rank where the backbone has to learn much, or on photographs.",
    ),
    "emoji8-scratch": TaskSequence(
        summary="the same tasks, from random weights",
        sizes=(32, 64),
        load=load_emoji8,
        build=fresh_network,
        augment=augment,
        training={"lr": 1e-3},
        shows="whether a method leaves room to learn where the backbone starts from random weights.",
        leaves_open="how methods do on a network that knows its subject, for which there are too few drawings here.",
    ),
    "emoji8-pretrained": TaskSequence(
        summary="the same tasks, from EfficientNet-Lite0 pretrained on ImageNet",
        sizes=(64, 96, 128),
        load=load_emoji8,
        build=partial(imagenet_network, efficientnet_lite0),
        augment=augment,
        training=FINE_TUNING,
        shows="what protection adds to features of ImageNet, on tasks that are all of one kind.",
        leaves_open="which method remembers best, because heads on features that never change may suffice.",
    ),
    "mixed8-pretrained": TaskSequence(
        summary="4 tasks of emoji and 4 alphabets in turn, from EfficientNet-Lite0 pretrained on ImageNet",
        sizes=(64, 96, 128),
        load=load_mixed8,
        build=partial(imagenet_network, efficientnet_lite0),
        augment=augment,
        training=FINE_TUNING,
        shows="whether features of ImageNet outlast tasks of two kinds in turn, drawings and letters.",
        leaves_open="whether the order of the tasks matters, because only one order was run.",
    ),
    "scripts8": TaskSequence(
        summary="the letters of 8 alphabets, tested on families of fonts never seen",
        sizes=(28,),
        load=load_scripts8,
        build=fresh_network,
        augment=move,
        training={"lr": 1e-3, "epochs": 10},
        shows="whether a network that starts from random weights keeps old alphabets while it learns to read new ones.",
        leaves_open="how methods do on a network that can read already, or on whole words.",
    ),
    "split-fashion": TaskSequence(
        summary="Fashion-MNIST in 5 tasks of 2 classes, an MLP 784-256-256",
        sizes=(28,),
        load=load_split_fashion,
        build=partial(perceptron_network, 256),
        augment=_unchanged,
        training={"lr": 1e-3, "epochs": 2, "batch_size": 64},
        shows="how many methods compare on an easy benchmark that is widely used.",
        leaves_open="which method harder tasks need, because almost any features tell a pair of classes apart.",
    ),
    "split-mnist": TaskSequence(
        summary="MNIST in 5 tasks of 2 digits, an MLP 784-400-400, as van de Ven and Tolias (2019)",
        sizes=(28,),
        load=load_split_mnist,
        build=partial(perceptron_network, 400),
        augment=_unchanged,
        training={"lr": 1e-3, "epochs": 21, "batch_size": 128},  # about their 2,000 steps a task
        shows="how methods do in a protocol with published numbers.",
        leaves_open="how they do where tasks are hard: two digits are told apart by nearly any features.",
    ),
    "permuted-fashion": TaskSequence(
        summary="Fashion-MNIST 10 times, its pixels in another order each, an MLP with one head for all",
        sizes=(28,),
        load=load_permuted_fashion,
        build=shared_perceptron,
        augment=_unchanged,
        scorings=("domain-incremental",),
        shares_head=True,
        training={"lr": 1e-3, "epochs": 2, "batch_size": 64},
        shows="whether a network with one head holds many tasks whose inputs have nothing in common.",
        leaves_open="what tasks gain from each other, because a permutation takes away all that images share.",
    ),
    "words5": TaskSequence(
        summary="which of three languages a word is from, 5 times, a Transformer over letters",
        sizes=(16,),
        load=load_words5,
        build=word_network,
        augment=_unchanged,
        training={"lr": 1e-3, "epochs": 10, "batch_size": 64},
        shows="how methods do on text, with a Transformer that starts from random weights.",
        leaves_open="how methods do on a language model: the Transformer is small, and its inputs are single words.",
    ),
    "facts": retrieval_sequence(
        "196 facts (a woman juggling) in 4 tasks, drawings of people and texts in one space",
        load_facts,
        shows="whether a network that maps pictures and texts into one space keeps old facts, as in the paper.",
        leaves_open="what photographs of facts would show, which the paper uses.",
    ),
    "facts-kinds": retrieval_sequence(
        "the same facts by kind of action: sports, work, daily life, fantasy",
        load_kinds,
        shows="the same for facts that are split by kind of action, such as sports and work.",
        leaves_open="what happens over many tasks, because there are few kinds of action.",
    ),
    "facts-scenes": retrieval_sequence(
        "4 tasks of 40 triples (cat left of boar): synthetic scenes of two emoji, and texts",
        load_scenes,
        shows="the same for facts about where two things are, in synthetic scenes.",
        leaves_open="what a real scene would show, with a background and things of all sizes.",
    ),
    "paper8": paper8("alexnet"),
    "6ds": sixds("alexnet"),
}
BUILT_IN_SEQUENCES["scripts5"] = replace(
    BUILT_IN_SEQUENCES["scripts8"],
    summary="the first five alphabets of scripts8",
    shows="",
    leaves_open="",
    load=lambda size: load_scripts8(size)[:5],
)
BUILT_IN_SEQUENCES["adaptation"] = replace(
    BUILT_IN_SEQUENCES["scripts8"],
    summary="scripts8, with one letter of each alphabet in use",
    shows="",
    leaves_open="",
    load=load_in_use,
    scorings=("multi-head", "in-use", "other-classes"),
)
_ONE_HEAD: tuple[tuple[str, MultiHeadBuild, str], ...] = (
    ("split-fashion", partial(perceptron_network, 256), "10 classes"),
    ("emoji8", pretrained_network, "320 emoji"),
    ("scripts8", fresh_network, "251 letters"),
)
for base, build, words in _ONE_HEAD:
    BUILT_IN_SEQUENCES[f"{base}-one-head"] = replace(
        BUILT_IN_SEQUENCES[base],
        summary=f"{base} with one head over all {words}: tests do not say which task",
        shows="",
        leaves_open="",
        build=partial(with_one_head, build),
        scorings=("class-incremental", "task-given"),
        shares_head=True,
    )
BUILT_IN_SEQUENCES["permuted-fashion-30"] = replace(
    BUILT_IN_SEQUENCES["permuted-fashion"],
    summary="Fashion-MNIST 30 times, fewer images each: whether a network can still learn",
    shows="",
    leaves_open="",
    load=load_permuted_fashion_30,
    records_plasticity=True,
)
BUILT_IN_SEQUENCES["emoji32"] = replace(
    BUILT_IN_SEQUENCES["emoji8"],
    summary="the emoji of emoji8 in 32 tasks of 10: whether a network can still learn",
    shows="",
    leaves_open="",
    load=load_emoji32,
    scorings=("multi-head",),
    records_plasticity=True,
)
BUILT_IN_SEQUENCES["adaptation-facts"] = replace(
    BUILT_IN_SEQUENCES["facts"],
    summary="the facts, with those of sports in use",
    shows="",
    leaves_open="",
    load=load_sports_in_use,
    scorings=("retrieval", "retrieval-in-use", "retrieval-other-classes"),
)

SEQUENCES = NamedEntries(
    "sequence", TaskSequence, "memsyn_bench.sequences", BUILT_IN_SEQUENCES, reserved=("pair-", "paper8-", "6ds-")
)
"""All sequences that `memsyn-bench list` names; `find_sequence` knows more names."""


def register_sequence(name: str, sequence: TaskSequence) -> None:
    """Add a sequence for this process: `memsyn-bench run` and `run` then take its name.

    A package that others install declares an entry point in the group `memsyn_bench.sequences` instead.

    Raises:
        OptionError: the name is taken or cannot be used, or `sequence` is no `TaskSequence`.
    """
    SEQUENCES.register(name, sequence)


OF_FOLDERS = {"paper8": paper8, "6ds": sixds}
"""Sequences of data that do not come with memsyn-bench, by the first part of their name: network -> sequence."""

SHORT_NAMES = {
    "activities": "Activities",
    "animals": "Animals & Nature",
    "food": "Food & Drink",
    "objects": "Objects",
    "people": "People & Body",
    "smileys": "Smileys & Emotion",
    "symbols": "Symbols",
    "travel": "Travel & Places",
}
"""What the tasks of `emoji8` are called in the names of pairs."""
PAIR_BASES = ("emoji8", "emoji8-scratch", "emoji8-pretrained")
"""The sequences whose network a pair can start from."""


def pair(first: str, second: str, *, base: str = "emoji8") -> TaskSequence:
    """Two tasks of `emoji8`, by their short names, in this order, from the network that `base` starts with.

    Raises:
        OptionError: an unknown task, or the same one twice, or another base than those of `emoji8`.
    """
    if base not in PAIR_BASES:
        raise OptionError(f"the base of a pair must be one of {', '.join(PAIR_BASES)}; got {base!r}.")
    if first not in SHORT_NAMES or second not in SHORT_NAMES or first == second:
        raise OptionError(f"a pair must be two of {', '.join(SHORT_NAMES)}; got {first!r} and {second!r}.")
    names = [SHORT_NAMES[first], SHORT_NAMES[second]]

    def load(size: int) -> list[Task]:
        tasks = {task.name: task for task in SEQUENCES[base].load(size)}
        return [tasks[name] for name in names]

    summary = f"{names[0]}, then {names[1]}, as in {base}"
    return replace(SEQUENCES[base], summary=summary, load=load, shows="", leaves_open="")


def find_sequence(name: str) -> TaskSequence:
    """The sequence of a name: one of `SEQUENCES`, a pair, or the paper's data sets with a network of torchvision.

    A pair is `pair-food-animals`, with `-scratch` or `-pretrained` behind it if it starts from the network of that
    sequence; `paper8-resnet18` is `paper8` with that network, and `6ds-resnet18` likewise.

    Raises:
        OptionError: there is none of that name.
    """
    if name in SEQUENCES:
        return SEQUENCES[name]
    kind, *words = name.split("-")
    if kind in OF_FOLDERS and len(words) == 1 and words[0].isidentifier():
        return OF_FOLDERS[kind](words[0])
    if kind == "pair" and len(words) in (2, 3):
        return pair(words[0], words[1], base="-".join(["emoji8", *words[2:]]))
    raise OptionError(
        f"the sequence must be one of {', '.join(SEQUENCES)}, or such as pair-food-animals or paper8-resnet18; "
        f"got {name!r}."
    )


def default_settings(name: str, *, optimizer: str | None = None) -> Settings:
    """The settings of a run of that sequence if none but the optimizer are given; its learning rate is scaled.

    Raises:
        OptionError: an unknown sequence or optimizer.
    """
    sequence = find_sequence(name)
    values: dict[str, Any] = {"sequence": name, "size": sequence.sizes[0], **sequence.training}
    own = Settings(**values)
    if optimizer is None or optimizer == own.optimizer:
        return own
    other = replace(own, optimizer=optimizer)
    return replace(other, lr=own.lr * OPTIMIZERS[optimizer].lr_factor / OPTIMIZERS[own.optimizer].lr_factor)
