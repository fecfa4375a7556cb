"""What counts in a window, by a clock of the tests' own."""

import math
from datetime import timedelta
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import memsyn
from memsyn.live import window as clocks
from memsyn.live.window import BUCKETS, Window, steady_time

DAY = 86400.0
START = 20_000 * DAY


def sums(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2, 3), value, dtype=torch.float64), "b": torch.full((2,), 2 * value, dtype=torch.float64)}


def add(window: Window, value: float, when: float, num_samples: int = 1) -> None:
    window.add(sums(value), num_samples, value * 10, when)


def held(window: Window, now: float) -> tuple[float, int]:
    """What a window says, and says everywhere."""
    found, count = window.value(now)
    assert found["b"].eq(found["b"][0]).all()
    assert torch.allclose(found["w"] * 2, found["b"][0], rtol=1e-12)
    assert window.total(now)[0] == pytest.approx(10 * float(found["w"][0, 0]) * window.total(now)[1] / count)
    return float(found["w"][0, 0]), count


def test_all_samples_count() -> None:
    window = Window()
    assert window.is_empty(START)
    for day in range(100):
        add(window, day, START + day * DAY, 2)
    assert held(window, START + 1000 * DAY) == (sum(range(100)), 200)
    assert not window.is_empty(math.inf)


@pytest.mark.parametrize("days", [1, 7, 30])
def test_a_sliding_window_holds_the_last_days(days: int) -> None:
    """Of each moment, all of the last six sevenths of it, and nothing that is older than all of it."""
    window, length, times = Window(last=timedelta(days=days)), days * DAY, []
    for step in range(200):
        now = START + step * days * DAY / 20
        times.append(now)
        add(window, now - START, now)
        value, count = held(window, now)
        surely = [t for t in times if t > now - length * (BUCKETS - 1) / BUCKETS]
        maybe = [t for t in times if t > now - length]
        assert len(surely) <= count <= len(maybe)
        assert value == sum(t - START for t in times[-count:])
        assert len(window.buckets) <= BUCKETS
    assert window.is_empty(now + length)


@pytest.mark.parametrize("hours", [0.1, 24.0])
def test_a_decayed_window(hours: float) -> None:
    """Omega = sum_k w_k |g_k| / sum_k w_k with w_k = 2^(-age / half-life), and sum_k w_k samples."""
    window, times = Window(half_life=timedelta(hours=hours)), [START + step * 3600.0 for step in range(300)]
    for step, when in enumerate(times):
        add(window, step, when)
    for now in sorted([times[-1], times[-1] + 3600 * hours, times[-1] + 5000]):
        weights = [2.0 ** ((when - now) / (3600 * hours)) for when in times]
        value, count = held(window, now)
        expected = sum(weight * step for step, weight in enumerate(weights)) / sum(weights)
        assert value / count == pytest.approx(expected, rel=1e-12)
        assert count == max(1, round(sum(weights)))
        assert window.total(now)[1] == pytest.approx(sum(weights))


@pytest.mark.parametrize("given", [{}, {"last": timedelta(days=7)}, {"half_life": timedelta(days=1)}])
def test_what_is_saved_goes_on_as_if_nothing_had_been(given: dict[str, timedelta]) -> None:
    """Whether it is saved and restored in between changes nothing but rounding."""
    whole, parts = Window(**given), Window(**given)
    for day in range(40):
        now = START + day * DAY
        for window in (whole, parts):
            add(window, 1 + day % 5, now)
            add(window, 1 + day % 3, now + 100)
        if day % 3 == 0:
            header, groups, count = parts.saved(now + 200)
            assert count == held(parts, now + 200)[1]
            parts = Window(**given)
            parts.restore(header, groups, {name: torch.zeros_like(own) for name, own in sums(0).items()})
        first, second = held(whole, now + 300), held(parts, now + 300)
        assert first[1] == second[1]
        assert first[0] == pytest.approx(second[0], rel=1e-12)


def test_dates_are_those_of_the_samples_that_count() -> None:
    window = Window(last=timedelta(days=7))
    for day in range(10):
        add(window, 1, day * DAY + 3600)
    header, groups, count = window.saved(9 * DAY + 7200)
    assert (header["first"], header["last"]) == ("1970-01-04T01:00:00+00:00", "1970-01-10T01:00:00+00:00")
    assert count == 7
    assert set(groups) == {"importance", *map(str, range(3, 10))}
    assert header["window"] == "last 604800 s"


