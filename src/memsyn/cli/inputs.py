"""What `gate` reads beside memories: the function that builds a model, its weights, and inputs without labels.

Owns the formats of data: safetensors, .npz, and lines of JSON. Nothing is unpickled.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from memsyn import BatchError, MemsynError, MismatchError, OptionError
from memsyn.batches import take
from memsyn.parameters import canonical_name, unwrap
from memsyn.storage.atomic_files import check_regular
from memsyn.storage.foreign_files import load_arrays, load_tensors

BATCH: Final = 64
"""How many samples are run at a time."""


def imported(option: str, named: str, expected: str) -> Any:
    """What `package.module:name` names; `expected` says what that is to be. The working folder is searched too.

    Raises:
        OptionError: there is no such thing, or its module failed.
    """
    module, sign, path = named.partition(":")
    if not (sign and module and path):
        raise OptionError(f"{option} must be package.module:{expected}; got {named!r}.")
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        return found
    except MemsynError:
        raise
    except Exception as error:
        hint = " Run it from the folder that holds the module, or set PYTHONPATH." * isinstance(error, ImportError)
        raise OptionError(f"{option} {named} failed: {type(error).__name__}: {error}.{hint}") from error
    finally:
        sys.path.remove("")


def build_model(named: str) -> nn.Module:
    """Call the function `package.module:build`, which returns the model.

    Raises:
        OptionError: there is no such function, it failed, or it returns something else.
    """
    found = imported("--model", named, "build, the function that builds the model")
    try:
        built = found if isinstance(found, nn.Module) else found()
    except MemsynError:
        raise
    except Exception as error:
        raise OptionError(f"--model {named} failed: {type(error).__name__}: {error}.") from error
    if not isinstance(built, nn.Module):
        raise OptionError(f"--model {named} must return a torch.nn.Module; it returned a {type(built).__name__}.")
    return built


def load_weights(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load a state_dict into a model that was just built.

    Raises:
        MismatchError: names or shapes are not the model's.
    """
    places = {
        canonical_name(n): t for n, t in unwrap(model).state_dict(keep_vars=True).items() if isinstance(t, Tensor)
    }
    held = {id(places[name]) for name in state if name in places}  # a tied parameter needs one of its names
    missing = [name for name, tensor in places.items() if id(tensor) not in held]
    unknown = [name for name in state if name not in places]
    reshaped = [name for name, values in state.items() if name in places and values.shape != places[name].shape]
    for names, what in ((missing, "lacks"), (unknown, "holds, and the model does not,"), (reshaped, "reshapes")):
        if names:
            raise MismatchError(
                f"{path} {what} {len(names)} tensors of {len(places)}, the first is {names[0]}: it is not the "
                "state_dict of the model that --model builds."
            )
    with torch.no_grad():
        for name, values in state.items():
            places[name].copy_(values)


def read_batches(path: Path) -> list[Any]:
    """The inputs of a file, in batches: a tensor, or a mapping of tensors by the names of the model's arguments.

    Raises:
        BatchError: the file cannot be read, or its tensors do not have one first dimension.
    """
    try:
        if path.suffix == ".npz":
            parts = [load_arrays(path)]
        elif path.suffix in (".jsonl", ".json", ".ndjson"):
            check_regular(path)
            parts = _from_lines(path.read_text(encoding="utf-8").splitlines())
        else:
            parts = [load_tensors(path)]
    except Exception as error:  # numbers of any size, lists of any depth, objects without a key
        raise BatchError(
            f"{path} could not be read: {error}. Give inputs as safetensors, .npz, or .jsonl with a line of numbers "
            "for each sample."
        ) from error
    batches: list[Any] = []
    for found in parts:
        sizes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        if not found or any(not shape for shape in sizes.values()) or len({shape[0] for shape in sizes.values()}) > 1:
            raise BatchError(f"{path} must hold tensors with one first dimension, the samples; got {sizes}.")
        batch: Any = next(iter(found.values())) if len(found) == 1 else found
        total = next(iter(sizes.values()))[0]
        batches += [take(batch, start, start + BATCH) for start in range(0, total, BATCH)]
    return batches


def _from_lines(lines: list[str]) -> list[dict[str, Tensor]]:
    """Tensors from lines of JSON: of lists of numbers one tensor, of objects of such lists a tensor for each key.

    Samples of other shapes than the one before, such as longer texts, begin a part of their own: nothing is padded.
    """
    samples = [json.loads(line) for line in lines if line.strip()]
    if not (samples and all(isinstance(sample, Mapping) for sample in samples)):
        samples = [{"inputs": sample} for sample in samples]
    rows = []
    for number, sample in enumerate(samples, start=1):
        if sample.keys() != samples[0].keys():
            raise ValueError(f"sample {number} has the keys {list(sample)}, the first has {list(samples[0])}")
        rows.append({name: torch.tensor(values) for name, values in sample.items()})
    # A whole number among others is written without a point.
    dtypes = {name: reduce(torch.promote_types, (row[name].dtype for row in rows)) for name in rows[0]} if rows else {}
    return [
        {name: torch.stack([row[name] for row in part]).to(dtype) for name, dtype in dtypes.items()}
        for part in (list(group) for _, group in groupby(rows, lambda row: [row[name].shape for name in dtypes]))
    ]
