"""The company's story as an experiment: a deployed classifier of 80 emoji learns 40 more, in many ways and seeds.

The network, the loop and the learning rates are those of `examples/company.py`. A seed changes the first weights, the
batches, and which sections of emoji are old and new. Each way to learn the new classes is an arm: carelessly, with
frozen statistics alone, the new head alone, by distillation, with a memory of one of five kinds of images, and
carelessly with a repair afterwards. Strengths are the defaults of memsyn, and nothing is chosen by these numbers.

Of each old class, the two drawings of the held-out studios are separated: one is sent as requests, the other one is
what a memory or a repair may see of images in use. Prints a line for each arm and seed, which is kept as JSON in
`--out`. Lines that are there are not made again. `--page` writes the tables.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import memsyn
from memsyn.comparing.verdict import MAX_CHANGE
from memsyn_bench.data.drawings import augment, load_emoji8
from memsyn_bench.data.strata import ranks_in_classes
from memsyn_bench.methods.distillation import distillation
from memsyn_bench.methods.sources import noise, public_images
from memsyn_bench.results.findings import difference, estimate, signed
from memsyn_bench.results.markdown import table
from memsyn_bench.task import Task

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))
from company import EPOCHS, NEW, OLD, Classifier, varied  # noqa: E402

VARIANTS, MEASURED, REQUESTS = 5, 3, 10
"""How often each drawing is moved and recoloured: to test the new classes, to measure a memory, as requests."""
ESTIMATORS = {"MAS": "mas", "projection": "kronecker"}
SOURCES = ("old training images", "images in use", "public images", "new images", "noise")
CARELESS, STATISTICS, HEAD, LWF = "careless", "frozen statistics alone", "new head alone", "distillation (LwF)"
REPAIRS = {"careless, then repair": MAX_CHANGE, "careless, then repair to 1%": 0.01}
"""Arm -> `max_change` of the repair."""
MEMORIES = {f"{memory}, {source}": (memory, source) for memory in ESTIMATORS for source in SOURCES}
ARMS = (CARELESS, STATISTICS, HEAD, LWF, *MEMORIES, *REPAIRS)
Extra = Callable[[Classifier, Tensor], Tensor]
"""(model, images) -> a further loss."""


@dataclass(frozen=True)
class Line:
    """An arm of one seed. Shares are 0 to 1."""

    seed: int
    arm: str
    epochs: int
    old: tuple[str, ...]
    new: tuple[str, ...]
    """Sections of emoji."""
    same: float
    """Requests with the same answer as before."""
    change: float
    """The mean relative change of the outputs on requests."""
    verdict: str
    """Of the gate, with its default thresholds."""
    old_before: float
    old_after: float
    """The accuracy on the requests, by labels that no arm sees."""
    new_accuracy: float
    seconds: float
    """Of the arm alone, by the clock."""

    @property
    def key(self) -> tuple[int, str, int]:
        return self.seed, self.arm, self.epochs


def read(path: Path) -> list[Line]:
    """The lines of a file; none if there is no file."""
    if not path.exists():
        return []
    entries = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [Line(**{**one, "old": tuple(one["old"]), "new": tuple(one["new"])}) for one in entries]


def seeded(seed: int, stage: int) -> torch.Generator:
    """The random numbers of one use; no use depends on another."""
    return torch.Generator().manual_seed(1000 * seed + stage)


def joined(tasks: Sequence[Task], name: str) -> Task:
    """The classes of several tasks as one task."""
    first = [40 * number for number in range(len(tasks))]
    return Task(
        name,
        tuple(own for task in tasks for own in task.class_names),
        torch.cat([task.train_images for task in tasks]),
        torch.cat([task.train_labels + number for task, number in zip(tasks, first, strict=True)]),
        torch.cat([task.test_images for task in tasks]),
        torch.cat([task.test_labels + number for task, number in zip(tasks, first, strict=True)]),
    )


class Company:
    """What a company has when the new classes are wanted: the shipped model, its data, and what customers send."""

    def __init__(self, seed: int, epochs: int) -> None:
        self.seed, self.epochs = seed, epochs
        tasks = load_emoji8(32)
        chosen = [tasks[place] for place in torch.randperm(len(tasks), generator=seeded(seed, 0)).tolist()]
        old, new = chosen[: len(OLD)], chosen[len(OLD) : len(OLD) + len(NEW)]
        self.sections = tuple(task.name for task in old), tuple(task.name for task in new)
        self.old, self.new = joined(old, "old classes"), joined(new, "new classes")
        sent = ranks_in_classes(self.old.test_labels, seeded(seed, 1)) > 0
        self.in_use = self.old.test_images[~sent]
        self.requests = varied(self.old.test_images[sent], REQUESTS, seed=1000 * seed + 2)
        self.request_labels = self.old.test_labels[sent].repeat(REQUESTS)
        self.new_requests = varied(self.new.test_images, VARIANTS, seed=1000 * seed + 3)

    @cached_property
    def shipped(self) -> Classifier:
        """The model that customers use."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Classifier()
        learn(model, "shipped", self.old, torch.optim.Adam(model.parameters(), lr=3e-3), self, epochs=self.epochs)
        return model

    @cached_property
    def careless(self) -> Classifier:
        """The model after a training without protection."""
        model = deepcopy(self.shipped)
        extend(model, self)
        return model

    def images(self, source: str) -> list[Tensor]:
        """Batches of a source, without labels."""
        stage = 10 + SOURCES.index(source)
        variants = self.seed * 1000 + stage
        generator = seeded(self.seed, stage)
        if source == "noise":
            seen = torch.cat(varied(self.old.train_images, MEASURED, variants))
            return list(noise(replace(self.old, train_images=seen), generator).split(64))
        images = {
            "old training images": lambda: self.old.train_images,
            "images in use": lambda: self.in_use,
            "public images": lambda: public_images(self.old, generator),
            "new images": lambda: self.new.train_images,
        }[source]()
        return varied(images, MEASURED, variants)

    def memory(self, *estimators: str, source: str = SOURCES[0]) -> memsyn.Memory:
        """What is measured on a source with the shipped model."""
        memory, images = memsyn.Memory.empty(), self.images(source)
        for estimator in estimators:
            found = memsyn.measure(self.shipped, images, estimator=estimator, progress=False)
            memory = memory.consolidate(self.shipped, found)
        return memory


