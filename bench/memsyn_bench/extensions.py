"""Methods and sequences by name: those of memsyn-bench, those registered in this process, those of installed packages.

Owns how a name is looked up, added and refused. An entry point is imported when its name is looked up, so that a broken
package stops nobody who does not use it. Must not know what an entry does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, final

from memsyn import MemsynError, OptionError

Entry = TypeVar("Entry")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Names stand in lists with commas and in the names of files."""


@final
class NamedEntries(Mapping[str, Entry], Generic[Entry]):
    """Entries of one kind by name, in this order: of memsyn-bench, of `register`, of entry points.

    A look-up raises OptionError for a name that is taken twice, and for an entry of a wrong type; MemsynError for an
    entry point that cannot be imported. Names alone (`in`, iteration) import nothing and raise nothing.

    Attributes:
        noun: what an entry is called in errors.
        group: of the entry points.
        entries: all but those of entry points.
    """

    def __init__(
        self, noun: str, kind: type[Entry], group: str, entries: dict[str, Entry], *, reserved: tuple[str, ...] = ()
    ) -> None:
        self.noun, self.group, self.entries = noun, group, entries
        self._kind, self._reserved = kind, reserved
        self._loaded: dict[str, Entry] = {}

    @cached_property
    def _points(self) -> dict[str, list[EntryPoint]]:
        """The entry points by name, as they are installed at the first look-up."""
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            found.setdefault(point.name, []).append(point)
        return found

    def __iter__(self) -> Iterator[str]:
        yield from self.entries
        yield from (name for name in self._points if name not in self.entries)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self.entries or name in self._points

    def __getitem__(self, name: str) -> Entry:
        points = self._points.get(name, [])
        places = [*(["memsyn-bench or this process"] if name in self.entries else []), *map(_described, points)]
        if len(places) > 1:
            raise OptionError(
                f"the {self.noun} {name!r} is defined {len(places)} times: by {', and by '.join(places)}. Rename "
                "one, or uninstall its package."
            )
        if not points:
            return self.entries[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(points[0])
        return self._loaded[name]

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry for this process.

        Raises:
            OptionError: the name is taken or cannot be used, or the entry is of a wrong type.
        """
        self._check_name(name)
        if name in self:
            raise OptionError(f"there is a {self.noun} called {name!r} already. Choose another name.")
        self.entries[name] = self._checked(entry, f"the {self.noun} {name!r}")

    def usable(self) -> tuple[dict[str, Entry], list[MemsynError]]:
        """The entries that can be used, and the errors of the others."""
        found: dict[str, Entry] = {}
        errors = []
        for name in self:
            try:
                found[name] = self[name]
            except MemsynError as error:
                errors.append(error)
        return found, errors

    def _check_name(self, name: str) -> None:
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise OptionError(
                f"the name of a {self.noun} must consist of letters, digits, dots, hyphens and underscores, and start "
                f"with a letter or digit; got {name!r}."
            )
        if name.startswith(self._reserved):
            raise OptionError(
                f"the name of a {self.noun} must not start with {' or '.join(self._reserved)}, which memsyn-bench "
                f"uses itself; got {name!r}."
            )

    def _checked(self, entry: object, place: str) -> Entry:
        if not isinstance(entry, self._kind):
            raise OptionError(
                f"{place} must be a memsyn_bench.{self._kind.__name__}, got {type(entry).__name__}. Make one with "
                f"{self._kind.__name__}(...)."
            )
        return entry

    def _load(self, point: EntryPoint) -> Entry:
        place = _described(point)
        try:
            entry = point.load()
        except Exception as error:
            raise MemsynError(
                f"{place} cannot be imported: {type(error).__name__}: {error}. Repair the package, or uninstall it."
            ) from error
        try:
            self._check_name(point.name)
        except OptionError as error:
            raise OptionError(f"{place}: {error}") from None
        return self._checked(entry, place)


def _described(point: EntryPoint) -> str:
    package = f" of {point.dist.name}" if point.dist else ""
    return f"the entry point {point.name} = {point.value}{package} ({point.group})"
