"""Writes a page as one self-contained HTML file that opens from disk, without a network.

Owns the template, its style and script, and the content security policy: the browser runs only these scripts and loads
nothing.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.metadata import version
from pathlib import Path

from memsyn.errors import MemsynError
from memsyn.report.names import json_in_html, needed
from memsyn.report.parts import Page
from memsyn.report.pictures import write_pictures
from memsyn.storage.atomic_files import replace_file
from memsyn.values.display import printable

START = b"<!DOCTYPE html>"
TEMPLATES = Path(__file__).parent / "templates"


def write_report(page: Page, html: Path | None, png: Path | None) -> None:
    """Write the page to a file, and its charts as pictures to a folder; either may be None.

    Raises:
        MemsynError: a file cannot be written, or a package of the extra `report` is missing.
    """
    if html is not None:
        write_page(page, html)
    if png is not None:
        write_pictures(page.charts(), png)


def write_page(page: Page, path: Path) -> None:
    """Write the page atomically. An existing file is replaced only if it is an HTML page.

    Raises:
        MemsynError: the file cannot be written, or exists and is no page; or plotly or jinja2 is missing.
    """
    text = html_of(page)
    try:
        if path.is_file() and path.stat().st_size and not path.read_bytes().startswith(START):
            raise MemsynError(f"{path} exists and is not an HTML page; it was not replaced. Name another file.")
        with replace_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise MemsynError(f"{path} cannot be written: {error.strerror}. Name another file.") from error


def html_of(page: Page) -> str:
    """The page as text, less than 6.5 MB, of which Plotly takes 4.8 MB.

    Raises:
        MemsynError: plotly or jinja2 is missing.
    """
    jinja2, plotly = needed("jinja2"), needed("plotly.offline")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    scripts = [plotly.get_plotlyjs(), (TEMPLATES / "page.js").read_text(encoding="utf-8")]
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    text: str = environment.get_template("page.html.jinja").render(
        page=page,
        figures=[json_in_html(chart.figure) for chart in page.charts()],
        version=version("memsyn"),
        policy=_policy(scripts),
        scripts=scripts,
        style=style,
        uses=bool(page.charts()),
    )
    return text


def _policy(scripts: list[str]) -> str:
    """A content security policy that allows these scripts, inline styles and embedded pictures, and nothing else."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"