def learn(
    model: Classifier,
    head: str,
    task: Task,
    optimizer: torch.optim.Optimizer,
    company: Company,
    *,
    epochs: int,
    heads_first: int = 0,
    extra: Extra | None = None,
) -> None:
    """The loop of the story: train mode, a learning rate that falls, the new head alone in the first epochs."""
    generator = seeded(company.seed, 4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs)
    for epoch in range(epochs):
        model.train()
        model.body.requires_grad_(epoch >= heads_first)
        for rows in torch.randperm(len(task.train_labels), generator=generator).split(32):
            optimizer.zero_grad()
            images = augment(task.train_images[rows], generator)
            loss = F.cross_entropy(model(images, head), task.train_labels[rows])
            if extra is not None:
                loss = loss + extra(model, images)
            loss.backward()
            optimizer.step()
        schedule.step()
    model.body.requires_grad_(True)
    model.eval()


def extend(
    model: Classifier,
    company: Company,
    *,
    memory: memsyn.Memory | None = None,
    freeze: bool = False,
    heads_first: int | None = None,
    extra: Extra | None = None,
) -> None:
    """Learn the new classes in the second head; by default with the whole network, as the careless training does."""
    epochs = company.epochs
    optimizer = torch.optim.Adam(
        [{"params": model.body.parameters(), "lr": 1e-4}, {"params": model.added.parameters(), "lr": 3e-3}]
    )
    with ExitStack() as stack:
        if freeze:
            stack.enter_context(memsyn.freeze_statistics(model))
        if memory is not None:
            stack.callback(memsyn.protect(optimizer, model, memory, freeze_statistics=True).remove)
        first = epochs // 4 if heads_first is None else heads_first
        learn(model, "added", company.new, optimizer, company, epochs=epochs, heads_first=first, extra=extra)


