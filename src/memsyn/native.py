"""The native library: what is faster in C than in torch, built with the wheel where there was a C compiler.

Owns how the library is found, loaded and checked, and which instructions it uses. Its source is native.c beside this
file; `hatch_build.py` compiles it. Everything in it can be computed by torch too, with the same results within
rounding, so that the library may be missing. Must not know what is computed with it.
"""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Final

import torch

from memsyn.errors import OptionError

LIBRARY: Final = Path(__file__).with_name("libmemsyn.so")
"""The name is the same on all systems: the loader does not care."""

INTERFACE: Final = 2
"""The number that the library must give. Its source holds it too: change both with the arguments of any function."""

VARIABLE: Final = "MEMSYN_NATIVE"
"""The environment variable that chooses the instructions. It is read when the library is first needed."""

LEVELS: Final = ("generic", "avx2", "avx512", "neon")
"""The sets of instructions for which the library holds code. Without a choice, the highest that the processor has."""


@cache
def native_library() -> ctypes.CDLL | None:
    """The library; None if there is none, if it does not load, or if MEMSYN_NATIVE is `off`.

    Also None if it was compiled without OpenMP and torch has more threads than one, when it is first needed.

    Raises:
        OptionError: MEMSYN_NATIVE names no level, or one that this processor or this library does not have.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "off", *LEVELS):
        raise OptionError(f"{VARIABLE} must be off, {', '.join(LEVELS)} or unset; got {wanted!r}.")
    if wanted == "off":
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.memsyn_choose.restype = ctypes.c_char_p
        library.memsyn_scratch.restype = ctypes.c_int64
        if library.memsyn_interface() != INTERFACE:
            return None
        if not library.memsyn_has_threads() and torch.get_num_threads() > 1:
            return None
    except (OSError, AttributeError):
        # No file, a file for another system, or a library that is no longer (or not yet) what this file expects.
        return None
    if library.memsyn_choose(wanted.encode() or None) is None:
        raise OptionError(f"{VARIABLE} is {wanted!r}, but this processor lacks these instructions. Unset it.")
    return library


def native_level() -> str | None:
    """The instructions that are used: one of `LEVELS`; None without a library."""
    library = native_library()
    if library is None:
        return None
    found: bytes = library.memsyn_choose((os.environ.get(VARIABLE) or "").encode() or None)
    return found.decode()
