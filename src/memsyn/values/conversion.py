"""Converts memories and importances to and from plain dicts of tensors in files of `torch.save`.

Owns three structures: Avalanche's MAS plugin, the official code of MAS, and memsyn's own. No other module reads such
files. They are read with `weights_only=True`, which creates only tensors and plain containers.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from memsyn.errors import MemoryFileError, MissingFileError, OptionError
from memsyn.parameters import canonical_name, near_names, wide_dtype
from memsyn.storage.atomic_files import open_file, replace_file
from memsyn.storage.foreign_files import check_size, load_dict, load_tensors
from memsyn.storage.reading_and_writing import MOMENTS, STATISTICS
from memsyn.storage.safetensors_header import DTYPES
from memsyn.values.consolidation import Consolidation
from memsyn.values.directions import GROUPS
from memsyn.values.factors import KroneckerFactors
from memsyn.values.importance import MAGNITUDE, OBJECTIVE, Importance, check_same_shapes
from memsyn.values.memory import Held, Memory

PLAIN: Final = "memsyn"
AVALANCHE: Final = "avalanche"
OFFICIAL: Final = "official"
STRUCTURES: Final = {
    PLAIN: "memsyn's plain dict",
    AVALANCHE: "Avalanche's MAS plugin",
    OFFICIAL: "the official MAS code's reg_params",
}
"""Structure -> its description in messages."""

CONVERTED: Final = "convert"
"""The rule in the history of a memory that was converted from other code."""

BATCHED: Final = f"{MAGNITUDE} of the batch mean"
"""The magnitude in the other two: the absolute value of a batch's mean gradient, as in `measure(..., batched=True)`."""

EXPORTS: Final = {
    AVALANCHE: (
        "plain = {k: {n: d.data for n, d in getattr(plugin, k).items()} for k in ('importance', 'params')}",
        "torch.save(plain, 'plain.pt')",
    ),
    OFFICIAL: (
        "plain = {n: model.reg_params[p] for n, p in model.named_parameters() if p in model.reg_params}",
        "torch.save(plain, 'plain.pt')",
    ),
}
"""Structure -> two lines that write a file for `read_plain`, to be run where the old code can be imported."""


_HOW_TO_EXPORT: Final = "\n".join(
    [
        "Only plain dicts of tensors are read, never a pickled model or plugin, which can run code. Two lines",
        "write such a dict, where the old code can be imported:",
        *(
            "\n".join([f"  {STRUCTURES[whose]}:", *(f"    {line}" for line in lines)])
            for whose, lines in EXPORTS.items()
        ),
    ]
)