def repaired(company: Company, max_change: float) -> Classifier:
    """The careless model with what the old outputs need put back, and its new head trained again.

    The change is measured on images in use, which are not the requests.
    """
    model = deepcopy(company.careless)
    images = varied(company.new.train_images, MEASURED, seed=1000 * company.seed + 5)
    learned = memsyn.measure(
        model, images, estimator="kronecker", forward=lambda own, batch: own(batch, "added"), progress=False
    )
    memory = company.memory("mas", "kronecker")
    found = memsyn.repair(
        model, memory, batches=company.images("images in use"), learned=learned, max_change=max_change
    )
    model.load_state_dict(found.weights, strict=False)
    epochs = max(1, company.epochs // 4)
    with memsyn.freeze_statistics(model):
        optimizer = torch.optim.Adam(model.added.parameters(), lr=3e-3)
        learn(model, "added", company.new, optimizer, company, epochs=epochs, heads_first=epochs)
    return model


def trained(company: Company, arm: str) -> Classifier:
    """The model of an arm."""
    if arm == CARELESS:
        return company.careless
    if arm in REPAIRS:
        return repaired(company, REPAIRS[arm])
    model, before = deepcopy(company.shipped), deepcopy(company.shipped).eval()
    if arm in MEMORIES:
        memory, source = MEMORIES[arm]
        extend(model, company, memory=company.memory(ESTIMATORS[memory], source=source))
        return model

    def as_before(own: Classifier, images: Tensor) -> Tensor:
        with torch.no_grad():
            recorded = before(images)
        return distillation(own(images), recorded)

    first = company.epochs if arm == HEAD else None
    extend(model, company, freeze=True, heads_first=first, extra=as_before if arm == LWF else None)
    return model


@torch.no_grad()
def accuracy(model: Classifier, batches: Sequence[Tensor], labels: Tensor, head: str) -> float:
    """The share of images that a head names rightly."""
    answers = torch.cat([model.eval()(batch, head).argmax(1) for batch in batches])
    return float((answers == labels).double().mean())


def line_of(company: Company, arm: str) -> Line:
    """Train one arm, and compare its model with the shipped one on the requests."""
    before = accuracy(company.shipped, company.requests, company.request_labels, "shipped")
    start = time.perf_counter()
    model = trained(company, arm)
    seconds = time.perf_counter() - start
    found = memsyn.compare(model, company.shipped, company.requests, progress=False)
    labels = company.new.test_labels.repeat(VARIANTS)
    return Line(
        company.seed, arm, company.epochs, *company.sections,
        same=found.agreement, change=found.mean_change, verdict=found.verdict().answer, old_before=before,
        old_after=accuracy(model, company.requests, company.request_labels, "shipped"),
        new_accuracy=accuracy(model, company.new_requests, labels, "added"), seconds=round(seconds, 1),
    )  # fmt: skip


def lines(path: Path, num_seeds: int, epochs: int, arms: Sequence[str] = ARMS) -> Iterator[Line]:
    """Make the lines that the file lacks, and write each as soon as it is made."""
    known = {line.key for line in read(path)}
    for seed in range(num_seeds):
        company = Company(seed, epochs)
        for arm in arms:
            if (seed, arm, epochs) not in known:
                line = line_of(company, arm)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(line)) + "\n")
                yield line


FIRST_WORDS = """# A deployed classifier learns new classes

A classifier of 80 emoji is deployed: a small convolutional network with BatchNorm. A month later 40 classes are added
in a head of their own, and the whole network is trained. This page compares ways to do that: what do customers of the
old classes notice, and how well are the new classes learned? The story itself, with the commands:
[did-it-work.md](../did-it-work.md).

    python benchmarks/company_story.py --page docs/results/company.md

This command makes the lines of [company.jsonl](../company.jsonl) that are not there yet, and writes this page from
them. No number on it is typed.

A seed changes the first weights, the batches, and which two sections of emoji are old and which one is new. Every arm
has the epochs and learning rates of the story. Strengths are memsyn's defaults. Nothing was chosen by these numbers.

Requests are drawings by a studio that training has not seen, one of each old class, in ten variants. Variants of one
drawing are not independent, so the gate's interval is narrower than it should be. "Images in use" are the other
drawing of each old class by that studio; requests do not hold them."""

