"""Texts as blocks of tokens: the new domains, English, and what the model writes itself.

Owns where they come from, and which part of each is held out. Debian's packages are read where apt installs them.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memsyn import MemsynError
from memsyn_bench.language.model import SEPARATOR, Assistant, Frozen, opening

FORTUNES = Path("/usr/share/games/fortunes")
HELD_OUT_SHARE = 0.1
"""The share of a domain's documents that is never learned from."""
SPLIT_SEED, OWN_SEED = 0, 1
TEMPERATURE = 0.8
MAX_CHARACTERS = 4_000_000


@dataclass(frozen=True, eq=False)
class Text:
    """Blocks of tokens to learn from or to measure on, and others to score on, each (N, T)."""

    training: Tensor
    held_out: Tensor
    skipped: int = 0
    """So many tokens at the start of each block are given: they are not scored."""


@dataclass(frozen=True)
class Domain:
    """A new domain."""

    summary: str
    documents: Callable[[], list[str]]


def fortunes(folder: Path, package: str) -> list[str]:
    """The quotations of a Debian package, each once.

    Raises:
        MemsynError: the package is not installed.
    """
    paths = sorted(path for path in folder.glob("*") if path.is_file() and not path.is_symlink())
    paths = [path for path in paths if path.suffix != ".dat"]
    if not paths:
        raise MemsynError(f"{folder} has no quotations: apt-get install {package}.")
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return list(dict.fromkeys(one.strip() for text in texts for one in text.split("\n%") if one.strip()))


def standard_library() -> list[str]:
    """Python's own modules, without packages and tests."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py"))]


DOMAINS: dict[str, Domain] = {
    "german": Domain("German quotations of Debian's fortunes-de", lambda: fortunes(FORTUNES / "de", "fortunes-de")),
    "code": Domain("Python's standard library", standard_library),
    "spanish": Domain("Spanish quotations of Debian's fortunes-es", lambda: fortunes(FORTUNES / "es", "fortunes-es")),
}
ENGLISH = Domain("English quotations of Debian's fortunes", lambda: fortunes(FORTUNES, "fortunes"))


def domain_text(assistant: Assistant, domain: Domain, *, length: int, num_held_out: int) -> Text:
    """A domain as blocks of `length` tokens. Documents are split before they are cut, so no document is in both."""
    documents = domain.documents()
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    shuffled = [documents[index] for index in torch.randperm(len(documents), generator=generator).tolist()]
    number = max(1, int(HELD_OUT_SHARE * len(shuffled)))
    held_out = _blocks(assistant, shuffled[:number], length)
    chosen = torch.randperm(len(held_out), generator=generator)[:num_held_out]
    return Text(_blocks(assistant, shuffled[number:], length), held_out[chosen])


def _blocks(assistant: Assistant, documents: Iterable[str], length: int) -> Tensor:
    """The documents one after the other, cut into blocks; the last tokens that fill no block are left out."""
    separator = assistant.tokenizer.encode(SEPARATOR)
    tokens: list[int] = []
    num_characters = 0
    for document in documents:
        tokens += assistant.tokenizer.encode(document) + separator
        num_characters += len(document)
        if num_characters > MAX_CHARACTERS:
            break
    number = len(tokens) // length
    return torch.tensor(tokens[: number * length]).view(number, length)


def own_text(
    assistant: Assistant,
    *,
    length: int,
    num_measured: int,
    num_held_out: int,
    precision: str,
    seed: int = OWN_SEED,
    batch_size: int = 32,
) -> Text:
    """Conversations that the model writes by itself, its user's part too (as Xu et al. 2024, Magpie).

    Only `opening()` is given. Nothing of any question is used.
    """
    start = assistant.tokens(opening())
    generator = torch.Generator().manual_seed(seed)
    frozen, rows = Frozen(assistant.network, precision), []
    number = num_measured + num_held_out
    for first in range(0, number, batch_size):
        given = start.expand(min(batch_size, number - first), -1)
        new = frozen.continued(given, length, temperature=TEMPERATURE, generator=generator)
        rows.append(torch.cat([given, new], 1))
    whole = torch.cat(rows)
    return Text(whole[:num_measured], whole[num_measured:], start.shape[1])
