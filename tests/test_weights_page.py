"""The page of new weights, and what pages begin with: answer, number, interval, threshold and bars."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from memsyn import Comparison, Memory
from memsyn.comparing.prediction import Prediction, predict
from memsyn.report.judgements import judge_comparison, judge_prediction, predicted
from memsyn.report.memory_page import memory_page
from memsyn.report.parts import TONES, Page, Table, Tree
from memsyn.report.weights_page import weights_page
from tests import story
from tests.commands import call

LIMITS = (0.97, 0.05)


def comparison(num_same: int, num_samples: int, change: float = 0.01, **more: Any) -> Comparison:
    same = torch.zeros(num_samples, dtype=torch.float64)
    same[:num_same] = 1
    changes = change * (1 + 0.01 * torch.randn(num_samples, generator=torch.Generator().manual_seed(0)).double())
    return Comparison("classes", "kind=", same, changes, torch.ones(num_samples).double(), **more)


@pytest.mark.parametrize(
    ("num_same", "num_samples", "change", "answer", "tone", "headline"),
    [
        (400, 400, 0.01, "Safe", "good", "The new model still answers as the old one did."),
        (144, 400, 0.01, "Broken", "bad", "Do not ship: the new model answers 64.0% of the inputs differently."),
        (144, 400, 1.4, "Broken", "bad", "Do not ship: the new model answers 64.0% of the inputs differently."),
        (400, 400, 0.08, "Broken", "bad", "Do not ship: the outputs of the new model have changed too much."),
        (389, 400, 0.01, "At risk", "warning", "Not shown to be safe: the new model may have forgotten too much."),
        (40, 40, 0.01, "Cannot say", "unknown", "There are too few inputs to tell."),
    ],
)
def test_a_comparison_begins_with_its_verdict(
    num_same: int, num_samples: int, change: float, answer: str, tone: str, headline: str
) -> None:
    found = comparison(num_same, num_samples, change)
    own = judge_comparison(found, *LIMITS)
    assert (own.answer, own.tone, own.headline) == (answer, tone, headline)
    assert own.answer.lower() == found.verdict(*LIMITS).answer
    assert own.sign == TONES[tone]
    assert own.rule == (
        "Safe means: at least 97% of the answers stay the same and outputs change by at most 5% on average, each with "
        "its whole 95% interval."
    )


def test_the_number_is_that_of_the_answers_with_its_interval() -> None:
    found = comparison(144, 400)
    own = judge_comparison(found, *LIMITS)
    lower, upper = found.agreement_interval
    assert (own.number, own.meaning) == ("36.0%", "of the answers to 400 inputs stay the same")
    assert own.interval == f"95% interval: {lower:.1%} to {upper:.1%}" == "95% interval: 31.4% to 40.8%"
    old, new = own.bars
    assert (old.label, old.length, old.interval) == ("Old model", 1.0, None)
    assert (new.label, new.length, new.interval) == ("New model", 0.36, (lower, upper))
    assert own.mark == (0.97, "asked for: 97%")
    assert own.steps[0].startswith("Outputs change by 1.0% on average (1.0% to 1.0%)")
    assert own.steps[1] == "Start again from the old model, and train with memsyn.protect."


def test_if_the_change_decides_it_is_the_number() -> None:
    found = comparison(400, 400, 0.08)
    own = judge_comparison(found, *LIMITS)
    assert (own.number, own.interval) == ("8.0%", "95% interval: 8.0% to 8.0%")
    allowed, new = own.bars
    assert (allowed.label, allowed.text) == ("Allowed", "5%")
    assert new.length / allowed.length == pytest.approx(found.mean_change / 0.05)
    assert new.interval is not None
    assert new.interval[1] == pytest.approx(0.9)
    assert own.mark == (allowed.length, "allowed: 5%")
    assert own.steps[0] == "100% of the answers stay the same (99.0% to 100%)."


def test_what_is_infinite_has_a_whole_bar() -> None:
    found = replace(comparison(400, 400), change=torch.full((400,), math.inf).double())
    own = judge_comparison(found, *LIMITS)
    assert (own.number, own.bars[1].length, own.bars[1].interval) == ("any amount", 1.0, None)
    assert own.answer == "Broken"


def test_thresholds_are_written_as_they_were_given() -> None:
    own = judge_comparison(comparison(400, 400), 0.9995, 0.0125)
    assert "at least 99.95% of the answers" in own.rule
    assert "at most 1.25% on average" in own.rule


def test_moved_statistics_are_named_as_the_cause_or_a_part_of_it() -> None:
    more: dict[str, Any] = {"moved_statistics": ("n.running_mean", "n.running_var")}
    whole = judge_comparison(comparison(144, 400, 1.4, with_old_statistics=comparison(400, 400), **more), *LIMITS)
    assert whole.steps[1:] == [
        "The cause: 2 running statistics moved in training; with the old ones put back, 100% of the answers stay the "
        "same and outputs change by 1.0%.",
        "Put them back: model.load_state_dict(memory.statistics, strict=False).",
    ]
    part = judge_comparison(comparison(144, 400, 1.4, with_old_statistics=comparison(400, 400, 0.07), **more), *LIMITS)
    assert part.steps[1].startswith("A part of the cause: 2 running statistics moved in training;")
    assert part.steps[2] == "Start again from the old model, and train with memsyn.protect."
    none = judge_comparison(comparison(144, 400, 1.4, with_old_statistics=comparison(144, 400, 1.4), **more), *LIMITS)
    assert none.steps[1:] == ["Start again from the old model, and train with memsyn.protect."]


@pytest.mark.parametrize(
    ("change", "moved", "answer", "headline"),
    [
        (0.042, (), "At risk", "Not shown to be safe: outputs may have changed by more than is allowed."),
        (0.007, (), "Safe", "The new model should still answer as the old one did."),
        (0.08, (), "Broken", "Do not ship: the outputs on old data are predicted to change too much."),
        (0.08, ("n",), "Broken", "Do not ship: the outputs on old data are predicted to change too much."),
        (0.01, ("n",), "Cannot say", "Without data this cannot be told: 1 running statistic moved, which the "
         "prediction does not see."),
    ],
)  # fmt: skip
def test_a_prediction_begins_with_its_verdict(
    change: float, moved: tuple[str, ...], answer: str, headline: str
) -> None:
    own = judge_prediction(Prediction(change, {"a": change}, moved), 0.05)
    assert (own.answer, own.headline, own.number) == (answer, headline, f"{change:.1%}")
    assert (
        own.interval == f"Nine in ten measured changes are at most 6.3 times the prediction: here {6.3 * change:.1%}."
    )
    assert own.rule == "Safe means: 6.3 times the prediction is at most 5%, and no running statistic moved."
    assert own.bars[1].length / own.bars[0].length == pytest.approx(change / 0.05)
    assert max(bar.length for bar in own.bars) == pytest.approx(0.9)
    assert ("1 running statistic moved" in " ".join(own.steps)) == (answer == "Broken" and bool(moved))


# On a model that was shipped


@pytest.fixture(scope="module")
def shipped() -> tuple[story.Classifier, Memory]:
    model = story.trained()
    return model, story.remembered(model)


@pytest.fixture
def folder(shipped: tuple[story.Classifier, Memory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A memory, weights of a second training without and with protection, and inputs."""
    monkeypatch.chdir(tmp_path)
    model, memory = shipped
    memory.save("memory")
    save_file(moved(model), "new.safetensors")
    save_file({"inputs": story.requests()}, "inputs.safetensors")
    return tmp_path


