"""What a page begins with: the answer in a word, the one number that decides, and the bars of old and new.

Owns the sentences for a reader who decides and does not know the method. Verdicts and numbers come from `comparing` and
`values`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from torch import Tensor

from memsyn.comparing.intervals import Interval, samples_needed
from memsyn.comparing.prediction import GIVE_ALL, TIMES, Prediction, predict
from memsyn.comparing.verdict import AT_RISK, BROKEN, CANNOT_SAY, MAX_CHANGE, MIN_AGREEMENT, SAFE, Comparison
from memsyn.errors import MismatchError, OptionError, RenamedParametersWarning
from memsyn.report.distribution import Lorenz
from memsyn.report.parts import Bar, Judgement, share_text
from memsyn.values.comparison import LARGE, LIMITS, OVERLAPS, SMALL, UNKNOWN, Difference
from memsyn.values.comparison import SAME as NO_DIFFERENCE
from memsyn.values.directions import DirectionsSummary
from memsyn.values.display import counted
from memsyn.values.memory import Held, Memory, kind_of

VERDICT_TONES: Final = {SAFE: "good", AT_RISK: "warning", BROKEN: "bad", CANNOT_SAY: "unknown"}
EXTENT_TONES: Final = {NO_DIFFERENCE: "good", SMALL: "good", LARGE: "warning", UNKNOWN: "unknown"}
READY: Final = "Ready"
ON_DATA: Final = "memsyn compare MEMORY STATE --model package.module:build --data FILE"


def judge_comparison(found: Comparison, min_agreement: float, max_change: float) -> Judgement:
    """The judgement of a comparison on data."""
    verdict = found.verdict(min_agreement, max_change)
    answers, change = found.agreement_interval, found.change_interval
    # How far each of the two numbers is from what is asked for: 0 fulfilled, 1 not shown, 2 missed.
    worst_answers = (answers.lower < min_agreement) + (answers.upper < min_agreement)
    worst_change = (change.upper > max_change) + (change.lower > max_change)
    rule = (
        f"Safe means: at least {_limit(min_agreement)} of the answers stay the same and outputs change by at most "
        f"{_limit(max_change)} on average, each with its whole 95% interval."
    )
    headline = {
        SAFE: "The new model still answers as the old one did.",
        BROKEN: f"Do not ship: the new model answers {share_text(1 - found.agreement)} of the inputs differently.",
        AT_RISK: "Not shown to be safe: the new model may have forgotten too much.",
        CANNOT_SAY: "Outputs depend on weights whose old values are not known."
        if found.depends_on_taken
        else "There are too few inputs to tell.",
    }[verdict.answer]
    inputs = counted(found.num_samples, "input")
    other = f"Outputs change by {share_text(found.mean_change)} on average ({_ends(change)})."
    own = Judgement(
        verdict.answer.capitalize(),
        VERDICT_TONES[verdict.answer],
        headline,
        share_text(found.agreement),
        f"of the answers to {inputs} stay the same",
        f"95% interval: {_ends(answers)}",
        rule,
        [
            Bar("Old model", "100%", 1.0),
            Bar("New model", share_text(found.agreement), found.agreement, (answers.lower, answers.upper)),
        ],
        (min_agreement, f"asked for: {_limit(min_agreement)}"),
    )
    if worst_change > worst_answers:
        other = f"{share_text(found.agreement)} of the answers stay the same ({_ends(answers)})."
        if verdict.answer == BROKEN:
            headline = "Do not ship: the outputs of the new model have changed too much."
        own = replace(
            own,
            headline=headline,
            number=share_text(found.mean_change),
            meaning=f"average change of the outputs for {inputs}",
            interval=f"95% interval: {_ends(change)}",
        )
        own = _with_change(own, found.mean_change, max_change, change)
    return replace(own, steps=[other, *_next_steps(found, verdict.answer, min_agreement, max_change)])


def _next_steps(found: Comparison, answer: str, min_agreement: float, max_change: float) -> list[str]:
    """What else to know of the answer, and what to do."""
    if answer == SAFE:
        return ["This holds for inputs like those that were tested."]
    if answer == CANNOT_SAY and found.depends_on_taken:
        return ["Give the old weights: memsyn compare MEMORY STATE --reference OLD_STATE."]
    if answer == CANNOT_SAY:
        return [f"Compare on at least {max(2, samples_needed(min_agreement)):,} inputs."]
    again = "Start again from the old model, and train with memsyn.protect."
    restored, moved = found.with_old_statistics, counted(len(found.moved_statistics), "running statistic")
    if restored is not None and (restored.agreement, -restored.mean_change) > (found.agreement, -found.mean_change):
        better = (
            f"with the old ones put back, {share_text(restored.agreement)} of the answers stay the same and outputs "
            f"change by {share_text(restored.mean_change)}."
        )
        if restored.verdict(min_agreement, max_change).answer != SAFE:
            return [f"A part of the cause: {moved} moved in training; {better}", again]
        put_back = "Put them back: model.load_state_dict(memory.statistics, strict=False)."
        return [f"The cause: {moved} moved in training; {better}", put_back]
    return ["Compare on more inputs, or treat the model as broken." if answer == AT_RISK else again]


def judge_prediction(found: Prediction | str, max_change: float) -> Judgement:
    """The judgement of a memory alone, without data; of one that cannot predict, what is missing."""
    if isinstance(found, str):
        return Judgement(
            CANNOT_SAY.capitalize(),
            VERDICT_TONES[CANNOT_SAY],
            "This memory alone cannot tell whether the new model is safe.",
            rule=f"Safe would mean: outputs change by at most {_limit(max_change)}.",
            steps=[f"Why: {found}", f"Compare on inputs, without labels: {ON_DATA}."],
        )
    answer = found.verdict(max_change).answer
    moved = f"{counted(len(found.moved_statistics), 'running statistic')} moved"
    if not found.moved_statistics:
        moved = f"{counted(len(found.unseen), 'weight tensor')} moved or may have moved"
    unseen = found.moved_statistics or found.unseen
    headline, step = {
        SAFE: (
            "The new model should still answer as the old one did.",
            f"To test the answers themselves, give inputs: {ON_DATA}.",
        ),
        BROKEN: (
            "Do not ship: the outputs on old data are predicted to change too much.",
            f"To see how many answers change, give inputs: {ON_DATA}."
            + (f" Also, {moved}, which the prediction does not see." if unseen else ""),
        ),
        AT_RISK: (
            "Not shown to be safe: outputs may have changed by more than is allowed.",
            f"Measure it, on inputs without labels: {ON_DATA}.",
        ),
        CANNOT_SAY: (
            f"Without data this cannot be told: {moved}, which the prediction does not see.",
            f"Compare on inputs: {ON_DATA}. "
            + ("Or load the old statistics into the model." if found.moved_statistics else f"{GIVE_ALL}."),
        ),
    }[answer]
    own = Judgement(
        answer.capitalize(),
        VERDICT_TONES[answer],
        headline,
        share_text(found.change),
        "predicted change of the outputs on old data",
        f"Nine in ten measured changes are at most {TIMES:g} times the prediction: here {share_text(found.upper)}.",
        f"Safe means: {TIMES:g} times the prediction is at most {_limit(max_change)}, and no running statistic moved.",
        steps=[step],
    )
    return _with_change(own, found.change, max_change)


def predicted(
    memory: Memory, weights: Mapping[str, Tensor], before: Mapping[str, Tensor] | None = None
) -> Prediction | str:
    """What the memory predicts for new weights, or why it cannot. Names that differ are said on the page."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RenamedParametersWarning)
        try:
            return predict(memory, weights, before)
        except (OptionError, MismatchError) as error:
            return str(error)


