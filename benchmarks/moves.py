"""How often one batch of `measure`, and one protected step, move between the files and the rooms of memsyn.

A move is a call from a function in one place to a function in another, or the return from it; places are files, then
rooms (folders; the single files beside them count as one room, `memsyn`). Code of torch in between belongs to no place.
Counted on a network of two linear layers: the first batch, a steady one, and a step. Prints a Markdown table.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import memsyn

PACKAGE = Path(memsyn.__file__).parent


def place_of(filename: str) -> tuple[str, str] | None:
    """The file and the room of some code, if it is ours."""
    path = Path(filename)
    if PACKAGE not in path.parents:
        return None
    parts = path.relative_to(PACKAGE).parts
    return "/".join(parts), parts[0] if len(parts) > 1 else "memsyn"


class Moves:
    """Counts moves while it is open; the function that opens it is no place."""

    def __init__(self) -> None:
        self.files: Counter[tuple[str, str]] = Counter()
        self.rooms: Counter[tuple[str, str]] = Counter()
        self.entered: set[tuple[str, str]] = set()
        self._stack: list[tuple[str, str]] = []
        self._known: dict[str, tuple[str, str] | None] = {}

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return"):
            return
        name = frame.f_code.co_filename
        if name not in self._known:
            self._known[name] = place_of(name)
        place = self._known[name]
        if place is not None:
            self.note(event, place)

    def note(self, event: str, place: tuple[str, str] | None) -> None:
        """A call of a function at a place, or the return from the last one that was called."""
        if event == "call":
            assert place is not None
            if self._stack:
                self._count(self._stack[-1], place)
            self._stack.append(place)
            self.entered.add(place)
        elif self._stack:
            own = self._stack.pop()
            if self._stack:
                self._count(own, self._stack[-1])

    def _count(self, one: tuple[str, str], other: tuple[str, str]) -> None:
        for counter, a, b in ((self.files, one[0], other[0]), (self.rooms, one[1], other[1])):
            if a != b:
                counter[a, b] += 1

    def __enter__(self) -> "Moves":
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5))


def moves_of_batch(index: int) -> Moves:
    """Those of the batch of that number: from when `measure` asks for it until it asks for the next."""
    found: list[Moves] = []

    def batches() -> Iterator[Tensor]:
        for number in range(index + 2):
            if number == index:
                found.append(Moves())
                found[0].__enter__()
            elif number == index + 1:
                sys.setprofile(None)
            yield torch.ones(8, 20)

    memsyn.measure(network(), batches(), progress=False)
    return found[0]


def moves_of_step() -> Moves:
    """Those of the second protected step."""
    model = network()
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [torch.ones(8, 20)], progress=False))
    optimizer = torch.optim.Adam(model.parameters())
    memsyn.protect(optimizer, model, memory)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(8, 20)).sum().backward()
        with Moves() as found:
            optimizer.step()
    return found


SUBJECTS: dict[str, Callable[[], Moves]] = {
    "the first batch": lambda: moves_of_batch(0),
    "a steady batch": lambda: moves_of_batch(5),
    "a protected step": moves_of_step,
}


def main() -> None:
    print("| | files | moves between files | rooms | moves between rooms |")
    print("|---|---:|---:|---:|---:|")
    for name, count in SUBJECTS.items():
        found = count()
        files, rooms = {place[0] for place in found.entered}, {place[1] for place in found.entered}
        print(f"| {name} | {len(files)} | {found.files.total()} | {len(rooms)} | {found.rooms.total()} |")
        if "-v" in sys.argv:
            for (one, other), times in found.files.most_common():
                print(f"    {times:4} {one} -> {other}")


if __name__ == "__main__":
    main()