def test_durations_are_checked() -> None:
    for given in (0.5, timedelta(0), -timedelta(days=1)):
        with pytest.raises(memsyn.OptionError, match=r"last must be a positive datetime.timedelta"):
            Window(last=given)
        with pytest.raises(memsyn.OptionError, match=r"half_life must be a positive datetime.timedelta"):
            Window(half_life=given)
    with pytest.raises(memsyn.OptionError, match=r"give last= or half_life=, not both"):
        Window(timedelta(days=1), timedelta(days=1))


def test_a_clock_that_is_set_back_and_long_idle_times_decay() -> None:
    window = Window(half_life=timedelta(seconds=60))
    add(window, 1.0, START)
    for now in (START - DAY, START - 10_000 * DAY):
        assert window.value(now)[0]["w"][0, 0] / window.value(now)[1] == 1.0
        assert math.isfinite(window.total(now)[0])
    add(window, 3.0, START - DAY)
    assert held(window, START - DAY) == (4.0, 2)
    later = START - DAY
    for seconds in (60 * 63, 60 * 65, 10_000 * DAY):
        assert window.is_empty(later + seconds) == (seconds > 60 * 64)
    add(window, 5.0, later + 10_000 * DAY)
    assert held(window, later + 10_000 * DAY) == (5.0, 1)
    other = Window(half_life=timedelta(seconds=60))
    add(other, 1.0, START)
    header, groups, _ = other.saved(START + 63 * 60)
    again = Window(half_life=timedelta(seconds=60))
    again.restore(header, groups, {name: torch.zeros_like(own).float() for name, own in sums(1.0).items()})
    found, count = again.value(START + 63 * 60)
    assert (float(found["b"][0]), count) == (2.0, 1)


def test_a_sliding_window_with_a_clock_that_is_set_back() -> None:
    """What is dated later than now would never expire; late samples are of the days on which they were served."""
    window = Window(last=timedelta(days=7))
    add(window, 100.0, START + 3650 * DAY)
    for day in range(60):
        add(window, 1.0, START + day * DAY)
    assert held(window, START + 59 * DAY) == (7.0, 7)
    window = Window(last=timedelta(days=7))
    for day in (0, 3, 1, 1, 2):
        add(window, 10.0**day, START + day * DAY)
    assert [bucket.header.place for bucket in window.buckets] == [20_000, 20_001, 20_002, 20_003]
    assert held(window, START + 3 * DAY) == (1121.0, 5)
    assert held(window, START + 8 * DAY) == (1100.0, 2)


@pytest.mark.parametrize("given", [{}, {"last": timedelta(days=7)}, {"half_life": timedelta(days=1)}])
def test_a_sum_that_appears_later_was_zero_before(given: dict[str, timedelta]) -> None:
    window, full, days = Window(**given), Window(**given), 20
    for day in range(days):
        own = {**sums(day), "late": torch.full((4,), 1.0 + day, dtype=torch.float64)}
        full.add({**own, "late": own["late"] if day >= 17 else 0 * own["late"]}, 1, day, START + day * DAY)
        window.add(own if day >= 17 else sums(day), 1, day, START + day * DAY)
    now = START + days * DAY - 1
    header, groups, count = window.saved(now)
    restored = Window(**given)
    restored.restore(header, groups, sums(0))
    for found in (window, restored):
        values, number = found.value(now)
        expected, _ = full.value(now)
        assert number == count
        assert all(torch.allclose(values[name], own, rtol=1e-12) for name, own in expected.items())
        read = found.traces(now, lambda part: {name: float(own.sum()) for name, own in part.items()})
        scale = count / found.total(now)[1]
        assert {name: own * scale for name, own in read.items()} == pytest.approx(
            {name: float(own.sum()) for name, own in expected.items()}
        )


# Clocks


