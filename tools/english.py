"""Whether texts are plain English: how many words a sentence has, and which phrases have a plainer form.

    python tools/english.py            every text that is checked
    python tools/english.py README.md  some files: Markdown, or Python modules for public docstrings and help texts

Owns what counts as a text, a sentence and a word. Prints a table and exits with 1 if a file breaks a limit. Reads
Python files without importing them, so that it needs markdown-it-py and nothing else.

- A sentence ends at a full stop, a question mark or an exclamation mark before a space, and where its paragraph or its
  list item ends. A colon or a semicolon does not end it: long sentences hide behind them.
- A word is what stands between spaces, if it holds a letter or a digit. Inline code is one word. Code blocks are not
  read.
- Headings are titles, not sentences, and are not read.
- The cells of tables count for the longest sentence, but not for the mean. Most hold two words or a number, so that one
  table would hide a page of long sentences.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
MEAN, LONGEST = 18, 40

TEXTS = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md", "bench/README.md", "deploy/**/*.md"]
PACKAGES = {"memsyn": "src/memsyn", "memsyn_bench": "bench/memsyn_bench"}
COMMANDS = ["src/memsyn/cli/*.py", "bench/memsyn_bench/cli.py"]

# Pattern of files that are not checked -> why.
LEFT_OUT = {
    "docs/results.md": "generated: the same sentences for each sequence and method, so that a mean says little",
    "docs/results/*.md": "generated: the tables behind docs/results.md",
}

# Phrase -> the plainer form. Regular expressions, without regard to case.
PHRASES = {
    r"\bof whom\b": "name them again",
    r"\bnobody('s| knows)": "say whose, or that it is not known",
    r"\b(is|are) yours to say\b": "say what to do: pass ..., set ...",
    r"\bmean the same by\b": "say what has the same effect",
    r"\bcomes? near to\b": "give the number",
    r"\bhundredths? and a half\b": "give the number with %",
    r"\bthat the data choose\b": "reached by data-dependent indexing",
    r"\bno magnitude is needed\b": "say the fact: one ordinary weight gradient suffices",
    r"\bin order to\b": "to",
    r"\butili[sz]e": "use",
    r"\bprior to\b": "before",
    r"\bwith respect to whether\b": "whether",
    r"\bdue to the fact that\b": "because",
    r"\bit (should|must) be noted that\b": "leave it out",
    r"\bneedless to say\b": "leave it out",
}

# Three dots leave something out, "1, 2, 4, ... times": they end a sentence only before a capital letter.
END = re.compile(r"((?<!\.)[.!?]|\.\.\.(?=[\"')\]”’]*\s+[A-Z]))[\"')\]”’]*(?=\s)")
ABBREVIATIONS = re.compile(r"(?:\b(?:e\.g|i\.e|cf|vs|al|approx|Eqs?|Figs?|Sec|No|pp|St|Dr))\.$")
CODE = "\ue000"  # stands for one piece of inline code, so that nothing in it ends a sentence
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples|Shapes|Note|Warns):$")


class Sentence(NamedTuple):
    """A sentence, the line at which it begins, and whether it stands in a table."""

    line: int
    text: str
    is_cell: bool = False

    @property
    def num_words(self) -> int:
        """Pieces between spaces that hold a letter or a digit; inline code is one."""
        bare = re.sub(r"`[^`]*`", CODE, self.text)
        return sum(any(char.isalnum() or char == CODE for char in piece) for piece in bare.split())


def sentences(text: str, line: int = 1, *, is_cell: bool = False) -> Iterator[Sentence]:
    """The sentences of one paragraph, list item or cell, in which inline code stands between backticks."""
    code = re.findall(r"`[^`]*`", text)
    bare = re.sub(r"`[^`]*`", CODE, text)
    start = 0
    for end in [
        *(match.end() for match in END.finditer(bare) if not ABBREVIATIONS.search(bare[: match.end(1)])),
        len(bare),
    ]:
        own = bare[start:end]
        begin = line + bare[: start + len(own) - len(own.lstrip())].count("\n")
        own = re.sub(CODE, lambda _: code.pop(0), " ".join(own.split()))
        if any(char.isalnum() for char in own):
            yield Sentence(begin, own, is_cell)
        start = end


def inline_text(token: Token) -> str:
    """What a reader sees of one inline token: links by their text, no pictures, code between backticks."""
    pieces = []
    for child in token.children or []:
        if child.type == "code_inline":
            pieces.append("`" + " ".join(child.content.split()).replace("`", "'") + "`")
        elif child.type == "text":
            pieces.append(child.content.replace("`", "'"))
        elif child.type in ("softbreak", "hardbreak"):
            pieces.append("\n")
    return "".join(pieces)


def of_markdown(text: str) -> Iterator[Sentence]:
    """The sentences of a Markdown page, outside of code blocks, headings and HTML."""
    row, around = 0, ""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.nesting == 1:
            around = token.type
            row = token.map[0] if token.type == "tr_open" and token.map else row
        elif token.type == "inline" and around != "heading_open":
            is_cell = around in ("th_open", "td_open")
            line = row if is_cell or token.map is None else token.map[0]
            yield from sentences(inline_text(token), line + 1, is_cell=is_cell)


def of_docstring(text: str, line: int) -> Iterator[Sentence]:
    """The sentences of a docstring that begins at `line`: paragraphs, arguments and list items, without examples."""
    section, block, begin = "", list[str](), line
    lines = inspect.cleandoc(text).split("\n")
    for number, own in enumerate([*lines, ""], line):
        indent = len(own) - len(own.lstrip())
        if indent == 0 and own:
            section = match[1] if (match := SECTION.match(own)) else ""
        is_code = section in ("Example", "Examples") or (not section and indent >= 4) or own.lstrip().startswith(">>>")
        is_item = (bool(section) and indent == 4) or own.lstrip().startswith("- ")
        if not own.strip() or is_code or is_item or (section and indent == 0):
            yield from sentences("\n".join(block), begin)
            block = []
        if own.strip() and not is_code and not (section and indent == 0):
            begin = begin if block else number
            block.append(re.sub(r"^(- |\**\w+(, \**\w+)*: )", "", own.lstrip()) if is_item else own)


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstring_sentences(node: Definition) -> Iterator[Sentence]:
    """Of a definition, and of a class's public methods and properties."""
    if text := ast.get_docstring(node, clean=False):
        yield from of_docstring(text, node.body[0].lineno)
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
                yield from docstring_sentences(child)


