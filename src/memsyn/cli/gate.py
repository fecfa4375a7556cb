"""The command gate: a verdict on new weights, before they ship.

Owns its exit codes: 0 safe, 2 forgot too much, 1 could not say, also after wrong usage.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from torch import Tensor, nn
from typer.core import TyperCommand

from memsyn import Memory, OptionError, Verdict, compare
from memsyn.cli.files import Json
from memsyn.cli.inputs import build_model, load_weights, read_batches
from memsyn.cli.model_folders import model_of_folder
from memsyn.cli.screen import plain_errors, say, say_json
from memsyn.comparing.answers import AUTO_KIND
from memsyn.comparing.prediction import predict
from memsyn.comparing.verdict import BROKEN, MAX_CHANGE, MIN_AGREEMENT, SAFE, check_thresholds
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


def gate_weights(
    memory_path: Annotated[str, typer.Argument(metavar="MEMORY", help="A memory file of memsyn, or its URL.")],
    state_path: Annotated[
        Path, typer.Argument(metavar="STATE", help="The new weights: a state_dict, or a folder of Hugging Face.")
    ],
    model: Annotated[
        str | None, typer.Option(metavar="package.module:build", help="The function that builds the model.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Inputs without labels: safetensors, .npz or .jsonl.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The old weights, as STATE, if the memory has no anchor.")
    ] = None,
    min_agreement: Annotated[float, typer.Option(help="The least share of same answers, 0 to 1.")] = MIN_AGREEMENT,
    max_change: Annotated[float, typer.Option(help="The largest relative change of outputs.")] = MAX_CHANGE,
    kind: Annotated[str, typer.Option(help="Answers: auto, classes, tokens, values or embeddings.")] = AUTO_KIND,
    as_json: Json = False,
) -> None:
    """Say whether new weights still answer as the old ones did, without labels; for CI and nightly jobs.

    With --data and --model both models run on the inputs; a folder of Hugging Face needs no --model. Without data, the
    memory's directions predict the change of outputs, and --max-change alone decides. Exits with 0 if the weights are
    safe, with 2 if they forgot too much, and with 1 if that cannot be said, or after an error.

    Example: memsyn gate old.memsyn.safetensors new.safetensors --model package.module:build --data inputs.safetensors
    """
    with plain_errors():
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
        facts: dict[str, Any] = {"comparison": None, "predicted": None}
        if data is not None and built is not None:
            old = memory if before is None else before
            found = compare(built, old, read_batches(data), kind=kind, progress=False)
            verdict, lines = found.verdict(min_agreement, max_change), str(found)
            facts["comparison"] = found.to_json()
        else:
            predicted = predict(memory, state, before)
            verdict, lines = predicted.verdict(max_change), ""
            facts["predicted"] = predicted.to_json()
    _print(verdict, lines, {**facts, "min_agreement": min_agreement, "max_change": max_change}, as_json=as_json)
    raise typer.Exit(EXIT_CODES.get(verdict.answer, 1))


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


def _print(verdict: Verdict, lines: str, facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        say_json({"verdict": verdict.answer, "sentence": verdict.sentence, **facts})
        return
    say(str(verdict))
    for line in lines.splitlines():
        say(line)