def judge_held(held: Held, curve: Lorenz | None, rooms: Sequence[DirectionsSummary]) -> Judgement:
    """What a file is good for: whether it can judge new weights."""
    answer, tone, headline, step = _readiness(held, bool(curve or rooms))
    rule = (
        f"A new model is called safe if at least {_limit(MIN_AGREEMENT)} of its answers stay the same, and its outputs "
        f"change by at most {_limit(MAX_CHANGE)}."
    )
    own = Judgement(answer, tone, headline, rule=rule if answer == READY else "", steps=[step])
    if curve is not None:
        return replace(
            own,
            number=share_text(curve.half),
            meaning="of the weights hold half of the importance",
            interval="Counted, not estimated: it has no interval.",
            bars=[
                Bar("Half of the importance:", f"{share_text(curve.half)} of the weights", curve.half),
                Bar("The other half:", f"{share_text(1 - curve.half)} of the weights", 1 - curve.half),
            ],
        )
    if rooms:
        free = mean_room(rooms)
        return replace(
            own,
            number=share_text(free),
            meaning="of the room to learn something new is free",
            interval="Counted, not estimated: it has no interval.",
            bars=[Bar("Free", share_text(free), free), Bar("In use", share_text(1 - free), 1 - free)],
        )
    return own


def mean_room(rooms: Sequence[DirectionsSummary]) -> float:
    """The room over all layers, weighted by their weights, 0 to 1."""
    return sum(own.room * own.num_weights for own in rooms) / max(1, sum(own.num_weights for own in rooms))


