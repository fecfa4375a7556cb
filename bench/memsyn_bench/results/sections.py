"""One file of results, for `memsyn-bench results`: its command, its tables, and sentences about them.

Owns layout and sentences. Every number in a sentence is computed here, none is typed.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean, median

from memsyn.values.display import printable
from memsyn_bench.results.findings import (
    ALONE,
    FROZEN,
    JOINT,
    MAS,
    NONE,
    Findings,
    Numbers,
    compared,
    difference,
    estimate,
    signed,
)
from memsyn_bench.results.markdown import details, escape, table
from memsyn_bench.results.metrics import forgetting, forward_transfer, intransigence, learning_accuracy
from memsyn_bench.results.report import MEANINGS, title
from memsyn_bench.sequences.sequences import default_settings, find_sequence
from memsyn_bench.settings import Settings, training_words

NEAR = 3.0
"""Points: if a frozen backbone ends this near to the best method, remembering did not matter."""


READING = f"""{MEANINGS}
For facts, the numbers are mean average precision in place of accuracy. Further:

- A number is a mean over the seeds ± half of its 95% interval (Student's t); with one seed, the number alone. Bold is
  the highest average accuracy of the methods that store no data.
- Minus {MAS}: the difference in average accuracy from {MAS}, seed by seed.
- Backward transfer is minus the forgetting. Forward transfer: accuracy when learned less that of {ALONE}, from the
  second task on. Intransigence: how far accuracy when learned falls short of {JOINT} training on the tasks so far.
- A column with the name of another scoring, such as class-incremental, holds its mean after the last task.
- Among strengths with equal scores the largest was taken. No strength was tried beyond those listed.
- Kept: what a method holds from task to task beside the model. Working: the most that it holds while it learns one,
  beside the model and its optimizer. Seconds: the median over the seeds, by the clock of a machine that did other
  work too."""
"""What the tables' columns mean."""


def section(found: Findings, level: int) -> str:
    """The section of one file, under a heading of that level."""
    settings = found.run.settings
    parts = [
        f"{'#' * level} {escape(found.name)}",
        f"{escape(_title(found))}: {escape(find_sequence(settings.sequence).summary)}. {training_words(settings)}",
        "\n".join(f"    {line}" for line in commands(found)),
        f"Made with {escape('; then '.join(found.run.machines))}.",
        unfinished(found),
    ]
    if found.methods:
        parts += [
            " ".join(sentences(found)),
            accuracy_table(found),
            cost_table(found),
            strength_table(found),
            task_table(found),
            details(f"The whole {quantity(settings)} matrix of each method, mean over the seeds", _matrices(found)),
        ]
    return "\n\n".join(part for part in parts if part)


def quantity(settings: Settings) -> str:
    """The quantity that the sequence is scored by."""
    return "mean average precision" if find_sequence(settings.sequence).scorings[0] == "retrieval" else "accuracy"


def _average(settings: Settings) -> str:
    word = quantity(settings)
    return word if "average" in word else f"average {word}"


def _title(found: Findings) -> str:
    counts = sorted({len(seeds) for seeds in found.results.values()})
    words = title(found.run.settings, counts[-1] if counts else 0)
    return words if len(counts) < 2 else f"{words}, of some methods fewer"


def commands(found: Findings) -> list[str]:
    """The commands that make the file: one for each number of seeds, without options that have their default."""
    seeds: dict[str, int] = {method: max(of_method) + 1 for method, of_method in found.results.items()}
    for method, seed, _ in found.unfinished:
        seeds[method] = max(seeds.get(method, 0), seed + 1)
    numbers = sorted(set(seeds.values()), reverse=True)
    return [_command(found, [method for method in seeds if seeds[method] == number], number) for number in numbers]


def row_commands(found: Findings) -> dict[str, str]:
    """Method -> the command that makes its row alone.

    A strength that was chosen on the first tasks, as older versions did, is a number in it, and the folder another.
    """
    older = {choice.method: choice for choice in found.run.choices if choice.num_tasks < found.run.num_tasks}
    commands = {}
    for method, seeds in found.results.items():
        alone = found
        if method in older:
            settings = replace(found.run.settings, strength=older[method].strength)
            alone = replace(found, run=replace(found.run, settings=settings), name=f"{found.name}-{method}", folder="")
        commands[method] = _command(alone, [method], max(seeds) + 1)
    return commands


def _command(found: Findings, methods: Sequence[str], num_seeds: int) -> str:
    settings = found.run.settings
    others = []
    defaults = asdict(default_settings(settings.sequence, optimizer=settings.optimizer))
    defaults["optimizer"] = default_settings(settings.sequence).optimizer
    for name, default in defaults.items():
        value = getattr(settings, name)
        if value != default:
            others += [f"--{name.replace('_', '-')}", str(value).removesuffix(".0")]
    out = found.folder or f"runs/{found.name}"
    if out != f"runs/{settings.sequence}":
        others += ["--out", out]
    words = ["memsyn-bench", "run", settings.sequence, "--methods", ",".join(methods), "--seeds", str(num_seeds)]
    return printable(shlex.join([*words, *others]))


def unfinished(found: Findings) -> str:
    """The seeds that are left out, because they have not learned every task."""
    names = [
        f"{escape(method)} seed {seed} ({num} of {found.run.num_tasks} tasks)" for method, seed, num in found.unfinished
    ]
    return f"Not finished, and left out: {', '.join(names)}." if names else ""


def sentences(found: Findings) -> list[str]:
    """The headline: who is best, what MAS does, how near joint training it comes, and whether the backbone mattered."""
    best = found.best()
    if best is None:
        return []
    word, best_numbers = _average(found.run.settings), found.averages(best)
    several, said = len(found.ranked) > 1, []
    if several:
        said = [
            f"Of the methods that store no data **{escape(best)}** has the highest {word}: {estimate(best_numbers)}%."
        ]
    if MAS in found.results:
        said += _of_mas(found, best)
    if several and FROZEN in found.results:
        said += _of_frozen(found, best)
    if any(len(seeds) == 1 for seeds in found.results.values()):
        said.append("Of a single seed no interval is known: its numbers stand alone.")
    return said


def _of_frozen(found: Findings, best: str) -> list[str]:
    """How a frozen backbone compares; how far joint training ends above it shows what could be gained."""
    if find_sequence(found.run.settings.sequence).shares_head:
        forgotten = estimate(found.by_seed(FROZEN, forgetting))
        return [f"The frozen backbone is no floor here: the tasks share its head, which forgets {forgotten} points."]
    apart = difference(found.averages(best), found.averages(FROZEN))
    if apart is None:
        return []
    if apart.mean > NEAR:
        return [f"The frozen backbone ends {apart.mean:.1f} points below the best method that stores no data."]
    near = f"ends within {NEAR:g} points ({apart.mean:.1f}) of the best method that stores no data"
    near = "is the best method that stores no data" if best == FROZEN else near
    said = [f"The frozen backbone {near}: this experiment shows nothing about memory."]
    room = difference(found.averages(JOINT), found.averages(FROZEN))
    if room:
        words = compared(room, "above the frozen backbone", "below the frozen backbone")
        said.append(f"{JOINT.capitalize()} training itself ends {words}.")
    return said


def _of_mas(found: Findings, best: str) -> list[str]:
    """What MAS does, and how far it is from the best ranked method, or the next, and from joint training."""
    averages = found.averages(MAS)
    others = [method for method in found.ranked if method != MAS]
    start = "It" if others and best == MAS else f"{MAS} ends at {estimate(averages)}% and"
    said = [f"{start} forgets {estimate(found.by_seed(MAS, forgetting))} points."]
    if others:
        other = max(others, key=found.standing)
        apart = difference(found.averages(other), averages)
        rank = "Seed by seed the next" if best == MAS else "Seed by seed the best"
        said += [f"{rank}, {escape(other)}, ends {compared(apart, f'above {MAS}', f'below {MAS}')}."] if apart else []
    apart = difference(averages, found.averages(JOINT))
    if apart:
        words = compared(apart, f"above {JOINT} training", f"below {JOINT} training")
        said.append(f"{MAS} ends {words}, which stores all data.")
    return said


CellText = Callable[[str], str]
"""Method -> its cell in a column of the table."""


def accuracy_table(found: Findings) -> str:
    """What each method reaches; `READING` says what the columns mean."""
    best = found.best()
    columns = _columns(found)
    averages = next(iter(columns))

    def row(method: str) -> list[str]:
        cells = {name: cell(method) for name, cell in columns.items()}
        if method == ALONE:  # it forgets by definition: only what it learns means something
            cells = {name: value if name == LEARNED else NONE for name, value in cells.items()}
        if method == best:
            cells[averages] = f"**{cells[averages]}**"
        return [f"**{escape(method)}**" if method == best else escape(method), *cells.values()]

    rows = [row(method) for method in found.ranked]
    apart = [method for method in found.methods if method not in found.ranked]
    if apart:
        rows.append([f"*{APART}:*", *[""] * len(columns)])
    rows += [row(method) for method in apart]
    return table(["Method", *columns], rows)


LEARNED = "When learned (%)"
APART = "store data, see test images, or are references"
"""What the methods that are not ranked do."""


def _columns(found: Findings) -> dict[str, CellText]:
    """The columns that the run has the methods for, and the other scorings that its records hold."""
    columns: dict[str, CellText] = {
        f"{_average(found.run.settings).capitalize()} (%)": lambda method: estimate(found.averages(method)),
    }
    if MAS in found.results and len(found.methods) > 1:
        base = found.averages(MAS)
        columns[f"Minus {MAS} (points)"] = lambda method: (
            NONE if method == MAS else signed(difference(found.averages(method), base))
        )
    columns["Forgetting (points)"] = lambda method: estimate(found.by_seed(method, forgetting))
    columns[LEARNED] = lambda method: estimate(found.by_seed(method, learning_accuracy))
    if ALONE in found.results:
        columns["Forward transfer (points)"] = lambda method: estimate(found.against(method, ALONE, forward_transfer))
    if JOINT in found.results:
        columns["Intransigence (points)"] = lambda method: (
            NONE if method == JOINT else estimate(found.against(method, JOINT, intransigence))
        )
    for name in found.scorings:
        columns[f"{escape(name).capitalize()} (%)"] = partial(_score, found, name)
    return columns


def _score(found: Findings, scoring: str, method: str) -> str:
    return estimate(found.scores(method, scoring))


def cost_table(found: Findings) -> str:
    """Strength, seeds, time and memory."""
    rows = []
    for method, seeds in found.results.items():
        records = [record for of_seed in seeds.values() for record in of_seed]
        strengths = sorted({record.strength for record in records if record.strength is not None})
        rows.append(
            [
                escape(method),
                ", ".join(f"{strength:g}" for strength in strengths) or NONE,
                str(len(seeds)),
                f"{seconds(found, method):.0f}",
                readable(kept_bytes(found, method, 0)),
                readable(kept_bytes(found, method, -1)),
                readable(max(record.working_bytes for record in records)),
            ]
        )
    columns = ["Method", "Strength", "Seeds", "Seconds a seed", "Kept after task 1", "Kept at the end", "Working"]
    return table(columns, rows)


def seconds(found: Findings, method: str) -> float:
    """Seconds for one seed by the clock: the median, because the machine may have been busy with other work."""
    return median(sum(record.seconds for record in records) for records in found.results[method].values())


def kept_bytes(found: Findings, method: str, task: int) -> int:
    """The most that a seed keeps after that task."""
    return max(records[task].kept_bytes for records in found.results[method].values())


def readable(num_bytes: int) -> str:
    """A number of bytes in the largest unit of which there is at least one."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"


def strength_table(found: Findings) -> str:
    """How each strength was chosen; nothing if none was."""
    rows = []
    for choice in found.run.choices:
        equals = choice.scores.count(max(choice.scores))
        edge = choice.strength in (min(choice.candidates), max(choice.candidates))
        mark = f" (chosen{f' of {equals} equals' * (equals > 1)}{', at the edge' * edge})"
        tried = [
            f"{strength:g}: {score:.1f}{mark * (strength == choice.strength)}"
            for strength, score in zip(choice.candidates, choice.scores, strict=True)
        ]
        tasks = f"{min(choice.num_tasks, found.run.num_tasks)} of {found.run.num_tasks}"
        rows.append([escape(choice.method), f"{choice.strength:g}", tasks, ", ".join(tried)])
    if not rows:
        return ""
    return (
        f"How the strengths were chosen: every candidate, and the mean validation {quantity(found.run.settings)} (%) "
        "on the tasks that were used, after the last of them.\n\n"
        f"{table(['Method', 'Chosen', 'Tasks', 'Candidate: score'], rows)}"
    )


def task_table(found: Findings) -> str:
    """Each task at the end; tasks learned alone, when they were learned."""
    rows = []
    for method in found.methods:
        seeds = found.results[method]
        numbers: list[Numbers] = [
            {
                seed: (records[task] if method == ALONE else records[-1]).accuracies[task]
                for seed, records in seeds.items()
            }
            for task in range(found.run.num_tasks)
        ]
        words = f"{escape(method)} (when learned)" if method == ALONE else escape(method)
        rows.append([words, *map(estimate, numbers)])
    heading = f"{quantity(found.run.settings).capitalize()} on each task at the end (%):"
    return f"{heading}\n\n{table(['Method', *map(escape, found.tasks)], rows)}"


def _matrices(found: Findings) -> str:
    """The accuracy matrix of each method; tasks learned alone have none."""
    blocks = []
    for method in found.methods:
        if method == ALONE:
            continue
        seeds = found.results[method].values()
        rows = [
            [
                f"after {escape(name)}",
                *(f"{fmean(records[after].accuracies[task] for records in seeds):.1f}" for task in range(after + 1)),
                *[""] * (found.run.num_tasks - after - 1),
            ]
            for after, name in enumerate(found.tasks)
        ]
        blocks.append(f"{escape(method)}:\n\n{table(['', *map(escape, found.tasks)], rows)}")
    return "\n\n".join(blocks)
