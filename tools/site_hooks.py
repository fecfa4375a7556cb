"""What mkdocs does beyond Markdown for the site: notebooks, sample pages, files outside `docs/`, folders in `nav`.

Runs every notebook when the site is built, and fails if a cell fails. Owns no text of a page.
"""

import html
import posixpath
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import indent
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from nbclient import NotebookClient

from memsyn.report.page import write_page

LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)\)")
"""A link that climbs: `[the cases](../tests/cases.py)`."""

LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".md": "text", ".sh": "bash"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of a folder where `nav` says `folder/*.md`, and name notebooks by their page."""
    docs = Path(config.docs_dir)
    if config.nav is not None:
        config.nav = list(_entries(config.nav, docs))
    return config


def _entries(nav: list[Any], docs: Path) -> Iterator[Any]:
    for entry in nav:
        title, target = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(target, list):
            yield {title: list(_entries(target, docs))}
        elif "*" in target:
            found = [path.relative_to(docs).as_posix() for path in sorted(docs.glob(target))]
            if found:
                yield {title: found}
        else:
            page = _page_of(target)
            yield page if title is None else {title: page}


def _page_of(path: str) -> str:
    """`start/get-started.ipynb` -> `start/get-started.md`, the page that is made of it."""
    return path.removesuffix(".ipynb") + ".md" if path.endswith(".ipynb") else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, and one for each file outside `docs/` that a page links to."""
    docs = Path(config.docs_dir)
    root = Path(config.config_file_path).parent
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            text = notebook_page(docs / file.src_uri)
            files.append(File.generated(config, _page_of(file.src_uri), content=text))
    for name, text in sample_pages(root).items():
        files.append(File.generated(config, f"gallery/{name}.html", content=text))
    outside = {path for file in files.documentation_pages() for path in _outside(file, docs, root)}
    for path in sorted(outside):
        text = f"# {path.name}\n\n`{path}`\n\n{_fenced((root / path).read_text(), LANGUAGES.get(path.suffix, 'text'))}"
        made = File.generated(config, _source_page(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(made)
    return files


def on_post_build(config: MkDocsConfig) -> None:
    """Keep the search index as a script too: a page that was opened from a folder may not read other files."""
    index = Path(config.site_dir) / "search" / "search_index.json"
    index.with_suffix(".js").write_text(f"var __index = {index.read_text()}")


def sample_pages(root: Path) -> dict[str, str]:
    """Name -> a page of memsyn as HTML, of the examples whose pictures are in the docs."""
    sys.path.insert(0, str(root))
    try:
        made = import_module("tests.pages").pages()
    finally:
        sys.path.remove(str(root))
    found = {}
    with TemporaryDirectory() as folder:
        for name, page in made.items():
            path = Path(folder) / f"{name}.html"
            write_page(page, path)
            found[name] = path.read_text()
    return found


def _source_page(path: Path) -> str:
    return f"source/{path.as_posix()}.md"


def _outside(file: File, docs: Path, root: Path) -> Iterator[Path]:
    """Files of the repository outside `docs/` that a page links to."""
    for match in LINK.finditer(file.content_string):
        path = (docs / file.src_uri).parent.joinpath(match[2]).resolve()
        if path.is_relative_to(root) and not path.is_relative_to(docs) and path.is_file():
            yield path.relative_to(root)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside `docs/` to their pages; of folders there, only the words stay."""
    docs, root = Path(config.docs_dir), Path(config.config_file_path).parent
    here = (docs / page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        path = here.joinpath(match[2]).resolve()
        if path.is_relative_to(docs) or not path.is_relative_to(root) or not path.exists():
            return match[0]  # mkdocs checks it
        if path.is_dir():
            return match[1]
        target = posixpath.relpath(_source_page(path.relative_to(root)), posixpath.dirname(page.file.src_uri) or ".")
        return f"[{match[1]}]({target})"

    return markdown if page.file.src_uri.startswith("source/") else LINK.sub(link, markdown)


def notebook_page(path: Path) -> str:
    """Run a notebook, and make a Markdown page of its cells and outputs.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    with TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        quiet = ["--log-level=ERROR"]  # of the kernel's own log
        client = NotebookClient(notebook, timeout=600, kernel_name="python3", coalesce_streams=True, resources=where)
        client.extra_arguments = quiet
        client.execute()
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        else:
            source = _fenced(cell.source, "python")
            if "folded" in cell.metadata.get("tags", []):
                source = '??? note "The code that draws the picture"\n\n' + indent(source, "    ")
            parts += [source, *map(_output, cell.outputs)]
    download = f'<p><a href="{path.name}" download>Download this notebook</a></p>'
    return "\n\n".join([parts[0], download, *parts[1:]]) + "\n"


def _output(output: Any) -> str:
    """One output of a cell: a picture, a table or text."""
    if output.output_type == "stream":
        return _as_text(output.text)
    data = output.data
    for kind in ("image/svg+xml", "text/html"):
        if kind in data:
            lines = " ".join(line.strip() for line in data[kind].splitlines())  # a blank line would end the block
            return f'<div class="output">{lines}</div>'
    return _as_text(data["text/plain"])


def _as_text(text: str) -> str:
    return f'<pre class="output">{html.escape(text.rstrip())}</pre>'.replace("\n\n", "\n&#8203;\n")


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
