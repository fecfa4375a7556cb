"""README: one page, whose program prints what it says, and whose numbers come from result files."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tools.readme_tables import END, PUBLISHED, README, ROWS, START, published, readme_content, written

TEXT = README.read_text(encoding="utf-8")


def test_it_is_one_page():
    assert len(TEXT.splitlines()) <= 120


def test_its_numbers_are_those_of_the_result_files():
    """If this fails, run `python tools/readme_tables.py`."""
    assert written(TEXT, readme_content()) == TEXT
    table = TEXT.split(START)[1].split(END)[0]
    assert all(f"[{name}]" in table for _, name in ROWS)
    assert written(TEXT.replace(table, " 12.3 "), readme_content()) == TEXT
    page = PUBLISHED.read_text(encoding="utf-8")
    assert written(page, published()) == page


def test_its_program_prints_what_it_says(tmp_path):
    """As pasted into an empty folder. Percentages may differ by a point between processors."""
    program, told = re.search(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)+)", TEXT, re.DOTALL).groups()
    (tmp_path / "toy.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "toy.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    assert [re.sub(r"\d+", "N", line) for line in lines] == [
        re.sub(r"\d+", "N", line.strip()) for line in told.splitlines()
    ]
    printed, expected = (map(int, re.findall(r"\d+", text)) for text in (done.stdout, told))
    assert all(abs(one - other) <= 2 for one, other in zip(printed, expected, strict=True)), done.stdout
    assert [path.name for path in Path(tmp_path).glob("*.safetensors")] == ["toy.memsyn.safetensors"]


def test_every_file_that_it_links_to_is_there():
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
    assert len(links) > 15
    assert [link for link in links if not (README.parent / link).exists()] == []
