"""What is taken of traffic, what waits, and how much time it may cost."""

import itertools
import math
import random
import time

import numpy as np
import pytest
import torch
from torch import nn

from memsyn import batches
from memsyn.live import request_queue
from memsyn.live.request_queue import Budget, Taken, Traffic, Watch


def taken(inputs: object, segment: str | None = None, tag: int = 0) -> Taken:
    return Taken(inputs, batches.num_samples(inputs) or 0, segment, tag, 0.0)


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.1, 0.01])
def test_each_sample_is_taken_on_its_own(rate: float) -> None:
    """How many are taken is binomial, whatever the sizes of requests; and the next one is as likely after one taken."""
    sizes, chosen, last = random.Random(0), [], 0
    own = Traffic(rate, 10**9, seed=1)
    for _ in range(20_000):
        size = sizes.choice([1, 1, 1, 7, 100])
        chosen += [last + row for row in own.choose(size)]
        last += size
    deviation = math.sqrt(last * rate * (1 - rate))
    assert abs(len(chosen) - last * rate) <= 4 * deviation
    assert len(set(chosen)) == len(chosen) == own.taken
    assert (own.seen, own.dropped) == (last, 0)
    neighbours = sum(b - a == 1 for a, b in itertools.pairwise(chosen))
    assert abs(neighbours - len(chosen) * rate) <= 4 * math.sqrt(len(chosen) * rate * (1 - rate)) + 1


def test_nobody_elses_generator_is_used() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    own = Traffic(0.3, 10**9, None)
    for _ in range(1000):
        own.choose(3)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_what_has_no_room_is_dropped() -> None:
    own = Traffic(1.0, 5, None)
    assert own.choose(3) == [0, 1, 2]
    assert own.choose(3) == [0, 1]
    assert own.choose(3) == []
    assert (own.seen, own.taken, own.dropped, own.held) == (9, 9, 4, 5)
    own.done(3)
    assert own.choose(4) == [0, 1, 2]
    own.done(5, dropped=2)
    assert (own.dropped, own.held) == (7, 0)


def test_it_is_full_when_a_batch_can_be_taken() -> None:
    own = Traffic(1.0, 8, None)
    for segment, expected in (("a", False), ("b", False), ("b", False), ("a", False), ("a", True)):
        own.choose(1)
        own.put(taken(torch.zeros(1, 3), segment))
        assert own.is_full(3) is expected  # three of "b" would have to wait for "a", which was there before
    assert [one.segment for one in own.take(3)] == ["a"] * 3
    own.done(3)
    assert not own.is_full(3)
    own.choose(6)
    assert own.is_full(3)  # no room for more


def test_what_can_be_measured_together_is_taken_together() -> None:
    own = Traffic(1.0, 100, None)
    entries = [
        taken(torch.zeros(1, 3)),
        taken(torch.zeros(1, 4)),
        taken(torch.ones(2, 3)),
        taken(torch.ones(1, 3), "a"),
        taken(torch.ones(1, 3), None, 1),
        taken(torch.ones(3, 3)),
        taken(torch.ones(1, 3)),
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


def test_a_change_of_weights_is_seen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    watch, tags = Watch(model), []
    tags.append(watch.tag())
    model.eval()(torch.ones(1, 2))
    model[0].weight.sum().backward()
    assert watch.refresh() == tags[0]

    def changed(what: str) -> None:
        assert watch.refresh() not in tags, what
        tags.append(watch.tag())

    torch.optim.SGD(model.parameters(), lr=0.1).step()
    changed("an optimizer")
    model.load_state_dict(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict())
    changed("load_state_dict")
    model.load_state_dict(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict(), assign=True)
    changed("load_state_dict(assign=True)")
    model[0].weight.data = torch.ones(2, 2)
    changed("data")
    model.train()(torch.rand(3, 2))
    assert watch.refresh() in tags, "torch does not count what moves statistics: that is for the fingerprint"
    watch.renew()
    changed("renew")
    with torch.inference_mode():
        model[0].weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    changed("a tensor that does not count")


def test_rest_keeps_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the work takes."""
    now, generator = 100.0, random.Random(0)
    monkeypatch.setattr(request_queue.time, "monotonic", lambda: now)
    budget, begin = Budget(0.1), now
    for _ in range(1000):
        began = now
        now += generator.choice([0.001, 0.5, 0.02])
        budget.spend(began)
        assert budget.ready >= now
        now = budget.ready
    assert budget.seconds / (now - begin) == pytest.approx(0.1)
