"""House rules of the room `live/` that can be read off its source."""

import ast
from pathlib import Path

import memsyn.live

ROOM = Path(memsyn.live.__file__).parent
MAX_ATTRIBUTES = 12


def num_attributes(folder: Path) -> dict[str, int]:
    """Class -> the number of attributes that its methods assign on `self` and that its body annotates."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for definition in ast.walk(ast.parse(path.read_text())):
            if isinstance(definition, ast.ClassDef):
                fields = {
                    node.target.id
                    for node in definition.body
                    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
                }
                assigned = {
                    node.attr
                    for node in ast.walk(definition)
                    if isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "self"
                }
                found[f"{path.relative_to(folder)}: {definition.name}"] = len(fields | assigned)
    return found


def test_classes_hold_at_most_a_dozen_attributes() -> None:
    counts = num_attributes(ROOM)
    counts.pop("observer.py: Stats")  # a plain list of counts, and public
    assert {name: count for name, count in counts.items() if count > MAX_ATTRIBUTES} == {}
    assert counts["window.py: Window"] == 4
    assert counts["request_queue.py: QueuedSamples"] == 6


def test_the_room_has_three_to_eight_files() -> None:
    assert 3 <= len(list(ROOM.glob("*.py"))) <= 8
