"""The methods by name: what `--methods` takes.

Owns their names, one line about each, their default strengths, and how others add a method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from memsyn import OptionError
from memsyn_bench.extensions import NamedEntries
from memsyn_bench.methods.continual_backprop import ContinualBackprop
from memsyn_bench.methods.distillation import Distillation
from memsyn_bench.methods.merging import WeightMerging, by_fisher, by_mean
from memsyn_bench.methods.method import CombinedMethods, FineTuning, Method
from memsyn_bench.methods.one_head import DiscriminantHead, OwnClasses
from memsyn_bench.methods.penalties import (
    Consolidate,
    ImportancePenalty,
    PathPenalty,
    ewc,
    l2,
    mas,
    mas_batched,
    mas_local,
    rwalk,
    si,
)
from memsyn_bench.methods.projections import OrthogonalProjection, Projection, adam_nscl, gpm
from memsyn_bench.methods.references import Alone, FrozenBackbone
from memsyn_bench.methods.rehearsal import PER_TASK, Rehearsal
from memsyn_bench.methods.sources import ALL, IN_USE, NEXT, NOISE, PUBLIC, TEST, ImageSource


@dataclass(frozen=True)
class MethodEntry:
    """A method that can be run.

    Attributes:
        summary: one line for `memsyn-bench list`.
        make: strength -> a new method, before its first task; 0.0 if the method has no strength.
        strength: the default strength, by which the method's own loss is multiplied; None if it has none. For MAS it is
            `PAPER_STRENGTH`, which is not the default of `memsyn.protect`.
        stores_data: whether it keeps images of earlier tasks. It is then not ranked with methods that keep none.
        needs_labels: whether what it keeps from task to task is computed from labels, or holds them.
        sees_test: whether it looks at test images, though not at their labels. It is then not ranked either.
        classifies: whether it takes the network's outputs for logits of classes, so that it cannot learn an embedding.

    Raises:
        OptionError: a value is of a wrong type, or the strength is out of range.
    """

    summary: str
    make: Callable[[float], Method]
    strength: float | None = None
    stores_data: bool = False
    needs_labels: bool = False
    sees_test: bool = False
    classifies: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.summary, str):
            raise OptionError(f"summary must be one line of text, got {type(self.summary).__name__}.")
        if not callable(self.make):
            raise OptionError(f"make must be a function of the strength, got {type(self.make).__name__}.")
        if self.strength is not None and not (math.isfinite(self.strength) and self.strength >= 0):
            raise OptionError(f"strength must be None, or finite and not negative; got {self.strength}.")


PAPER_STRENGTH = 1.0
"""lambda of Aljundi et al. 2018, untuned. The default of `memsyn.protect` is `Relative(0.01)`, whose lambda depends on
the memory. It was chosen on three of these sequences, which would favour it here, and the recorded results were made
with 1. `--strength chosen` treats all methods alike."""


def _mas_on(source: ImageSource, remember: Consolidate = mas) -> MethodEntry:
    """MAS with importance from other images."""
    return MethodEntry(
        f"{'MAS' if remember is mas else 'local MAS'}, importance from {source.words}",
        lambda strength: ImportancePenalty(strength, remember, source),
        PAPER_STRENGTH,
        sees_test=source.sees_test,
    )


def _projected_on(source: ImageSource) -> MethodEntry:
    """The projection with directions from other images."""
    return MethodEntry(
        f"memsyn's projection, directions from {source.words}",
        lambda _: Projection(source=source),
        sees_test=source.sees_test,
    )


BUILT_IN_METHODS: dict[str, MethodEntry] = {
    "finetune": MethodEntry(
        "train on each task and protect nothing: how much is forgotten without help", lambda _: FineTuning()
    ),
    "joint": MethodEntry(
        "train on all tasks so far, which stores all data: the ceiling",
        lambda _: Rehearsal(per_task=None),
        stores_data=True,
        needs_labels=True,
    ),
    "alone": MethodEntry("each task from the first weights: a reference for what can be learned", lambda _: Alone()),
    "frozen": MethodEntry(
        "only the heads learn after the first task: the floor, if each task has its own",
        lambda _: FrozenBackbone(),
    ),
    "l2": MethodEntry(
        "penalise the change of every weight alike",
        lambda strength: ImportancePenalty(strength, lambda training, memory, _: l2(training, memory)),
        1.0,
    ),
    "lwf": MethodEntry(
        "Learning without Forgetting (Li and Hoiem 2016): keep the old heads' outputs",
        Distillation,
        1.0,
        classifies=True,
    ),
    "ebll": MethodEntry(
        "Encoder-based lifelong learning (Rannen et al. 2017): LwF, and the features' codes kept",
        lambda strength: Distillation(strength, encodes=True),
        1.0,
        needs_labels=True,
        classifies=True,
    ),
    "imm-mean": MethodEntry(
        "IMM (Lee et al. 2017): the mean of the tasks' weights", lambda strength: WeightMerging(strength, by_mean), 1.0
    ),
    "imm-mode": MethodEntry(
        "IMM (Lee et al. 2017): their mean weighted by Fisher information",
        lambda strength: WeightMerging(strength, by_fisher),
        1.0,
        classifies=True,
    ),
    "ewc": MethodEntry(
        "Elastic weight consolidation (Kirkpatrick et al. 2017): the exact Fisher information, online",
        lambda strength: ImportancePenalty(strength, ewc),
        100.0,
        classifies=True,
    ),
    "si": MethodEntry(
        "Synaptic Intelligence (Zenke et al. 2017): the loss's path integral",
        lambda strength: PathPenalty(strength, si),
        1.0,
        needs_labels=True,
    ),
    "rwalk": MethodEntry(
        "RWalk (Chaudhry et al. 2018): running Fisher information and path score",
        lambda strength: PathPenalty(strength, rwalk),
        1.0,
        needs_labels=True,
    ),
    "mas": MethodEntry(
        "Memory Aware Synapses (Aljundi et al. 2018): importances of all tasks so far are summed",
        lambda strength: ImportancePenalty(strength, mas),
        PAPER_STRENGTH,
    ),
    "mas-local": MethodEntry(
        "local MAS: every layer's own output counts, forward passes only",
        lambda strength: ImportancePenalty(strength, mas_local),
        PAPER_STRENGTH,
    ),
    "mas-test": _mas_on(TEST),
    "mas-both": _mas_on(ALL),
    "mas-local-test": _mas_on(TEST, mas_local),
    "mas-local-both": _mas_on(ALL, mas_local),
    "mas-in-use": _mas_on(IN_USE),
    "mas-public": _mas_on(PUBLIC),
    "mas-new": _mas_on(NEXT),
    "mas-noise": _mas_on(NOISE),
    "mas-batched": MethodEntry(
        "MAS with the absolute value after the mean over a batch, as other libraries compute it",
        lambda strength: ImportancePenalty(strength, mas_batched),
        PAPER_STRENGTH,
    ),
    "projected": MethodEntry(
        "memsyn's projection: directions of inputs and outputs by rank 64, one fixed strength",
        lambda _: Projection(),
    ),
    "projected-full": MethodEntry("the same with all directions", lambda _: Projection(rank=None)),
    "projected-inputs": MethodEntry(
        "the same with the inputs' directions alone: forward passes only", lambda _: Projection(estimator="inputs")
    ),
    "projected-test": _projected_on(TEST),
    "projected-public": _projected_on(PUBLIC),
    "projected-new": _projected_on(NEXT),
    "projected-noise": _projected_on(NOISE),
    "projected-lda": MethodEntry(
        "the projection of the backbone, own classes in the loss, a head of class means (Hayes and Kanan 2020)",
        lambda _: CombinedMethods(Projection(protects_heads=False), OwnClasses(), DiscriminantHead()),
        classifies=True,
        needs_labels=True,
    ),
    "continual-backprop": MethodEntry(
        "Continual backpropagation (Dohare et al. 2024): hidden units of little use start afresh",
        lambda _: ContinualBackprop(),
    ),
    "gpm": MethodEntry(
        "Gradient Projection Memory (Saha et al. 2021): gradients orthogonal to old tasks' inputs",
        lambda _: OrthogonalProjection(gpm, of_updates=False),
    ),
    "adam-nscl": MethodEntry(
        "Adam-NSCL (Wang et al. 2021): steps in the null space of old tasks' inputs",
        lambda _: OrthogonalProjection(adam_nscl, of_updates=True),
    ),
    "rehearsal": MethodEntry(
        f"store {PER_TASK} images of each task and train on them beside",
        lambda _: Rehearsal(),
        stores_data=True,
        needs_labels=True,
    ),
    "projected-rehearsal": MethodEntry(
        f"the projection, and {PER_TASK} images of each task stored",
        lambda _: CombinedMethods(Projection(), Rehearsal()),
        stores_data=True,
        needs_labels=True,
    ),
    "projected-lda-rehearsal": MethodEntry(
        f"projected-lda, and {PER_TASK} images of each task stored",
        lambda _: CombinedMethods(Projection(protects_heads=False), OwnClasses(), DiscriminantHead(), Rehearsal()),
        stores_data=True,
        classifies=True,
        needs_labels=True,
    ),
    "mas-rehearsal": MethodEntry(
        f"MAS, and {PER_TASK} images of each task stored",
        lambda strength: CombinedMethods(ImportancePenalty(strength, mas), Rehearsal()),
        PAPER_STRENGTH,
        stores_data=True,
        needs_labels=True,
    ),
}

"""One more way to measure importance, (training, memory, images) -> memory, is one more `ImportancePenalty`."""

METHODS = NamedEntries("method", MethodEntry, "memsyn_bench.methods", BUILT_IN_METHODS)
"""All methods that `memsyn-bench list` names."""


def register_method(name: str, entry: MethodEntry) -> None:
    """Add a method for this process: `--methods` and `run` then take its name.

    A package that others install declares an entry point in the group `memsyn_bench.methods` instead.

    Raises:
        OptionError: the name is taken or cannot be used, or `entry` is no `MethodEntry`.
    """
    METHODS.register(name, entry)


def new_method(name: str, strength: float | None) -> Method:
    """A method of that name, before its first task.

    Raises:
        OptionError: its `make` returns something else.
    """
    method = METHODS[name].make(strength or 0.0)
    if not isinstance(method, Method):
        raise OptionError(
            f"make of the method {name!r} must return a memsyn_bench.Method, got {type(method).__name__}."
        )
    return method
