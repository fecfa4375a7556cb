"""One head over the classes of all tasks: what is had with no old data, and with a few stored samples.

Owns the section's table and sentences. Every number in a sentence is computed.
"""

from __future__ import annotations

from memsyn_bench.results.findings import FINETUNE, JOINT, MAS, Findings, Group, estimate, has_more_data, mean
from memsyn_bench.results.markdown import escape, table
from memsyn_bench.results.metrics import forgetting
from memsyn_bench.results.sections import kept_bytes, readable

GIVEN = "task-given"
"""The scoring that tells the network which task an image is of."""
SAID = (FINETUNE, MAS, "projected", "projected-lda", "rehearsal", "projected-lda-rehearsal", JOINT)
"""The methods of the sentence, where they were run."""


def one_head(group: Group) -> str:
    """Every method of each run: accuracy over all classes, and if the task is given; what is stored."""
    note = (
        "Over all classes: the network chooses between the classes of all tasks. Task given: between those of the "
        "image's own task. Both are means over the tasks after the last one. Stored data: old images."
    )
    return "\n\n".join([*(_of_run(found) for found in group), note])


def said_of_one_head(group: Group) -> str:
    """The accuracy over all classes of the main methods, run by run."""
    return " ".join(
        f"{escape(found.name)}: "
        + ", ".join(f"{method} {mean(found.averages(method)):.1f}" for method in SAID if method in found.results)
        + f" ({_num_seeds(found)})."
        for found in group
    )


def _num_seeds(found: Findings) -> str:
    num = max(len(seeds) for seeds in found.results.values())
    return "1 seed" if num == 1 else f"{num} seeds"


def _of_run(found: Findings) -> str:
    rows = []
    for method in found.methods:
        stored = "yes" if has_more_data(method) else "no"
        cells = [estimate(found.averages(method)), estimate(found.by_seed(method, forgetting))]
        given = estimate(found.scores(method, GIVEN))
        kept = readable(kept_bytes(found, method, found.run.num_tasks - 1))
        rows.append([escape(method), *cells, given, stored, kept])
    columns = [
        "Method",
        "Over all classes (%)",
        "Forgetting (points)",
        "Task given (%)",
        "Stored data",
        "Kept at the end",
    ]
    return f"{escape(found.name)}, {_num_seeds(found)}:\n\n{table(columns, rows)}"
