"""Files of second moments with a right checksum and wrong content: each is refused with an error that names it."""

import copy
from dataclasses import replace

import pytest
import torch

from memsyn import KroneckerFactors, Memory, MemoryFileError, MismatchError
from memsyn.kernels.second_moments import zeros
from memsyn.matrices import Layout, Matrix
from memsyn.storage.reading_and_writing import write
from memsyn.values.conversion import read_plain
from memsyn.values.directions import STRENGTH, _expanded, damping
from memsyn.values.factors import layer_names
from memsyn.values.spectra import spectrum_of_sketch
from tests import hostile


def changed(tree, place, value):
    """A copy of header and groups with one place changed; `...` takes it away."""
    tree = {name: dict(part) if name != "header" else copy.deepcopy(part) for name, part in tree.items()}
    node = tree
    for key in place[:-1]:
        node = node[key]
    if value is ...:
        del node[place[-1]]
    else:
        node[place[-1]] = value(node[place[-1]]) if callable(value) else value
    return tree


def written(path, kind, tree):
    tree = dict(tree)
    write(path, kind, tree.pop("header"), tree)
    return path


def test_what_is_written_is_read(tmp_path):
    """So the cases below fail for what they change."""
    found = hostile.factors()
    path = written(tmp_path / "f", "factors", {"header": found.header(), "moments": found.sums})
    assert KroneckerFactors.load(path).matrices == found.matrices
    memory = hostile.directions()
    path = written(tmp_path / "m", "memory", {"header": memory.header(), **memory.groups()})
    assert Memory.load(path).directions.header() == memory.directions.header()


MATRIX = ("header", "matrices")
FACTORS = {
    "whole of a wrong shape": (("moments", "inputs/g.weight"), torch.ones(2, 3, 3)),
    "of no groups": (("moments", "outputs/g.weight"), torch.ones(2, 2)),
    "table of a wrong length": (("moments", "inputs/t"), torch.ones(4)),
    "table as a matrix": (("moments", "inputs/t"), torch.eye(5)[None]),
    "positions of a shape": (("moments", "positions/w"), torch.ones(1)),
    "sketch of other rows": (("moments", "inputs_sketch/w"), torch.ones(1, 8, 4)),
    "sketch without columns": (("moments", "inputs_sketch/w"), torch.ones(1, 9, 0)),
    "sketch that asks for memory": (("moments", "inputs_sketch/w"), torch.ones(1, 9, 10)),
    "sketch without groups": (("moments", "inputs_sketch/w"), torch.ones(9, 4)),
    "trace of a wrong shape": (("moments", "inputs_trace/w"), torch.ones(())),
    "negative trace": (("moments", "inputs_trace/w"), -torch.ones(1)),
    "negative positions": (("moments", "positions/w"), -torch.ones((), dtype=torch.float64)),
    "negative counts": (("moments", "inputs/t"), -torch.ones(5)),
    "negative squares": (("moments", "diagonal/n"), -torch.ones(2)),
    "negative diagonal": (("moments", "outputs/w"), torch.diag_embed(torch.tensor([[1.0, -1.0]]))),
    "negative eigenvalue": (("moments", "outputs/w"), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])),
    "asymmetric": (("moments", "outputs/w"), torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])),
    "integers": (("moments", "outputs/w"), torch.ones(1, 2, 2, dtype=torch.int64)),
    "without inputs": (("moments", "inputs/g.weight"), ...),
    "without a trace": (("moments", "inputs_trace/w"), ...),
    "without positions": (("moments", "positions/t"), ...),
    "of an unknown side": (("moments", "sideways/w"), lambda tree: torch.ones(1)),
    "of an unknown matrix": ((*MATRIX, "g.weight"), ...),
    "no matrices": (MATRIX, ...),
    "no moments": (("moments",), {}),
    "layout too short": ((*MATRIX, "w", "layout"), [1, 2, 9, True]),
    "layout of text": ((*MATRIX, "w", "layout"), "12345"),
    "layout of floats": ((*MATRIX, "w", "layout"), [1.0, 2, 9, True, False]),
    "layout of truths": ((*MATRIX, "w", "layout"), [True, 2, 9, True, False]),
    "layout without groups": ((*MATRIX, "w", "layout"), [0, 2, 9, True, False]),
    "layout of a grouped table": ((*MATRIX, "t", "layout"), [2, 2, 5, True, True]),
    "table with a bias": ((*MATRIX, "t", "bias"), "b"),
    "layout of other sizes": ((*MATRIX, "w", "layout"), [1, 2, 2**62, True, False]),
    "flags of numbers": ((*MATRIX, "w", "layout"), [1, 2, 9, 1, 0]),
    "bias of a number": ((*MATRIX, "w", "bias"), 3),
    "no weight": ((*MATRIX, "w", "weight"), ...),
    "no samples": (("header", "num_samples"), 0),
    "samples as a truth": (("header", "num_samples"), True),
    "of an importance": (("header", "magnitude"), "abs"),
    "fingerprint of a number": (("header", "fingerprint"), 3),
}


