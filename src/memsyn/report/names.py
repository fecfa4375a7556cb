"""Names from files, which strangers may have written, made harmless where they are shown.

Owns the escapes of a terminal, of Plotly's text, of file names and of JSON inside HTML; what stands in HTML itself
jinja2 escapes.
"""

from __future__ import annotations

import hashlib
import html
import json
from importlib import import_module
from typing import Any, Final
from urllib.parse import quote

from memsyn.errors import MemsynError

LONGEST_LABEL: Final = 24
"""Characters of a name on an axis."""
LONGEST_FILE: Final = 100
"""Characters of a file's name; most file systems take 255 bytes."""


def printable(text: str) -> str:
    """Text with everything that is no visible character or space written as an escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def inert(text: str) -> str:
    """A name for Plotly, which takes `<b>` and `<a href>` in any text for markup."""
    return html.escape(printable(text), quote=False)


def file_name(text: str) -> str:
    """Text as one part of a path, whatever is in it and however long it is."""
    own = quote(text, safe=" ", errors="surrogatepass")
    own = own.replace(".", "%2E") if own.startswith(".") else own
    if len(own) <= LONGEST_FILE:
        return own
    return f"{own[: LONGEST_FILE - 9]}-{hashlib.sha256(own.encode()).hexdigest()[:8]}"


def shortened(text: str) -> str:
    """A name for an axis: what is long loses its middle."""
    shown = printable(text)
    half = LONGEST_LABEL // 2
    return shown if len(shown) <= LONGEST_LABEL else f"{shown[: half - 1]}…{shown[-half:]}"


def short_fingerprint(fingerprint: str | None) -> str:
    """The first digits of a fingerprint, enough to tell two apart: "sha256:66080fca91..." gives "66080fca"."""
    return (fingerprint or "").partition(":")[2][:8]


def json_in_html(value: Any) -> str:
    """JSON that cannot end the <script> it stands in. NaN and the infinities must be None already."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def needed(module: str) -> Any:
    """An optional module.

    Raises:
        MemsynError: says what to install.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise MemsynError(f"this needs {package}: pip install 'memsyn[report]'.") from None
