"""Dead units, free directions, what runs record of them, and the section and picture of long sequences."""

import json
from dataclasses import replace

import pytest
import torch
from bench.tests import tiny
from bench.tests.test_results import rows
from PIL import Image
from torch import nn

from memsyn import Memory, measure
from memsyn.report.judgements import mean_room
from memsyn_bench.pages.plots import plot_plasticity
from memsyn_bench.results.findings import read_findings
from memsyn_bench.results.plasticity import plasticity_curves, plasticity_section, slopes, window_size
from memsyn_bench.running import runner
from memsyn_bench.running.plasticity import dead_units, free_directions
from memsyn_bench.running.record import TaskRecord, append_run, append_task, read_all
from memsyn_bench.sequences.networks import MultiHead, WordTransformer
from memsyn_bench.sequences.sequences import SEQUENCES
from memsyn_bench.settings import Settings

SETTINGS = Settings(sequence="tiny", size=8, epochs=1, batch_size=4, lr=0.01)
RECORDS = replace(tiny.SEQUENCE, records_plasticity=True)


def written(biases, num_channels=None):
    """One head on a layer whose units are dead where the bias is far below 0."""
    layer = nn.Linear(2, len(biases)) if num_channels is None else nn.Conv2d(1, num_channels, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.copy_(torch.tensor(biases))
    flat = [] if num_channels is None else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return MultiHead(nn.Sequential(layer, nn.ReLU(), *flat), len(biases), head_sizes=[2])


def test_a_unit_is_dead_if_it_is_0_on_every_image():
    model = written([-9.0, -1.5, 0.0, 1.0])
    images = torch.zeros(200, 2)
    assert dead_units(model, images, 0) == 75.0
    images[199] = 1.0  # in the last batch: the second unit is 2 - 1.5 there, the third 2
    assert dead_units(model, images, 0) == 25.0


def test_a_channel_is_alive_if_it_is_at_one_position_of_one_image():
    model = written([-9.0, -0.5], num_channels=2)
    images = torch.zeros(3, 1, 4, 4)
    assert dead_units(model, images, 0) == 100.0
    images[2, 0, 3, 1] = 1.0
    assert dead_units(model, images, 0) == 50.0


def test_units_of_all_layers_count_alike_and_a_module_that_is_used_twice_has_units_twice():
    shared = nn.ReLU()
    body = nn.Sequential(nn.Linear(2, 3), shared, nn.Linear(3, 1), shared)
    with torch.no_grad():
        for layer, bias in ((body[0], 1.0), (body[2], -9.0)):
            layer.weight.zero_()
            layer.bias.fill_(bias)
    assert dead_units(MultiHead(body, 1, head_sizes=[2]), torch.rand(5, 2), 0) == 25.0


def test_the_model_keeps_no_hook_and_a_network_without_relu_has_no_units():
    model = written([0.0, 1.0])
    with pytest.raises(RuntimeError):
        dead_units(model, torch.zeros(3, 7), 0)
    assert not any(module._forward_hooks for module in model.modules())
    words = MultiHead(WordTransformer(), 64, head_sizes=[2])
    assert dead_units(words, torch.zeros(2, 16, dtype=torch.int64), 0) is None


def test_free_directions_are_those_of_a_report():
    model, images = written([0.1, 0.3, 1.0]), torch.rand(40, 2)
    assert free_directions(Memory.empty()) is None
    factors = measure(model, [images], forward=lambda m, x: m(x, 0), estimator="kronecker", progress=False)
    memory = Memory.empty().consolidate(model, factors)
    layers = memory.directions.summary()
    assert free_directions(memory) == pytest.approx(100 * mean_room(layers))
    assert 0 < free_directions(memory) < 100
    assert len({layer.num_weights for layer in layers}) > 1


def run(out, methods=("finetune", "projected")):
    return runner.run(SETTINGS, methods=methods, num_seeds=1, out=out)


def numbers(results):
    return {method: [replace(record, seconds=0.0) for record in seeds[0]] for method, seeds in results.items()}


def test_a_sequence_that_asks_for_it_records_both_after_each_task(tmp_path, monkeypatch):
    monkeypatch.setitem(SEQUENCES.entries, "tiny", RECORDS)
    results = run(tmp_path)
    for record in results["finetune"][0]:
        assert list(record.plasticity) == ["dead units"]
    for record in results["projected"][0]:
        assert list(record.plasticity) == ["dead units", "free directions"]
        assert all(0 <= value <= 100 for value in record.plasticity.values())
    memory = Memory.load(tmp_path / "projected-seed0.memsyn.safetensors")
    assert results["projected"][0][-1].plasticity["free directions"] == pytest.approx(free_directions(memory))


def test_recording_changes_no_number_and_other_sequences_write_no_field(tmp_path, monkeypatch):
    monkeypatch.setitem(SEQUENCES.entries, "tiny", tiny.SEQUENCE)
    plain = numbers(run(tmp_path / "plain"))
    lines = [json.loads(line) for line in (tmp_path / "plain" / "results.jsonl").read_text().splitlines()]
    assert not any("plasticity" in line for line in lines)
    monkeypatch.setitem(SEQUENCES.entries, "tiny", RECORDS)
    recorded = numbers(run(tmp_path / "recorded"))
    assert all(record.plasticity for records in recorded.values() for record in records)
    without = {method: [replace(record, plasticity={}) for record in records] for method, records in recorded.items()}
    assert without == plain


def test_a_run_that_was_cut_off_records_the_same_digits(tmp_path, monkeypatch):
    monkeypatch.setitem(SEQUENCES.entries, "tiny", RECORDS)
    whole, train, calls = numbers(run(tmp_path / "whole")), runner.train, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) in (3, 5):
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "train", interrupted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "cut")
    assert numbers(run(tmp_path / "cut")) == whole


