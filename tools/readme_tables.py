"""Write the tables of README.md and of docs/results/published.md from result files.

    .venv/bin/python tools/readme_tables.py          # writes both
    .venv/bin/python tools/readme_tables.py --check  # exit code 1 if it would change

Owns which numbers README shows. Every one of them is computed from a file in docs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from textwrap import fill

from memsyn_bench.language.experiment import LanguageRecord, read_language
from memsyn_bench.results.findings import NONE, Findings, estimate, mean, read_findings
from memsyn_bench.results.markdown import table

DOCS = Path(__file__).parent.parent / "docs"
README = DOCS.parent / "README.md"
START, END = "<!-- written by tools/readme_tables.py from result files -->", "<!-- end -->"
METHODS = ("finetune", "frozen", "mas", "projected", "rehearsal", "joint")
PUBLISHED = DOCS / "results" / "published.md"
THEIRS = (
    ("nothing protected", "finetune", "87.19 ± 0.94"),
    ("EWC", "ewc", "98.64 ± 0.22"),
    ("SI", "si", "99.09 ± 0.15"),
    ("LwF", "lwf", "99.57 ± 0.02"),
    ("MAS", "mas", NONE),
    ("projected", "projected", NONE),
    ("all data (offline)", "", "99.66 ± 0.02"),
)
"""Words, the method here, and the number of van de Ven and Tolias (2019), Table 4, with its standard error."""
WIDTH = 140
ONE_HEAD = "split-fashion-one-head"
ROWS = (
    ("The backbone must learn: drawings and alphabets, from ImageNet weights", "mixed8-pretrained"),
    ("A network from random weights: eight alphabets", "scripts8"),
    ("A backbone that fits the new tasks: drawings, from ImageNet weights", "emoji8-pretrained"),
    ("One head whose classes stay, and inputs of another kind in each task", "permuted-fashion"),
    ("One head over the classes of all tasks", "split-fashion-one-head"),
)
"""What is learned, and the run that measured it."""


def found(name: str) -> Findings:
    """The results of a run."""
    return read_findings(DOCS / "results" / f"{name}.jsonl")


def accuracies() -> str:
    """A row for each kind of task."""
    rows = []
    for words, name in ROWS:
        run = found(name)
        rows.append([f"{words} ([{name}](docs/results/{page(name)}.md))", *(cell(run, method) for method in METHODS)])
    return table(["New tasks", "Fine-tuned", "Frozen", "MAS", "Projected", "Rehearsal", "Joint"], rows)


def cell(run: Findings, method: str) -> str:
    """The average accuracy of a method with its interval, and the number of seeds."""
    numbers = run.averages(method) if method in run.results else {}
    return f"{estimate(numbers)} ({len(numbers)})" if numbers else NONE


def page(name: str) -> str:
    """The page of a run."""
    return "one-head" if name.endswith("one-head") else name


def average(name: str, method: str) -> str:
    """The average accuracy of a method."""
    return f"{mean(found(name).averages(method)):.1f}%"


def lost_answers(method: str, lr: float, strength: float | None = None) -> str:
    """The answers that the language model has lost after the last domain, in points of all questions."""
    records = read_language(DOCS / "language" / "results.jsonl")
    (before,) = {record.flags for record in records if record.method == "before"}
    own = [
        record
        for record in records
        if (record.method, record.settings.lr, record.settings.strength) == (method, lr, strength)
        and len(record.domains) == 3
    ]
    return f"{fmean(100 * _lost(record, before) / len(before) for record in own):.1f}"


def _lost(record: LanguageRecord, before: str) -> int:
    return sum(was == "1" and now == "0" for was, now in zip(before, record.flags, strict=True))


def advice() -> str:
    """What to use where the table does not say it."""
    plain, means, stored, both = (
        average(ONE_HEAD, f"projected{end}") for end in ("", "-lda", "-rehearsal", "-lda-rehearsal")
    )
    lost = [lost_answers("finetune", 1e-4), lost_answers("lora", 1e-3), lost_answers("projected-inputs", 5e-4, 30.0)]
    arms = ("projection, new images", "projection, old training images", "frozen statistics alone", "new head alone")
    kept = [same(arm) for arm in arms]
    return "\n".join(
        bullet(words)
        for words in (
            "**Freeze the backbone** if new heads on it are good enough. **Project** if the backbone has to learn.",
            "**One head over all classes**: protection alone does not keep the old classes. With a head of class means "
            f"beside the projection {means} are right, with 20 stored images of each class too {both}.",
            "**Old data that you may keep**: train on all of it (joint). With one head, 20 stored images of each class "
            f"beside the projection give {stored} in place of {plain}.",
            f"**A language model**, after German, code and Spanish: fine-tuning loses {lost[0]} points of its old "
            f"answers, LoRA {lost[1]}, the projection at strength 30 {lost[2]}. It learns less of the last language. "
            "The numbers depend on which is last ([docs/language.md](docs/language.md), 2 seeds).",
            "**No old data at all**: measure on the new task's own inputs, before you train, and project. A classifier "
            f"that learned new classes kept {kept[0]} of its answers so, {kept[1]} with its old images, {kept[2]} "
            f"without a memory, and {kept[3]} with a frozen backbone, on which the new classes were as good "
            "([company](docs/results/company.md), 3 seeds).",
        )
    )


def same(arm: str) -> str:
    """The answers that stay as they were in the company's story, by the way in which it learns the new classes."""
    lines = map(json.loads, (DOCS / "company.jsonl").read_text(encoding="utf-8").splitlines())
    return f"{100 * fmean(line['same'] for line in lines if line['arm'] == arm):.1f}%"


def bullet(words: str) -> str:
    """An item of a list, in lines of README's width."""
    return fill(f"- {words}", WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def readme_content() -> str:
    """The tables and the list of README."""
    return f"{accuracies()}\n\n{advice()}\n"


def published() -> str:
    """Split MNIST: published numbers beside those of this benchmark."""
    run = found("split-mnist")
    rows = [[words, theirs, cell(run, method) if method else NONE] for words, method, theirs in THEIRS]
    return f"{table(['Method', 'Published', 'Here (seeds)'], rows)}\n"


def written(text: str, content: str) -> str:
    """A page with what stands between the marks written anew."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{content}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if README would change")
    check = parser.parse_args().check
    for path, content in ((README, readme_content), (PUBLISHED, published)):
        text = path.read_text(encoding="utf-8")
        if check and written(text, content()) != text:
            sys.exit(1)
        path.write_text(written(text, content()), encoding="utf-8")


if __name__ == "__main__":
    main()