def _readiness(held: Held, is_known: bool) -> tuple[str, str, str, str]:
    """Answer, tone, headline and next step of a file."""
    make = "Next: memory = memory.consolidate(model, measured)."
    if not isinstance(held, Memory):
        what = "a measured importance" if kind_of(held) == "importance" else "measured factors"
        return "Not yet a memory", "unknown", f"This file holds {what}: a memory is made from it.", make
    if not is_known:
        return "Empty", "unknown", "Nothing is remembered yet.", make
    if not held.anchor or (held.directions is not None and held.directions.moved(held.anchor)):
        headline = "This memory can judge a new model if the old weights are given too."
        return READY, "warning", headline, "Judge: memsyn compare MEMORY STATE --reference OLD_STATE."
    if isinstance(predicted(held, {**held.anchor, **held.statistics}), str):
        return READY, "good", "This memory can judge a new model on inputs without labels.", f"Judge: {ON_DATA}."
    headline = "This memory can judge a new model, with or without data."
    return READY, "good", headline, f"Judge: memsyn compare MEMORY STATE. Surer, on inputs without labels: {ON_DATA}."


def judge_difference(found: Difference) -> Judgement:
    """Whether the difference of two files matters."""
    extent = found.extent
    answer = {NO_DIFFERENCE: "Same", SMALL: "Small difference", LARGE: "Large difference", UNKNOWN: "Cannot say"}[
        extent
    ]
    headline = {
        NO_DIFFERENCE: "B protects the same weights as A.",
        SMALL: "B protects nearly the same weights as A.",
        LARGE: "B protects partly other weights than A.",
        UNKNOWN: "One of the two holds nothing that could be compared.",
    }[extent]
    own = Judgement(answer, EXTENT_TONES[extent], "A and B hold the same, bit for bit." if found.same else headline)
    if found.shifted is not None:
        stayed = 1 - found.shifted
        (least, most), (least_small, most_small) = LIMITS.values()
        ranked = "The rank correlation of the weights is not defined."
        if found.rank_correlation is not None:
            ranked = f"Rank correlation of the weights (Spearman): {found.rank_correlation:.3f}; 1 is the same order."
        if found.rank_interval is not None:
            ranked += " 95% interval: {:.4f} to {:.4f}, from a sample of weights.".format(*found.rank_interval)
        return replace(
            own,
            number=share_text(found.shifted),
            meaning="of the importance moved to other weights",
            interval="Counted over all weights: it has no interval.",
            rule=f"Same means: at most {_limit(most)} moved, and a rank correlation of at least {least:g}. "
            f"Small means: at most {_limit(most_small)}, and at least {least_small:g}.",
            bars=[
                Bar("A (old)", "100%", 1.0),
                Bar("B (new)", f"{share_text(stayed)} on the same weights", stayed),
            ],
            mark=(1 - most_small, f"a small difference: at least {_limit(1 - most_small)}"),
            steps=[ranked],
        )
    if found.overlap is not None:
        return replace(
            own,
            number=share_text(found.overlap),
            meaning="of the directions that matter are the same",
            interval="Counted over all layers: it has no interval.",
            rule=f"Same means: an overlap of at least {_limit(OVERLAPS[NO_DIFFERENCE])}. Small means: at least "
            f"{_limit(OVERLAPS[SMALL])}.",
            bars=[Bar("A (old)", "100%", 1.0), Bar("B (new)", share_text(found.overlap), found.overlap)],
            mark=(OVERLAPS[SMALL], f"a small difference: at least {_limit(OVERLAPS[SMALL])}"),
        )
    return own


def _with_change(own: Judgement, change: float, allowed: float, interval: Interval | None = None) -> Judgement:
    """The judgement with the bars of a change and of what is allowed. The longest is nine tenths of the width."""
    ends = (change, allowed, interval.upper if interval is not None else 0.0)
    longest = max([own for own in ends if math.isfinite(own)]) / 0.9 or 1.0
    shown = None if interval is None or not math.isfinite(interval.upper) else interval
    bars = [
        Bar("Allowed", _limit(allowed), allowed / longest),
        Bar(
            "New model",
            share_text(change),
            min(1.0, change / longest),
            None if shown is None else (shown.lower / longest, shown.upper / longest),
        ),
    ]
    return replace(own, bars=bars, mark=(allowed / longest, f"allowed: {_limit(allowed)}"))


def _ends(interval: Interval) -> str:
    return f"{share_text(interval.lower)} to {share_text(interval.upper)}"


def _limit(share: float) -> str:
    """A threshold, exactly."""
    return f"{100 * share:.6g}%"
