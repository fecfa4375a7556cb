"""The documentation site: built strictly from docs/, read without a network, and true to the code."""

import ast
import fcntl
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import yaml
from mkdocs.config.defaults import MkDocsConfig
from nbclient.exceptions import CellExecutionError
from tools.site_hooks import notebook_page, on_config

import memsyn
from tests.browser import CHROMIUM, MISSING, Browser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LOADS = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "link": "href",
    "script": "src",
    "source": "src",
}
"""Tag -> the attribute that names what a browser loads."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, as `make docs` builds it: the notebooks run. Processes of pytest-xdist share one build."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with (shared / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "site").exists():
            build(shared / "unfinished-site")
            (shared / "unfinished-site").rename(shared / "site")
    return shared / "site"


def build(folder: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr


class Found(HTMLParser):
    """What a page loads, where it links to, and the places in it that links can name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.places: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        if tag in LOADS and own.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(own.get(LOADS[tag]) or "")
        if tag == "a":
            self.links.append(own.get("href") or "")
        self.places.append(own.get("id") or own.get("name") or "")


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Found]:
    return {path: Found(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}


def in_nav(entries: list) -> list[str]:
    found = []
    for entry in entries:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += in_nav(target) if isinstance(target, list) else [target]
    return found


def nav() -> list[str]:
    config = MkDocsConfig()
    config.docs_dir, config.nav = str(DOCS), yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    return in_nav(on_config(config).nav)


def test_the_navigation_names_every_page_once() -> None:
    sources = [path.relative_to(DOCS) for kind in ("*.md", "*.ipynb") for path in DOCS.rglob(kind)]
    assert sorted(nav()) == sorted(path.with_suffix(".md").as_posix() for path in sources)


def test_a_folder_in_the_navigation_becomes_its_pages(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    config = MkDocsConfig()
    config.docs_dir, config.nav = str(tmp_path), [{"Results": [{"By sequence": "results/*.md"}]}]
    assert on_config(config).nav == [{"Results": []}]
    for name in ("words5.md", "emoji8.md"):
        (tmp_path / "results" / name).write_text("# A")
    config.nav = [{"Results": [{"By sequence": "results/*.md"}]}]
    assert on_config(config).nav == [{"Results": [{"By sequence": ["results/emoji8.md", "results/words5.md"]}]}]


def test_nothing_is_loaded_from_another_host(site: Path, pages: dict[Path, Found]) -> None:
    assert len(pages) > 40
    for path, page in pages.items():
        assert not [own for own in page.loaded if re.match(r"(\w+:)?//", own)], path
        assert not [own for own in page.loaded if own.startswith("/")], f"{path}: not from the page's folder"
    for path in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        assert not re.search(r"""(url\(|@import|href=)\s*["']?(\w+:)?//""", path.read_text()), path


def test_links_lead_to_files_and_places_that_are_there(site: Path, pages: dict[Path, Found]) -> None:
    places = {path: set(page.places) for path, page in pages.items()}
    checked = 0
    for path, page in pages.items():
        for link in page.links + page.loaded:
            if re.match(r"(https?|data|mailto):", link) or link in ("", "#"):
                continue
            name, _, place = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.is_dir() or target.is_file(), f"{path.relative_to(site)} links to {link}"
            checked += 1
            if place and target in places and not place.startswith("__"):
                assert place in places[target], f"{path.relative_to(site)} links to {link}"
    assert checked > 1000


def numbers_after(site: Path, page: str, words: str) -> list[float]:
    """The numbers that a notebook printed after these words."""
    (row,) = re.findall(rf"{re.escape(words)} +\[(.*)\]", (site / page).read_text())
    return [float(number) for number in row.split(",")]


def test_the_notebook_shows_what_is_forgotten_and_what_is_kept(site: Path) -> None:
    page = "start/get-started.html"
    without = numbers_after(site, page, "after month 3, unprotected:")
    protected = numbers_after(site, page, "after month 3, with memsyn:")
    assert len(without) == len(protected) == 3
    assert min(protected) > 84
    assert without[0] < 68  # the first alphabet
    assert protected[0] - without[0] > 25
    assert "Broken." in (site / page).read_text()
    assert "Safe." in (site / page).read_text()


def test_the_second_notebook_shows_what_the_strength_does(site: Path) -> None:
    text = (site / "start/projection.html").read_text()
    rows = re.findall(r"^ +(\d+) +([\d.]+)% +([\d.]+)% +([\d.]+)%(?:$|<)", text, re.MULTILINE)
    found = {float(row[0]): tuple(map(float, row[1:])) for row in rows}
    assert list(found) == [0, 1, 10, 100, 1000]
    rooms = [room for room, _, _ in found.values()]
    assert rooms == sorted(rooms, reverse=True)
    assert found[10][1] > found[0][1] + 15  # the first task, at the default strength and without protection
    assert found[10][2] > found[1000][2] + 5  # the second task


def test_a_cell_that_fails_ends_the_build(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_markdown_cell("# A"), nbformat.v4.new_code_cell("assert 1 + 1 == 3")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    with pytest.raises(CellExecutionError, match=re.escape("assert 1 + 1 == 3")):
        notebook_page(tmp_path / "a.ipynb")


def test_notebooks_are_kept_without_outputs() -> None:
    for path in DOCS.rglob("*.ipynb"):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert not [cell for cell in cells if cell.outputs or cell.execution_count], path.name


def test_the_reference_has_every_public_name_once(pages: dict[Path, Found], site: Path) -> None:
    source = re.findall(r"^::: memsyn\.(\w+)$", (DOCS / "reference" / "api.md").read_text(), re.MULTILINE)
    assert sorted(source) == sorted(memsyn.__all__)
    places = pages[site / "reference" / "api.html"].places
    assert not {f"memsyn.{name}" for name in memsyn.__all__} - set(places)
    text = (site / "reference" / "api.html").read_text()
    assert "The absolute value is taken per sample" in text


def texts_of_the_code() -> str:
    """Every text in the source of memsyn, with a mark where a value is put in."""
    found = []
    for path in Path(memsyn.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_page_of_errors_has_every_class_and_quotes_real_messages() -> None:
    page = (DOCS / "reference" / "errors.md").read_text()
    classes = [name for name in memsyn.__all__ if name.endswith(("Error", "Warning"))]
    sections = dict(zip(*[iter(re.split(r"^## (\w+)$", page, flags=re.MULTILINE)[1:])] * 2, strict=True))
    assert sorted(sections) == sorted(classes)
    code = texts_of_the_code()
    for name, section in sections.items():
        assert len(section.split()) >= 20, f"{name}: cause and cure are missing"
        messages = re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)
        assert messages or name.endswith("Warning"), name
        for message in messages:
            parts = [part for part in message.split("…") if len(part.strip(" .,:;")) > 3]
            assert parts
            for part in parts:
                assert part.rstrip() in code, f"{name}: no message of memsyn has {part!r}"


RECIPES = DOCS / "recipes"
WITH_EXAMPLES = {"detection", "embeddings", "entities", "language-model", "larger-than-one-machine", "lora"}
"""Recipes that show a script of `examples/`; test_trainers_examples.py runs those."""
WITHOUT_CODE = {"index"}
Rows = list[tuple[str, list[float]]]
"""What a recipe printed: the words before the first colon of each line, and the numbers after it."""


def rows_of(text: str) -> Rows:
    """`protected: 99% of 5 right` -> ("protected", [99, 5])."""
    return [(line.partition(":")[0], numbers_of(line.partition(":")[2])) for line in text.splitlines()]


def numbers_of(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


def settings() -> dict[str, str]:
    """One thread, and the command `memsyn` of this environment."""
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": commands}


def check_new_classes(rows: Rows) -> None:
    careless, protected = dict(rows)["careless"], dict(rows)["protected"]
    assert careless[0] < 93
    assert min(protected) > 96


def check_no_old_data(rows: Rows) -> None:
    (_, nothing, _), (same, new, learned), (_, noise, _), (_, old, _) = (numbers for _, numbers in rows)
    assert nothing > 2 * noise > 3 * new
    assert new < 1.5 * old
    assert min(same, learned) > 95


def check_time_series(rows: Rows) -> None:
    (_, [begun]), (_, [forgotten, _]), (_, [kept, learned]), _, (_, [lost, _]), (_, [default, _]), _, (_, firm) = rows
    assert forgotten > 5 * begun
    assert max(kept, learned) < 1.5 * begun
    assert min(lost, default) > 3 * max(firm)  # the LSTM: with the default strength, and with a large one


def check_strength(rows: Rows) -> None:
    changes, old, new = zip(*(numbers for words, numbers in rows if words.startswith("strength")), strict=True)
    assert list(changes) == sorted(changes, reverse=True)
    assert old[0] < 90 < 97 < old[2]
    assert new[2] > new[4] + 2
    trials = [numbers for words, numbers in rows if words.startswith("Relative")]
    assert all(learned < 0.98 * trials[0][0] for learned, _ in trials[1:-1])
    assert trials[-1][1] > trials[0][1] + 10
    assert ("outputs times 5", [25]) in rows


def check_gate(rows: Rows) -> None:
    assert [numbers for _, numbers in rows] == [[0], [1], [2]]
    steps = yaml.safe_load(blocks_of("gate-in-ci", "yaml"))["jobs"]["gate"]["steps"]
    (in_workflow,) = (step["run"] for step in steps if step.get("run", "").startswith("memsyn gate"))
    by_code = blocks_of("gate-in-ci", "bash")
    for command, name, code, said in (
        (in_workflow, "barely", 0, "Safe."),
        (in_workflow, "much", 2, "Broken."),
        (by_code, "much", 1, "broken: train again"),
    ):
        shutil.copy(f"{name}.safetensors", "candidate.safetensors")
        done = subprocess.run(["bash", "-ec", command], env=settings(), capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        assert said in done.stdout
    assert "Broken." in Path("verdict.html").read_text()


def check_lightning(rows: Rows) -> None:
    forgotten, kept = (numbers for _, numbers in rows[:2])
    assert forgotten[0] < 80
    assert min(kept) > 95


def check_other_code(rows: Rows) -> None:
    shares = [numbers[0] for words, numbers in rows if words.startswith("batches of")]
    assert shares[0] == 100
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 80


def check_one_head(rows: Rows) -> None:
    found = dict(rows)
    assert max(found["fine-tuned"][0], found["class means alone"][0]) < 35
    assert found["projected, with class means"][0] > max(87, found["projected"][0] + 3)


def check_short_answers(_: Rows) -> None:
    memory = memsyn.Memory.load("model.memsyn.safetensors")
    assert [entry.label for entry in memory.history] == ["shipped", "second month"]
    assert memsyn.Importance.load("traffic.safetensors").num_samples == 256


CLAIMS = {
    "gate-in-ci": check_gate,
    "lightning": check_lightning,
    "new-classes": check_new_classes,
    "no-old-data": check_no_old_data,
    "one-head": check_one_head,
    "other-code": check_other_code,
    "short-answers": check_short_answers,
    "strength": check_strength,
    "time-series": check_time_series,
}
"""Recipe -> what its page says of the numbers that its code prints."""


def blocks_of(name: str, language: str) -> str:
    page = (RECIPES / f"{name}.md").read_text()
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))


def test_each_recipe_runs_or_shows_a_script_that_is_run() -> None:
    assert {path.stem for path in RECIPES.glob("*.md")} == CLAIMS.keys() | WITH_EXAMPLES | WITHOUT_CODE
    shown = "".join(blocks_of(name, "py") for name in WITH_EXAMPLES)
    scripts = re.findall(r'^--8<-- "examples/(\w+)\.py"$', shown, re.MULTILINE)
    assert sorted(scripts) == ["detection", "entities", "fsdp", "lora", "retrieval", "sft"]


@pytest.mark.parametrize("name", CLAIMS)
def test_a_recipe_prints_what_its_page_shows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.py").write_text(blocks_of(name, "python"))
    done = subprocess.run([sys.executable, "recipe.py"], env=settings(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    CLAIMS[name](rows_of(done.stdout))
    shown = blocks_of(name, "text")
    if shown:
        printed = done.stdout.splitlines()
        lines = [line for line in shown.splitlines() if line]
        assert [re.sub(r"[\d.]+", "N", line) for line in lines] == [re.sub(r"[\d.]+", "N", line) for line in printed]
        for line, own in zip(lines, printed, strict=True):
            width = 12 if "%" in line else 0.2  # other processors round otherwise, and training amplifies that
            assert numbers_of(own) == pytest.approx(numbers_of(line), abs=width), f"the page shows {line}, not {own}"


def test_the_page_of_versions_has_those_that_are_tested() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    page = (DOCS / "reference" / "versions.md").read_text()
    named = re.findall(r"([a-z][a-z-]+) (\d+\.\d+\.\d+)", page) + re.findall(r"\| (torch) \| ([\d.]+),", page)
    assert len(named) >= 15
    assert not [(name, version) for name, version in named if pinned.get(name) != version]


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_a_browser_shows_pages_without_a_network(site: Path, tmp_path: Path) -> None:
    browser = Browser(tmp_path / "profile")
    try:
        for name in ("index", "start/get-started", "reference/api", "concepts/projection", "gallery"):
            for width in (1600, 380):
                browser.open(site / f"{name}.html", width=width)
                assert not [url for url in browser.loaded if not url.startswith(("file:", "data:"))], name
                assert browser.run("document.documentElement.scrollWidth") <= width, f"{name} at {width}"
                broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
                assert browser.run(broken) == [], name
                assert browser.problems == [], name
    finally:
        browser.close()
