"""An experiment: methods learn domains in a row, and after each the model is scored. One line of JSON for each score.

Owns the settings, the records, and how a run continues. A line is of one method, seed and domain; its key holds all
that its numbers depend on, so that runs of other settings go into the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Container, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memsyn import Memory, MemsynError, OptionError
from memsyn.storage.reading_and_writing import read, write
from memsyn_bench.language.learning import Lesson, learn, remembered
from memsyn_bench.language.methods import LANGUAGE_METHODS
from memsyn_bench.language.model import PRECISIONS, Assistant, Frozen
from memsyn_bench.language.questions import Question
from memsyn_bench.language.scoring import right_answers, text_loss
from memsyn_bench.language.texts import DOMAINS, ENGLISH, OWN_SEED, Text, domain_text, own_text

LANGUAGE_FILE = "language.jsonl"
CHECKPOINT, WRITTEN = "language checkpoint", "text written by a model"
TIED = "lm_head.weight"
"""The head shares the table of tokens."""
BEFORE = "before"
"""The name of the line about the model as it was."""
OWN_TEXT, ENGLISH_TEXT, NEW_TEXT = "own", "english", "new"
MEMORY_TEXTS = (OWN_TEXT, ENGLISH_TEXT, NEW_TEXT)


@dataclass(frozen=True)
class LanguageSettings:
    """All that the numbers of a line depend on, beside the method, the seed and the domains so far."""

    steps: int = 100
    lr: float | None = None
    """None: the method's own."""
    strength: float | None = None
    """None: the method's own."""
    memory_text: str = OWN_TEXT
    """What a memory is measured on before the first domain: the model's own text, or English. After each domain the
    memory takes in text of that domain. "new": before each domain, its own training text alone, and nothing after it.
    """
    batch_size: int = 4
    length: int = 64
    num_measured: int = 40
    """Blocks of each text that a memory is measured on."""
    num_held_out: int = 32
    """Blocks of each text that are scored."""
    precision: str = "bfloat16"

    def __post_init__(self) -> None:
        numbers = {"steps": self.steps, "batch_size": self.batch_size, "length": self.length}
        numbers |= {"num_measured": self.num_measured, "num_held_out": self.num_held_out}
        for name, number in numbers.items():
            if number < 1:
                raise OptionError(f"{name} must be at least 1; got {number}.")
        for name, value, choices in (
            ("memory_text", self.memory_text, MEMORY_TEXTS), ("precision", self.precision, tuple(PRECISIONS))
        ):  # fmt: skip
            if value not in choices:
                raise OptionError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


@dataclass(frozen=True)
class LanguageRecord:
    """What a model knows after one more domain."""

    method: str
    seed: int
    domains: tuple[str, ...]
    """The domains that were learned, in order."""
    settings: LanguageSettings
    """With the learning rate and the strength that were used."""
    losses: dict[str, float]
    """Held-out loss in nats a token of each domain of the experiment, of the model's own text and of English."""
    right: dict[str, str]
    """Kind of question -> 1 for each right answer and 0 for each wrong one, in the order of the list."""
    seconds: float
    """Training alone, by the clock."""
    memory_seconds: float
    """Measuring and consolidating, before the first domain and after this one."""
    peak_bytes: int | None
    """The most memory that the process held while it trained."""
    kept_bytes: int
    """The memory's tensors."""
    machine: str
    """Versions, platform and threads."""

    @property
    def key(self) -> str:
        """Two records of the same key hold the same numbers."""
        return _key(self.method, self.seed, self.domains, self.settings)

    @property
    def flags(self) -> str:
        """Of all questions."""
        return "".join(self.right.values())


