"""The commands gate and compare: a verdict on new weights, before they ship; for machines and for people.

Owns the exit codes of gate: 0 safe, 2 forgot too much, 1 could not say, also after wrong usage.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import typer
from torch import Tensor, nn
from typer.core import TyperCommand

from memsyn import Comparison, Memory, OptionError, Verdict, compare
from memsyn.cli.files import Html, Json, Png
from memsyn.cli.inputs import build_model, load_weights, read_batches
from memsyn.cli.model_folders import model_of_folder
from memsyn.cli.screen import say, say_json
from memsyn.comparing.answers import AUTO_KIND
from memsyn.comparing.prediction import Prediction, predict
from memsyn.comparing.verdict import BROKEN, MAX_CHANGE, MIN_AGREEMENT, SAFE, check_thresholds, finite_or_none
from memsyn.parameters import canonical_name
from memsyn.values.conversion import read_weights

EXIT_CODES: Final = {SAFE: 0, BROKEN: 2}
"""Verdict -> exit code; 1 for all others."""


_UsageError: Final[type[BaseException]] = typer.BadParameter.__mro__[1]
"""The errors after wrong usage. New versions of typer hold a click of their own, which has no public name."""


class GateCommand(TyperCommand):
    """Exits with 1 after wrong usage: 2 says that the model forgot."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments."""
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            vars(error)["exit_code"] = 1
            raise


MemoryPath = Annotated[str, typer.Argument(metavar="MEMORY", help="A memory file of memsyn, or its URL.")]
StatePath = Annotated[
    Path, typer.Argument(metavar="STATE", help="The new weights: a state_dict, or a folder of Hugging Face.")
]
Model = Annotated[str | None, typer.Option(metavar="package.module:build", help="The function that builds the model.")]
Data = Annotated[Path | None, typer.Option(metavar="FILE", help="Inputs without labels: safetensors, .npz or .jsonl.")]
OldState = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The old weights, as STATE, if the memory has no anchor.")
]
MinAgreement = Annotated[float, typer.Option(help="The least share of same answers, 0 to 1.")]
MaxChange = Annotated[float, typer.Option(help="The largest relative change of outputs.")]
Kind = Annotated[str, typer.Option(help="Answers: auto, classes, tokens, values or embeddings.")]


def gate_weights(
    memory_path: MemoryPath,
    state_path: StatePath,
    model: Model = None,
    data: Data = None,
    reference: OldState = None,
    min_agreement: MinAgreement = MIN_AGREEMENT,
    max_change: MaxChange = MAX_CHANGE,
    kind: Kind = AUTO_KIND,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Say whether new weights still answer as the old ones did, without labels; for CI and nightly jobs.

    With --data and --model both models run on the inputs; a folder of Hugging Face needs no --model. Without data, the
    memory's directions predict the change of outputs, and --max-change alone decides. Exits with 0 if the weights are
    safe, with 2 if they forgot too much, and with 1 if that cannot be said, or after an error.

    Example: memsyn gate old.memsyn.safetensors new.safetensors --model package.module:build --data inputs.safetensors
    """
    found = _judged(memory_path, state_path, model, data, reference, (min_agreement, max_change), kind)
    _report(found, memory_path, state_path, html, None)
    _print(found, as_json=as_json)
    raise typer.Exit(EXIT_CODES.get(found.verdict.answer, 1))


def compare_weights(
    memory_path: MemoryPath,
    state_path: StatePath,
    model: Model = None,
    data: Data = None,
    reference: OldState = None,
    min_agreement: MinAgreement = MIN_AGREEMENT,
    max_change: MaxChange = MAX_CHANGE,
    kind: Kind = AUTO_KIND,
    html: Html = None,
    png: Png = None,
    as_json: Json = False,
) -> None:
    """Compare new weights with the old model of a memory, for people: the verdict, its numbers, and a page.

    It says what `gate` says, and exits with 0 whatever the verdict is. The page shows in which layers the change is.

    Example: memsyn compare old.memsyn.safetensors new.safetensors --html page.html
    """
    found = _judged(memory_path, state_path, model, data, reference, (min_agreement, max_change), kind)
    _report(found, memory_path, state_path, html, png)
    _print(found, as_json=as_json)


class Judged(NamedTuple):
    """A verdict, what it was found by, and what it was found from."""

    verdict: Verdict
    found: Comparison | Prediction
    memory: Memory
    state: Mapping[str, Tensor]
    before: Mapping[str, Tensor] | None
    limits: tuple[float, float]
    """The least agreement and the largest change."""


def _judged(
    memory_path: str,
    state_path: Path,
    model: str | None,
    data: Path | None,
    reference: Path | None,
    limits: tuple[float, float],
    kind: str,
) -> Judged:
    min_agreement, max_change = limits
    check_thresholds(min_agreement, max_change)
    if state_path.is_dir():
        if model is not None:
            raise OptionError(
                f"{state_path} is a folder: with --model, give a state_dict in a file. A folder of Hugging Face is "
                "loaded without --model."
            )
    elif (data is None) != (model is None):
        raise OptionError("--data and --model belong together: give both, or none for a prediction without data.")
    memory = Memory.load(memory_path)
    built, state = _state_of(state_path, model)
    before = None if reference is None else _state_of(reference, None)[1]
    found: Comparison | Prediction
    if data is not None and built is not None:
        old = memory if before is None else before
        found = compare(built, old, read_batches(data), kind=kind, progress=False)
        verdict = found.verdict(min_agreement, max_change)
    else:
        found = predict(memory, state, before)
        verdict = found.verdict(max_change)
    return Judged(verdict, found, memory, state, before, limits)


def _state_of(path: Path, named: str | None) -> tuple[nn.Module | None, Mapping[str, Tensor]]:
    """The model of a folder, or of `--model`, and its weights."""
    if path.is_dir():
        built = model_of_folder(path)
        return built, {canonical_name(name): values for name, values in built.state_dict().items()}
    state = read_weights(path)
    if named is None:
        return None, state
    built = build_model(named)
    load_weights(built, state, path)
    return built, state


def _report(judged: Judged, memory_path: str, state_path: Path, html: Path | None, png: Path | None) -> None:
    if html is None and png is None:
        return
    from memsyn.report.page import write_report
    from memsyn.report.weights_page import weights_page

    _, found, memory, state, before, limits = judged
    names = os.path.basename(memory_path), state_path.name
    write_report(weights_page(memory, state, found, names, before, limits), html, png)


def _print(judged: Judged, *, as_json: bool) -> None:
    verdict, found = judged.verdict, judged.found
    is_on_data = isinstance(found, Comparison)
    if as_json:
        facts = {
            "verdict": verdict.answer,
            "sentence": verdict.sentence,
            "comparison": found.to_json() if is_on_data else None,
            "predicted": None if is_on_data else found.to_json(),
        }
        say_json({**facts, "min_agreement": judged.limits[0], "max_change": finite_or_none(judged.limits[1])})
        return
    say(str(verdict))
    for line in str(found).splitlines() if is_on_data else ():
        say(line)
