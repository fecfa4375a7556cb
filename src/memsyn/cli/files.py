"""The commands on memory files: inspect, verify, diff, merge, convert.

With --json each prints one JSON object, whose keys are stable: docs/commands.md. Errors go to stderr either way. Pages
and pictures are imported only for --html and --png: they need the extra `report`, the commands do not.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import typer

from memsyn import Importance, KroneckerFactors, Memory, MemoryFileError, MismatchError, OptionError
from memsyn.cli.outputs import check_out
from memsyn.cli.screen import (
    by_route,
    describe,
    print_difference,
    print_held,
    say,
    say_json,
)
from memsyn.storage.reading_and_writing import read
from memsyn.values import comparison
from memsyn.values.conversion import PLAIN, STRUCTURES, is_plain, new_names, read_plain, read_weights, write_plain
from memsyn.values.memory import KINDS, Held, kind_of, load

File = Annotated[
    str, typer.Argument(metavar="FILE", help="A memory, importance or factors file of memsyn, or its URL.")
]
Files = Annotated[list[str], typer.Argument(metavar="FILE", help="Files of memsyn, or their URLs.")]
Out = Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page that opens in any browser.")]
Png = Annotated[Path | None, typer.Option(metavar="DIR", help="Write the charts as pictures to this folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def inspect_file(
    path: File,
    html: Html = None,
    png: Png = None,
    weights: Annotated[
        Path | None, typer.Option(help="A model's state_dict: the page says whether it is safe.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print what a memory, importance or factors file protects, layer by layer; with --html also write a page.

    Example: memsyn inspect runs/demo/mas-seed0.memsyn.safetensors
    """
    held = load(path)
    if weights is not None and not (isinstance(held, Memory) and (html or png)):
        raise OptionError("--weights needs a memory file and --html or --png: add one of them, or leave it out.")
    if weights is not None and isinstance(held, Memory) and held.directions is not None and not held.anchor:
        raise OptionError("--weights needs an anchor, and this memory holds directions alone: leave it out.")
    if html or png:
        from memsyn.report.memory_page import memory_page
        from memsyn.report.page import write_report

        name = os.path.basename(path) if weights is None else f"{weights.name} against {os.path.basename(path)}"
        page = memory_page(held, name, read_weights(weights) if weights else None)
        write_report(page, html, png)
    if as_json:
        say_json(_facts(held))
    else:
        print_held(held)


def _facts(held: Held) -> dict[str, Any]:
    objective, magnitude = held.quantity or (None, None)
    facts = {
        "kind": kind_of(held),
        "num_samples": held.num_samples,
        "objective": objective,
        "magnitude": magnitude,
        "layers": [asdict(layer) for layer in held.summary()],
    }
    if isinstance(held, Memory):
        history = [asdict(entry) for entry in held.history]
        kept = list(held.statistics)
        return {**facts, "history": history, "directions": _directions_facts(held), "statistics": kept}
    return {**facts, "routes": by_route(held)}


def _directions_facts(memory: Memory) -> dict[str, Any] | None:
    if memory.directions is None:
        return None
    objective, magnitude = memory.directions_quantity or (None, None)
    return {
        "objective": objective,
        "magnitude": magnitude,
        "rank": memory.directions.rank,
        "layers": [asdict(layer) for layer in memory.directions.summary()],
        "diagonal": list(memory.directions.diagonal),
        "free": sorted(memory.directions.free),
    }


def verify_files(paths: Files, as_json: Json = False) -> None:
    """Check files: checksum, format, shapes, finite values, nothing negative that cannot be. One line a file.

    Exits with 0 if all are whole, with 1 if one is damaged, missing or not of memsyn.

    Example: memsyn verify backup/*.memsyn.safetensors
    """
    results = [_verified(path) for path in paths]
    if as_json:
        say_json({"ok": all(result["ok"] for result in results), "files": results})
    else:
        for result in results:
            say(f"OK      {result['path']}: {result['kind']}" if result["ok"] else f"FAILED  {result['error']}")
    if not all(result["ok"] for result in results):
        raise typer.Exit(1)


def _verified(path: str) -> dict[str, Any]:
    try:
        header, groups = read(path)
        kind = str(header.get("kind"))
        if kind in KINDS:
            KINDS[kind].from_file(path, header, groups)
            kind = "checkpoint" if "checkpoint" in header else kind
    except MemoryFileError as error:
        return {"path": path, "ok": False, "kind": None, "error": str(error)}
    return {"path": path, "ok": True, "kind": kind, "error": None}