class Machine:
    """True time, a clock that may be set, and windows that are saved and restored; sample k adds 1 to place k."""

    def __init__(self, given: dict[str, timedelta], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given, self.most, self.true, self.wrong_by = given, most, 0.0, 0.0
        self.served: list[float] = []
        monkeypatch.setattr(clocks, "_elapsed", lambda: self.true)
        self.patch = monkeypatch
        self.window = Window(**given)
        self.start()

    def start(self) -> None:
        """Begin a process: memsyn is imported."""
        self.patch.setattr(clocks, "_BEGAN", START + self.wrong_by)

    def restart(self) -> None:
        if not self.window.is_empty(steady_time()):
            header, groups, _ = self.window.saved(steady_time())
            self.start()
            self.window = Window(**self.given)
            self.window.restore(header, groups, {"w": torch.zeros(self.most, dtype=torch.float64)})
        else:
            self.start()
            self.window = Window(**self.given)

    def serve(self) -> None:
        own = torch.zeros(self.most, dtype=torch.float64)
        own[len(self.served)] = 1.0
        self.served.append(self.true)
        self.window.add({"w": own}, 1, 1.0, steady_time())


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.floats(0, 3 * DAY)),
        st.tuples(st.just("set"), st.floats(-5000 * DAY, 5000 * DAY)),
        st.tuples(st.just("serve"), st.integers(1, 3)),
        st.tuples(st.just("restart"), st.none()),
    ),
    max_size=20,
)


@pytest.mark.parametrize("given", [{}, {"last": timedelta(days=7)}, {"half_life": timedelta(days=1)}])
@hypothesis.settings(deadline=None, max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(steps=STEPS)
def test_whatever_the_clock_does_samples_count_as_their_age_says(
    given: dict[str, timedelta], steps: list[tuple[str, Any]]
) -> None:
    """No value stands for more samples than were added, no sample counts more than 1 or less than an older one.

    While a process lives, a sample's weight is that of its true age, whatever the clock is set to.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine, restarts = Machine(given, 60, monkeypatch), 0
        for what, value in steps:
            if what == "wait":
                machine.true += value
            elif what == "set":
                machine.wrong_by = value
            elif what == "restart":
                machine.restart()
                restarts += 1
            else:
                for _ in range(value):
                    machine.serve()
            now, window = steady_time(), machine.window
            if window.is_empty(now):
                continue
            sums, count = window.value(now)
            assert 1 <= count <= len(machine.served)
            assert 0 < window.total(now)[1] <= len(machine.served) * (1 + 1e-9)
            weights = sums["w"][: len(machine.served)] * window.total(now)[1] / count
            assert weights.max() <= 1 + 1e-9
            assert (weights.diff() >= -1e-9).all()
            if not restarts and given.get("half_life"):
                ages = machine.true - torch.tensor(machine.served, dtype=torch.float64)
                assert torch.allclose(weights, 2 ** (-ages / DAY), atol=1e-9)
            if not restarts and given.get("last"):
                surely = sum(machine.true - served < 6 * DAY for served in machine.served)
                assert surely <= count <= sum(machine.true - served <= 7 * DAY for served in machine.served)


@pytest.mark.parametrize("halvings", [1, 12, 16, 17, 1000])
def test_a_clock_that_is_set_back_multiplies_no_samples(halvings: int) -> None:
    """Eight samples stood for 16,220 after 12 half-lives."""
    window = Window(half_life=timedelta(days=1))
    for _ in range(8):
        add(window, 1.0, START)
    for now in (START - halvings * DAY, START, START - halvings * DAY):
        assert held(window, now) == (8.0, 8)
        assert window.saved(now)[2] == 8
    for hour in range(48):
        add(window, 1.0, START - halvings * DAY + 3600 * hour)
        assert held(window, START - halvings * DAY + 3600 * hour)[1] <= 9 + hour


@pytest.mark.parametrize("given", [{"last": timedelta(days=7)}, {"half_life": timedelta(days=1)}])
def test_a_store_of_the_future_goes_on(given: dict[str, timedelta]) -> None:
    """Written while the clock was ten years ahead, read and written again by processes with the right time."""
    window = Window(**given)
    for _ in range(8):
        add(window, 1.0, START + 3650 * DAY)
    for day in range(30):
        now = START + day * DAY
        header, groups, _ = window.saved(now - 0.1 * DAY if day else START + 3650 * DAY)
        window = Window(**given)
        window.restore(header, groups, sums(0))
        add(window, 1.0, now)
        _, count = held(window, now)
        assert count <= 8 + day + 1
    # The tenth of a day from each write to the next start is not counted, so nine tenths of the days are.
    assert count == (2 if "half_life" in given else 7)
    header["at"] = 1e300
    with pytest.raises(ValueError, match="at is 1e"):
        Window(**given).restore(header, groups, sums(0))
