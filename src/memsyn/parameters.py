"""The names of a model's parameters, the same in memory, in errors and on disk.

Owns unwrapping (DataParallel, DistributedDataParallel, AveragedModel, torch.compile), the canonical name of every
parameter and statistic, its layer, which names a pattern chooses, how the names of two models fit, and the fingerprint
of weights. Must not change the model.
"""

import difflib
import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torch.optim.swa_utils import AveragedModel

from memsyn.adapters import modules_in_use
from memsyn.errors import MismatchError, ModelError, OptionError, RenamedParametersWarning
from memsyn.sharding.exchange import first_process, gathered, pieces_on_first, text_told_by
from memsyn.sharding.parts import check_same_processes, is_sharded
from memsyn.torch_private import compiled_original, persistent_buffers, uncompiled_name

Patterns = str | Iterable[str]
"""Names of parameters, or patterns of names: one, or several."""

_Value = TypeVar("_Value")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DataParallel, DistributedDataParallel, AveragedModel, Fabric's or a compiled model.

    Fabric's module calls no hooks of its own when it is saved, and its output refuses any backward pass but Fabric's.
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)) or _is_of_fabric(
            model
        ):
            model = model.module  # type: ignore[assignment]
        elif (original := compiled_original(model)) is not None:
            model = original
        else:
            return model


def refuse_other_sharding(model: nn.Module) -> None:
    """Refuse a model whose parameters are cut in another way than by `fully_shard`: their values are not to be found.

    Raises:
        ModelError: it is under DeepSpeed's ZeRO-3 or the old FullyShardedDataParallel.
    """
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    kind = "FullyShardedDataParallel" if "FullyShardedDataParallel" in kinds else None
    # ZeRO-3 gives each parameter a number, and takes its values away: its shape is (0,).
    if any(getattr(parameter, "ds_id", None) is not None for parameter in model.parameters()):
        kind = "DeepSpeed's ZeRO-3"
    if kind is not None:
        raise ModelError(
            f"the model is cut between processes by {kind}, which memsyn cannot read. Use fully_shard (FSDP2) of "
            "torch.distributed.fsdp: in Accelerate and transformers fsdp_version: 2, in Lightning the "
            "ModelParallelStrategy. Or keep the model whole in each process, as DistributedDataParallel does."
        )


def _is_of_fabric(model: nn.Module) -> bool:
    return type(model).__name__ == "_FabricModule" and "lightning" in type(model).__module__


def canonical_name(name: str) -> str:
    """The name of a parameter in the user's own module, without what `torch.compile`, Fabric and checkpoints add."""
    return uncompiled_name(name).replace("_forward_module.", "").replace("_checkpoint_wrapped_module.", "")


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter of the unwrapped model. A tied parameter has its first name."""
    return {canonical_name(name): parameter for name, parameter in unwrap(model).named_parameters()}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter, for the parameters that require a gradient."""
    return {name: p for name, p in named_parameters(model).items() if p.requires_grad}


def layer_of(name: str) -> str:
    """The layer of a parameter, for tables and reports: its name up to the last dot.

    A parameter of the model itself has no dot in its name and is a layer of its own: an empty name would hide it.

    Example:
        >>> layer_of("encoder.0.weight"), layer_of("position_table")
        ('encoder.0', 'position_table')
    """
    return name.rpartition(".")[0] or name


