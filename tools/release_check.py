"""Whether a tag may be released: every text that names the version names this one, and nothing is left to fill in.

    python tools/release_check.py v0.2.0

Owns the list of these texts. Prints what is wrong, a line each, and exits with 1 if there is anything.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# File -> the pattern of its version.
VERSIONS = {
    "pyproject.toml": r'^version = "(.+)"$',
    "bench/pyproject.toml": r'^version = "(.+)"$',
    "CITATION.cff": r'^version: "?([^"\n]+?)"?$',
    "deploy/kubernetes/serve.yaml": r"image: memsyn-serve:(\S+)$",
}
PLACEHOLDER = "OWNER"
WITH_ADDRESSES = (
    "pyproject.toml",
    "bench/pyproject.toml",
    "CHANGELOG.md",
    "CITATION.cff",
    "SECURITY.md",
    ".github/ISSUE_TEMPLATE/config.yml",
    "docs/reference/stability.md",
)


def different_versions(root: Path, version: str) -> list[str]:
    """The texts that name another version, and whether the benchmark needs this one of memsyn."""
    found = []
    for name, pattern in VERSIONS.items():
        named = set(re.findall(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE))
        if named != {version}:
            found.append(f"{name}: names version {', '.join(sorted(named)) or 'none'}, not {version}. Change it there.")
    if f'"memsyn[report]=={version}"' not in (root / "bench" / "pyproject.toml").read_text(encoding="utf-8"):
        found.append(f"bench/pyproject.toml: does not need memsyn[report]=={version}. Change its dependencies.")
    return found


def missing_before_release(root: Path, version: str) -> list[str]:
    """What a release needs beside its version: a day in the changelog, golden files, and real addresses."""
    found = []
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        found.append(f"CHANGELOG.md: has no heading '## [{version}] - YYYY-MM-DD'. Write the day of the release.")
    if not list((root / "tests" / "golden").glob(f"{version}-*.safetensors")):
        found.append(f"tests/golden: has no files of {version}. Run: python -m tests.golden {version}")
    lines = (root / "docs" / "performance.jsonl").read_text(encoding="utf-8").splitlines()
    if json.loads(lines[0])["quick"]:
        found.append("docs/performance.md: is of a quick run. Run: make bench")
    for name in WITH_ADDRESSES:
        if PLACEHOLDER in (root / name).read_text(encoding="utf-8"):
            found.append(f"{name}: says {PLACEHOLDER}. Write the owner of the public repository.")
    return found


def main(arguments: list[str]) -> int:
    """Check one tag. Returns the exit code."""
    if len(arguments) != 1 or not (match := re.fullmatch(r"v(\d+\.\d+\.\d+)", arguments[0])):
        print(f"give one tag such as v0.2.0; got {' '.join(arguments) or 'none'}.")
        return 1
    wrong = different_versions(ROOT, match[1]) + missing_before_release(ROOT, match[1])
    print(*wrong or [f"{arguments[0]} may be released."], sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
