"""The files for GitHub and for releases: valid by their schemas, with pinned actions and targets that exist.

Workflows cannot run here. So they are linted (check-jsonschema, zizmor), and what they call is held against this tree.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tools import release_check

yaml = pytest.importorskip("yaml", reason="needs PyYAML: make install brings it")

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
ADDRESS = "https://github.com/OWNER/memsyn"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def lint(name: str, *arguments: object) -> None:
    """Run a linter of the extra `dev`, which must find nothing."""
    program = Path(sys.executable).parent / name
    if not program.exists() and os.environ.get("CI") != "true":
        pytest.skip(f"needs {name}: make install brings it")
    done = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def test_all_files_are_known() -> None:
    assert [path.stem for path in WORKFLOWS] == ["docs", "release", "tests", "weekly"]
    assert [path.stem for path in FORMS] == ["bug", "idea", "model"]


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        ("github-workflows", WORKFLOWS),
        ("github-issue-forms", FORMS),
        ("github-issue-config", [GITHUB / "ISSUE_TEMPLATE" / "config.yml"]),
        ("dependabot", [GITHUB / "dependabot.yml"]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_fit_their_schemas(schema: str, paths: list[Path]) -> None:
    lint("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *paths)


def test_workflows_have_no_known_weakness(tmp_path: Path) -> None:
    lint("zizmor", "--offline", "--no-progress", GITHUB)
    weak = tmp_path / "weak.yml"
    weak.write_text(
        "on: issues\njobs:\n  greet:\n    runs-on: ubuntu-24.04\n    steps:\n"
        "      - run: echo ${{ github.event.issue.title }}\n"
    )
    with pytest.raises(AssertionError, match="template-injection"):
        lint("zizmor", "--offline", "--no-progress", weak)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_jobs_have_limits(path: Path) -> None:
    used = re.findall(r"uses: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert used
    assert [one for one in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one)] == []
    assert read(path)["permissions"] == {}
    assert all("timeout-minutes" in job for job in read(path)["jobs"].values())


def test_an_action_has_one_version_in_all_workflows() -> None:
    texts = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    pins = {tuple(pin.split("@")) for pin in re.findall(r"uses: (\S+)", texts)}
    assert len(pins) == len({name for name, _ in pins})


def test_every_target_of_make_that_a_workflow_calls_exists() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
    called = {
        match
        for path in WORKFLOWS
        for step in steps(path)
        for match in re.findall(r"make ([a-z-]+)", step.get("run", ""))
    }
    assert {"check", "test", "soak", "docs", "packages", "release-check"} <= called
    assert called - targets == set()


def test_windows_runs_the_commands_of_make_torch() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ntorch:\n")[1].split("\n\n")[0]
    install, run = [step["run"] for step in read(GITHUB / "workflows" / "tests.yml")["jobs"]["windows"]["steps"][2:]]
    assert install.split("torch ")[1] in recipe
    assert run.split("pytest ")[1].replace("'", "") in recipe


def test_the_list_of_tests_for_any_torch_names_files() -> None:
    arguments = (ROOT / "tests" / "with_any_torch.txt").read_text(encoding="utf-8").split()
    names = [argument for argument in arguments if not argument.startswith("--deselect=")]
    assert names == sorted(set(names))
    assert [name for name in names if not (ROOT / name).is_file()] == []
    assert len(names) > 30
    for file, _, test in (argument[len("--deselect=") :].partition("::") for argument in arguments[len(names) :]):
        assert file in names
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")


def test_python_versions_are_those_that_the_distributions_take() -> None:
    jobs = read(GITHUB / "workflows" / "tests.yml")["jobs"]
    rows = [*jobs["pythons"]["strategy"]["matrix"]["python"], "3.11"]
    assert sorted(rows, key=lambda row: int(row[2:])) == ["3.10", "3.11", "3.12", "3.13"]
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert oldest is not None
    assert jobs["torch"]["strategy"]["matrix"]["torch"] == [f"{oldest[1]}.0", ""]


def test_hooks_run_the_versions_that_are_tested() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    hooks = read(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff", "ruff-format", "english", "large-files"]
    for name, version in (package.split("==") for hook in hooks for package in hook["additional_dependencies"]):
        assert pins.get(name, version) == version, f"{name} is {pins[name]} in constraints.txt"


def test_the_citation_names_the_version_the_paper_and_the_address() -> None:
    citation = read(ROOT / "CITATION.cff")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{citation["version"]}"' in text
    assert citation["repository-code"] == ADDRESS
    (paper,) = citation["references"]
    assert paper["title"] == "Memory Aware Synapses: Learning what (not) to forget"
    assert paper["authors"][0]["family-names"] == "Aljundi"
    assert paper["year"] == 2018


@pytest.mark.parametrize("name", ["pyproject.toml", "bench/pyproject.toml"])
def test_both_distributions_have_the_same_addresses(name: str) -> None:
    section = (ROOT / name).read_text(encoding="utf-8").split("[project.urls]\n")[1].split("\n\n")[0]
    found = dict(re.findall(r'^(\w+) = "([^"]+)"', section, re.MULTILINE))
    assert list(found) == ["Homepage", "Documentation", "Source", "Issues", "Changelog"]
    assert {value for key, value in found.items() if key in ("Homepage", "Source")} == {ADDRESS}
    assert found["Changelog"].startswith(ADDRESS)


# The check before a release


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that the check reads, with an owner."""
    for name in {*release_check.VERSIONS, *release_check.WITH_ADDRESSES, "CHANGELOG.md"}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / name).read_text(encoding="utf-8").replace("OWNER", "someone")
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "docs" / "performance.jsonl").write_text(json.dumps({"part": "head", "quick": False}) + "\n", "utf-8")
    shutil.copytree(ROOT / "tests" / "golden", tmp_path / "tests" / "golden")
    changelog = tmp_path / "CHANGELOG.md"
    text = re.sub(r"^## \[0\.2\.0\].*$", "## [0.2.0] - 2026-12-01", changelog.read_text("utf-8"), flags=re.MULTILINE)
    changelog.write_text(text, encoding="utf-8")
    return tmp_path