def _key(method: str, seed: int, domains: Sequence[str], settings: LanguageSettings) -> str:
    whole = json.dumps([method, seed, list(domains), asdict(settings)], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Experiment:
    """A model, its questions and its texts, as they are for all methods and seeds."""

    assistant: Assistant
    questions: Sequence[Question]
    domains: dict[str, Text]
    own: Text
    english: Text

    @classmethod
    def prepared(
        cls,
        assistant: Assistant,
        questions: Sequence[Question],
        domains: Sequence[str],
        settings: LanguageSettings,
        out: Path,
    ) -> Experiment:
        """Read the texts, and let the model write its own, which is kept in the folder `out`.

        Raises:
            OptionError: a domain is unknown.
            MemsynError: a text is not there.
        """
        _check_names("domain", domains, DOMAINS)
        number = settings.num_held_out
        texts = {
            name: domain_text(assistant, DOMAINS[name], length=settings.length, num_held_out=number) for name in domains
        }
        english = domain_text(assistant, ENGLISH, length=settings.length, num_held_out=number)
        own = _kept_own_text(assistant, settings, out)
        return cls(assistant, questions, texts, own, english)

    def scored(self, network: nn.Module, precision: str) -> tuple[dict[str, float], dict[str, str]]:
        """Losses by text, and right answers by kind."""
        model = Frozen(network, precision)
        texts = {**self.domains, "own": self.own, "english": self.english}
        losses = {name: text_loss(model, text.held_out, text.skipped) for name, text in texts.items()}
        right: dict[str, str] = {}
        found = right_answers(model, self.assistant.tokenizer, self.questions)
        for question, is_right in zip(self.questions, found, strict=True):
            right[question.kind] = right.get(question.kind, "") + str(int(is_right))
        return losses, right


def _kept_own_text(assistant: Assistant, settings: LanguageSettings, out: Path) -> Text:
    """What the model writes, out of a file if it was written before with these settings: it takes a while."""
    return _kept_text(assistant, settings, (settings.num_measured, settings.num_held_out), OWN_SEED, out)


def _kept_longer_text(own: Text, assistant: Assistant, settings: LanguageSettings, out: Path) -> Text:
    """The model's own text with further blocks to measure on, if the settings want more. What is scored stays."""
    number = settings.num_measured - len(own.training)
    if number <= 0:
        return own
    further = _kept_text(assistant, settings, (number, 0), OWN_SEED + 1, out)
    return replace(own, training=torch.cat([own.training, further.training]))


def _kept_text(
    assistant: Assistant, settings: LanguageSettings, numbers: tuple[int, int], seed: int, out: Path
) -> Text:
    num_measured, num_held_out = numbers
    sizes = "-".join(map(str, (settings.length, *numbers, seed)))
    path = out / f"own-text-{sizes}-{settings.precision}.safetensors"
    if path.exists():
        header, groups = read(path, WRITTEN)
        return Text(groups["text"]["measured"], groups["text"]["held_out"], header["skipped"])
    text = own_text(
        assistant,
        length=settings.length,
        num_measured=num_measured,
        num_held_out=num_held_out,
        precision=settings.precision,
        seed=seed,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"measured": text.training, "held_out": text.held_out}
    write(path, WRITTEN, {"skipped": text.skipped}, {"text": tensors})
    return text


def _check_names(what: str, names: Sequence[str], known: Sequence[str] | dict[str, Any]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) < len(names) or not names:
        raise OptionError(f"{what}s must be different ones of {', '.join(known)}; got {', '.join(names) or 'none'}.")


def run_language(
    experiment: Experiment,
    methods: Sequence[str],
    seeds: Sequence[int],
    settings: LanguageSettings,
    out: Path,
    say: Callable[[LanguageRecord], None] = lambda record: None,
) -> list[LanguageRecord]:
    """Run methods through the domains. Lines that the folder's file has already are not made again.

    Raises:
        OptionError: a method is unknown.
        MemsynError: the file is not ours.
    """
    chosen = [parse_method(method, settings) for method in methods]
    out.mkdir(parents=True, exist_ok=True)
    path = out / LANGUAGE_FILE
    old = read_language(path) if path.exists() else []
    known = {record.key for record in old}
    before = _before(settings)
    made = []
    if not any(one.key == before.key and experiment.domains.keys() <= one.losses.keys() for one in old):
        losses, right = experiment.scored(experiment.assistant.network, settings.precision)
        made.append(replace(before, losses=losses, right=right))
        _append_language(path, made[-1])
        say(made[-1])
    for seed in seeds:
        courses = [Course(experiment, name, seed, own, out) for name, own in chosen]
        for index in range(len(experiment.domains)):
            for course in courses:
                record = course.learn_one(index, known)
                if record is not None:
                    made.append(record)
                    say(record)
    return made


def parse_method(text: str, settings: LanguageSettings) -> tuple[str, LanguageSettings]:
    """The name and the settings of a method such as "lora", "finetune@lr=1e-4" or "mas@strength=1@blocks=400".

    Raises:
        OptionError: the method is unknown, or an option is.
    """
    name, *options = text.split("@")
    if name not in LANGUAGE_METHODS:
        raise OptionError(f"unknown method {name!r}: use one of {', '.join(LANGUAGE_METHODS)}.")
    own = LANGUAGE_METHODS[name]
    given: dict[str, Any] = {"lr": own.lr, "strength": own.strength, "blocks": settings.num_measured}
    needs_text = own.estimator is not None or own.extra == "replay"
    for option in options:
        key, _, value = option.partition("=")
        try:
            given[key] = type(given[key] or 0.0)(value)
        except (ValueError, KeyError):
            raise OptionError(
                f"{text!r} must be METHOD, METHOD@lr=NUMBER, METHOD@strength=NUMBER or METHOD@blocks=NUMBER."
            ) from None
        if key == "blocks" and not needs_text:
            raise OptionError(f"{text!r}: {name} measures no memory, so it takes no blocks.")
    if own.extra == "replay" and settings.memory_text == NEW_TEXT:
        raise OptionError(
            f"{text!r} replays the memory's text, and the new text is learned anyway. Use the memory of another text: "
            f"{OWN_TEXT} or {ENGLISH_TEXT}."
        )
    text = settings.memory_text if needs_text else OWN_TEXT
    return name, replace(
        settings, lr=given["lr"], strength=given["strength"], memory_text=text, num_measured=given["blocks"]
    )


def _before(settings: LanguageSettings) -> LanguageRecord:
    """The line about the model as it was; without numbers."""
    plain = LanguageSettings(
        steps=1, batch_size=settings.batch_size, length=settings.length, num_held_out=settings.num_held_out,
        num_measured=settings.num_measured, precision=settings.precision,
    )  # fmt: skip
    return LanguageRecord(BEFORE, 0, (), plain, {}, {}, 0.0, 0.0, None, 0, _machine_in_words())


@dataclass(frozen=True, eq=False)
class Course:
    """One method and seed on its way through the domains. Its state is in a checkpoint, so that it can be cut off."""

    experiment: Experiment
    name: str
    seed: int
    settings: LanguageSettings
    out: Path

    def key(self, index: int) -> str:
        """The key of the record after domain `index`."""
        return _key(self.name, self.seed, list(self.experiment.domains)[: index + 1], self.settings)

    def checkpoint(self, index: int) -> Path:
        """The file of the state after domain `index`."""
        return self.out / "checkpoints" / f"{self.key(index)}.safetensors"

    def learn_one(self, index: int, known: Container[str]) -> LanguageRecord | None:
        """Learn domain `index` and score; None if that is known, and nothing that is not known begins there."""
        if index < self._first(known):
            return None
        is_last = index + 1 == len(self.experiment.domains)
        method, settings, start = LANGUAGE_METHODS[self.name], self.settings, time.perf_counter()
        network, memory = self._state(index)
        spent = time.perf_counter() - start
        names = list(self.experiment.domains)
        training = self.experiment.domains[names[index]].training
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        lesson = Lesson(method, settings.lr or 0.0, settings.strength, settings.steps, settings.batch_size,
                        settings.precision)  # fmt: skip
        done = learn(network, memory, training, self._old_text, lesson, generator)
        losses, right = self.experiment.scored(done.network, settings.precision)
        kept = _bytes_of(memory)
        if not is_last:
            start = time.perf_counter()
            if settings.memory_text != NEW_TEXT:
                memory = remembered(memory, done.network, training[: settings.num_measured], method, names[index])
            spent += time.perf_counter() - start
            _save(self.checkpoint(index), done.network, memory)
        record = LanguageRecord(
            self.name, self.seed, tuple(names[: index + 1]), settings, losses, right, done.seconds, spent,
            done.peak_bytes, kept, _machine_in_words(),
        )  # fmt: skip
        if index:
            self.checkpoint(index - 1).unlink(missing_ok=True)
        if record.key in known:
            return None
        _append_language(self.out / LANGUAGE_FILE, record)
        return record

    def _first(self, known: Container[str]) -> int:
        """Which domain is learned first: the one after the newest checkpoint that the first unknown record needs."""
        number = len(self.experiment.domains)
        unknown = next((index for index in range(number) if self.key(index) not in known), None)
        if unknown is None:
            return number
        return max((index + 1 for index in range(unknown) if self.checkpoint(index).exists()), default=0)

    @property
    def _old_text(self) -> Text:
        """What the memory is measured on before the first domain, and what is replayed."""
        text = self.experiment.own
        if self.settings.memory_text == ENGLISH_TEXT:
            text = self.experiment.english
        elif self.settings.memory_text == OWN_TEXT:
            text = _kept_longer_text(text, self.experiment.assistant, self.settings, self.out)
        return replace(text, training=text.training[: self.settings.num_measured])

    def _state(self, index: int) -> tuple[nn.Module, Memory]:
        """The network and the memory before domain `index`."""
        network = deepcopy(self.experiment.assistant.network)
        memory = _load(self.checkpoint(index - 1), network) if index else Memory.empty()
        settings = self.settings
        if settings.memory_text == NEW_TEXT:
            label, text = list(self.experiment.domains.items())[index]
        elif not index:
            label, text = settings.memory_text, self._old_text
        else:
            return network, memory
        blocks = text.training[: settings.num_measured]
        return network, remembered(memory, network, blocks, LANGUAGE_METHODS[self.name], label)


def _save(path: Path, network: nn.Module, memory: Memory) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor for name, tensor in network.state_dict().items() if name != TIED}
    write(path, CHECKPOINT, memory.header(), {"model": weights, **memory.groups()})