MEANINGS = """\
- **careless**: train mode, no protection. BatchNorm takes over the statistics of the new images.
- **frozen statistics alone**: the same with `memsyn.freeze_statistics`. All arms below have frozen statistics too.
- **new head alone**: the backbone does not learn.
- **distillation (LwF)**: the old head keeps its outputs on the new images, by the loss of Li and Hoiem (2016) at
  temperature 2, weight 1.
- **MAS**, **projection**: `memsyn.protect` with a memory that was measured on the images named. Public images are
  letters. New images are those of the new classes, measured before the first step, so no old image is used. Noise has
  the mean and deviation of each pixel of the old images.
- **careless, then repair**: `memsyn.repair` with `learned=`, its change measured on images in use, then the new head
  alone for a quarter of the epochs. The default allows the outputs to change by 5%; the last arm allows 1%, as in the
  story."""


def page(found: Sequence[Line]) -> str:
    """The page of the lines of one number of epochs."""
    arms = [arm for arm in ARMS if any(line.arm == arm for line in found)]
    shown = {arm: [line for line in found if line.arm == arm] for arm in arms}
    columns = [
        "arm", "same answers (%)", "change of outputs (%)", "old classes (%)", "old classes, change (points)",
        "new classes (%)", "the gate says",
    ]  # fmt: skip
    before = {line.seed: 100 * line.old_before for line in found}
    rows = [["as shipped", "", "", estimate(before), "", "", ""], *(_row(arm, own) for arm, own in shown.items())]
    seeds = len({line.seed for line in found})
    epochs = " or ".join(str(number) for number in sorted({line.epochs for line in found}))
    note = f"Means over {seeds} seeds with 95% intervals; {epochs} epochs a training."
    apart = [_row_of_source(shown, memory, source) for memory in ESTIMATORS for source in SOURCES[1:]]
    parts = [FIRST_WORDS, "## What customers notice, and what is learned", table(columns, rows), note, MEANINGS]
    parts += ["## Which images a memory needs", "In points, minus the same with old training images, seed by seed:"]
    parts.append(
        table(["memory", "same answers", "change of outputs", "old classes", "new classes"], list(filter(None, apart)))
    )
    return "\n\n".join(parts) + "\n"


def _numbers(own: Sequence[Line], number: Callable[[Line], float]) -> dict[int, float]:
    return {line.seed: 100 * number(line) for line in own}


COLUMNS: tuple[Callable[[Line], float], ...] = (
    lambda line: line.same,
    lambda line: line.change,
    lambda line: line.old_after,
    lambda line: line.old_after - line.old_before,
    lambda line: line.new_accuracy,
)


def _row(arm: str, own: Sequence[Line]) -> list[str]:
    verdicts = [line.verdict for line in own]
    said = ", ".join(f"{verdict} {verdicts.count(verdict)}" for verdict in sorted(set(verdicts)))
    same, change, after, apart, new = (_numbers(own, number) for number in COLUMNS)
    return [arm, estimate(same), estimate(change), estimate(after), estimate(apart), estimate(new), said]


def _row_of_source(shown: dict[str, list[Line]], memory: str, source: str) -> list[str] | None:
    own, reference = (shown.get(f"{memory}, {which}", []) for which in (source, SOURCES[0]))
    if not own or not reference:
        return None
    numbers = [COLUMNS[place] for place in (0, 1, 2, 4)]
    cells = [signed(difference(_numbers(own, number), _numbers(reference, number))) for number in numbers]
    return [f"{memory}, {source}", *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/company.jsonl")
    parser.add_argument("--page", type=Path, help="the page to write, such as docs/results/company.md")
    options = parser.parse_args()
    for line in lines(options.out, options.seeds, options.epochs):
        print(json.dumps(asdict(line)), flush=True)
    if options.page is not None:
        own = [line for line in read(options.out) if line.epochs == options.epochs]
        options.page.write_text(page(own), encoding="utf-8")


if __name__ == "__main__":
    main()
