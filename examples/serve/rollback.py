"""Go back to the version before, and to its memory; then tell the replicas.

The file of a memory is named by the fingerprint of its model: the rename that brings the model back brings its memory
back, too. The version that is left gets the verdict "rolled back", so it is not served again by mistake. The exit code
is 1 if there is nothing to go back to, and 2 if a replica did not reload.
"""

import argparse
import sys
from pathlib import Path

from admission import alone, judge
from model import FILE, load, save
from nightly import memory_of, version_before
from replicas import tell


def main() -> int:
    """Go back by one version; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/serve"))
    parser.add_argument("--reload", nargs="*", default=[], metavar="URL", help="of the replicas")
    given = parser.parse_args()
    with alone(given.folder):
        now = load(given.folder / FILE)
        before = version_before(given.folder, now)
        memory_of(given.folder, before)
        save(before, given.folder / FILE)
        judge(given.folder, now, "rolled back", f"Version {before.version} was taken back instead of it.")
        print(f"version {before.version} is served again.")
        failed = [url for url in given.reload if not tell(url)]
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