@pytest.mark.parametrize("case", FACTORS)
def test_forged_factors(case, tmp_path):
    place, value = FACTORS[case]
    found = hostile.factors()
    tree = {"header": found.header(), "moments": found.sums}
    if case == "of an unknown side":
        tree["moments"]["sideways/w"] = torch.ones(1)
    with pytest.raises(MemoryFileError, match=r"f( is not as memsyn writes it|: its tensors|: .* is torch\.int64)"):
        KroneckerFactors.load(written(tmp_path / "f", "factors", changed(tree, place, value)))


KEYS = ("header", "directions", "numbers", "w")
DIRECTIONS = {
    "values of a wrong shape": (("input_values", "w"), torch.ones(1, 3)),
    "values without groups": (("input_values", "g.weight"), torch.ones(1)),
    "rest of a wrong shape": (("input_rest", "w"), torch.ones(2)),
    "vectors of other rows": (("input_vectors", "w"), torch.eye(8)[None, :, :1]),
    "vectors without groups": (("input_vectors", "w"), torch.ones(9)),
    "negative eigenvalue": (("input_values", "w"), -torch.ones(1, 1)),
    "negative rest": (("output_rest", "t"), -torch.ones(1)),
    "negative squares": (("diagonal", "n"), -torch.ones(2)),
    "integers": (("input_values", "w"), torch.ones(1, 1, dtype=torch.int64)),
    "vectors of integers": (("input_vectors", "w"), torch.eye(9, dtype=torch.int64)[None, :, :1]),
    "not orthonormal": (("input_vectors", "w"), lambda vectors: vectors * 1.1),
    "no rest": (("input_rest", "w"), ...),
    "no values": (("input_values", "w"), ...),
    "no group": (("input_values",), {}),
    "no vectors": (("output_vectors", "g.weight"), ...),
    "vectors of a table": (("input_vectors", "t"), torch.eye(5)[None]),
    "of an unknown matrix": (("input_values", "x"), torch.ones(1, 1)),
    "vectors without values": (("output_values", "w"), ...),
    "mass of 0": ((*KEYS, "mass"), 0),
    "mass below 0": ((*KEYS, "mass"), -1.0),
    "mass as a truth": ((*KEYS, "mass"), True),
    "mass as text": ((*KEYS, "mass"), "1"),
    "scale of 0": ((*KEYS, "scales"), [0.0, 1.0]),
    "one scale": ((*KEYS, "scales"), [1.0]),
    "no positions": ((*KEYS, "counts"), [0, 7]),
    "samples as a truth": ((*KEYS, "counts"), [7, True]),
    "no numbers": (KEYS, ...),
    "mass of a diagonal": (("header", "directions", "diagonal", "n"), [0, 1.0]),
    "scale of a diagonal as text": (("header", "directions", "diagonal", "n"), [1.0, "nan"]),
    "diagonal without numbers": (("header", "directions", "diagonal", "n"), ...),
    "rank of 0": (("header", "directions", "rank"), 0),
    "rank as a truth": (("header", "directions", "rank"), True),
    "layout of other sizes": (("header", "directions", "matrices", "w", "layout"), [1, 3, 9, True, False]),
    "table": (("header", "directions", "matrices", "w", "layout"), [1, 2, 9, True, True]),
    "matrix without groups": (("header", "directions", "matrices", "x"), lambda own: own),
    "no history": (("header", "history"), []),
    "history of an importance": (("header", "history", 0, "magnitude"), "abs"),
    "no header": (("header", "directions"), 3),
}


