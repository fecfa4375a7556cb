"""The house rules that can be read off the source: who imports whom, and what is public."""

import ast
import subprocess
import sys
from pathlib import Path

import memsyn

PACKAGE = Path(memsyn.__file__).parent
CORE = {"torch", "numpy", "tqdm", "safetensors", "memsyn"}
FLOORS = [
    "errors",
    "parameters",
    "objectives",
    "batches",
    "shadow",
    "products",
    "sums",
    "convolutions",
    "rules",
    "operations",
    "decompositions",
    "calls",
    "tracer",
    "recorder",
    "routes",
    "passes",
    "dependence",
    "hebbian",
    "guard",
    "files",
    "remote",
    "layout",
    "storage",
    "importance",
    "distributed",
    "checkpoint",
    "run",
    "process",
    "measure",
    "windows",
    "traffic",
    "ledger",
    "worker",
    "observe",
    "history",
    "memory",
    "compare",
    "convert",
    "compiled",
    "penalty",
    "steps",
    "strength",
    "protect",
    "tune",
    "trajectory",
    "__init__",
    "report",
    "integrations",
    "bench",
    "cli",
]
"""Lowest first: a module imports only what stands before it."""


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Every module named in an import, `memsyn.x` for `from memsyn import x` where x is a module."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            submodules = [a.name for a in node.names if module == "memsyn" and (PACKAGE / f"{a.name}.py").exists()]
            names += [f"memsyn.{name}" for name in submodules] or [module]
    return names


def test_imports_go_downwards_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        floor = floor_of(path)
        for name in imports(path):
            if name.startswith("memsyn."):
                below = name.split(".")[1]
                assert FLOORS.index(below) <= FLOORS.index(floor), f"{path.name} imports {name}, which stands above it"


def test_the_core_imports_nothing_optional() -> None:
    for path in PACKAGE.glob("*.py"):
        if path.name not in {"cli.py", "remote.py"}:
            foreign = {name.split(".")[0] for name in imports(path)} - CORE - sys.stdlib_module_names
            assert not foreign, f"{path.name} imports {foreign}"


def test_importing_memsyn_imports_nothing_optional() -> None:
    optional = ("typer", "rich", "PIL", "matplotlib", "memsyn.bench", "fsspec", "plotly", "jinja2")
    code = f"import sys, memsyn; print([m for m in {optional} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_sorted_and_there() -> None:
    assert list(memsyn.__all__) == sorted(memsyn.__all__)
    assert all(getattr(memsyn, name).__doc__ for name in memsyn.__all__)
    assert memsyn.__all__ == [
        "BatchError",
        "Consolidation",
        "Estimator",
        "Importance",
        "LayerSummary",
        "LostParametersWarning",
        "Memory",
        "MemoryFileError",
        "MemsynError",
        "MismatchError",
        "ModelError",
        "MovedWeightsWarning",
        "NewParametersWarning",
        "Observer",
        "OptionError",
        "OutputError",
        "ProcessError",
        "Protection",
        "ProtectionError",
        "Relative",
        "Report",
        "SamplesInteractError",
        "SlowParametersWarning",
        "Stats",
        "StrengthWarning",
        "Trial",
        "Tuned",
        "measure",
        "penalty",
        "protect",
        "tune",
    ]


def test_every_error_of_ours_has_one_root() -> None:
    from memsyn import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(c, (memsyn.MemsynError, UserWarning)) for c in classes)


def test_files_and_functions_stay_small() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        assert source.count("\n") <= 400, path.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and isinstance(node, ast.FunctionDef):
                code = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
                length = code[-1].end_lineno - code[0].lineno + 1 if code else 0
                assert length <= 50, f"{path.name}: {node.name} has {length} lines"


def test_the_examples_in_the_docstrings_run() -> None:
    import doctest
    import importlib

    ran = 0
    for name in ("measure", "observe", "parameters", "penalty", "protect", "trajectory", "tune"):
        result = doctest.testmod(importlib.import_module(f"memsyn.{name}"))
        assert result.failed == 0
        ran += result.attempted
    assert ran > 10