def _load(path: Path, network: nn.Module) -> Memory:
    """Load the weights into the network; return the memory."""
    header, groups = read(path, CHECKPOINT)
    network.load_state_dict(groups.pop("model"), strict=False)
    return Memory.from_file(path, header, groups)


def _bytes_of(memory: Memory) -> int:
    return sum(tensor.nbytes for group in memory.groups().values() for tensor in group.values())


def _machine_in_words() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("memsyn", "torch", "transformers", "peft"))
    threads = torch.get_num_threads()
    return f"{versions}, {platform.system()} {platform.machine()}, {threads} thread{'s' * (threads != 1)}"


def _append_language(path: Path, record: LanguageRecord) -> None:
    """Write one whole line; first remove the part of a line that an earlier process may have left."""
    with open(path, "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(asdict(record)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_language(path: Path) -> list[LanguageRecord]:
    """The records of a file, oldest first. A last line that was cut off is left out.

    Raises:
        MemsynError: it cannot be read, or a line is not ours.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise MemsynError(
            f"{path} cannot be read: {error.strerror}. Give the file of a language experiment."
        ) from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            settings = LanguageSettings(**entry.pop("settings"))
            records.append(LanguageRecord(**{**entry, "domains": tuple(entry["domains"]), "settings": settings}))
        except (ValueError, KeyError, TypeError, AttributeError, OptionError):
            raise MemsynError(
                f"{path}, line {number} is no record of a language experiment. Use another --out, or remove the file."
            ) from None
    return records