def wrong(tree: Path, version: str) -> list[str]:
    return release_check.different_versions(tree, version) + release_check.missing_before_release(tree, version)


def test_this_version_may_be_released_from_a_tree_with_an_owner(tree: Path) -> None:
    assert wrong(tree, "0.2.0") == []


def test_another_version_is_refused_at_each_place(tree: Path) -> None:
    places = ["pyproject.toml", "bench/pyproject.toml", "CITATION.cff", "deploy/kubernetes/serve.yaml"]
    assert [line.split(":")[0] for line in wrong(tree, "0.3.0")] == [
        *places, "bench/pyproject.toml", "CHANGELOG.md", "tests/golden"
    ]  # fmt: skip


@pytest.mark.parametrize("name", release_check.WITH_ADDRESSES)
def test_a_placeholder_is_refused(name: str, tree: Path) -> None:
    (tree / name).write_text((tree / name).read_text("utf-8").replace("someone", "OWNER"), encoding="utf-8")
    assert wrong(tree, "0.2.0") == [f"{name}: says OWNER. Write the owner of the public repository."]


def test_the_costs_of_a_quick_run_are_refused(tree: Path) -> None:
    (tree / "docs" / "performance.jsonl").write_text(json.dumps({"part": "head", "quick": True}) + "\n", "utf-8")
    assert wrong(tree, "0.2.0") == ["docs/performance.md: is of a quick run. Run: make bench"]


@pytest.mark.parametrize("arguments", [[], ["0.2.0"], ["v0.2"], ["v0.2.0", "v0.2.1"]])
def test_what_is_no_tag_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert release_check.main(arguments) == 1
    assert "give one tag such as v0.2.0" in capsys.readouterr().out
