"""What the built distributions say of their licences, that the texts are in them, and what CI installs by hash."""

import email
import importlib
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FOLDERS = {"memsyn": ROOT, "memsyn-bench": ROOT / "bench"}
OPENINGS = {
    "Apache-2.0": "Apache License\n                           Version 2.0",
    "CC-BY-4.0": "Section 1 – Definitions.",
    "MIT": "Copyright (c) Microsoft Corporation.",
    "OFL-1.1": "SIL OPEN FONT LICENSE",
    "Bitstream-Vera": "Gnome Foundation",
}
"""Licence -> words of its text."""


@pytest.fixture(scope="module", params=FOLDERS)
def wheel(request, tmp_path_factory):
    """The name of a distribution and its wheel, built as pip builds it."""
    build = pytest.importorskip("hatchling.build", reason="needs hatchling: make install brings it")
    target = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(FOLDERS[request.param])
        built = build.build_wheel(str(target))
    with zipfile.ZipFile(target / built) as file:
        yield request.param, file


def metadata(file):
    (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(file.read(name)), name.removesuffix("METADATA")


def packs():
    """The licences in the tables of the packs."""
    found = set()
    for path in (ROOT / "bench" / "memsyn_bench" / "data" / "packs").glob("*/LICENSES.md"):
        rows = [line.split(" | ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
        place = rows[0].index("licence")
        found |= {row[place] for row in rows[1:]}
    return found


def test_the_expression_has_the_licences_of_what_is_in_the_wheel(wheel):
    name, file = wheel
    facts, _ = metadata(file)
    own = {"Apache-2.0"} if name == "memsyn" else {"Apache-2.0"} | packs()
    assert set(facts["License-Expression"].split(" AND ")) == own
    assert facts["License"] is None, "the older field would say it twice"
    assert not [value for value in facts.get_all("Classifier", []) if value.startswith("License ::")]
    holds_pictures = any(entry.endswith((".webp", ".png", ".safetensors")) for entry in file.namelist())
    assert holds_pictures == (name == "memsyn-bench")


def test_the_wheel_holds_the_text_of_each_licence(wheel):
    _, file = wheel
    facts, folder = metadata(file)
    named = facts.get_all("License-File")
    texts = "\n".join(file.read(f"{folder}licenses/{path}").decode() for path in named)
    for licence in facts["License-Expression"].split(" AND "):
        assert OPENINGS[licence] in texts, licence


def test_the_wheel_of_the_benchmark_says_whose_each_pack_is(wheel):
    name, file = wheel
    folders = {entry.rsplit("/", 1)[0] for entry in file.namelist() if "/data/packs/" in entry}
    folders = {folder for folder in folders if ".dist-info/" not in folder}
    assert len(folders) == (3 if name == "memsyn-bench" else 0)
    for folder in folders:
        assert f"{folder}/LICENSES.md" in file.namelist()


@pytest.mark.parametrize("name", FOLDERS)
def test_the_source_distribution_holds_the_texts(name, tmp_path, monkeypatch):
    pytest.importorskip("hatchling.build", reason="needs hatchling: make install brings it")
    monkeypatch.chdir(FOLDERS[name])
    built = importlib.import_module("hatchling.build").build_sdist(str(tmp_path))
    with tarfile.open(tmp_path / built) as file:
        (info,) = (entry for entry in file.getnames() if entry.endswith("/PKG-INFO"))
        facts = email.message_from_bytes(file.extractfile(info).read())
        for path in facts.get_all("License-File"):
            assert f"{built.removesuffix('.tar.gz')}/{path}" in file.getnames()


def test_a_licence_in_the_tables_is_an_identifier_of_spdx():
    assert packs() == {"Apache-2.0", "CC-BY-4.0", "MIT", "OFL-1.1", "Bitstream-Vera"}
    for path in (ROOT / "bench" / "LICENSES").iterdir():
        assert OPENINGS[path.stem] in path.read_text(encoding="utf-8")


# What CI installs


def locked(name):
    """Package -> version, hashes."""
    text = (ROOT / name).read_text(encoding="utf-8")
    entries = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n +--hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^[^\s#]", text, re.MULTILINE)), "each entry has a version and hashes"
    return {
        canonicalize_name(package): (Version(version), hashes.count("sha256")) for package, version, hashes in entries
    }


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-tools.lock"])
def test_locks_have_hashes_and_name_no_host(name):
    assert len(locked(name)) > 40
    assert all(count > 0 for _, count in locked(name).values())
    assert not re.search(r"://|--(extra-)?index|--find", (ROOT / name).read_text(encoding="utf-8"))


def test_the_lock_has_what_the_distributions_need_in_ci():
    """If this fails after a change of pyproject.toml or constraints.txt: make lock."""
    found = {package: version for package, (version, _) in locked("requirements.lock").items()}
    pending = [Requirement("memsyn[dev]"), Requirement("memsyn-bench[all]"), Requirement("hatchling")]
    own = {"memsyn": ROOT / "pyproject.toml", "memsyn-bench": ROOT / "bench" / "pyproject.toml"}
    done = set()
    while pending:
        needed = pending.pop()
        if str(needed) in done:
            continue
        done.add(str(needed))
        if needed.name in own:
            pending += requirements(own[needed.name], needed.extras)
        else:
            package = canonicalize_name(needed.name)
            assert package in found, f"{needed} is not in requirements.lock"
            assert needed.specifier.contains(found[package], prereleases=True), f"{needed}, locked {found[package]}"
    assert len(done) > 40


def requirements(path, extras):
    """What a distribution needs with some extras."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11, for which the lock is")
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    found = [*project["dependencies"], *(own for extra in extras for own in project["optional-dependencies"][extra])]
    return [Requirement(own) for own in found]


def test_the_lock_has_the_versions_that_are_tested():
    found = {package: version for package, (version, _) in locked("requirements.lock").items()}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        needed = None if line.startswith("#") else Requirement(line)
        if needed is not None and canonicalize_name(needed.name) in found:  # not all extras are installed in CI
            assert needed.specifier.contains(found[canonicalize_name(needed.name)]), line


@pytest.mark.parametrize(
    ("prints", "code", "says"),
    [
        ("No known vulnerabilities found", 0, "No known"),
        ("Found 2 known vulnerabilities in 1 package", 1, "Found 2"),
        ("ConnectionError: unreachable", 1, "NOT AUDITED"),
        ("ERROR:pip_audit._cli:torch: Dependency not found on PyPI and could not be audited", 1, "NOT AUDITED"),
    ],
)
def test_an_audit_that_did_not_happen_is_no_success(prints, code, says, tmp_path):
    """A stand-in prints what pip-audit prints."""
    program = tmp_path / "bin" / "pip-audit"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncase "$*" in *--strict*) echo "{prints}" >&2; exit {code};; esac\n')
    program.chmod(0o755)
    (tmp_path / ".installed").touch()
    command = ["make", "audit", f"TOOLS={tmp_path}", f"OUT={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert says in done.stdout
    assert (done.returncode == 0) == (says == "No known")
    audited = (tmp_path / "audited.txt").read_text()
    assert len(audited.splitlines()) == len(locked("requirements.lock"))
    assert "+" not in audited
