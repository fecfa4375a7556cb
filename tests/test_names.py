"""One name, one meaning: no two modules of the package define the same public name."""

import ast
import importlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import memsyn

PACKAGE = Path(memsyn.__file__).parent


def names_bound_by(statement: ast.stmt) -> Iterator[str]:
    """Of classes, functions, aliases and constants; imports bind none, and overloads announce a later function."""
    if isinstance(statement, ast.FunctionDef) and any(ast.unparse(d) == "overload" for d in statement.decorator_list):
        return
    if isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield statement.name
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def test_no_public_name_is_defined_in_two_modules() -> None:
    modules = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "integrations":  # each is imported alone, by the users of one trainer
            continue
        for statement in ast.parse(path.read_text()).body:
            for name in names_bound_by(statement):
                if not name.startswith("_"):
                    modules[name].append(path.relative_to(PACKAGE).as_posix())
    twice = {name: found for name, found in modules.items() if len(found) > 1}
    assert not twice
    assert {"Memory", "layer_of", "FORMAT", "Groups"} <= modules.keys()


@pytest.mark.parametrize("name", ["compare", "measure", "penalty", "protect", "tune"])
def test_a_function_of_the_package_is_not_a_module_of_it(name: str) -> None:
    assert callable(getattr(memsyn, name))
    with pytest.raises(ModuleNotFoundError, match=f"No module named 'memsyn.{name}'"):
        importlib.import_module(f"memsyn.{name}")
    room = {"compare": "comparing", "measure": "measuring"}.get(name, "protecting")
    module = importlib.import_module(f"memsyn.{room}.{name}")
    assert isinstance(module, ModuleType)
    assert getattr(module, name) is getattr(memsyn, name)
