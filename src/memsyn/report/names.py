"""Escapes names from files, which strangers may have written, for every place where they are shown.

Owns the escapes for Plotly's texts, file names and JSON inside HTML. jinja2 escapes HTML itself.
"""

from __future__ import annotations

import hashlib
import html
import json
from importlib import import_module
from typing import Any, Final
from urllib.parse import quote

from memsyn.errors import MemsynError
from memsyn.values.display import printable

LONGEST_LABEL: Final = 24
"""The most characters of a name on an axis."""
LONGEST_FILE: Final = 100
"""The most characters of a file's name; most file systems allow 255 bytes."""


def inert(text: str) -> str:
    """A name for Plotly, which interprets `<b>` and `<a href>` in any text."""
    return html.escape(printable(text), quote=False)


def file_name(text: str) -> str:
    """Text as the name of a file: "a/b" becomes "a%2Fb"; a long text is cut and gets a digest."""
    own = quote(text, safe=" ", errors="surrogatepass")
    own = own.replace(".", "%2E") if own.startswith(".") else own
    if len(own) <= LONGEST_FILE:
        return own
    return f"{own[: LONGEST_FILE - 9]}-{hashlib.sha256(own.encode()).hexdigest()[:8]}"


def shortened(text: str) -> str:
    """A name for an axis: a long one is cut in its middle."""
    shown = printable(text)
    half = LONGEST_LABEL // 2
    return shown if len(shown) <= LONGEST_LABEL else f"{shown[: half - 1]}…{shown[-half:]}"


def short_fingerprint(fingerprint: str | None) -> str:
    """The first digits of a fingerprint, enough to tell two apart: "sha256:66080fca91..." gives "66080fca"."""
    return (fingerprint or "").partition(":")[2][:8]


def json_in_html(value: Any) -> str:
    """JSON for use inside a <script>, which it cannot end. It must hold no NaN or infinity."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def needed(module: str) -> Any:
    """An optional module, imported.

    Raises:
        MemsynError: it is not installed; says what to install.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise MemsynError(f"this needs {package}: pip install 'memsyn[report]'.") from None
