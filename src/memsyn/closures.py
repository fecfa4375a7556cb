"""The functions that a copied model holds, made to refer to the copy.

Owns what `copy.deepcopy` leaves out: functions, and the objects that they refer to. Must never write to the model that
was copied.
"""

from collections.abc import Sequence
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from memsyn.torch_private import copied_function, forward_hooks


def rebind_closures(model: nn.Module, clone: nn.Module) -> None:
    """Replace the model by the clone in the functions that the clone's modules hold, and in their hooks.

    deepcopy does not copy functions. So after `old = model.forward; model.forward = lambda x: 2 * old(x)`, the clone
    would run `old`, a method of the model. Trainers wrap `forward` so: mixed precision, fused losses, offloading.
    """
    replaced: dict[int, Any] = {}
    for mine, its in (
        (model.modules(), clone.modules()),
        (model.parameters(), clone.parameters()),
        (model.buffers(), clone.buffers()),
    ):
        replaced.update((id(old), new) for old, new in zip(mine, its, strict=True))
    for module in clone.modules():
        holders: list[dict[Any, Any]] = [vars(module), *forward_hooks(module)]
        for holder in holders:
            holder.update(
                {
                    key: _rebound(value, replaced)
                    for key, value in holder.items()
                    if isinstance(value, (FunctionType, MethodType, partial)) or _is_plain_callable(value)
                }
            )


def _rebound(value: Any, replaced: dict[int, Any]) -> Any:
    """The same function, or object that is called, with the objects in `replaced` in place of the old ones.

    Anything else, and what refers to none of them, is returned as it is.

    Args:
        value: what a function refers to.
        replaced: id of an object of the model -> the clone's. Functions that were looked at are added.
    """
    if id(value) in replaced:
        return replaced[id(value)]
    if isinstance(value, MethodType):
        parts = value.__func__, value.__self__
        new = [_rebound(parts[0], replaced), _rebound_object(parts[1], replaced)]
        return value if _are_same(new, parts) else MethodType(*new)
    if isinstance(value, partial):
        parts = (value.func, *value.args, *value.keywords.values())
        function, *new = [_rebound(part, replaced) for part in parts]
        if _are_same([function, *new], parts):
            return value
        count = len(value.args)
        return partial(function, *new[:count], **dict(zip(value.keywords, new[count:], strict=True)))
    if not isinstance(value, FunctionType):
        return _rebound_object(value, replaced) if _is_plain_callable(value) else value
    replaced[id(value)] = value  # a function may refer to itself
    cells = value.__closure__ or ()
    given = (*(_contents(cell) for cell in cells), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    new = [_rebound(part, replaced) for part in given]
    if _are_same(new, given):
        return value
    count, end = len(cells), len(cells) + len(value.__defaults__ or ())
    # A cell whose object stays is shared, not copied: another function may write to it.
    closure = [cell if own is _contents(cell) else CellType(own) for cell, own in zip(cells, new, strict=False)]
    copied = copied_function(value, tuple(new[count:end]), tuple(closure))
    copied.__kwdefaults__ = dict(zip(value.__kwdefaults__ or {}, new[end:], strict=True))
    copied.__dict__.update(vars(value))
    replaced[id(value)] = copied
    return copied


def _is_plain_callable(value: Any) -> bool:
    """Whether `value` is an object that is called, and neither a module nor a class."""
    return (
        callable(value) and not isinstance(value, (type, nn.Module)) and isinstance(getattr(value, "__dict__", 0), dict)
    )


def _rebound_object(value: Any, replaced: dict[int, Any]) -> Any:
    """An object with the same attributes, rebound; `value` itself if none of them changes.

    Accelerate's mixed precision is such an object between two functions. It refuses `copy.copy`.
    """
    if id(value) in replaced:
        return replaced[id(value)]
    attributes = getattr(value, "__dict__", None)
    if isinstance(value, (type, ModuleType, nn.Module)) or not isinstance(attributes, dict):
        return value
    replaced[id(value)] = value  # its attributes may refer to it
    new = {name: _rebound(own, replaced) for name, own in attributes.items()}
    is_plain = not any("__new__" in vars(kind) for kind in type(value).__mro__[:-1])
    if not is_plain or _are_same([*new.values()], [*attributes.values()]):
        return value
    copied = object.__new__(type(value))
    copied.__dict__.update(new)
    replaced[id(value)] = copied
    return copied


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return None


def _are_same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return all(one is other for one, other in zip(left, right, strict=True))