def is_plain(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of torch's: the ninth byte of every safetensors file is the brace of its JSON header."""
    try:
        with open_file(path) as (file, _):
            return file.read(9)[8:] != b"{"
    except OSError:
        return False  # a URL, a missing file, a folder, a pipe: `storage` raises the error


def write_plain(path: str | os.PathLike[str], held: Held) -> None:
    """Write a plain dict with `torch.save`.

    The dict of a memory has the keys importance, anchor, counts, history; the dict of an importance has importance,
    num_samples, objective, magnitude. `importance` is Omega, the mean over samples, in both. Tensors are by parameter
    name; all other values are plain containers, numbers and text. A memory with directions has the key directions and
    the groups of `directions.GROUPS` too; one with statistics has the key statistics. The dict of factors has their
    header's entries, and the sums as moments.

    Raises:
        MemoryFileError: the file cannot be written.
    """
    plain: dict[str, Any]
    if isinstance(held, Memory):
        plain = {"importance": held.importance, "anchor": held.anchor, "counts": held.counts}
        plain["history"] = [asdict(entry) for entry in held.history]
        if held.directions is not None:
            plain |= {"directions": held.directions.header(), **held.directions.groups()}
        plain |= {STATISTICS: held.statistics} if held.statistics else {}
    elif isinstance(held, KroneckerFactors):
        plain = {**held.header(), MOMENTS: held.sums}
    else:
        plain = {"importance": held.mean(), "num_samples": held.num_samples}
        plain |= {"objective": held.objective, "magnitude": held.magnitude}
    try:
        with replace_file(path) as file:
            torch.save(plain, file)
    except OSError as error:
        raise MemoryFileError(
            f"{path} could not be written: {error}. A file that was there before is whole."
        ) from error


def new_names(names: Collection[str], rules: Iterable[str]) -> dict[str, str]:
    """Old name -> new name by rules `OLD=NEW`, one after the other; names that no rule changes are left out.

    OLD is the start of names: `module.=` takes `module.` away, `=net.` puts `net.` in front of every name. With `*` it
    is a pattern of whole names; each `*` stands for any text, which takes the place of the same `*` in NEW:
    `*.weight_g=*.parametrizations.weight.original0`.

    Raises:
        OptionError: a rule has no `=` or more stars in NEW than in OLD, or changes no name, or two names become one.
    """
    present = {name: name for name in names}
    for rule in rules:
        old, sign, new = rule.partition("=")
        if not sign or "=" in new or new.count("*") > old.count("*"):
            raise OptionError(f"expected OLD=NEW, with at most as many * in NEW as in OLD; got {rule!r}.")
        pattern = re.compile("(.*)".join(map(re.escape, old.split("*"))) + ("" if "*" in old else "(.*)"))
        parts = (new if "*" in old else new + "*").split("*")
        changed = False
        for name, own in present.items():
            found = pattern.fullmatch(own)
            if found is not None:
                texts = [*found.groups()[: len(parts) - 1], ""]
                present[name] = "".join(part + text for part, text in zip(parts, texts, strict=True))
                changed |= present[name] != own
        if not changed:
            raise OptionError(f"the rule {rule!r} changes none of {len(names)} names. {near_names(old, names)}")
    counts = Counter(present.values())
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise OptionError(f"two parameters would be named {twice[0]}: give rules that keep names apart.")
    return {name: new for name, new in present.items() if new != name}


def read_weights(path: Path) -> dict[str, Tensor]:
    """A model's weights by parameter name, from a state_dict in a file of safetensors or of torch.

    Raises:
        MemoryFileError: the file is missing, damaged, or not a state_dict of dense tensors.
    """
    state: Mapping[Any, Any] = _load(path) if is_plain(path) else load_tensors(path)
    found = {
        canonical_name(name): values
        for name, values in state.items()
        if isinstance(name, str) and isinstance(values, Tensor)
    }
    sparse = [name for name, values in found.items() if values.layout != torch.strided]
    if sparse:
        raise MemoryFileError(f"{path} holds sparse tensors, the first is {sparse[0]}: write them with .to_dense().")
    for name, values in found.items():
        if values.dtype not in DTYPES.values() or values.dtype.itemsize * values.is_floating_point() == 1:
            raise MemoryFileError(f"{path} holds {name} as {values.dtype}: convert it to a type to compute with.")
        if values.device.type != "cpu":
            raise MemoryFileError(f"{path} holds {name} without its values: save a model that is not on meta.")
    check_size(path, found.values())
    return found


def read_plain(path: Path, *, num_samples: int | None = None, exact: bool = False) -> tuple[Held, str]:
    """Read a dict that `torch.save` wrote; returns what it holds, and its structure, a key of `STRUCTURES`.

    Three structures are known, w standing for a parameter's name:

        memsyn       {"importance": {w: tensor}, "anchor": {w: tensor}, ...}, as `write_plain` writes it
        avalanche    {"importance": {w: tensor}, "params": {w: tensor}}, or {w: tensor}; with one task, {0: {w: tensor}}
        official     {w: {"omega": tensor, "init_val": tensor}}, which is `reg_params` by name

    A dict with an anchor is a memory, without one an importance. All three penalise with
    lambda * sum Omega (theta - theta*)^2, so that a strength keeps its effect (older versions of Avalanche: half).

    Args:
        path: the file.
        num_samples: the number of samples, if the file does not say.
        exact: whether it was measured with batches of one sample. If not, its magnitude is "abs of the batch mean", as
            of `measure(..., batched=True)`, and it is not consolidated with exact importances.

    Raises:
        MemoryFileError: the file is missing or damaged, holds more than plain containers of tensors, or has another
            structure; the error says how to write a file that can be read.
        OptionError: `num_samples` is missing, or is given although the file has it.
    """
    plain = _load(path)
    if (num_samples is not None or exact) and ("history" in plain or "num_samples" in plain):
        raise OptionError(f"{path} itself says how it was measured: leave num_samples and exact out.")
    if "history" in plain:
        groups = {name: _tensors(path, plain.get(name), name) for name in ("anchor", "importance")}
        if "directions" in plain:
            groups |= {name: _tensors(path, plain.get(name, {}), name) for name in GROUPS}
        if STATISTICS in plain:
            groups[STATISTICS] = _tensors(path, plain[STATISTICS], STATISTICS)
        return Memory.from_file(path, plain, groups), PLAIN
    if MOMENTS in plain:
        return KroneckerFactors.from_file(path, plain, {MOMENTS: _tensors(path, plain[MOMENTS])}), PLAIN
    whose, omega, anchor = _groups(path, plain)
    count = plain.get("num_samples", num_samples)
    if count is None:
        raise OptionError(f"{path} does not say on how many samples it was measured: give num_samples (--samples).")
    if type(count) is not int or not 1 <= count < 2**63:
        raise OptionError(f"num_samples must be a whole number, at least 1 and below 2^63; got {count!r:.40}.")
    objective, magnitude = plain.get("objective", OBJECTIVE), plain.get("magnitude", MAGNITUDE if exact else BATCHED)
    if anchor is None:
        sums = {name: values.to(wide_dtype(values)) * count for name, values in omega.items()}
        return Importance(sums, count, {}, str(objective), str(magnitude)), whose
    anchor = {name: values for name, values in anchor.items() if name in omega}
    check_same_shapes(anchor, omega, f"the anchor in {path}", "the importance")
    entry = Consolidation.now(
        anchor,
        num_samples=count,
        rule=CONVERTED,
        decay=None,
        objective=str(objective),
        magnitude=str(magnitude),
        label=f"from {STRUCTURES[whose]}",
    )
    return Memory(anchor, omega, (entry,), dict.fromkeys(omega, count)), whose


def _groups(path: Path, plain: Mapping[Any, Any]) -> tuple[str, dict[str, Tensor], dict[str, Tensor] | None]:
    """The structure of a dict, its importance, and its anchor if it has one."""
    if "importance" in plain:
        key = "params" if "params" in plain else "anchor"
        anchor = _tensors(path, plain[key]) if key in plain else None
        return AVALANCHE if key == "params" else PLAIN, _tensors(path, plain["importance"], "importance"), anchor
    entries = {name: value for name, value in plain.items() if name != "lambda"}
    if entries and all(
        isinstance(entry, Mapping) and {"omega", "init_val"} <= entry.keys() for entry in entries.values()
    ):
        omega = _tensors(path, {name: entry["omega"] for name, entry in entries.items()}, "importance")
        return OFFICIAL, omega, _tensors(path, {name: entry["init_val"] for name, entry in entries.items()})
    return AVALANCHE, _tensors(path, plain, "importance"), None


def _tensors(path: Path, group: Any, kind: str = "anchor") -> dict[str, Tensor]:
    """Copies of tensors by name, from a group by name or by one task and name."""
    if isinstance(group, Mapping) and group and all(isinstance(task, int) for task in group):
        if len(group) > 1:
            tasks = ", ".join(map(str, group))
            raise _refusal(path, f"holds {len(group)} tasks ({tasks}), but a memory has one anchor: take the last task")
        (group,) = group.values()
    if not isinstance(group, Mapping):
        raise _refusal(path, "holds something else where tensors by name should be")
    found: dict[str, Tensor] = {}
    num_bytes, size = 0, path.stat().st_size
    for name, value in group.items():
        if not isinstance(name, str):
            raise _refusal(path, "holds tensors without their parameters' names")
        if not _is_dense(value):
            raise _refusal(path, f"holds something else than a dense tensor of real numbers as {name}")
        num_bytes += value.numel() * value.element_size()
        if num_bytes > size:  # many views of one storage would need more memory than the file has bytes
            raise _refusal(path, f"has {size} bytes and holds tensors of more")
        found[name] = value.detach().clone()  # views of one storage become tensors of their own
        if kind == "importance" and bool((value < 0).any()):
            raise MemoryFileError(
                f"{path}: {name} holds negative values, but importance is never negative. If this is a model's "
                "state_dict, measure the model: a state_dict holds no importance."
            )
    return found


def _is_dense(value: object) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.is_floating_point()
        and value.device.type == "cpu"
    )


def _load(path: Path) -> Mapping[Any, Any]:
    try:
        return load_dict(path)
    except MissingFileError:
        raise
    except MemoryFileError as error:
        raise MemoryFileError(f"{error}\n{_HOW_TO_EXPORT}") from error.__cause__


def _refusal(path: Path, what: str) -> MemoryFileError:
    return MemoryFileError(f"{path} {what}.\n{_HOW_TO_EXPORT}")
