"""Words of 15 languages in five tasks: which of three languages is a word from?

Owns reading the word lists of Debian's packages, and how a word becomes a row of numbers. Knows no networks.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

import torch
from torch import Tensor

from memsyn import MemsynError
from memsyn_bench.task import Task

WORDS_FOLDER = Path("/usr/share/dict")
LANGUAGES = (
    (("American English", "american-english"), ("German", "ngerman"), ("French", "french")),
    (("Spanish", "spanish"), ("Italian", "italian"), ("Portuguese", "portuguese")),
    (("Dutch", "dutch"), ("Danish", "danish"), ("Swedish", "swedish")),
    (("Polish", "polish"), ("Catalan", "catalan"), ("Norwegian", "bokmaal")),
    (("Esperanto", "esperanto"), ("Faroese", "faroese"), ("Galician", "galician-minimos")),
)
"""For each task, the languages and the files of their words."""
PACKAGES = (
    "wamerican wngerman wfrench wspanish witalian wportuguese wdutch wdanish wswedish wpolish wcatalan wnorwegian "
    "wesperanto wfaroese wgalician-minimos"
)
NUM_TRAIN, NUM_TEST = 2_000, 500
"""Words of each language."""
LONGEST = 16


def load_words5(size: int, folder: Path = WORDS_FOLDER) -> list[Task]:
    """Return five tasks of three languages, 6,000 words to train on and 1,500 to test on: (N, 16) int64, 0 to 26.

    A word has 4 to 16 letters, a to z, once its accents are taken off; 0 stands behind its end. Words that two
    languages of a task share are left out. Which words are drawn is part of the sequence, the same for every run.

    Raises:
        MemsynError: a file is missing, or has too few words.
    """
    tasks = []
    for index, languages in enumerate(LANGUAGES):
        lists = [_read_words(folder / file) for _, file in languages]
        generator = torch.Generator().manual_seed(index)
        train, test = [], []
        for own in lists:
            words = sorted(own.difference(*(other for other in lists if other is not own)))
            if len(words) < NUM_TRAIN + NUM_TEST:
                raise MemsynError(f"words5: a word list of {folder} has {len(words)} words: too few.")
            drawn = [words[place] for place in torch.randperm(len(words), generator=generator).tolist()]
            train.append(drawn[:NUM_TRAIN])
            test.append(drawn[NUM_TRAIN : NUM_TRAIN + NUM_TEST])
        names = tuple(name for name, _ in languages)
        tasks.append(Task(", ".join(names), names, *_rows(train), *_rows(test)))
    return tasks


def _read_words(path: Path) -> set[str]:
    if not path.is_file():
        raise MemsynError(f"words5: {path} is missing. Install Debian's packages: apt install {PACKAGES}")
    plain = (_without_accents(line.strip()) for line in path.read_text("utf-8", errors="ignore").splitlines())
    return {word for word in plain if 4 <= len(word) <= LONGEST and word.isascii() and word.isalpha()}


def _without_accents(word: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", word.lower()) if not unicodedata.combining(c))


def _rows(words: list[list[str]]) -> tuple[Tensor, Tensor]:
    """The words as rows of numbers, and the place of each one's language."""
    rows = [[ord(c) - ord("a") + 1 for c in word] for own in words for word in own]
    labels = [label for label, own in enumerate(words) for _ in own]
    return torch.tensor([row + [0] * (LONGEST - len(row)) for row in rows]), torch.tensor(labels)
