"""The house rules that can be read off the source: who imports whom, what is public, and how large things are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import memsyn

PACKAGE = Path(memsyn.__file__).parent
CORE = {"torch", "numpy", "tqdm", "safetensors", "memsyn"}

BASE = {"errors", "torch_private", "matrices"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "torch_private": set(),
    "matrices": set(),
    "native": {"errors"},  # below both that call the library: kernels and protecting know nothing of each other
    "progress": set(),
    "sharding": {"errors"},
    "closures": {"torch_private"},
    "adapters": {"errors", "torch_private", "closures"},
    "parameters": BASE | {"adapters", "sharding"},
    "weights_in_effect": {"adapters", "parameters"},
    "batches": BASE,
    "kernels": BASE | {"native"},
    "storage": BASE | {"sharding"},
    "engine": BASE | {"kernels", "batches", "parameters"},
    "values": BASE | {"storage", "parameters", "sharding", "weights_in_effect"},
    "measuring": BASE
    | {
        "engine",
        "kernels",
        "values",
        "storage",
        "batches",
        "parameters",
        "progress",
        "sharding",
        "adapters",
        "closures",
    },
    "protecting": BASE | {"native", "values", "parameters", "progress", "sharding", "adapters", "weights_in_effect"},
    "comparing": BASE | {"measuring", "values", "batches", "parameters", "progress", "sharding", "adapters"},
    "error_log": {"values"},
    "live": BASE | {"error_log", "measuring", "values", "storage", "kernels", "batches", "parameters"},
    "__init__": BASE | {"measuring", "comparing", "values", "protecting", "live", "parameters"},
    "sidecar": {"__init__", "batches", "storage"},
    "report": BASE | {"comparing", "values", "storage", "parameters"},
    "cli": BASE | {"__init__", "comparing", "batches", "parameters", "values", "storage", "report", "sidecar"},
    "integrations": {"__init__", "sharding"},  # a trainer may have cut the model
}
"""Room -> the rooms that it may import, beside itself. `__init__` stands for the public names."""


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Every module named in an import; `memsyn.x` for `from memsyn import x` where x is a module."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            modules = [a.name for a in node.names if module == "memsyn" and (PACKAGE / f"{a.name}.py").exists()]
            names += [f"memsyn.{name}" for name in modules] or [module]
    return names


def rooms_imported(path: Path) -> set[str]:
    """The rooms of memsyn that a file imports."""
    return {[*name.split("."), "__init__"][1] for name in imports(path) if name.split(".")[0] == "memsyn"}


@pytest.mark.parametrize("room", sorted({room_of(path) for path in PACKAGE.rglob("*.py")}))
def test_a_room_imports_only_the_rooms_in_its_row(room: str) -> None:
    for path in PACKAGE.rglob("*.py"):
        if room_of(path) == room:
            assert rooms_imported(path) - {room} <= ROOMS[room], f"{path.relative_to(PACKAGE)}"


def test_the_table_of_rooms_has_no_circle() -> None:
    left = dict(ROOMS)
    while left:
        lowest = [room for room, below in left.items() if not below & left.keys()]
        assert lowest, f"a circle among {sorted(left)}"
        for room in lowest:
            del left[room]


IMPORTED_WHEN_NEEDED = {"urls.py", "triton_products.py"}
"""Files of the core that need an optional package. Others import them inside a function: for a URL, or on a GPU."""


def test_the_core_imports_nothing_optional() -> None:
    for path in PACKAGE.rglob("*.py"):
        if room_of(path) not in {"cli", "report", "integrations"} and path.name not in IMPORTED_WHEN_NEEDED:
            foreign = {name.split(".")[0] for name in imports(path)} - CORE - sys.stdlib_module_names
            assert not foreign, f"{path.name} imports {foreign}"


def test_importing_memsyn_imports_nothing_optional() -> None:
    optional = ("typer", "rich", "PIL", "matplotlib", "memsyn_bench", "fsspec", "plotly", "jinja2", "triton")
    code = f"import sys, memsyn; print([m for m in {optional} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_sorted_and_there() -> None:
    assert list(memsyn.__all__) == sorted(memsyn.__all__)
    assert all(getattr(memsyn, name).__doc__ for name in memsyn.__all__ if name != "Forward")  # an alias has none
    assert memsyn.__all__ == [
        "BatchError",
        "Comparison",
        "Consolidation",
        "Estimator",
        "FactorSummary",
        "ForgettingWarning",
        "Forward",
        "FrozenStatistics",
        "GrownParametersWarning",
        "Importance",
        "KroneckerFactors",
        "LayerSummary",
        "LostParametersWarning",
        "Memory",
        "MemoryFileError",
        "MemsynError",
        "MismatchError",
        "ModelError",
        "MovedStatisticsWarning",
        "MovedWeightsWarning",
        "NewParametersWarning",
        "NotMeasuredWarning",
        "NotProtectedWarning",
        "Observer",
        "OptionError",
        "OutputError",
        "OutputSideWarning",
        "PairedDifference",
        "ProcessError",
        "Protection",
        "ProtectionError",
        "Relative",
        "RenamedParametersWarning",
        "Repaired",
        "RepeatedDataWarning",
        "Report",
        "SamplesInteractError",
        "SlowParametersWarning",
        "Stats",
        "StrengthWarning",
        "Trial",
        "Tuned",
        "Verdict",
        "compare",
        "fingerprint",
        "freeze_statistics",
        "measure",
        "merge_models",
        "penalty",
        "protect",
        "repair",
        "tune",
    ]


def test_every_error_of_ours_has_one_root() -> None:
    from memsyn import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(c, (memsyn.MemsynError, UserWarning)) for c in classes)


def test_functions_stay_small() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                code = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
                length = (code[-1].end_lineno or 0) - code[0].lineno + 1 if code else 0
                assert length <= 50, f"{path.name}: {node.name} has {length} lines"


LARGE = {"Stats"}
"""A frozen record of counts, not state: what `Observer.stats()` returns."""


def test_classes_hold_at_most_a_dozen_attributes() -> None:
    """Fields, and what methods set on `self`."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name not in LARGE:
                found = {
                    n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                }
                for n in ast.walk(node):
                    if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self":
                        found.add(n.attr)
                assert len(found) <= 12, f"{path.name}: {node.name} holds {len(found)} attributes: {sorted(found)}"


def test_the_examples_in_the_docstrings_run() -> None:
    import doctest
    import importlib.util

    ran = 0
    for path in PACKAGE.rglob("*.py"):
        if ">>> " not in path.read_text():
            continue
        if path.name == "avalanche.py" and importlib.util.find_spec("avalanche") is None:
            continue  # it needs an environment of its own
        name = ".".join(("memsyn", *path.relative_to(PACKAGE).with_suffix("").parts))
        result = doctest.testmod(importlib.import_module(name))
        assert result.failed == 0
        ran += result.attempted
    assert ran > 10