@pytest.mark.parametrize("case", DIRECTIONS)
def test_forged_directions(case, tmp_path):
    place, value = DIRECTIONS[case]
    memory = hostile.directions()
    tree = {"header": memory.header(), **memory.groups()}
    if case == "vectors of a table":
        tree["input_vectors"]["t"] = torch.zeros(())
    if case == "of an unknown matrix":
        tree["input_values"]["x"] = torch.zeros(())
    if case == "matrix without groups":
        tree["header"]["directions"]["matrices"]["x"] = tree["header"]["directions"]["matrices"]["w"]
    with pytest.raises(MemoryFileError, match=r"m( is not as memsyn writes it|: .* is torch\.int64)"):
        Memory.load(written(tmp_path / "m", "memory", changed(tree, place, value)))


@pytest.mark.parametrize("group", ["moments", "input_values"])
def test_nan_is_refused(group, tmp_path):
    """Tensors are written without their checks, as another program may."""
    source = next(source for source in hostile.factor_sources() if group in source[2])
    name = next(iter(source[2][group]))
    broken = {own: dict(members) for own, members in source[2].items()}
    broken[group][name] = torch.full_like(broken[group][name], 0.0)
    write(tmp_path / "f", source[0], source[1], broken)
    entry, header, data = hostile.taken_apart((tmp_path / "f").read_bytes())
    start = header[f"{group}/{name}"]["data_offsets"][0]
    data = data[:start] + b"\x00\x00\xc0\x7f" + data[start + 4 :]
    (tmp_path / "f").write_bytes(hostile.put_together(entry, header, data))
    kind = KroneckerFactors if group == "moments" else Memory
    with pytest.raises(MemoryFileError, match="holds NaN or infinite values"):
        kind.load(tmp_path / "f")


def test_a_plain_dict_is_checked_like_a_file(tmp_path):
    found = hostile.factors()
    torch.save({**found.header(), "moments": {**found.sums, "positions/w": -torch.ones(())}}, tmp_path / "x.pt")
    with pytest.raises(MemoryFileError, match="positions/w is no sum of second moments"):
        read_plain(tmp_path / "x.pt")


def test_room_is_counted_without_a_matrix_of_all_directions():
    memory = hostile.directions().directions
    for strength in (0.1, STRENGTH, 1e3, 0.0):
        for own in memory.layers.values():
            outputs = None if own.outputs is None else _expanded(own.outputs)
            whole = damping(_expanded(own.inputs), outputs, strength) > 0.5
            assert own.room(strength) == pytest.approx(float(whole.double().mean()))
            alone = replace(own, outputs=None)
            whole = damping(_expanded(own.inputs), None, strength) > 0.5
            assert alone.room(strength) == pytest.approx(float(whole.double().mean()))


def test_no_eigenvalue_of_a_sketch_is_above_its_trace():
    sketch = hostile.factors().sums["inputs_sketch/w"]
    found, mean = spectrum_of_sketch(1e6 * sketch, torch.ones(1), None)
    assert mean == pytest.approx(1 / 9)
    assert float(found.values.max()) == pytest.approx(9.0)


def test_a_sketch_has_no_more_columns_than_rows():
    found = zeros(Layout(1, 1, 2100, False, False), 2100, torch.ones(()), with_bias=False, rank=2000)
    assert found["sketch"].shape == (1, 2100, 2100)


def test_a_layer_with_several_matrices_is_named_by_them():
    layout = Layout(1, 2, 2, False, False)
    matrices = {name: Matrix(name, None, layout) for name in ("a.w", "a.v", "b.w")}
    assert layer_names(matrices) == {"a.w": "a.w", "a.v": "a.v", "b.w": "b"}


def test_memories_whose_histories_lie_cannot_be_merged():
    memory = hostile.directions()
    bare = replace(memory, directions=None, anchor={}, importance={})
    for one, other in ((bare, bare), (replace(memory, anchor={}, importance={}), bare)):
        with pytest.raises(MismatchError, match="one memory holds an importance, the other directions"):
            one.merge(other)
