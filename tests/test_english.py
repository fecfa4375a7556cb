"""The check of plain English: what a sentence and a word are, what is left out, and that our own texts pass."""

import subprocess
import sys
from pathlib import Path

import pytest
from tools import english

import memsyn

ROOT = Path(__file__).parents[1]


def texts(found) -> list[str]:
    return [sentence.text for sentence in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two? Three!", ["One.", "Two?", "Three!"]),
        ("It measures. memsyn stays as it is.", ["It measures.", "memsyn stays as it is."]),
        ("A part: a list; more of it", ["A part: a list; more of it"]),
        ("Others (e.g. Aljundi et al. 2018, vs. EWC). Then", ["Others (e.g. Aljundi et al. 2018, vs. EWC).", "Then"]),
        ("After 1, 2, ... batches. Then (s, ...) count.", ["After 1, 2, ... batches.", "Then (s, ...) count."]),
        ("It goes on... Then it ends.", ["It goes on...", "Then it ends."]),
        ('He says "no." She says (yes.) They agree.', ['He says "no."', "She says (yes.)", "They agree."]),
        ("Use `a.b. C` and 0.5 of `x`. End", ["Use `a.b. C` and 0.5 of `x`.", "End"]),
        (" - ", []),
    ],
)  # fmt: skip
def test_where_sentences_end(text: str, expected: list[str]) -> None:
    assert texts(english.sentences(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two three.", 3),
        ("`one two three` is a word.", 4),
        ("`a`/`b`, and 3.5% - of x = y", 6),
        ("\u201cquoted\u201d (brackets) \u2014 dash", 3),
    ],
)
def test_what_counts_as_a_word(text: str, expected: int) -> None:
    assert english.Sentence(1, text).num_words == expected


PAGE = """# A title is no sentence, however long it is

First sentence with [a link](to/no.where) and
`code. Here`. Second
one.

- an item without a full stop
- another. With two
  lines.

```
Code. Is. Not. Read.
```

    Nor. This.

| a head | b |
|---|---|
| a cell. With two | 3.5 |

Last ![no picture. At all](x.png) one.
"""


def test_markdown_is_read_without_code_and_titles() -> None:
    found = [(sentence.line, sentence.text, sentence.is_cell) for sentence in english.of_markdown(PAGE)]
    assert found == [
        (3, "First sentence with a link and `code. Here`.", False),
        (4, "Second one.", False),
        (7, "an item without a full stop", False),
        (8, "another.", False),
        (8, "With two lines.", False),
        (17, "a head", True),
        (17, "b", True),
        (19, "a cell.", True),
        (19, "With two", True),
        (19, "3.5", True),
        (21, "Last one.", False),
    ]


def test_cells_do_not_lower_the_mean_but_may_not_be_too_long() -> None:
    long = " ".join(["word"] * 41)
    found = list(english.of_markdown(f"Two words.\n\n| a | b |\n|---|---|\n| {long} | c |\n"))
    assert english.mean_words(found) == 2
    assert [line.split(" words")[0] for line in english.faults("page.md", found)] == ["page.md:5: 41"]


DOCSTRING = '''"""Measure a thing.

    Omega = 1/N. It is
    exact.

    - an item

    Args:
        model: any module. Read
            only.
        low, high: two numbers.

    Returns:
        The result.

    Example:
        >>> call(). It. Is. Not. Read
        3. Nor. This.
    """'''


def test_docstrings_are_read_by_paragraph_and_argument() -> None:
    found = [(sentence.line, sentence.text) for sentence in english.of_docstring(DOCSTRING.strip('"'), 10)]
    assert found == [
        (10, "Measure a thing."),
        (12, "Omega = 1/N."),
        (12, "It is exact."),
        (15, "an item"),
        (18, "any module."),
        (18, "Read only."),
        (20, "two numbers."),
        (23, "The result."),
    ]


def test_exported_names_methods_and_help_texts_are_read() -> None:
    memory = texts(english.sentences_of(ROOT / "src" / "memsyn" / "values" / "memory.py"))
    assert any("consolidated" in sentence for sentence in memory)
    gate = texts(english.sentences_of(ROOT / "src" / "memsyn" / "cli" / "gate.py"))
    assert any(sentence.startswith("Exits with 0") for sentence in gate)
    assert any("Inputs without labels" in sentence for sentence in gate)
    assert english.sentences_of(ROOT / "src" / "memsyn" / "matrices.py") == []


def test_every_public_name_is_in_a_file_that_is_checked() -> None:
    checked = {
        path.relative_to(ROOT / "src").as_posix()
        for path in english.checked_files()
        if path.is_relative_to(ROOT / "src")
    }
    values = [getattr(memsyn, name) for name in memsyn.__all__]
    modules = {value.__module__ for value in values if value.__module__.startswith("memsyn.")}
    assert len(modules) > 10
    assert {module.replace(".", "/") + ".py" for module in modules} <= checked


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "english.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_faults_are_named_by_file_and_line_and_exit_with_1(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Short.\n\n" + " ".join(["word"] * 41) + ".\n\nA term of whom\nyou know.\n", encoding="utf-8")
    done = check(page)
    assert done.returncode == 1
    assert f"{page}:3: 41 words, more than 40. Split: word" in done.stdout
    assert f'{page}:5: "of whom": name them again.' in done.stdout
    page.write_text((" ".join(["word"] * 19) + ". ") * 3, encoding="utf-8")
    done = check(page)
    said = f"{page}: 19.0 words a sentence, more than 18. Split the longest sentences."
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, said)
    page.write_text((" ".join(["word"] * 18) + ". ") * 3, encoding="utf-8")
    done = check(page)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)


def test_what_is_left_out_says_why_and_exists() -> None:
    for pattern, reason in english.LEFT_OUT.items():
        assert len(reason.split()) > 3
        assert list(ROOT.glob(pattern)) or pattern == "docs/results/*.md"
    assert english.is_left_out(ROOT / "docs" / "results.md")
    assert not english.is_left_out(ROOT / "docs" / "live.md")
    assert ROOT / "docs" / "live.md" in english.checked_files()
    assert ROOT / "docs" / "results.md" not in english.checked_files()


def test_the_texts_of_this_project_are_plain() -> None:
    done = check()
    assert done.returncode == 0, done.stdout