def with_their_layers(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """All names of the layers of some names, sorted: of `head.weight` also `head.bias`."""
    layers = {layer_of(name) for name in names}
    return sorted(name for name in among if layer_of(name) in layers)


def only_those(values: Mapping[str, _Value], names: Container[str]) -> dict[str, _Value]:
    """The values of some names."""
    return {name: value for name, value in values.items() if name in names}


def under_new_names(values: Mapping[str, _Value], names: Mapping[str, str]) -> dict[str, _Value]:
    """Values by name under other names: old -> new; names that are not given stay."""
    return {names.get(name, name): value for name, value in values.items()}


def way_out(names: Collection[str], among: Collection[str]) -> str:
    """A sentence for errors about parameters that were replaced: how to leave their layers out."""
    wrong = with_their_layers(names, among)
    if not wrong or len(wrong) == len(among):
        return ""
    return (
        f" If you replaced what does not fit, leave it out and free to change: exclude={wrong}, in protect, penalty, "
        "consolidate or memory.select."
    )


def chosen_names(names: Collection[str], only: Patterns | None, exclude: Patterns | None) -> set[str]:
    """The names that `only` matches, or all if it is None, without those that `exclude` matches.

    A pattern is a name, or has `*`, `?` and `[...]` as in `fnmatch`: `*` matches dots too, `head.*` all of a head.

    Raises:
        OptionError: a pattern matches no name, or no name is left.
    """
    kept = set(names) if only is None else _matched(names, only, "only")
    kept -= _matched(names, exclude, "exclude") if exclude is not None else set()
    if names and not kept:
        raise OptionError(f"only={only!r} and exclude={exclude!r} leave none of the memory's {len(names)} parameters.")
    return kept


def statistics_beside(
    names: Iterable[str],
    known: Collection[str],
    kept: Collection[str],
    only: Patterns | None,
    exclude: Patterns | None,
) -> set[str]:
    """The statistics that stay when of the `known` parameters only those in `kept` do.

    A statistic goes with the parameters of its layer. In a layer without parameters, the patterns choose it.
    """
    layers, others = {layer_of(name) for name in kept}, {layer_of(name) for name in known}

    def matches(name: str, patterns: Patterns | None, option: str) -> bool:
        return patterns is not None and any(fnmatchcase(name, pattern) for pattern in listed(patterns, option))

    return {
        name
        for name in names
        if layer_of(name) in layers
        or (
            layer_of(name) not in others
            and (only is None or matches(name, only, "only"))
            and not matches(name, exclude, "exclude")
        )
    }


def _matched(names: Collection[str], patterns: Patterns, option: str) -> set[str]:
    found: set[str] = set()
    for pattern in listed(patterns, option):
        own = {name for name in names if name == pattern or fnmatchcase(name, pattern)}
        if not own:
            raise OptionError(
                f"{option}={pattern!r} matches none of the memory's {len(names)} parameters. "
                f"{near_names(pattern, names)} A whole layer is {'layer.*'!r}."
            )
        found |= own
    return found


def listed(patterns: Patterns, option: str) -> list[str]:
    """Patterns as a list.

    Raises:
        OptionError: they are not text.
    """
    found = (
        [patterns] if isinstance(patterns, str) else list(patterns) if isinstance(patterns, Iterable) else [patterns]
    )
    if not all(isinstance(pattern, str) for pattern in found):
        raise OptionError(f"{option} must be a name or pattern, or a list of them; got {patterns!r:.80}.")
    return found


def near_names(pattern: str, names: Collection[str]) -> str:
    """A sentence that lists the names that are most like a pattern."""
    ordered = sorted(names)
    near = difflib.get_close_matches(pattern, ordered, n=4, cutoff=0.3) or ordered[:4]
    return f"Near names: {', '.join(near)}." if near else "It has none."


_ALIASES: Final = (
    (re.compile(r"\.(?:base_layer|modules_to_save\.[^.]+)\."), "."),  # of PEFT
    (re.compile(r"parametrizations\.([^.]+)\.original0$"), r"\1_g"),  # weight_norm, as a parametrization and before
    (re.compile(r"parametrizations\.([^.]+)\.original1$"), r"\1_v"),
    (re.compile(r"parametrizations\.([^.]+)\.original$"), r"\1_orig"),  # spectral_norm
)
"""What other libraries and other versions of torch add to the name of one and the same parameter."""


def _plain_names(names: Iterable[str]) -> dict[str, str]:
    """Name without `_ALIASES` -> name. Where two names would become one, both stay as they are."""
    plain = {name: name for name in names}
    for pattern, replacement in _ALIASES:
        plain = {name: pattern.sub(replacement, own) for name, own in plain.items()}
    counts = Counter(plain.values())
    return {own if counts[own] == 1 else name: name for name, own in plain.items()}


@dataclass(frozen=True)
class Renaming:
    """How known names fit the names of a model.

    Attributes:
        names: known name -> name in the model, for the names that differ.
        added: what the model's names have in front of the known ones.
        removed: what the known names have in front of the model's.
    """

    names: dict[str, str] = field(default_factory=dict)
    added: str = ""
    removed: str = ""

    def own(self, name: str) -> str:
        """The name in the model of a known name, a buffer's too."""
        return self.names.get(name, self.added + name.removeprefix(self.removed))

    def known(self, name: str) -> str:
        """The known name of a name in the model, a buffer's too."""
        own = next((known for known, new in self.names.items() if new == name), None)
        return own if own is not None else self.removed + name.removeprefix(self.added)


def renaming(known: Collection[str], own: Collection[str], whose: str = "the memory") -> Renaming:
    """How known names fit the names of a model: as they are, or with one prefix added, or with one removed.

    Names of PEFT's base layers and of both kinds of weight normalisation count as the same. A prefix is used if at
    least half of the known names fit with it, and no other way fits more than half as many.

    Raises:
        MismatchError: the names fit in more than one way.
    """
    if all(name in own for name in known):
        return Renaming()
    theirs, ours = _plain_names(sorted(known)), _plain_names(own)
    ways: Counter[tuple[str, str]] = Counter({("", ""): len(theirs.keys() & ours.keys())})
    ways.update((prefix, "") for name in ours for prefix, rest in _splits(name) if rest in theirs)
    ways.update(("", prefix) for name in theirs for prefix, rest in _splits(name) if rest in ours)
    (best, count), *others = ways.most_common()
    if ways["", ""] == count or 2 * count < len(theirs):
        best = ("", "")
    elif others and 2 * others[0][1] > count:
        raise _ambiguity([(best, count), others[0]], len(theirs), whose)
    added, removed = best
    fits = {name: added + plain.removeprefix(removed) for plain, name in theirs.items()}
    names = {name: ours.get(plain, plain if added or removed else name) for name, plain in fits.items()}
    if len(set(names.values())) < len(names):
        raise _ambiguity([(best, count), (("", ""), ways["", ""])], len(theirs), whose)
    return Renaming({name: new for name, new in names.items() if new != name}, added, removed)


def _splits(name: str) -> Iterable[tuple[str, str]]:
    """A name cut at each of its dots: `a.b.c` gives (`a.`, `b.c`) and (`a.b.`, `c`)."""
    return ((name[: index + 1], name[index + 1 :]) for index, letter in enumerate(name) if letter == ".")


def _ambiguity(ways: list[tuple[tuple[str, str], int]], num_names: int, whose: str) -> MismatchError:
    """The error for names that fit a model in two ways, with what to do."""
    said = [
        f"{f'with {added!r} in front' if added else f'without {removed!r}' if removed else 'as they are'} ({count})"
        for (added, removed), count in ways
    ]
    prefixes = [way[0] for way, _ in ways if way[0]]
    cure = "Keep one part of the memory, such as memory.select(only='" + (ways[0][0][1] or "part.") + "*')."
    if prefixes:
        cure = f"Give the submodule that is meant, such as {submodule(prefixes[0])} in place of the model."
    return MismatchError(f"the {num_names} names of {whose} fit the model in two ways: {' and '.join(said)}. {cure}")


def submodule(prefix: str) -> str:
    """How to write the submodule of a prefix: `net.0.` is `model.get_submodule('net.0')`, `net.` is `model.net`."""
    path = prefix.removesuffix(".")
    return f"model.{path}" if all(part.isidentifier() for part in path.split(".")) else f"model.get_submodule({path!r})"


def fitted(known: Collection[str], own: Collection[str], whose: str = "the memory", stacklevel: int = 3) -> Renaming:
    """`renaming`, with a warning that says which names were found.

    Warns:
        RenamedParametersWarning: some names differ.
    """
    found = renaming(known, own, whose)
    used = [(name, new) for name, new in found.names.items() if new in own]
    if used:
        cure = f"give {submodule(found.added)}" if found.added else "rename the file's parameters"
        warnings.warn(
            f"{len(used)} of {len(known)} parameters of {whose} have other names in the model, and were found there: "
            f"{used[0][0]} is {used[0][1]}. To settle the names, {cure}, or use memsyn convert --rename.",
            RenamedParametersWarning,
            stacklevel=stacklevel,
        )
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All tensors that the model's output depends on: its parameters, and its floating point buffers."""
    buffers = {canonical_name(name): buffer for name, buffer in unwrap(model).named_buffers()}
    return {**named_parameters(model), **{name: b for name, b in buffers.items() if b.is_floating_point()}}


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name -> floating point buffer that a state_dict holds: above all running statistics.

    Outputs depend on them as they do on parameters, but no optimizer moves them. A shared buffer has its first name.
    Buffers without values (lazy, or on the meta device) and sparse ones are left out.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module, _ in modules_in_use(unwrap(model)):
        for name, buffer in persistent_buffers(module):
            has_values = not isinstance(buffer, UninitializedBuffer) and not buffer.is_meta
            if has_values and buffer.is_floating_point() and buffer.layout == torch.strided:
                found.setdefault(id(buffer), (canonical_name(f"{prefix}.{name}".lstrip(".")), buffer))
    return dict(found.values())


def moved_statistics(remembered: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Names of the remembered statistics that the model has with other values, in another shape, or not at all."""
    present = statistics(model)
    return [n for n, values in remembered.items() if n not in present or not same_values(present[n], values)]


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, and the same values in the dtype of the first; NaN is equal to NaN."""
    if one.shape != other.shape:
        return False
    like = one
    one, other = (gathered(tensor).to(like.device, like.dtype).to(wide_dtype(like)) for tensor in (one, other))
    return bool(((one == other) | ((one != one) & (other != other))).all())


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype for sums and penalties of a tensor: float32 at least, since half precision overflows."""
    return torch.float32 if tensor.dtype.itemsize == 1 else torch.promote_types(tensor.dtype, torch.float32)


def fingerprint(of: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 of a model's weights, bit for bit: "sha256:" and 64 hexadecimal digits.

    `Importance.fingerprint` says at which weights an importance
    was measured, if it is known. Names, dtypes, shapes and bytes count; the order, the device and the strides do not.
    Of sharded tensors (`fully_shard`), the first process hashes the parts that the others send, piece by piece, and
    tells the result: all processes must call it together. No tensor is gathered; of others, one is copied at a time.

    Args:
        of: a model, of which parameters and floating point buffers count; or tensors by name.

    Raises:
        ModelError: tensors are cut between different processes.

    Example:
        >>> import torch, memsyn
        >>> model = torch.nn.Linear(2, 1)
        >>> before = memsyn.fingerprint(model)
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(1)
        >>> memsyn.fingerprint(model) == before
        False
    """
    tensors = weights(of) if isinstance(of, nn.Module) else of
    digest, like = hashlib.sha256(), None
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if is_sharded(tensor):
            like = tensor if like is None else like
            check_same_processes(like, tensor)
        else:
            tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor.resolve_conj().resolve_neg()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        for piece in pieces_on_first(tensor, HASHED):
            digest.update(piece.view(torch.uint8).numpy().data)
    found = f"sha256:{digest.hexdigest()}"
    return found if like is None else text_told_by(first_process(like), found, like)


HASHED: Final = 2**20
"""How many numbers are hashed at a time."""