def diff_files(
    a: Annotated[str, typer.Argument(metavar="A", help="The older file.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The newer file.")],
    html: Html = None,
    png: Png = None,
    as_json: Json = False,
) -> None:
    """Compare two files: whether their difference matters, which layers it is in, and where the anchors moved.

    Exits with 0 if they hold the same, bit for bit, with 1 if they differ or cannot be compared.

    Example: memsyn diff january.memsyn.safetensors february.memsyn.safetensors
    """
    one, other = load(a), load(b)
    found = comparison.diff(one, other)
    if html or png:
        from memsyn.report.memory_page import difference_page
        from memsyn.report.page import write_report

        write_report(difference_page(one, other, (os.path.basename(a), os.path.basename(b))), html, png)
    if as_json:
        say_json({"extent": found.extent, "sentence": found.sentence, **asdict(found)})
    else:
        print_difference(one, other, found)
    if not found.same:
        raise typer.Exit(1)


def merge_files(paths: Files, out: Out, as_json: Json = False) -> None:
    """Add up what replicas of one model measured: the result is that of one which saw all samples.

    Importance files are added up, and so are factors files. Memory files are merged if each holds one consolidation and
    all are of the same weights; to go on from a memory of several consolidations, merge importances or factors, and
    consolidate the result.

    Example: memsyn merge replica1.safetensors replica2.safetensors -o all.safetensors
    """
    if len(paths) < 2:
        raise OptionError("there is nothing to merge: give at least two files.")
    found = [path if "://" in path else os.path.realpath(path) for path in paths]
    twice = [path for path, real in dict(zip(paths, found, strict=True)).items() if found.count(real) > 1]
    if twice:
        raise OptionError(f"{', '.join(twice)} is given more than once: its samples would count twice.")
    check_out(out, paths)
    merged = reduce(_added, (load(path) for path in paths))
    merged.save(out)
    if as_json:
        say_json({**_written(out, merged), "files": paths})
    else:
        say(f"{out}: {describe(merged)}, of {len(paths)} files.")


def _added(one: Held, other: Held) -> Held:
    if isinstance(one, Memory) and isinstance(other, Memory):
        return one.merge(other)
    if isinstance(one, Importance) and isinstance(other, Importance):
        return one + other
    if isinstance(one, KroneckerFactors) and isinstance(other, KroneckerFactors):
        return one + other
    raise MismatchError(f"{_a(one)} and {_a(other)} cannot be merged: give files of one kind.")


def _a(held: Held) -> str:
    return {"memory": "a memory", "importance": "an importance"}.get(kind_of(held), kind_of(held))


def convert_file(
    path: Annotated[str, typer.Argument(metavar="FILE", help="A file of memsyn, or a dict saved by torch.")],
    out: Out,
    num_samples: Annotated[
        int | None, typer.Option("--samples", help="On how many samples it was measured, if the file does not say.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="It was measured with batches of one sample, if the file does not say.")
    ] = False,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW",
            help="Names that begin with OLD begin with NEW instead; with * in OLD, a pattern of whole names. Repeat it "
            "for several. A file of memsyn stays one.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a file of memsyn into a plain dict of tensors saved by torch, or such a dict into a file of memsyn.

    With --rename a file of memsyn is written as a file of memsyn, with other names of parameters: --rename module.=
    takes a prefix away, --rename =net. adds one.

    Reads memsyn's own dicts, the importance and params of Avalanche's MAS plugin, and the reg_params of the official
    MAS code. They are loaded with weights_only=True: a pickled model is refused, and the error says how to export it.

    Example: memsyn convert reg_params.pt -o old.memsyn.safetensors --samples 5000
    """
    check_out(out, [path])
    held: Held
    names: dict[str, str] = {}
    if is_plain(path):
        held, whose = read_plain(Path(path), num_samples=num_samples, exact=exact)
        held, names = _renamed(held, rename or [])
        held.save(out)
        how = f"from {STRUCTURES[whose]}"
    elif num_samples is not None or exact:
        raise OptionError(f"{path} itself says how it was measured: leave --samples and --exact out.")
    elif rename:
        held, names = _renamed(load(path), rename)
        held.save(out)
        whose, how = PLAIN, "as a file of memsyn"
    else:
        held, whose, how = load(path), PLAIN, f"as {STRUCTURES[PLAIN]}"
        write_plain(out, held)
    if as_json:
        say_json({**_written(out, held), "structure": whose, "renamed": names})
    else:
        said = f", {len(names)} parameters renamed" if names else ""
        say(f"{out}: {describe(held)}, {how}{said}.")


def _renamed(held: Held, rules: list[str]) -> tuple[Held, dict[str, str]]:
    """A value with other names, and old name -> new name."""
    names = new_names({*held.names, *(held.statistics if isinstance(held, Memory) else ())}, rules)
    return held.renamed(names), names


def _written(out: str, held: Held) -> dict[str, Any]:
    return {"out": out, "kind": kind_of(held), "num_samples": held.num_samples}