def moved(model: nn.Module, by: float = 0.002) -> dict[str, Tensor]:
    """Weights near the old ones."""
    generator = torch.Generator().manual_seed(0)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if name.startswith("body.0"):
            value += by * torch.randn(value.shape, generator=generator)
    return state


DATA = ("--model", "tests.story:build", "--data", "inputs.safetensors")


def tree_of(page: Page) -> Tree:
    (part,) = page.sections[0].parts
    assert isinstance(part, Tree)
    return part


def test_the_command_compares_for_people(folder: Path, shipped: tuple[story.Classifier, Memory]) -> None:
    output = call("compare", "memory", "new.safetensors", *DATA, "--html", "page.html", "--png", "png").output
    assert output == call("gate", "memory", "new.safetensors", *DATA).output
    assert output.startswith("Safe. 100.0% of 400 samples give the same answer")
    text = Path("page.html").read_text()
    assert "<h1>new.safetensors against memory</h1>" in text
    assert "The new model still answers as the old one did." in text
    assert sorted(path.name for path in Path("png").iterdir()) == ["changes.png", "moved.png"]
    facts = json.loads(call("compare", "memory", "new.safetensors", *DATA, "--json").stdout)
    assert facts == json.loads(call("gate", "memory", "new.safetensors", *DATA, "--json").stdout)
    careless = {n: -v if v.is_floating_point() else v for n, v in shipped[0].state_dict().items() if "var" not in n}
    save_file({**shipped[0].state_dict(), **careless}, "careless.safetensors")
    assert call("compare", "memory", "careless.safetensors", *DATA).output.startswith("Broken. ")  # and exits with 0
    call("gate", "memory", "careless.safetensors", *DATA, "--html", "gate.html", code=2)
    assert "Do not ship: " in Path("gate.html").read_text()


