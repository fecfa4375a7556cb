"""What a reader of an observer's stores learns about single requests: the attacks of benchmarks/privacy_attack.py.

Each attack is also mounted on stores that hold every sample at once, where it must succeed: else it would show nothing.
"""

import logging
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import privacy_attack as attack
from torch import nn

import memsyn
from memsyn.live import observer as live_observer
from memsyn.live import segment_files, weights_versions
from memsyn.live.window import Window
from memsyn.live.withheld_sums import DOMINANCE, PARTS, WithheldSums
from memsyn.storage.reading_and_writing import read
from tests.serving import TwoPaths, a_model, assert_same, begin, measured


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "traffic.safetensors"


LIVE = "the store and importance() in process"


@pytest.mark.parametrize("name", [name for name in attack.READING if name != LIVE])
def test_no_input_can_be_read(name: str, soak: bool) -> None:
    """An input is nowhere nearer to what was sent than to what was never sent, but by the choice among many."""
    found, never = attack.reading(name, {}, None if soak else 140)
    assert found == never == math.inf or found > 0.75 * never
    assert found > 0.3


@pytest.mark.parametrize("name", attack.READING)
def test_inputs_can_be_read_if_each_is_written(name: str) -> None:
    assert attack.reading(name, {"min_samples": 1}, 12)[0] < 1e-6


@pytest.mark.parametrize("name", attack.TABLES)
def test_rare_tokens_do_not_show(name: str) -> None:
    """Neither by numbers that are there, nor by numbers that wait."""
    assert attack.tokens(name, {"min_samples": 1}, 20) > 0.99
    assert abs(attack.tokens(name, {}, 80) - 0.5) < 0.1


@pytest.mark.parametrize("size", [1, 4, 16])
def test_members_of_small_stores_cannot_be_told(size: int) -> None:
    for membership in (attack.membership, attack.membership_in_factors):
        assert membership(size, {"min_samples": 1}, 6) > 0.8
        assert membership(size, {}, 2) == 0.5


# What is written


OPTIONS: list[dict[str, Any]] = [
    {},
    {"last": timedelta(days=7)},
    {"half_life": timedelta(days=365_000)},
    {"estimator": "kronecker"},
]


def states(observer: memsyn.Observer, store: Path, batches: list[Any]) -> list[bytes]:
    """The contents of the store after each batch, without repetitions."""
    found: list[bytes] = []
    for batch in batches:
        observer.observe(batch)
        assert observer.flush()
        if store.exists() and (not found or found[-1] != store.read_bytes()):
            found.append(store.read_bytes())
    return found


@pytest.mark.parametrize("given", OPTIONS)
def test_no_write_has_few_new_samples(given: dict[str, Any], store: Path) -> None:
    """Nor the first one after a restart."""
    batches, counts = list(torch.randn(200, 4, dtype=torch.float64).split(1)), []
    for part in (batches[:90], batches[90:]):
        with begin(a_model(), store, **given, min_samples=40) as observer:
            for batch in part:
                observer.observe(batch)
                assert observer.flush()
                if store.exists():
                    counts.append(read(store)[0]["num_samples"])
            assert observer.stats().withheld == len(part) % 40
    assert sorted(set(counts)) == [40, 80, 120, 160]


