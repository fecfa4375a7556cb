"""Damaged and hostile files, at random from a generator: what no loader should trust."""

import copy
import json
import random
import struct
from typing import Any

import torch

from memsyn import Consolidation, KroneckerFactors, Memory
from memsyn.matrices import Layout, Matrix, probe_matrix
from memsyn.values.directions import Directions, consolidated
from tests.sealing import put_together, sealed, taken_apart


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 7, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**40, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "../../../etc/passwd", "anchor/../w", "/", "\x00", "\x1b[2J", "\ud800", "é" * 9, "F32",
    "F64", "BF16", "BOOL", "I64", "C64", "memory", "importance", "factors", "importance/layer.weight",
    "sum", "sum/layer.weight", "moments/inputs/t", "input_values/w", "inputs_sketch/w", "sha256:" + "0" * 64, [],
    {}, [[]], [0, 0], [0, 8], [8, 4], [-8, 0], [2**62, 2**62, 0], [1] * 65, ["layer.weight"], {"w": "w"}, nested(300),
]  # fmt: skip
NUMBERS = [float("nan"), float("inf"), -float("inf"), -1.0, -1e-45, -0.0, 1e-45, 3e38, 1e30]


def damaged(rng: random.Random, whole: bytes, other: bytes) -> bytes:
    """Bytes flipped, lost, put in, repeated, exchanged; the checksum stays as it was."""
    content = bytearray(whole)
    for _ in range(rng.choice([1, 1, 2, 5])):
        first, last = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        match rng.randrange(8):
            case 0:
                content[first % len(content)] ^= 1 << rng.randrange(8)
            case 1:
                content[first:last] = rng.randbytes(last - first)
            case 2:
                del content[first:]
            case 3:
                del content[first:last]
            case 4:
                content[first:first] = rng.randbytes(rng.randrange(1, 40))
            case 5:
                content[last:last] = content[first:last]
            case 6:
                content[first:last] = other[first:last]
            case 7:
                content[:8] = struct.pack("<Q", rng.choice([0, 1, 2, len(content), 2**31, 2**63, 2**64 - 1, last]))
        content = content or bytearray(b"\0")
    return bytes(content)


def forged(rng: random.Random, whole: bytes) -> bytes:
    """Another header or other numbers, with the right checksum."""
    entry, header, data = taken_apart(whole)
    tree = {"entry": entry, "header": header}
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        _change(rng, tree)
    for _ in range(rng.choice([0, 0, 1, 2])):
        place, number = rng.randrange(len(data) // 4) * 4, struct.pack("<f", rng.choice(NUMBERS))
        data = data[:place] + rng.choice([number, rng.randbytes(4)]) + data[place + 4 :]
    if not isinstance(tree.get("header"), dict) or rng.randrange(8) == 0:
        return sealed(_changed_text(rng, json.dumps(tree).encode()), data)
    whole = put_together(tree.get("entry"), tree["header"], data)
    if rng.randrange(8):
        return whole
    (length,) = struct.unpack("<Q", whole[:8])
    return sealed(_changed_text(rng, whole[8 : 8 + length]), whole[8 + length :])


def _change(rng: random.Random, tree: dict[str, Any]) -> None:
    """One place of a JSON tree, anywhere in it."""
    places = []

    def visit(node: Any, depth: int = 0) -> None:
        if depth < 50 and isinstance(node, (dict, list)):
            for key in node if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                visit(node[key], depth + 1)

    visit(tree)
    if not places:
        return
    (node, key), (source, name) = rng.choice(places), rng.choice(places)
    match rng.randrange(5):
        case 0 | 1:
            node[key] = copy.deepcopy(rng.choice(VALUES))
        case 2:
            del node[key]
        case 3:
            node[key] = copy.deepcopy(source[name])
        case 4 if isinstance(node, dict):
            text = rng.choice([value for value in VALUES if isinstance(value, str)])
            node[text] = node.pop(key)


def _changed_text(rng: random.Random, text: bytes) -> bytes:
    """JSON that is none any more, or says something twice."""
    first, last = sorted(rng.randrange(len(text)) for _ in range(2))
    piece = rng.choice([text[first:last], b"[" * 5000, b'"\\ud800"', b"\xff\xfe", b"1" * 5000, b"9e999", b"{}{", b'"'])
    return text[:first] + piece + text[rng.choice([first, last]) :]


def factors() -> KroneckerFactors:
    """A grouped matrix with a bias, a matrix as a sketch, a table, and parameters without a matrix."""
    grouped, wide, table = Layout(2, 2, 3, False, False), Layout(1, 2, 9, True, False), Layout(1, 2, 5, True, True)
    rows = torch.Generator().manual_seed(0)

    def moment(groups: int, width: int) -> torch.Tensor:
        found = torch.randn(groups, width, 7, generator=rows)
        return found @ found.transpose(1, 2)

    whole = moment(1, 9)
    sums = {
        "inputs/g.weight": moment(2, 4),
        "outputs/g.weight": moment(2, 2),
        "inputs_sketch/w": whole @ probe_matrix(9, 4, whole),
        "inputs_trace/w": whole.diagonal(dim1=1, dim2=2).sum(1),
        "outputs/w": moment(1, 2),
        "inputs/t": torch.tensor([3.0, 0, 1, 2, 1]),
        "outputs/t": moment(1, 2),
        "diagonal/n": torch.tensor([1.0, 0.5]),
        "diagonal/unused": torch.zeros(2),
        **{f"positions/{key}": torch.tensor(7.0, dtype=torch.float64) for key in ("g.weight", "w", "t")},
    }
    matrices = {"g.weight": Matrix("g.weight", "g.bias", grouped), "w": Matrix("w", None, wide)}
    matrices["t"] = Matrix("t", None, table)
    return KroneckerFactors(sums, 7, matrices, {"w": "Kronecker factors", "unused": "unused"}, fingerprint="sha256:00")


def directions() -> Memory:
    """A memory of these factors, with some of their eigenvectors."""
    found = consolidated(Directions(), factors(), (0.0, 1.0), 1)
    entry = Consolidation("now", 7, "sum", None, "signed_outputs", "second moments of inputs and output gradients")
    kept = {"norm.running_mean": torch.tensor([0.5, -2.0])}
    return Memory({"n": torch.ones(2)}, {"n": torch.ones(2)}, (entry,), {"n": 7}, found, kept)


def factor_sources() -> list[tuple[str, dict[str, Any], dict[str, dict[str, torch.Tensor]]]]:
    """Kinds, headers and groups of the files that hold second moments."""
    memory = directions()
    return [
        ("factors", factors().header(), {"moments": factors().sums}),
        ("memory", memory.header(), memory.groups()),
    ]


def sources() -> list[tuple[str, dict[str, Any], dict[str, dict[str, torch.Tensor]]]]:
    """Kinds, headers and groups of the files to start from."""
    odd = {
        "scalar": torch.ones(()),
        "none": torch.ones(0, 3),
        "half": torch.ones(3).half(),
        "wide": torch.ones(2).double(),
    }
    entry = {"when": "now", "num_samples": 3, "rule": "sum", "decay": None, "objective": "o", "magnitude": "abs"}
    counts = dict.fromkeys(odd, 3)
    quantity = {"objective": "o", "magnitude": "abs", "num_samples": 3, "routes": {}}
    return [
        *factor_sources(),
        ("importance", quantity, {"importance": odd}),
        ("memory", {"history": [entry, {**entry, "decay": 0.5}], "counts": counts}, {"anchor": odd, "importance": odd}),
    ]