def test_the_command_compares_without_data(folder: Path) -> None:
    output = call("compare", "memory", "new.safetensors", "--html", "page.html").output
    assert output.startswith("Safe. From the memory alone, outputs on the old data are predicted to change by ")
    assert "Nine in ten measured changes are at most 6.3 times the prediction" in Path("page.html").read_text()


def test_errors_of_the_command_exit_with_1(folder: Path) -> None:
    error = call("compare", "memory", "new.safetensors", "--data", "inputs.safetensors", code=1).stderr
    assert "--data and --model belong together" in error
    error = call("compare", "memory", "new.safetensors", "--html", "none/page.html", code=1).stderr
    assert "none/page.html cannot be written" in " ".join(error.split())
    assert "Usage:" in call("compare", "memory", code=2).output


def test_the_tree_holds_the_predicted_changes(shipped: tuple[story.Classifier, Memory]) -> None:
    model, memory = shipped
    state = moved(model)
    prediction = predict(memory, state)
    page = weights_page(memory, state, prediction, ("memory", "new"), None, LIMITS)
    tree = tree_of(page)
    share = prediction.layers["body.0"]
    assert tree.title == f"body.0 changes the outputs most: by {share:.1%}"
    assert tree.of == "the allowed change"
    body, old = tree.branches
    assert (body.name, body.text, old.name, old.text) == ("body", f"{prediction.change:.1%}", "old", "0%")
    assert [row.name for row in body.branches] == ["0", "1", "3"]  # in the model's order
    assert [row.level for row in body.branches] == [sum(share >= s * 0.05 for s in (0.01, 0.05, 0.2, 0.5)), 0, 0]
    assert [own.heading for own in page.behind] == [
        "The verdict in full", "Predicted change of outputs", "What moved since the anchor",
    ]  # fmt: skip
    assert page.lead == "Old model: memory, a memory of 1,000 samples. New model: new."
    same = weights_page(memory, model.state_dict(), predict(memory, model.state_dict()), ("m", "n"), None, LIMITS)
    assert same.sections[0].parts == ["No weight that matters has changed."]
    strict = weights_page(memory, state, prediction, ("memory", "new"), None, (0.97, 0.0))
    assert tree_of(strict).of == "the largest change"


