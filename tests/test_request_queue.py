"""Which samples are chosen, which wait, and in which order they leave the queue."""

import itertools
import math
import random
import time

import numpy as np
import pytest
import torch

from memsyn import batches
from memsyn.live.request_queue import QueuedSamples, RateSampler, RequestQueue


def queue_of(room: int, rate: float = 1.0, seed: int | None = None) -> RequestQueue:
    return RequestQueue(RateSampler(rate, seed), room)


def samples(inputs: object, segment: str | None = None, version: int = 0) -> QueuedSamples:
    return QueuedSamples(inputs, batches.num_samples(inputs) or 0, segment, version, 0.0)


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.1, 0.01])
def test_each_sample_is_chosen_independently(rate: float) -> None:
    """The number is binomial, whatever the sizes of requests; a chosen sample does not change the odds of the next."""
    sizes, chosen, last = random.Random(0), [], 0
    own = queue_of(10**9, rate, seed=1)
    for _ in range(20_000):
        size = sizes.choice([1, 1, 1, 7, 100])
        chosen += [last + row for row in own.choose(size)]
        last += size
    deviation = math.sqrt(last * rate * (1 - rate))
    assert abs(len(chosen) - last * rate) <= 4 * deviation
    assert len(set(chosen)) == len(chosen) == own.num_sampled
    assert (own.num_seen, own.num_dropped) == (last, 0)
    neighbours = sum(b - a == 1 for a, b in itertools.pairwise(chosen))
    assert abs(neighbours - len(chosen) * rate) <= 4 * math.sqrt(len(chosen) * rate * (1 - rate)) + 1


def test_gaps_choose_the_rows_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example in the docstring."""
    gaps = iter([2, 0, 5, 99])
    monkeypatch.setattr(RateSampler, "_gap", lambda self: next(gaps))
    sampler = RateSampler(0.25, None)
    assert [sampler.choose(size) for size in (3, 4, 4)] == [[2], [0], [2]]


def test_requests_may_cut_the_stream_anywhere() -> None:
    """The chosen samples are those of the whole stream."""
    whole = RateSampler(0.3, seed=2).choose(1000)
    sampler, sizes, found, start = RateSampler(0.3, seed=2), random.Random(0), [], 0
    while start < 1000:
        size = min(sizes.randrange(9), 1000 - start)
        found += [start + row for row in sampler.choose(size)]
        start += size
    assert found == whole


def test_other_generators_are_left_alone() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    own = queue_of(10**9, 0.3)
    for _ in range(1000):
        own.choose(3)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_samples_without_room_are_dropped() -> None:
    own = queue_of(5)
    assert own.choose(3) == [0, 1, 2]
    assert own.choose(3) == [0, 1]
    assert own.choose(3) == []
    assert (own.num_seen, own.num_sampled, own.num_dropped, own.num_waiting) == (9, 9, 4, 5)
    own.done(3)
    assert own.choose(4) == [0, 1, 2]
    own.done(5, dropped=2)
    assert (own.num_dropped, own.num_waiting) == (7, 0)


def test_it_is_full_when_a_batch_can_be_taken() -> None:
    own = queue_of(8)
    for segment, expected in (("a", False), ("b", False), ("b", False), ("a", False), ("a", True)):
        own.choose(1)
        own.put(samples(torch.zeros(1, 3), segment))
        assert own.is_full(3) is expected  # three of "b" would have to wait for "a", which was there before
    assert [one.segment for one in own.take(3)] == ["a"] * 3
    own.done(3)
    assert not own.is_full(3)
    own.choose(6)
    assert own.is_full(3)  # no room for more


def test_what_can_be_measured_together_is_taken_together() -> None:
    own = queue_of(100)
    entries = [
        samples(torch.zeros(1, 3)),
        samples(torch.zeros(1, 4)),
        samples(torch.ones(2, 3)),
        samples(torch.ones(1, 3), "a"),
        samples(torch.ones(1, 3), None, 1),
        samples(torch.ones(3, 3)),
        samples(torch.ones(1, 3)),
    ]
    for entry in entries:
        own.put(entry)
    time.sleep(0.02)
    assert 0.02 <= own.lag < 60
    assert own.take(4) == [entries[0], entries[2], entries[6]]
    assert own.take(4) == [entries[1]]
    assert own.take(4) == [entries[3]]
    assert own.take(4) == [entries[4]]
    assert own.take(1) == [entries[5]], "one that is larger than all is measured alone"
    assert own.take(4) == []
    assert own.lag == 0


def test_taking_a_batch_looks_at_no_request_behind_it() -> None:
    """Else it would hold the lock longer the more requests wait."""
    compared = []

    class Version:
        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            compared.append(other)
            return True

    own = queue_of(10**6)
    for _ in range(1000):
        own.choose(1)
        own.put(QueuedSamples(torch.zeros(1, 4), 1, None, Version(), 0.0))
    compared.clear()
    assert len(own.take(8)) == 8
    assert len(compared) < 30
    assert own.num_waiting == 1000


def test_joined_requests_are_the_batch_they_would_have_been() -> None:
    table = torch.arange(5)
    whole = {"ids": torch.arange(12).view(4, 3), "mask": [torch.ones(4, 3), ("text", 1)], "table": table, "flag": True}
    parts = [batches.picked(whole, [0]), batches.picked(whole, [1, 3])]
    assert parts[1]["ids"].tolist() == [[3, 4, 5], [9, 10, 11]]
    assert parts[0]["table"].data_ptr() != table.data_ptr()
    assert batches.kind(parts[0]) != batches.kind(parts[1]), "tables may differ"
    del parts[0]["table"], parts[1]["table"]
    assert batches.kind(parts[0]) == batches.kind(parts[1])
    both = batches.joined(parts)
    assert both["ids"].tolist() == [[0, 1, 2], [3, 4, 5], [9, 10, 11]]
    assert both["mask"][0].shape == (3, 3)
    assert (both["mask"][1], both["flag"]) == (("text", 1), True)
    assert batches.joined(parts[:1]) is parts[0]


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(1, 3, dtype=torch.float64),
        torch.zeros(1, 4),
        torch.zeros(1),
        [torch.zeros(1, 3)],
        {"x": torch.zeros(1, 3)},
        (torch.zeros(1, 3), 5),
    ],
)
def test_what_cannot_be_joined_is_of_another_kind(other: object) -> None:
    assert batches.kind(other) == batches.kind(other)
    assert batches.kind(other) != batches.kind(torch.zeros(1, 3))


def test_what_is_picked_is_a_copy_without_a_graph() -> None:
    whole = torch.ones(3, 2, requires_grad=True) * 2
    for rows in ([0, 1, 2], [1]):
        own = batches.picked(whole, rows)
        whole.data.add_(1)
        assert own.max() < whole.min()
        assert not own.requires_grad


def test_nothing_waits_after_the_end() -> None:
    own = queue_of(10)
    for _ in range(3):
        own.choose(2)
    own.put(samples(torch.zeros(2, 3)))
    own.close()
    assert (own.num_waiting, own.num_dropped, own.take(9), own.lag) == (4, 2, [], 0.0)
    own.put(samples(torch.zeros(2, 3)))  # it was on its way
    own.done(2, dropped=2)
    assert (own.num_waiting, own.num_dropped, own.num_sampled, own.take(9)) == (0, 6, 6, [])
