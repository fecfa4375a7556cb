"""What a command writes: never over a file that it reads.

Owns how two names of one file are recognised: links, other spellings, and URLs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from memsyn import OptionError


def check_out(out: str | Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuse an output that is one of the inputs, also by another name: a link, or ./FILE.

    Raises:
        OptionError: says which.
    """
    for path in inputs:
        if path is not None and _are_one(str(path), str(out)):
            raise OptionError(f"-o {out} is {path}, which is only read: give another file.")


def _are_one(path: str, other: str) -> bool:
    one, two = (name.removeprefix("file://") for name in (path, other))
    if "://" in one or "://" in two:
        return one == two
    return os.path.exists(one) and os.path.exists(two) and os.path.samefile(one, two)