def test_the_page_of_a_comparison_has_its_samples(shipped: tuple[story.Classifier, Memory]) -> None:
    model, memory = shipped
    state = moved(model)
    state["body.1.running_mean"] += 0.01
    found = comparison(398, 400, 0.02)
    page = weights_page(memory, state, found, ("memory", "new"), None, LIMITS)
    assert tree_of(page).note.endswith("Running statistics moved too; the numbers do not see them.")
    _, changes, *_ = page.behind
    chart, table = changes.parts
    assert chart in page.charts()
    assert page.charts()[0].title == "Half of the outputs change by at most 2.0%, nine in ten by at most 2.0%"
    assert page.charts()[0].figure["data"][0]["y"][-1] == pytest.approx(100 * float(found.change.max()), rel=1e-4)
    assert isinstance(table, Table)
    assert len(table.rows) == 20
    assert {cell.text for cell in table.rows[0][:1]} <= {"sample 398", "sample 399"}
    assert [row[1].text for row in table.rows[:3]] == ["no", "no", "yes"]


def test_without_directions_changes_count_by_importance(shipped: tuple[story.Classifier, Memory]) -> None:
    model, memory = shipped
    importance, state = replace(memory, directions=None), moved(model)
    page = weights_page(importance, state, comparison(400, 400), ("memory", "new"), None, LIMITS)
    assert tree_of(page).title == "100% of the change that matters is in body.0"
    assert "Predicted change of outputs" not in [own.heading for own in page.behind]
    odd = {**state, "body.3.bias": torch.full((16,), torch.nan)}
    page = weights_page(importance, odd, comparison(400, 400), ("memory", "new"), None, LIMITS)
    assert page.sections[0].parts == ["These layers hold weights that are not finite: body.3."]
    # The old weights may be given: nothing changed from these.
    page = weights_page(importance, state, comparison(400, 400), ("memory", "new"), state, LIMITS)
    assert page.sections[0].parts == ["No weight that matters has changed."]


def test_a_memory_of_directions_is_asked_with_the_old_weights(shipped: tuple[story.Classifier, Memory]) -> None:
    model, memory = shipped
    bare = replace(memory, anchor={}, importance={}, counts={})
    state, before = moved(model), dict(model.state_dict())
    page = weights_page(bare, state, comparison(400, 400), ("memory", "new"), before, LIMITS)
    assert tree_of(page).title.startswith("body.0 changes the outputs most: by ")
    page = weights_page(bare, state, comparison(400, 400), ("memory", "new"), None, LIMITS)
    assert page.sections[0].parts == ["The memory does not hold what would tell where the change matters."]


def test_the_page_of_a_memory_judges_weights(shipped: tuple[story.Classifier, Memory]) -> None:
    model, memory = shipped
    page = memory_page(memory, "m")
    assert page.headline == "This memory can judge a new model, with or without data."
    assert page.judgement is not None
    assert page.judgement.rule == (
        "A new model is called safe if at least 97% of its answers stay the same, and its outputs change by at most 5%."
    )
    page = memory_page(memory, "m", moved(model))
    assert (page.judgement.answer, page.sections[0].heading) == ("Safe", "Where the change is")
    assert memory_page(memory, "m", moved(model, 1.0)).judgement.answer == "Broken"
    page = memory_page(replace(memory, directions=None), "m", moved(model))
    assert (page.judgement.answer, page.judgement.number) == ("Cannot say", "")
    assert page.judgement.steps[0].startswith("Why: the memory holds no directions, which predict the change")
    assert page.judgement.steps[1].startswith("Compare on inputs, without labels: memsyn compare MEMORY STATE --model")


def test_names_with_a_prefix_are_found_in_silence(shipped: tuple[story.Classifier, Memory]) -> None:
    model, memory = shipped
    state = {f"module.{name}": value for name, value in moved(model).items()}
    found = predicted(memory, state)
    assert isinstance(found, Prediction)
    assert found.change == pytest.approx(predict(memory, moved(model)).change)
    importance = replace(memory, directions=None)
    page = weights_page(importance, state, comparison(400, 400), ("m", "n"), None, LIMITS)
    assert tree_of(page).title == "100% of the change that matters is in body.0"


def test_the_file_of_the_weights_is_in_the_title(folder: Path) -> None:
    call("inspect", "memory", "--weights", "new.safetensors", "--html", "page.html")
    assert "<h1>new.safetensors against memory</h1>" in Path("page.html").read_text()