def test_a_file_from_before_the_field_is_continued(tmp_path, monkeypatch):
    """Its lines come back without numbers, and those that are added have them."""
    monkeypatch.setitem(SEQUENCES.entries, "tiny", RECORDS)
    whole = numbers(run(tmp_path, methods=("projected",)))["projected"]
    path = tmp_path / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[1:]:
        line.pop("plasticity")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    old = [replace(record, plasticity={}) for record in whole]
    assert [replace(record, seconds=0.0) for record in read_all(path, SETTINGS)[0]] == old
    assert numbers(run(tmp_path, methods=("projected",)))["projected"] == old
    assert numbers(run(tmp_path, methods=("finetune",)))["finetune"][0].plasticity


NUM_TASKS = 6


def write(path, learned, dead, free):
    """Method -> seed -> the accuracy when learned of each task; percents of each task."""
    append_run(path, SETTINGS, NUM_TASKS)
    for method, seeds in learned.items():
        for seed, values in seeds.items():
            for task, value in enumerate(values):
                plasticity = {"dead units": dead[task], "free directions": free[task]} if dead else {}
                if method == "mas":
                    plasticity.pop("free directions", None)
                append_task(
                    path,
                    TaskRecord(
                        method, seed, task, f"t{task}", (0.0,) * task + (value,), 0.1, 0.0, 1.0,
                        SETTINGS.fingerprint, None, 0, 0, plasticity=plasticity,
                    ),
                )  # fmt: skip
    return read_findings(path)


DEAD, FREE = [0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [90.0, 80.0, 70.0, 60.0, 50.0, 40.0]


@pytest.fixture
def found(tmp_path, monkeypatch):
    monkeypatch.setitem(SEQUENCES.entries, "tiny", RECORDS)
    learned = {
        "mas": {0: [90.0, 88.0, 86.0, 84.0, 82.0, 80.0], 1: [92.0, 90.0, 88.0, 86.0, 84.0, 82.0]},
        "projected": {0: [80.0, 81.0, 82.0, 83.0, 84.0, 85.0], 1: [80.0, 82.0, 84.0, 86.0, 88.0, 90.0]},
    }
    return write(tmp_path / "x.jsonl", learned, DEAD, FREE)


def test_the_section_compares_the_first_the_middle_and_the_last_tasks(found):
    assert [window_size(num) for num in (3, 6, 14, 15, 30)] == [1, 2, 4, 5, 5]
    cells = rows(plasticity_section(found) + "\n")
    # Seed 0: 89 and 81, seed 1: 91 and 83; t_{0.975} of one degree of freedom times 2 / sqrt(2) / sqrt(2).
    assert cells["mas"]["When learned, first 2 (%)"] == "90.0 ± 12.7"
    assert cells["mas"]["When learned, middle 2 (%)"] == "86.0 ± 12.7"
    assert cells["mas"]["When learned, last 2 (%)"] == "82.0 ± 12.7"
    assert cells["mas"]["Last minus first (points)"] == "-8.0 ± 0.0"
    assert cells["mas"]["Slope (points / 10 tasks)"] == "-20.0 ± 0.0"
    assert cells["mas"]["Dead units, last (%)"] == "9.0 ± 0.0"
    assert cells["mas"]["Free directions, first (%)"] == "–"
    assert cells["projected"]["Last minus first (points)"] == "+6.0 ± 25.4"
    assert cells["projected"]["Free directions, first (%)"] == "85.0 ± 0.0"
    assert cells["projected"]["Free directions, middle (%)"] == "65.0 ± 0.0"
    assert slopes(found, "projected") == pytest.approx({0: 10.0, 1: 20.0})


def test_the_sentences_say_which_way_and_whether_the_interval_holds_0(found):
    text = plasticity_section(found)
    assert "mas learns the last 2 tasks 8.0 ± 0.0 points worse than the first 2." in text
    assert "projected learns the last 2 tasks 6.0 ± 25.4 points better than the first 2 (the interval holds 0)." in text


def test_a_run_that_recorded_nothing_has_no_section(tmp_path, monkeypatch):
    monkeypatch.setitem(SEQUENCES.entries, "tiny", RECORDS)
    assert plasticity_section(write(tmp_path / "x.jsonl", {"mas": {0: [50.0] * NUM_TASKS}}, None, FREE)) == ""


def test_the_curves_hold_each_seed_task_by_task_and_are_drawn(found, tmp_path):
    curves = plasticity_curves(found)
    assert list(curves) == ["accuracy when learned (%)", "dead units (%)", "free directions (%)"]
    assert curves["accuracy when learned (%)"]["mas"][0] == [90.0, 92.0]
    assert curves["dead units (%)"]["projected"] == [[value] * 2 for value in DEAD]
    assert list(curves["free directions (%)"]) == ["projected"]
    plot_plasticity(curves, "tiny", tmp_path / "a.png")
    plot_plasticity({name: curves[name] for name in list(curves)[:1]}, "tiny", tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as picture, Image.open(tmp_path / "b.png") as narrow:
        assert picture.width > 2 * narrow.width
        colours = picture.convert("RGB").getcolors(1 << 24)
    assert {(51, 34, 136), (136, 204, 238)} <= {colour for _, colour in colours}, "a line for each method"
