"""The tree of layers: blocks from dotted names, their numbers and their colours."""

import math

import pytest

from memsyn.report.module_tree import DEEPEST, layer_tree
from memsyn.report.parts import Branch


def tree(values: dict[str, float], **more: float) -> list[Branch]:
    found = layer_tree(
        "title", list(values), lambda names: sum(values[name] for name in names), of="all", note="note", **more
    )
    assert found.key == ["under 1%", "1% to 5%", "5% to 20%", "20% to 50%", "over 50%"]
    return list(found.branches)


def outline(branches: list[Branch]) -> list[object]:
    return [(row.name, outline(list(row.branches))) if row.branches else row.name for row in branches]


def test_layers_are_folded_by_block() -> None:
    names = ["stem", "body.0.conv", "body.0.norm", "body.1.conv", "body.1.norm", "head.fc"]
    found = tree(dict.fromkeys(names, 0.1))
    assert outline(found) == ["stem", ("body", [("0", ["conv", "norm"]), ("1", ["conv", "norm"])]), "head.fc"]
    body = found[1]
    assert (body.text, body.num_layers) == ("40.0%", 4)
    assert [row.text for row in body.branches] == ["20.0%", "20.0%"]


def test_a_block_of_one_block_is_one_row() -> None:
    assert outline(tree({"net.body.0": 1.0, "net.body.1": 2.0})) == [("net.body", ["0", "1"])]
    assert outline(tree({"net.body.0.a": 1.0})) == ["net.body.0.a"]


def test_a_layer_with_weights_and_layers_is_both() -> None:
    found = tree({"attention": 0.3, "attention.out": 0.1, "norm": 0.0})
    assert outline(found) == [("attention", ["(its own weights)", "out"]), "norm"]
    assert [row.text for row in found[0].branches] == ["30.0%", "10.0%"]


@pytest.mark.parametrize(
    ("value", "level"), [(0.0, 0), (0.0099, 0), (0.01, 1), (0.05, 2), (0.2, 3), (0.4999, 3), (0.5, 4), (7.0, 4)]
)
def test_colours_are_steps_of_the_whole(value: float, level: int) -> None:
    assert tree({"a": value, "b": 0.0})[0].level == level
    assert tree({"a": value * 0.05, "b": 0.0}, whole=0.05)[0].level == level


def test_a_block_is_measured_as_one() -> None:
    values = {"a.0": 3.0, "a.1": 4.0}
    found = layer_tree("", list(values), lambda n: math.hypot(*(values[k] for k in n)), of="", note="")
    assert found.branches[0].text == "500.0%"


def test_names_of_strangers_are_cut_at_a_depth() -> None:
    name = ".".join("a" * 5_000)
    found = tree({name: 1.0, name + "b": 1.0, ".": 0.0, "": 0.0, "a..b": 0.0})
    depth = 0
    while found[0].branches:
        found, depth = list(found[0].branches), depth + 1
    assert depth <= DEEPEST + 1
