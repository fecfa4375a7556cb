"""The house rules that can be read off the benchmark's source: who imports whom, what is public, and sizes."""

import ast
import doctest
import importlib
from collections import Counter
from pathlib import Path

import pytest

import memsyn_bench
from tests import test_rooms as library

PACKAGE = Path(memsyn_bench.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

LOWEST = {"task", "losses", "settings", "extensions", "extras", "optimizers"}
ROOMS: dict[str, set[str]] = {
    **{room: set() for room in sorted(LOWEST)},
    "optimizers": {"extras"},
    "settings": {"optimizers"},
    "data": {"task", "extras"},
    "sequences": LOWEST | {"data"},
    "methods": LOWEST - {"optimizers"} | {"data", "sequences"},
    "running": LOWEST - {"extras", "extensions"} | {"methods", "sequences"},
    "results": {"settings", "methods", "sequences", "running"},
    "language": {"extras", "results"},
    "pages": {"settings", "extras", "losses", "methods", "sequences", "running", "results", "language"},
    "__init__": LOWEST - {"extras", "extensions", "optimizers"} | {"methods", "sequences", "running"},
    "cli": {"settings", "optimizers", "extensions", "methods", "sequences", "running", "results", "pages", "language"},
}
"""Room -> the rooms that it may import, beside itself. `__init__` has the public names."""

MEMSYN: dict[str, set[str]] = {
    "memsyn.parameters": {"methods"},  # trainable_parameters, wide_dtype
    "memsyn.matrices": {"methods"},  # how weights are read as matrices
    "memsyn.values.directions": {"methods"},  # the default strength of a projection
    "memsyn.values.display": {"results"},  # names out of files
    "memsyn.values.spectra": {"methods"},
    "memsyn.storage.reading_and_writing": {"running", "language"},  # checkpoints
    "memsyn.storage.atomic_files": {"running"},  # examples.json
    "memsyn.report.names": {"pages"},  # names out of files
    "memsyn.report.page": {"pages"},
    "memsyn.report.parts": {"pages"},
    "memsyn.report.charts": {"pages"},
    "memsyn.report.styles": {"pages"},
    "memsyn.cli.screen": {"cli"},  # how an error is printed
}
"""Module of memsyn -> the rooms that may import it, beside the public names, which all may. memsyn-bench asks for one
version of memsyn because of these: they may change with any."""


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path, package: str) -> set[str]:
    return {name for name in library.imports(path) if name.split(".")[0] == package}


@pytest.mark.parametrize("room", sorted({room_of(path) for path in FILES}))
def test_a_room_imports_only_the_rooms_in_its_row(room):
    for path in FILES:
        if room_of(path) == room:
            rooms = {[*name.split("."), "__init__"][1] for name in imported(path, "memsyn_bench")}
            assert rooms - {room} <= ROOMS[room], path.relative_to(PACKAGE)


def test_the_table_of_rooms_has_no_circle_and_no_row_or_entry_too_many():
    used = {
        (room_of(path), [*name.split("."), "__init__"][1]) for path in FILES for name in imported(path, "memsyn_bench")
    }
    assert {(room, below) for room, rooms in ROOMS.items() for below in rooms} == {
        (room, below) for room, below in used if room != below
    }
    left = dict(ROOMS)
    while left:
        lowest = [room for room, below in left.items() if not below & left.keys()]
        assert lowest, f"a circle among {sorted(left)}"
        for room in lowest:
            del left[room]


def test_of_memsyn_the_public_names_are_imported_and_what_the_table_lists():
    used: dict[str, set[str]] = {}
    for path in FILES:
        for name in imported(path, "memsyn"):
            if name != "memsyn" and not name.startswith("memsyn.integrations"):
                used.setdefault(name, set()).add(room_of(path))
    assert used == MEMSYN


def test_no_name_is_defined_twice():
    names = Counter(
        target.id if isinstance(target, ast.Name) else target
        for path in FILES
        for node in ast.parse(path.read_text()).body
        for target in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            else node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        if isinstance(target, ast.Name | str)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_public_names_are_sorted_and_there():
    assert memsyn_bench.__all__ == [
        "Loss", "Method", "MethodEntry", "MultiHead", "OneHead", "Results", "Settings", "SharedHead", "SmallConvNet",
        "Task", "TaskRecord", "TaskSequence", "TaskTraining", "cross_entropy", "default_settings", "draw_weights",
        "register_method", "register_sequence", "run", "similarity_loss",
    ]  # fmt: skip
    assert all(hasattr(memsyn_bench, name) for name in memsyn_bench.__all__)


def test_functions_and_classes_stay_small(monkeypatch):
    monkeypatch.setattr(library, "PACKAGE", PACKAGE)
    monkeypatch.setattr(library, "LARGE", {"TaskRecord"})  # a frozen record: one field for each of a line
    library.test_functions_stay_small()
    library.test_classes_hold_at_most_a_dozen_attributes()


def test_the_examples_in_the_docstrings_run():
    ran = 0
    for path in FILES:
        if ">>> " in path.read_text():
            name = ".".join(("memsyn_bench", *path.relative_to(PACKAGE).with_suffix("").parts))
            result = doctest.testmod(importlib.import_module(name))
            assert result.failed == 0
            ran += result.attempted
    assert ran > 5
