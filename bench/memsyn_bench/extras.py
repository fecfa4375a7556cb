"""Packages that only some parts of the benchmark need: they are imported when they are used.

Owns the error for a missing package.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from memsyn import MemsynError


def import_extra(module: str, *, purpose: str, install: str) -> ModuleType:
    """Import an optional module; `install` is the name to give to pip.

    Raises:
        MemsynError: the module is missing; the error says what needs it and how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        raise MemsynError(f"{purpose} needs {package} ({error}): pip install '{install}'.") from error
