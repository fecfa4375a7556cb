"""The protocol that chooses strengths: what it looks at, what it takes, and what is written down of it."""

import json
from dataclasses import replace

import pytest
from bench.tests import tiny

from memsyn import OptionError
from memsyn_bench.methods.registry import METHODS
from memsyn_bench.running import runner, strengths
from memsyn_bench.running.record import StrengthRecord, read_all
from memsyn_bench.running.scoring import score
from memsyn_bench.running.strengths import SEED, candidates, choose_strength
from memsyn_bench.running.training import generator, task_training, train
from memsyn_bench.sequences.sequences import SEQUENCES
from memsyn_bench.settings import Settings
from memsyn_bench.task import for_validation

SETTINGS = Settings(sequence="tiny", size=8, epochs=1, batch_size=4, lr=0.01, strength="chosen")
WITH_STRENGTH = [name for name, entry in METHODS.items() if entry.strength is not None]


class Forbidden:
    """Test data that nobody may look at."""

    def __getattribute__(self, name):
        raise AssertionError(f"test data were asked for {name}")


def sealed(task):
    return replace(task, test_images=Forbidden(), test_labels=Forbidden())


@pytest.fixture
def tasks():
    return [sealed(task) for task in tiny.load(8)]


def test_default_strengths_are_those_of_the_recorded_results():
    """MAS has the paper's, which is not the library's `Relative(0.01)`; a projection has the library's."""
    of_mas = {name: METHODS[name].strength for name in METHODS if name.startswith("mas")}
    assert len(of_mas) == 12
    assert set(of_mas.values()) == {1.0}
    assert METHODS["projected"].make(0.0).strength == 10.0


def test_candidates_are_decades_around_the_methods_own_strength():
    assert candidates("mas") == pytest.approx((1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0))
    assert candidates("ewc") == pytest.approx(tuple(100 * value for value in candidates("mas")))
    assert candidates("finetune") == ()
    assert set(WITH_STRENGTH) == set(METHODS) - {
        "finetune", "joint", "alone", "frozen", "rehearsal", "projected", "projected-full", "projected-inputs",
        "projected-test", "projected-public", "projected-new", "projected-noise", "gpm", "adam-nscl", "projected-lda",
        "projected-rehearsal", "projected-lda-rehearsal", "continual-backprop",
    }  # fmt: skip


@pytest.mark.parametrize("method", WITH_STRENGTH)
def test_no_test_data_are_looked_at(tasks, method):
    choice = choose_strength(method, tiny.SEQUENCE, tasks, SETTINGS)
    assert (choice.method, choice.candidates) == (method, candidates(method))
    assert choice.strength in choice.candidates
    assert all(0 <= score <= 100 for score in choice.scores)


@pytest.mark.parametrize("method", ["mas", "imm-mean", "rwalk", "ebll"])
def test_a_score_is_the_validation_accuracy_after_learning_the_tasks_with_that_strength(tasks, method):
    choice = choose_strength(method, tiny.SEQUENCE, tasks, SETTINGS)
    assert choice.num_tasks == 3
    for strength, mean in list(zip(choice.candidates, choice.scores, strict=True))[::3]:
        held = [for_validation(task, SEED) for task in tasks]
        model, learner = tiny.build(held, generator(SEED, 0)), METHODS[method].make(strength)
        for index, task in enumerate(held):
            training = task_training(model, task, index, settings=SETTINGS, augment=tiny.augment, seed=SEED)
            train(training, learner, after_epoch=lambda: None)
            learner.end(training)
        assert mean == pytest.approx(sum(score(model, held, "multi-head")) / 3)


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [((1.0, 5.0, 9.0, 7.0, 6.0, 3.0, 2.0), 0.1), ((9.0, 1.0, 1.0, 9.0, 8.0, 0.0, 0.0), 1.0), ((0.0,) * 7, 1000.0)],
)
def test_the_best_is_taken_and_among_equals_the_largest(tasks, monkeypatch, scores, chosen):
    left = list(scores)
    monkeypatch.setattr(strengths, "score", lambda *_: [left.pop(0)] * 3)
    choice = choose_strength("mas", tiny.SEQUENCE, tasks, SETTINGS)
    assert choice.strength == pytest.approx(chosen)
    assert choice.scores == pytest.approx(scores)


def test_a_training_that_diverges_counts_as_nothing(tasks, monkeypatch):
    calls = []

    def diverging(training, method, after_epoch):
        calls.append(method.strength)
        result = train(training, method, after_epoch=after_epoch)
        return replace(result, losses=[float("nan")]) if training.index == 1 and method.strength > 5 else result

    monkeypatch.setattr(strengths, "train", diverging)
    choice = choose_strength("mas", tiny.SEQUENCE, tasks, SETTINGS)
    assert choice.scores[4:] == (0.0, 0.0, 0.0)
    assert len(calls) == strengths.num_trainings(3) - 3 == 1 + 7 * 2 - 3
    assert choice.strength <= 1.0
    with pytest.raises(OptionError, match=r"the first task cannot be learned: .* at lr 1e\+30\. Lower it"):
        choose_strength("mas", tiny.SEQUENCE, tasks, replace(SETTINGS, lr=1e30))


def test_what_cannot_be_chosen_is_refused(tasks):
    with pytest.raises(OptionError, match="finetune has no strength to choose"):
        choose_strength("finetune", tiny.SEQUENCE, tasks, SETTINGS)
    with pytest.raises(OptionError, match="on two tasks at least; there is 1"):
        choose_strength("mas", tiny.SEQUENCE, tasks[:1], SETTINGS)


def test_a_run_writes_its_choice_down_once_and_uses_it(tmp_path, monkeypatch):
    monkeypatch.setitem(SEQUENCES.entries, "tiny", tiny.SEQUENCE)
    chosen = []

    def choose(method, *args):
        chosen.append(method)
        return StrengthRecord(method, 7.0, (0.7, 7.0), (1.0, 2.0), SETTINGS.fingerprint)

    def run(num_seeds):
        return runner.run(SETTINGS, methods=["finetune", "mas"], num_seeds=num_seeds, out=tmp_path)

    monkeypatch.setattr(runner, "choose_strength", choose)
    first = run(1)
    again = run(2)
    assert chosen == ["mas"]
    assert [record.strength for record in first["mas"][0] + again["mas"][1]] == [7.0] * 6
    assert [record.strength for record in first["finetune"][0]] == [None] * 3
    records, choices = read_all(tmp_path / runner.RESULTS_FILE, SETTINGS)
    assert (len(records), [choice.strength for choice in choices]) == (12, [7.0])
    kinds = [json.loads(line)["kind"] for line in (tmp_path / runner.RESULTS_FILE).read_text().splitlines()]
    assert kinds.index("strength") == 4  # after the run's own record and fine-tuning's three


@pytest.mark.parametrize(("strength", "expected"), [("own", 100.0), (3.0, 3.0)])
def test_else_a_strength_is_the_methods_own_or_the_one_given(tmp_path, monkeypatch, strength, expected):
    monkeypatch.setitem(SEQUENCES.entries, "tiny", tiny.SEQUENCE)
    settings = replace(SETTINGS, strength=strength)
    found = runner.run(settings, methods=["ewc"], num_seeds=1, out=tmp_path)["ewc"][0]
    assert [record.strength for record in found] == [expected] * 3
