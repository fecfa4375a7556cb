"""What a profile says of memsyn: seconds by kind of code, and the functions with the most of them."""

import cProfile
import pstats
from pathlib import Path

import memsyn

PACKAGE = Path(memsyn.__file__).parent


def place_of(filename: str) -> str:
    """The room of memsyn that a file is in, or `torch` for all other code."""
    path = Path(filename)
    if PACKAGE not in path.parents:
        return "torch"
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else "memsyn"


def seconds_by_place(profile: cProfile.Profile) -> dict[str, float]:
    """Seconds of the profile: in products (kernels), in other code of memsyn, and in torch with the model.

    An operation of torch counts where it was called, but for those that the engine calls: they are the model's own.
    """
    found = {"products": 0.0, "other code": 0.0, "torch": 0.0}
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for (filename, _, _), (_, _, own, _, callers) in stats.items():
        if filename != "~":
            found[_kind(place_of(filename))] += own
            continue
        for (caller, _, _), (_, _, part, _) in callers.items():
            place = place_of(caller)
            found["torch" if place == "engine" else _kind(place)] += part
    return found


def _kind(place: str) -> str:
    return {"torch": "torch", "kernels": "products"}.get(place, "other code")


def most_of(profile: cProfile.Profile, count: int) -> dict[str, float]:
    """The three functions of memsyn with the most seconds, over `count`: their own, and of operations they call."""
    times: dict[str, float] = {}

    def add(filename: str, name: str, own: float) -> None:
        if PACKAGE in Path(filename).parents:
            key = f"{Path(filename).stem}.{name}"
            times[key] = times.get(key, 0.0) + own / count

    for (filename, _, name), (_, _, own, _, callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        add(filename, name, own)
        if filename == "~":
            for (caller, _, calling), (_, _, part, _) in callers.items():
                add(caller, calling, part)
    return dict(sorted(times.items(), key=lambda item: -item[1])[:3])
