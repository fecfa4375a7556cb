"""The command merge-models: one checkpoint from several, weighted by what each of them relies on.

Owns how files and folders are matched with memories. A layer at a time is in memory.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from memsyn.cli.files import Json, Out
from memsyn.cli.outputs import check_out
from memsyn.cli.screen import say, say_json
from memsyn.storage.weights_files import WHOLE, StoredWeights, write_weights
from memsyn.values.memory import load_mapped
from memsyn.values.model_merging import merged_tensors


def merge_model_files(
    paths: Annotated[
        list[Path], typer.Argument(metavar="MODEL", help="Checkpoints: safetensors, or Hugging Face folders.")
    ],
    memories: Annotated[
        list[str], typer.Option("--memory", metavar="FILE", help="The memory of a model. One for each, in their order.")
    ],
    out: Out,
    as_json: Json = False,
) -> None:
    """Merge fine-tuned models of one base into one, weighted by what each of them relies on.

    With Kronecker factors in all memories, the merged weights are those for which the predicted changes of all models
    add up to the least; with importances, the weighted mean. A tensor that only one model has is taken from it. One
    layer at a time is in memory, so that checkpoints may be larger than it. If the first model is a folder, so is the
    output, with the other files of that folder.

    Example: memsyn merge-models a.safetensors b.safetensors --memory a.memsyn.safetensors --memory b.memsyn.safetensors
    -o merged.safetensors
    """
    target = Path(out)
    sources = [file for path in paths if path.is_dir() for file in path.iterdir()]
    check_out(out, [*paths, *memories])
    for file in sources if target.is_dir() else ():
        check_out(target / file.name, [*sources, *paths, *memories])
    check_out(target / WHOLE, [*sources, *paths, *memories])
    models = [StoredWeights(path) for path in paths]
    known = [load_mapped(path) for path in memories]
    like = {name: model.like(name) for model in reversed(models) for name in model}
    merged = tqdm(merged_tensors(models, known), "merging", len(like), unit="tensor", disable=as_json or None)
    if paths[0].is_dir():
        target.mkdir(parents=True, exist_ok=True)
        write_weights(target / WHOLE, like, merged)
        for file in paths[0].iterdir():
            if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json", ".bin")):
                shutil.copyfile(file, target / file.name)
    else:
        write_weights(target, like, merged)
    if as_json:
        say_json({"out": out, "num_models": len(models), "num_tensors": len(like)})
    else:
        say(f"{out}: {len(models)} models merged, {len(like):,} tensors.")
