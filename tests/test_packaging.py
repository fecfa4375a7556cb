"""What the two distributions hold and need: the library stays small, and texts name extras that exist."""

import io
import re
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECTS = {"memsyn": ROOT / "pyproject.toml", "memsyn-bench": ROOT / "bench" / "pyproject.toml"}
TEXTS = [
    ROOT / "README.md",
    ROOT / "bench" / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("benchmark", "commands", "did-it-work", "live", "serve")),
    *(ROOT / "src").rglob("*.py"),
    *(ROOT / "bench" / "memsyn_bench").rglob("*.py"),
]


LIBRARY = ROOT / "src" / "memsyn" / "libmemsyn.so"
"""Compiled from the source, and not kept in it."""


def extras(distribution):
    text = PYPROJECTS[distribution].read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    return set(re.findall(r"^([\w-]+) = ", section, re.MULTILINE))


def test_the_library_is_below_560_kb_and_holds_no_pictures():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path in (ROOT / "src" / "memsyn").rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path != LIBRARY:
                assert path.suffix in {".py", ".typed", ".c", ".css", ".js", ".jinja"}, path
                wheel.write(path, path.relative_to(ROOT))
    assert file.tell() < 560_000


def test_the_benchmark_comes_with_its_types_and_the_licences_of_its_pictures():
    package = ROOT / "bench" / "memsyn_bench"
    assert (package / "py.typed").exists()
    packs = [path for path in (package / "data" / "packs").iterdir() if path.is_dir()]
    assert {path.name for path in packs} == {"emoji8", "facts", "scripts8"}
    assert all((path / "LICENSES.md").exists() for path in packs)
    assert (ROOT / "bench" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_extra_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    for distribution, names in re.findall(r"(?<![\w.-])(memsyn|memsyn-bench)\[([a-z0-9,]+)\]", text):
        assert set(names.split(",")) <= extras(distribution), f"{distribution}[{names}]"
    for place, names in re.findall(r"'?(\./bench|\.)\[([a-z0-9,]+)\]", text):
        assert set(names.split(",")) <= extras("memsyn" if place == "." else "memsyn-bench"), f"{place}[{names}]"
    assert "memsyn bench" not in text
