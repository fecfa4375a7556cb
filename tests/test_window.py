"""What counts in a window, by a clock of the tests' own."""

import math
from datetime import timedelta

import pytest
import torch

import memsyn
from memsyn.live.window import BUCKETS, Window

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
