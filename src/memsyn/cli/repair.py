"""The command repair: the least way back for weights that forgot, as a file of safetensors.

Owns what is written: all tensors of the new weights, with the repaired ones in their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save
from torch import Tensor

from memsyn import KroneckerFactors, Memory, MemoryFileError, OptionError, repair
from memsyn.cli.files import Json, Out
from memsyn.cli.inputs import build_model, load_weights, read_batches
from memsyn.cli.outputs import check_out
from memsyn.cli.screen import say, say_json
from memsyn.comparing.verdict import MAX_CHANGE
from memsyn.storage.atomic_files import replace_file
from memsyn.values.conversion import read_weights


def repair_weights(
    memory_path: Annotated[str, typer.Argument(metavar="MEMORY", help="A memory file of memsyn, or its URL.")],
    state_path: Annotated[Path, typer.Argument(metavar="STATE", help="The new weights: a state_dict.")],
    out: Out,
    max_change: Annotated[float, typer.Option(help="The largest relative change of old outputs.")] = MAX_CHANGE,
    learned: Annotated[
        str | None, typer.Option(metavar="FILE", help="Factors of the new task: keeps more of it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="package.module:build", help="The function that builds the model.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Inputs of the old kind without labels, as for gate.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The old weights, for a memory that holds no anchor.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Take back as much of a change of weights as the old outputs need, and write the repaired weights.

    Without --data and --model the memory's directions predict the change of the old outputs; with them it is measured.

    Example: memsyn repair old.memsyn.safetensors new.safetensors -o repaired.safetensors --learned factors
    """
    if (data is None) != (model is None):
        raise OptionError("--data and --model belong together: give both, or none for a prediction without data.")
    check_out(out, [memory_path, state_path, learned, data, reference])
    memory, state = Memory.load(memory_path), read_weights(state_path)
    factors = None if learned is None else KroneckerFactors.load(learned)
    before = None if reference is None else read_weights(reference)
    if data is not None and model is not None:
        built, batches = build_model(model), read_batches(data)
        load_weights(built, state, state_path)
        found = repair(built, memory, max_change=max_change, learned=factors, reference=before, batches=batches)
    else:
        found = repair(state, memory, max_change=max_change, learned=factors, reference=before)
    repaired = _with_tied(state, found.weights)
    # A tied weight has all of its names here, each with its own copy.
    whole = {name: repaired[name].clone(memory_format=torch.contiguous_format) for name in state}
    try:
        with replace_file(out) as file:
            file.write(save(whole, {"format": "pt"}))
    except OSError as error:
        raise MemoryFileError(f"{out} could not be written: {error}. A file that was there before is whole.") from error
    if as_json:
        say_json({"out": out, **found.to_json()})
        return
    for line in str(found).splitlines():
        say(line)
    say(f"Written to {out}.")


def _with_tied(state: Mapping[str, Tensor], repaired: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the repaired ones, also under the other names of a tied weight.

    A file may hold a copy for each name. Two weights that have been trained and are equal bit for bit are tied.
    """
    found = {**state, **repaired}
    for name, values in repaired.items():
        before = state[name]
        for other in state.keys() - repaired.keys():
            if state[other].shape == before.shape and torch.equal(state[other], before):
                found[other] = values
    return found