def public_modules(package: str, folder: Path) -> dict[Path, list[str]]:
    """Module -> which of its names the package exports."""
    found: dict[Path, list[str]] = {}
    for node in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            path = folder.joinpath(*str(node.module).split(".")[1:])
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            found[path] = [alias.name for alias in node.names]
    return found


def command_names(trees: Iterable[ast.Module]) -> set[str]:
    """The functions that are commands: `app.command("merge")(files.merge_files)`, or decorated by `@app.command`."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and "app.command(" in ast.unparse(node.func):
            found |= {ast.unparse(argument).rsplit(".")[-1] for argument in node.args}
        elif isinstance(node, ast.FunctionDef) and any("app.command" in ast.unparse(d) for d in node.decorator_list):
            found.add(node.name)
    return found


def help_sentences(tree: ast.Module, commands: set[str]) -> Iterator[Sentence]:
    """The help of commands (their docstrings) and of their arguments and options (`help=`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in commands:
            yield from docstring_sentences(node)
        elif isinstance(node, ast.keyword) and node.arg == "help":
            parts = [node.value] if isinstance(node.value, ast.Constant) else getattr(node.value, "values", [])
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else CODE for part in parts)
            yield from sentences(text.replace(CODE, "`value`"), node.value.lineno)


def of_python(path: Path) -> Iterator[Sentence]:
    """The sentences that users read of a module: docstrings of exported names, and help texts of commands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for package, folder in PACKAGES.items():
        exported = public_modules(package, ROOT / folder).get(path, [])
        for node in tree.body:
            if isinstance(node, Definition) and node.name in exported:
                yield from docstring_sentences(node)
    files = [file for pattern in COMMANDS for file in ROOT.glob(pattern)]
    if path in files:
        yield from help_sentences(tree, command_names(ast.parse(file.read_text(encoding="utf-8")) for file in files))


def sentences_of(path: Path) -> list[Sentence]:
    """The sentences of a file, in the order of its lines."""
    found = of_python(path) if path.suffix == ".py" else of_markdown(path.read_text(encoding="utf-8"))
    return sorted(found, key=lambda sentence: sentence.line)


def is_left_out(path: Path) -> bool:
    """Whether a file is in LEFT_OUT."""
    return path.is_relative_to(ROOT) and any(path.relative_to(ROOT).match(pattern) for pattern in LEFT_OUT)


def checked_files() -> list[Path]:
    """All files that are checked, sorted by kind and name."""
    texts = {path for pattern in TEXTS for path in ROOT.glob(pattern) if not is_left_out(path)}
    modules = {path for package, folder in PACKAGES.items() for path in public_modules(package, ROOT / folder)}
    return [*sorted(texts), *sorted(modules | {path for pattern in COMMANDS for path in ROOT.glob(pattern)})]


def mean_words(found: list[Sentence]) -> float:
    """The mean number of words of the sentences outside of tables."""
    prose = [sentence.num_words for sentence in found if not sentence.is_cell]
    return sum(prose) / len(prose) if prose else 0.0


def faults(name: str, found: list[Sentence]) -> Iterator[str]:
    """What is wrong with a file, a line for each fault."""
    if (mean := mean_words(found)) > MEAN:
        yield f"{name}: {mean:.1f} words a sentence, more than {MEAN}. Split the longest sentences."
    for sentence in found:
        if sentence.num_words > LONGEST:
            yield f"{name}:{sentence.line}: {sentence.num_words} words, more than {LONGEST}. Split: {sentence.text}"
        for pattern, plainer in PHRASES.items():
            if match := re.search(pattern, re.sub(r"`[^`]*`", CODE, sentence.text), re.IGNORECASE):
                yield f'{name}:{sentence.line}: "{match[0]}": {plainer}. In: {sentence.text}'


def main(arguments: list[str]) -> int:
    """Print the table and the faults. Returns the exit code."""
    files = [Path(name).resolve() for name in arguments] or checked_files()
    wrong: list[str] = []
    print(f"{'file':<48} sentences  mean  longest")
    for path in files:
        found = [] if is_left_out(path) else sentences_of(path)
        if not found:
            continue
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
        longest = max(sentence.num_words for sentence in found)
        print(f"{name:<48} {len(found):>9} {mean_words(found):>5.1f} {longest:>8}")
        wrong += faults(name, found)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
