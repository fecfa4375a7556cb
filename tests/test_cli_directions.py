"""The commands on factors files, and on memories with directions."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from memsyn import Importance, KroneckerFactors, Memory
from memsyn.matrices import probe_matrix
from tests import kronecker
from tests.commands import call
from tests.test_cli_files import as_json, rows


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Factors of two directions, their memories, a memory of both, and one beside an importance."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    kronecker.factors(0).save("f")
    kronecker.factors(1).save("g")
    kronecker.factors(1, outputs=False).save("inputs")
    kronecker.memory(0).save("m")
    kronecker.memory(1).save("k")
    kronecker.memory(0, 1).save("n")
    importance = Importance({name: torch.ones_like(p) for name, p in kronecker.model().named_parameters()}, 4)
    importance.save("i")
    kronecker.memory(0).consolidate(kronecker.model(), importance).save("both")
    Memory.empty().consolidate(kronecker.model(), importance).save("plain")
    return tmp_path


def test_inspect_factors(folder) -> None:
    output = call("inspect", "f").output
    assert "Factors over 4 samples" in output
    assert ["0", "3", "1.0", "0.0%", "2", "2.0", "0.0%"] in rows(output)
    assert ["1", "2", "1.6", "0.0%", "1", "1.0", "0.0%"] in rows(output)
    assert "Measured: second moments of inputs and output gradients of signed_outputs.\n" in output
    assert "No matrices, and measured as squared gradients: 2.weight, 2.bias\n" in output
    assert "Computed by 'Kronecker factors': 3 of 5 parameters\n" in output
    assert "Computed by 'unused': 1 of 5 parameters: 2.bias\n" in output
    assert ["0", "3", "1.0", "0.0%", "2", "-", "-"] in rows(call("inspect", "inputs").output)


def test_inspect_says_what_a_sketch_lost_and_at_which_weights(folder) -> None:
    # The trace is 8, of which the sketch has 6: a quarter is lost.
    found = kronecker.factors()
    sums = {name: total for name, total in found.sums.items() if name != "inputs/0.weight"}
    sums["inputs_sketch/0.weight"] = (torch.diag(torch.tensor([6.0, 0, 0])) @ probe_matrix(3, 2, torch.ones(())))[None]
    sums["inputs_trace/0.weight"] = torch.tensor([8.0])
    replace(found, sums=sums, fingerprint="sha256:" + "ab" * 32).save("sketch")
    output = call("inspect", "sketch").output
    assert next(row for row in rows(output) if row[0] == "0")[3] == "25.0%"
    assert "of signed_outputs, at the weights sha256:abababab." in output
    assert "only one of the two holds it. Measure both with one estimator and one rank." in " ".join(
        call("merge", "f", "sketch", "-o", "x", code=1).stderr.split()
    )


def test_inspect_directions(folder) -> None:
    output = call("inspect", "m").output
    assert "Memory of 4 samples" in output
    assert "Top tenth" not in output
    # One of three input directions is taken; in layer 1 both are.
    assert ["0", "3 x 2", "3 x 2", "66.7%", "1", "8", "4"] in rows(output)
    assert ["1", "2 x 1", "2 x 1", "0.0%", "1", "4", "4"] in rows(output)
    assert "Measured: second moments of inputs and output gradients of signed_outputs.\n" in output
    assert "No matrices, and kept as squared gradients: 2.weight\n" in output
    assert "Measured, but no output relied on them: 2.bias\n" in output
    assert "task 0" in output
    output = call("inspect", "n").output
    assert ["0", "3 x 2", "3 x 2", "33.3%", "2", "16", "8"] in rows(output)
    output = call("inspect", "both").output
    assert "Top tenth" in output
    assert output.count("Measured: ") == 2
    assert ["0", "3 x 2", "3 x 2", "66.7%", "1", "8", "4"] in rows(output)
    kronecker.memory(0, outputs=False).save("inputs only")
    assert ["0", "3 x 2", "3 x -", "66.7%", "1", "8", "4"] in rows(call("inspect", "inputs only").output)


def test_names_of_directions_are_printed_as_text(folder) -> None:
    found, name = kronecker.factors(), "a[red]\x1b[31m.w"
    matrices = {name: replace(found.matrices["1.weight"], weight=name)}
    sums = {f"{side}/{name}": found.sums[f"{side}/1.weight"] for side in ("inputs", "outputs", "positions")}
    replace(found, sums=sums, matrices=matrices).save("odd")
    for arguments in (["inspect", "odd"], ["diff", "odd", "odd"]):
        output = call(*arguments).output
        assert "\x1b" not in output
        assert r"a[red]\x1b[31m" in "".join(row[0] for row in rows(output))


def test_inspect_as_json(folder) -> None:
    found = as_json("inspect", "both")
    assert found["directions"] == {
        "objective": "signed_outputs",
        "magnitude": "second moments of inputs and output gradients",
        "rank": 64,
        "layers": [asdict(layer) for layer in Memory.load("both").directions.summary()],
        "diagonal": ["2.weight"],
        "free": ["2.bias"],
    }
    assert found["directions"]["layers"][0] == {
        "layer": "0", "num_weights": 6, "inputs": 3, "outputs": 2, "kept_inputs": 3, "kept_outputs": 2,
        "room": pytest.approx(2 / 3), "mass": 1.0, "num_positions": 8, "num_samples": 4,
    }  # fmt: skip
    assert as_json("inspect", "m")["layers"] == []
    found = as_json("inspect", "f")
    assert found.pop("routes") == {
        "Kronecker factors": ["0.bias", "0.weight", "1.weight"], "rule": ["2.weight"], "unused": ["2.bias"],
    }  # fmt: skip
    assert found.pop("layers")[1] == {
        "layer": "1", "num_weights": 2, "inputs": 2, "outputs": 1, "input_dimension": pytest.approx(1.6),
        "output_dimension": 1.0, "input_lost": 0.0, "output_lost": 0.0,
    }  # fmt: skip
    assert found == {
        "kind": "factors",
        "num_samples": 4,
        "objective": "signed_outputs",
        "magnitude": "second moments of inputs and output gradients",
    }


def test_verify(folder) -> None:
    assert call("verify", "f", "m", "both").output == "OK      f: factors\nOK      m: memory\nOK      both: memory\n"
    damaged = bytearray(Path("f").read_bytes())
    damaged[-1] ^= 1
    Path("f").write_bytes(damaged)
    assert as_json("verify", "f", code=1)["files"][0]["error"].startswith("f is damaged: its checksum")


def test_diff(folder) -> None:
    for a, b, room, change in (("m", "n", "33.3%", "-33.3"), ("f", "g", "66.7%", "+0.0"), ("m", "g", "66.7%", "+0.0")):
        output = call("diff", a, b, code=1).output
        # The inputs of n are those of m and as much of another direction; those of f and g are orthogonal.
        overlap = "0.707" if b == "n" else "0.000"
        assert ["0", "66.7%", room, change, overlap, "1.000"] in rows(output)
        assert ["1", "0.0%", "0.0%", "+0.0", "1.000", "1.000"] in rows(output)
        assert "Share A" not in output
        assert "different quantities" not in output
        assert output.endswith("They differ.\n")
    assert call("diff", "m", "m").output.endswith("The same, bit for bit.\n")
    assert call("diff", "f", "f").output.endswith("The same, bit for bit.\n")


def test_diff_of_unlike_files(folder) -> None:
    output = call("diff", "both", "plain", code=1).output
    assert ["0", "66.7%", "", "", "", ""] in rows(output)
    assert ["0", "60.0%", "60.0%", "+0.0", "1.5", "1.5", "0", "0"] in rows(output)
    output = call("diff", "f", "inputs", code=1).output
    assert ["0", "66.7%", "66.7%", "+0.0", "0.000", ""] in rows(output)
    assert "Their directions are of different quantities: second moments of inputs and output gradients" in output
    for a, b in (("f", "i"), ("i", "m"), ("m", "plain")):
        message = " ".join(call("diff", a, b, code=1).stderr.split())
        assert "have nothing to compare: one holds an importance, the other second moments" in message
        assert message.endswith("Give two files that hold the same.")


def test_diff_as_json(folder) -> None:
    found = as_json("diff", "both", "plain", code=1)
    assert found["directions"][0] == {
        "layer": "0", "room_a": pytest.approx(2 / 3), "room_b": None, "input_overlap": None, "output_overlap": None,
    }  # fmt: skip
    found = as_json("diff", "m", "n", code=1)
    assert found["directions"][0]["input_overlap"] == pytest.approx(0.5**0.5)
    assert (found["layers"], found["same"]) == ([], False)


def test_merge(folder) -> None:
    assert call("merge", "f", "g", "-o", "all").output == "all: factors of 8 samples, of 2 files.\n"
    assert torch.equal(
        KroneckerFactors.load("all").sums["inputs/0.weight"].diagonal(0, 1, 2), torch.tensor([[8.0, 8, 0]])
    )
    assert as_json("merge", "m", "k", "-o", "both") == {
        "out": "both", "kind": "memory", "num_samples": 8, "files": ["m", "k"],
    }  # fmt: skip
    assert Memory.load("both").directions.room()["0.weight"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["f", "m"], "factors and a memory cannot be merged: give files of one kind."),
        (["i", "f"], "an importance and factors cannot be merged: give files of one kind."),
        (["f", "inputs"], "cannot add factors of different quantities"),
        (["m", "n"], "only memories of one consolidation each can be merged, and one has 2"),
        (["m", "plain"], "one memory holds an importance, the other directions: they cannot be merged."),
    ],
)
def test_what_cannot_be_merged(folder, files, message) -> None:
    assert message in " ".join(call("merge", *files, "-o", "x", code=1).stderr.split())
    assert not Path("x").exists()


@pytest.mark.parametrize(("name", "kind"), [("f", "factors of 4"), ("n", "memory of 8"), ("both", "memory of 8")])
def test_convert_there_and_back(folder, name, kind) -> None:
    assert call("convert", name, "-o", "x.pt").output == f"x.pt: {kind} samples, as memsyn's plain dict.\n"
    assert call("convert", "x.pt", "-o", "again").output == f"again: {kind} samples, from memsyn's plain dict.\n"
    assert call("diff", name, "again").output.endswith("The same, bit for bit.\n")
    assert "leave num_samples and exact out" in call("convert", "x.pt", "-o", "y", "--samples", "3", code=1).stderr


def test_a_dict_with_wrong_directions_is_refused(folder) -> None:
    for name, group in (("n", "input_vectors"), ("f", "moments")):
        call("convert", name, "-o", "x.pt")
        plain = torch.load("x.pt", weights_only=True)
        plain[group] = {key: 2 - tensor for key, tensor in plain[group].items()}
        torch.save(plain, "x.pt")
        assert "x.pt is not as memsyn writes it: ValueError" in call("convert", "x.pt", "-o", "y", code=1).stderr
        assert not Path("y").exists()


def test_weights_need_an_anchor(folder) -> None:
    said = call("inspect", "m", "--html", "x.html", "--weights", "w", code=1).stderr
    assert "--weights needs an anchor, and this memory holds directions alone: leave it out." in " ".join(said.split())


def test_the_options_write_pages_and_pictures(folder) -> None:
    call("inspect", "n", "--html", "n.html", "--png", "png")
    assert "1 has the least room left: 0%" in Path("n.html").read_text()
    assert Path("png/room.png").read_bytes().startswith(b"\x89PNG")
    result = call("diff", "f", "g", "--html", "d.html", "--json", code=1)
    assert json.loads(result.stdout)["same"] is False
    assert "Overlap of two second moments" in Path("d.html").read_text()
