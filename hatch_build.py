"""Compiles the native library of memsyn for a wheel, or in its place in the source tree for an editable installation.

    python hatch_build.py       # compile it in the source tree, without installing anything

Owns the compiler's command and the tag of the wheel. The compiler is the command in CC, by default `cc`. Without one
that works, on Windows, or with MEMSYN_NATIVE=off, the wheel is pure Python: then torch computes all of it.
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path(__file__).parent / "src" / "memsyn"
SOURCE, LIBRARY = PACKAGE / "native.c", PACKAGE / "libmemsyn.so"
# No -march: the source chooses its instructions when it runs. -ffp-contract: a product and a sum are one instruction.
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-fPIC",
    "-shared",
]
# Apple's compiler refuses -fopenmp. Without it the library has one thread.
THREADS = (["-fopenmp"], [])


def compile_library(library: Path = LIBRARY) -> str | None:
    """Compile the library to this path; why that failed, or None.

    Before it is compiled, an old file is removed: what lies there afterwards is of this source.
    """
    if os.environ.get("MEMSYN_NATIVE") == "off":
        return "MEMSYN_NATIVE is off"
    if sys.platform == "win32":
        return "it is not built on Windows"
    library.unlink(missing_ok=True)
    reason = "no compiler"
    for threads in THREADS:
        try:
            command = [
                *shlex.split(os.environ.get("CC") or "cc"),
                *shlex.split(os.environ.get("ARCHFLAGS", "")),
                *FLAGS,
            ]
            command += [*threads, str(SOURCE), "-o", str(library), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
            return None
        except subprocess.CalledProcessError as error:
            reason = f"{shlex.join(error.cmd)}\n{error.stderr}"
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            reason = str(error)
    library.unlink(missing_ok=True)
    return reason


def wheel_tag() -> str:
    """Any Python 3 on this system: the library is loaded by ctypes, and knows nothing of Python's ABI."""
    system = sysconfig.get_platform()
    if system.endswith("universal2"):  # an interpreter for two processors; the compiler builds for one
        system = system.replace("universal2", platform.machine())
    return "py3-none-" + system.replace("-", "_").replace(".", "_")


class NativeLibrary(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the library to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects the files."""
        reason = compile_library()
        if reason is None and version != "editable":  # which finds the library in the source tree
            build_data["pure_python"] = False
            build_data["tag"] = wheel_tag()
            build_data["artifacts"].append(f"/{LIBRARY.relative_to(self.root).as_posix()}")
        elif reason is not None:
            self.app.display_warning(f"memsyn without its native library, in pure Python: {reason}")


if __name__ == "__main__":
    sys.exit(compile_library())
