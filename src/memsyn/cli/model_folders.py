"""A folder of Hugging Face as the new weights of `gate`: config.json beside safetensors, sharded or not.

Owns the choice of the model's class, and the check that all of its weights were in the folder. Imports `transformers`
(the extra `transformers`) when such a folder is given. Nothing is downloaded, nothing is unpickled, and no code in the
folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from torch import nn

from memsyn import MemoryFileError, MemsynError, MismatchError
from memsyn.storage.atomic_files import check_regular

CONFIG: Final = "config.json"

_STATE_INSTEAD: Final = "give the model's state_dict in one file, with --model package.module:build"


def model_of_folder(folder: Path) -> nn.Module:
    """The model that `save_pretrained` wrote into a folder, in evaluation mode, in the dtype of the files.

    Raises:
        MemoryFileError: the folder holds no such model, or it cannot be loaded.
        MismatchError: the folder lacks weights of the model, or holds others.
        MemsynError: transformers is not installed.
    """
    architecture = _architecture(folder)
    for file in folder.iterdir():
        if not file.is_dir():
            check_regular(file)  # a pipe would be read for ever
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MemsynError(
            f"{folder} is a folder of Hugging Face, which needs {error.name}: pip install 'memsyn[transformers]'."
        ) from error
    builder = getattr(transformers, architecture, None)
    if not (isinstance(builder, type) and issubclass(builder, transformers.PreTrainedModel)):
        raise MemoryFileError(
            f"{folder / CONFIG} names the architecture {architecture!r}, which is no model of transformers "
            f"{transformers.__version__}. For a class of your own, {_STATE_INSTEAD}."
        )
    load: Any = builder.from_pretrained
    try:
        with _silent(transformers):
            built, found = load(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, and refused below
            )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise MemoryFileError(f"{folder} could not be loaded as {architecture}: {reason or type(error)}.") from error
    _check_whole(folder, architecture, found)
    model: nn.Module = built.eval()
    return model


def _architecture(folder: Path) -> str:
    """The class of the model, as its config names it.

    Raises:
        MemoryFileError: there is no config, or it names no class.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise MemoryFileError(
            f"{folder} is a folder without {CONFIG}: give a state_dict in a file, or a folder that save_pretrained of "
            "transformers wrote (an adapter must be merged first)."
        )
    try:
        names = json.loads(path.read_text(encoding="utf-8")).get("architectures")
        name = names[0]
    except (OSError, ValueError, AttributeError, TypeError, LookupError, RuntimeError) as error:
        raise MemoryFileError(
            f"{path} names no architecture, such as BertForSequenceClassification: write the folder by "
            f"save_pretrained, or {_STATE_INSTEAD}."
        ) from error
    return str(name)


def _check_whole(folder: Path, architecture: str, found: dict[str, Any]) -> None:
    """Refuse a model of which a weight was drawn at random, or left out.

    Raises:
        MismatchError: says which.
    """
    reshaped = [name for name, *_ in found["mismatched_keys"]]
    for names, what in (
        (found["missing_keys"], "lacks"),
        (found["unexpected_keys"], "holds, and the model does not,"),
        (reshaped, "reshapes"),
    ):
        if names:
            raise MismatchError(
                f"{folder} {what} {len(names)} tensors, the first is {min(names)}: it is not a whole "
                f"{architecture}. Load it as the class that you serve, and write it by save_pretrained."
            )


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Without the bars and reports of transformers: what went wrong is in our errors."""
    logging = transformers.utils.logging
    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