def test_each_segment_and_version_has_its_own_number(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, sample = a_model(), torch.randn(1, 4, dtype=torch.float64)
    with begin(model, store, min_samples=8) as observer:
        for count, segment in ((7, None), (7, "a"), (8, "b")):
            for _ in range(count):
                observer.observe(sample, segment=segment)
        assert observer.flush()
        assert [path.name for path in store.parent.glob("[!.]*")] == ["traffic+b.safetensors"]
        assert observer.stats().withheld == 14
        model.load_state_dict(a_model(1).state_dict())
        for _ in range(7):
            observer.observe(sample)
        assert observer.flush()
        assert observer.stats().withheld == 21
        assert "the weights changed: 14 measured samples were too few for a file, and are lost." in caplog.messages
        assert observer.stats().stored is not None
    assert [path.name for path in store.parent.glob("[!.]*")] == ["traffic+b.safetensors"]


@pytest.mark.parametrize("given", OPTIONS[:3])
def test_what_is_withheld_is_in_the_value_and_joins_the_store(given: dict[str, Any], store: Path) -> None:
    """In the end nothing is missing: each number is written as soon as no batch makes up more than a quarter of it."""
    model, batches = a_model(), list(torch.randn(320, 4, dtype=torch.float64).split(4))
    tolerance = 1e-5 if "half_life" in given else 1e-12
    with begin(model, store, **given, min_samples=64) as observer:
        for count in (5, 40, 80):
            for batch in batches[: count if count == 5 else count // 2]:
                observer.observe(batch)
            assert observer.flush()
            shown = 5 if count == 5 else 25 if count == 40 else 65
            assert observer.importance().num_samples == 4 * shown
    with begin(model, store.with_name("all"), **given, min_samples=64) as observer:
        for batch in batches:
            observer.observe(batch)
        assert observer.flush()
        expected = measured(model, batches)
        assert_same(observer.importance(), expected, tolerance)
        held = memsyn.Importance.load(store.with_name("all"))
        assert held.num_samples == 320
        missing = {name: 1 - held.sums[name] / total for name, total in expected.sums.items()}
        assert all(bool((own.abs() < 1e-4).double().mean() > 0.9) for own in missing.values())
        assert all(float(own.min()) > -1e-4 for own in missing.values())


def test_the_first_batch_of_a_segment_is_still_limited_by_itself(store: Path) -> None:
    """Though it is measured in parts."""
    given = torch.ones(64, 1, dtype=torch.float64)
    given[[0, 5, 31]] = 1000.0
    with begin(nn.Linear(1, 1, bias=False).double(), store, cap=0.1, min_samples=64, max_batch=64) as observer:
        observer.observe(given)
        assert observer.flush()
        assert observer.stats().capped == 3


def test_that_something_is_withheld_is_said(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    with begin(a_model(), store, min_samples=8) as observer:
        observer.observe(torch.randn(3, 4, dtype=torch.float64))
        assert observer.flush()
        assert "3 withheld" in repr(observer.stats())
    observer.close()
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "3 samples were measured, and in no file: there were fewer than min_samples=8 of their segment and weights."
    ]
    assert not store.exists()
    with pytest.raises(memsyn.OptionError, match="min_samples must be a whole number, at least 1; got 0"):
        begin(a_model(), store, min_samples=0)


def test_a_file_does_not_tell_that_a_single_sample_took_a_branch(store: Path) -> None:
    """Neither by sums, nor by routes, nor by the names of matrices."""
    model, x = TwoPaths(), torch.randn(40, 4, dtype=torch.float64)
    for estimator in ("mas", "kronecker"):
        own = store.with_name(estimator)
        with begin(model, own, estimator=estimator, min_samples=40, max_batch=1) as observer:
            for k, one in enumerate(x.split(1)):
                observer.observe({"x": one} if k != 20 else {"x": one, "more": one[:, :2]})
            assert observer.flush()
        header, groups = read(own)
        assert header["routes"]["second.weight"] == header["routes"]["second.bias"] == "unused"
        assert "second" not in str(header.get("matrices", ""))
        assert not any(bool(t.any()) for sums in groups.values() for name, t in sums.items() if "second" in name)


# The rules


def released(withheld: WithheldSums, *batches: list[float]) -> list[float]:
    """What may be written of one number each after these batches of a sample."""
    for k, own in enumerate(zip(*batches, strict=True)):
        withheld.add({"w": torch.tensor(own)}, 1, float(k))
    found = withheld.release()
    assert found is not None
    return found.sums["w"].tolist()


def test_a_number_waits_until_no_batch_makes_up_more_than_a_quarter() -> None:
    """If one batch stands out, it counts as much as the second."""
    withheld = WithheldSums(8)
    alike, one, four, out = [1.0] * 8, [5.0, *[0.0] * 7], [1.0] * 4 + [0.0] * 4, [9.0, 1.0, 2.0, *[1.0] * 5]
    two, none = [9.0, 8.0, *[1.0] * 6], [0.0] * 8
    assert released(withheld, alike, one, four, out, two, none) == [8.0, 0.0, 4.0, 11.0 - 1.0, 0.0, 0.0]
    assert withheld.release() is None
    three = [5.0] * 3 + [0.0] * 5
    assert released(withheld, alike, three, none, alike, none, none) == [8.0, 20.0, 0.0, 8.0, 0.0, 0.0]


def test_second_moments_stay_sums_of_products() -> None:
    """Inputs that one batch dominates are left out of every x; a matrix that few positions use waits whole."""
    withheld, generator = WithheldSums(64), torch.Generator().manual_seed(0)
    whole = torch.zeros(1, 5, 5, dtype=torch.float64)
    for k in range(16):
        x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        x[:, 2] *= k == 7
        moment = (x.T @ x).unsqueeze(0)
        own = {"inputs/a": moment, "positions/a": torch.tensor(4.0)}
        own |= {"inputs/b": moment * (k == 7), "outputs/b": moment, "positions/b": torch.tensor(4.0 * (k == 7))}
        withheld.add(own, 4, 0.0)
        whole += moment
    found = withheld.release()
    assert found is not None
    assert set(found.sums) == {"inputs/a", "positions/a"}
    kept_moment = found.sums["inputs/a"][0]
    assert not kept_moment[2].any()
    assert not kept_moment[:, 2].any()
    kept = [0, 1, 3, 4]
    assert torch.equal(kept_moment[kept][:, kept], whole[0][kept][:, kept])
    assert float(torch.linalg.eigvalsh(kept_moment).min()) > -1e-12


def test_weights_decay_while_they_wait() -> None:
    """A single new sample among old ones makes up nearly all: it counts as much as one of these."""
    withheld = WithheldSums(8, half_life=1.0)
    for _ in range(7):
        withheld.add({"w": torch.ones(1)}, 1, 0.0)
    withheld.add({"w": torch.ones(1)}, 1, 10.0)
    assert withheld.weight == pytest.approx(1 + 7 / 1024)
    assert float(withheld.sums["w"]) == pytest.approx(1 + 7 / 1024)
    found = withheld.release()
    assert found is not None
    assert found.sums["w"].tolist() == [8 / 1024]
    withheld.add({"w": torch.ones(1)}, 1, 9.0)  # late
    assert float(withheld.sums["w"]) == 0.5


def test_what_waits_too_long_is_lost_and_counted() -> None:
    withheld = WithheldSums(8, longest=7.0)
    withheld.add({"w": torch.ones(1)}, 3, 0.0)
    withheld.add({"w": torch.ones(1)}, 1, 6.0)
    withheld.expire(6.9)
    assert (withheld.num_samples, withheld.num_lost) == (4, 0)
    withheld.expire(7.0)
    assert (withheld.num_samples, withheld.num_lost, withheld.sums) == (0, 4, {})


def test_sixteen_batches_of_alike_samples_satisfy_the_rule() -> None:
    assert PARTS >= 2 * DOMINANCE


SPANS: list[tuple[dict[str, timedelta], float]] = [
    ({"last": timedelta(days=7)}, 8 * 86_400.0),
    ({"half_life": timedelta(hours=1)}, 70 * 3_600.0),
    ({"half_life": timedelta(minutes=1)}, 1_100 * 60.0),
]


@pytest.mark.parametrize(("given", "seconds"), SPANS)
@pytest.mark.parametrize("count", [5, 8])
def test_a_segment_goes_on_after_a_quiet_time(
    given: dict[str, timedelta], seconds: float, count: int, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 samples most are written, and single numbers wait on; 5 wait. Neither counts any more afterwards."""
    clock = [1.7e9]
    for module in (live_observer, weights_versions):
        monkeypatch.setattr(module, "steady_time", lambda: clock[0])
    with begin(a_model(), store, **given, min_samples=8, cap=0.05) as observer:
        observer.observe(torch.randn(count, 4, dtype=torch.float64))
        assert observer.flush()
        clock[0] += seconds
        observer.observe(torch.randn(8, 4, dtype=torch.float64), segment="other")
        assert observer.flush()
        assert all(bool(own.isfinite().all()) for own in observer.importance().sums.values())
        assert observer.importance().num_samples == 8
        observer.observe(torch.randn(8, 4, dtype=torch.float64))
        assert observer.flush()
        assert (observer.stats().errors, observer.stats().dropped) == (0, 0)
        assert memsyn.Importance.load(store).num_samples == 8


def test_few_samples_join_a_write_that_failed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise memsyn.MemoryFileError("the disk is full") from OSError(28, "full")

    with begin(a_model(), store, min_samples=8) as observer:
        with monkeypatch.context() as patch:
            patch.setattr(segment_files, "write", full)
            observer.observe(torch.randn(8, 4, dtype=torch.float64))
            assert not observer.flush()
        observer.observe(torch.randn(5, 4, dtype=torch.float64))
        assert observer.flush()
        assert observer.stats().withheld == 0
        assert memsyn.Importance.load(store).num_samples == 13


def test_what_is_released_late_is_no_clock_that_was_set_back() -> None:
    window, hour = Window(half_life=timedelta(minutes=2)), 3_600.0
    window.add({"w": torch.ones(2)}, 8, 2.0, 1.7e9)
    window.total(1.7e9 + 3 * hour)
    window.add({"w": torch.ones(2)}, 8, 2.0, 1.7e9 + hour, 8.0)
    assert window.saved(1.7e9 + 3 * hour)[0]["last"] == "2023-11-14T23:13:20+00:00"
