"""An observer's sums are those that `measure` gives, and nothing of its work reaches who serves."""

import copy
import io
import random
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import memsyn
from memsyn.measuring.model_copy import Onlooker, model_copy
from tests import reference
from tests.serving import (
    Words,
    a_model,
    assert_same,
    assert_same_factors,
    begin,
    factors_of,
    measured,
    requests,
)
from tests.test_measure import Snapshot


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "traffic.safetensors"


@pytest.mark.parametrize("estimator", ["mas", "mas-local", "mas-vector", "fisher"])
def test_the_sums_are_those_of_measure(estimator: str, store: Path) -> None:
    model, batches = a_model(), requests(50)
    with begin(model, store, estimator=estimator) as observer:
        for batch in batches:
            observer.observe(batch)
        assert observer.flush()
        expected = measured(model, batches, estimator=estimator)
        assert_same(observer.importance(), expected)
        assert_same(memsyn.Importance.load(store), expected)
        for batch in batches:
            observer.observe({"input": batch} if len(batch) == 1 else (batch, torch.zeros(len(batch))))
        assert observer.flush()
        assert_same(memsyn.Importance.load(store), expected + expected)


def test_convolutions_and_mappings_and_a_forward(store: Path) -> None:
    conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2)).double()
    images = [torch.randn(1 + k % 2, 1, 6, 6, dtype=torch.float64) for k in range(20)]
    words, mask = Words(), torch.tensor([[1, 1, 0]])
    sentences = [{"ids": torch.randint(0, 10, (1, 3)), "attention_mask": mask, "labels": mask} for _ in range(9)]
    cases: list[tuple[nn.Module, list[Any], Any]] = [
        (conv, images, None),
        (words, sentences, None),
        (words, sentences, lambda model, batch: model(batch["ids"], scale=2.0)),
    ]
    for index, (model, batches, forward) in enumerate(cases):
        with begin(model, store.with_name(f"{index}.safetensors"), forward=forward) as observer:
            for batch in batches:
                observer.observe(batch)
            assert observer.flush()
            assert observer.stats().last_error is None
            assert_same(observer.importance(), measured(model.eval(), batches, forward=forward), 1e-9)


def test_inputs_may_be_changed_at_once(store: Path) -> None:
    model, batches = a_model(), requests(20)
    expected = measured(model, [batch.clone() for batch in batches])
    with begin(model, store) as observer:
        for batch in batches:
            observer.observe(batch)
            batch.zero_()
        assert observer.flush()
        assert_same(observer.importance(), expected)


class Doubling(nn.Identity):
    def doubled(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (2 * args[0],)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_attached_it_sees_every_pass_and_leaves_nothing(mode: Any, store: Path) -> None:
    model, batches = a_model(), requests(20)
    doubling = Doubling()
    model.append(doubling).register_forward_pre_hook(doubling.doubled)
    expected, snapshot = measured(model, batches), Snapshot(model)
    generators = random.getstate(), np.random.get_state()[1].tolist()
    observer = begin(model, store)
    observer.attach()
    with mode():
        answers = [model(batch) for batch in batches]
    assert observer.flush()
    assert_same(observer.importance(), expected)
    observer.detach()
    model(batches[0])
    assert observer.stats().seen == expected.num_samples
    observer.close()
    snapshot.assert_unchanged()
    assert generators == (random.getstate(), np.random.get_state()[1].tolist())
    assert all(torch.equal(answer, model(batch)) for answer, batch in zip(answers, batches, strict=True))


def test_attached_it_knows_arguments_by_name(store: Path) -> None:
    model, ids = Words(), torch.randint(0, 10, (2, 3))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with begin(model, store) as observer:
        observer.attach()
        model(ids, mask)
        model(ids, attention_mask=mask)
        model(ids=ids, attention_mask=mask, scale=1.0)
        assert observer.flush()
        assert observer.stats().last_error is None
        assert_same(observer.importance(), measured(model, [{"ids": ids, "attention_mask": mask}] * 3))


class Scaled(nn.Module):
    """Takes arguments in all ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        nn.init.ones_(self.layer.weight)

    def forward(self, given: Tensor, *others: Tensor, **named: Any) -> Tensor:
        return self.layer(given) * named.get("scale", 1.0) + sum(others)


class ByPlace(Scaled):
    def forward(self, given: Tensor, scale: float, /) -> Tensor:
        return self.layer(given) * scale


def test_attached_it_knows_further_keyword_arguments_by_name(store: Path) -> None:
    model, ones = Scaled(), torch.ones(1, 2, dtype=torch.float64)
    with begin(model, store) as observer:
        observer.attach()
        observer.attach()
        model(ones, scale=3.0)
        assert observer.flush()
        assert observer.stats().seen == 1
        assert observer.importance().mean()["layer.weight"].tolist() == [[36.0, 36.0]]  # y = 3 (w x): 2 y 3 x
        observer.detach()
        model(ones)
        assert observer.stats().seen == 1


@pytest.mark.parametrize(
    ("model", "others"), [(Scaled(), (torch.ones(1, 1),)), (ByPlace(), (3.0,))], ids=["many", "by place"]
)
def test_arguments_that_have_no_name_are_an_error(model: nn.Module, others: tuple[Any, ...], store: Path) -> None:
    with begin(model, store) as observer:
        observer.attach()
        model(torch.ones(1, 2, dtype=torch.float64), *others)
        stats = observer.stats()
        assert (stats.seen, stats.errors) == (0, 1)
        assert "only as a positional argument" in str(stats.last_error)


class Cache:
    def __init__(self) -> None:
        self.entries: list[Tensor] = []


def test_what_cannot_be_copied_is_refused(store: Path) -> None:
    class Model(Scaled):
        def forward(self, given: Tensor, cache: Cache) -> Tensor:
            cache.entries.append(given)
            return self.layer(given)

    model, cache = Model(), Cache()
    with begin(model, store) as observer:
        observer.attach()
        model(torch.ones(2, 2, dtype=torch.float64), cache=cache)
        assert observer.flush()
        assert len(cache.entries) == 1
        stats = observer.stats()
        assert (stats.sampled, stats.dropped, stats.waiting, stats.errors) == (2, 2, 0, 1)
        assert "a batch holds a Cache, which memsyn cannot copy" in str(stats.last_error)


def test_arrays_are_copied(store: Path) -> None:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["given"], scale=float(batch["scale"][0]))

    scale = np.array([3.0])
    with begin(Scaled(), store, forward=forward) as observer:
        observer.observe({"given": torch.ones(1, 2, dtype=torch.float64), "scale": scale})
        scale[0] = 0.0
        assert observer.flush()
        assert observer.importance().mean()["layer.weight"].tolist() == [[36.0, 36.0]]


def test_a_hook_that_only_looks_is_not_in_clones(store: Path) -> None:
    model, batch = a_model(), requests(1)[0]
    with begin(model, store) as observer:
        observer.attach()
        model[0].register_forward_pre_hook(Onlooker())
        model[0].register_forward_hook(Onlooker())
        clone = model_copy(model)
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in clone.modules())
        assert len(model._forward_pre_hooks) == len(model[0]._forward_hooks) == 1
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        for other in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
            assert torch.equal(other(batch), model(batch))
        assert observer.stats().seen == 2 * len(batch)


def test_a_hook_that_may_compute_is_an_error(store: Path) -> None:
    """At once, or when it comes later: what was measured before it stays."""
    model, batch = a_model(), requests(1)[0]
    handle = model[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(
        memsyn.ModelError, match=r"may be part of what the model computes: .*<lambda> on 0\. .*onlookers=True"
    ):
        memsyn.Observer(model, store)
    handle.remove()
    with begin(model, store) as observer:
        observer.observe(batch)
        assert observer.flush()
        handle = model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        observer.observe(batch)
        assert not observer.flush()
        stats = observer.stats()
        assert (stats.measured, stats.dropped) == (len(batch), len(batch))
        assert "<lambda> on the model" in stats.last_error
        for _ in range(10):  # however often
            observer.observe(batch)
            assert not observer.flush()
        handle.remove()
        observer.observe(batch)
        assert observer.flush()
        assert_same(observer.importance(), measured(model, [batch, batch]))


def test_hooks_of_others_see_no_samples_again(store: Path) -> None:
    """Where they are said to look on. But those that compute weights do: the older weight norm, and pruning."""
    torch.manual_seed(0)
    model, batch, seen = a_model(), requests(1)[0], []
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(model[2])
    expected = measured(model, [batch, batch])

    def look(*given: Any) -> None:
        seen.append(threading.current_thread().name)

    model[0].register_forward_hook(look)
    model.register_forward_pre_hook(look)
    with begin(model, store, onlookers=True) as observer:
        for _ in range(2):
            model(batch)
            observer.observe(batch)
            assert observer.flush()
        assert observer.stats().last_error is None
        assert_same(observer.importance(), expected)
    assert seen == [threading.current_thread().name] * 4


# Factors


FACTORS = pytest.mark.parametrize("estimator", ["inputs", "kronecker"])


@FACTORS
def test_factors_are_those_of_measure(estimator: str, store: Path) -> None:
    """With seed 0 the signs are also the same. Requests of the same size are measured in their order."""
    conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
    cases: list[tuple[nn.Module, list[Any], float]] = [
        (a_model(), list(torch.randn(100, 4, dtype=torch.float64).split(1)), 1e-12),
        (Words(), [{"ids": torch.randint(0, 10, (2, 3))} for _ in range(40)], 1e-12),
        (conv.eval(), list(torch.randn(80, 1, 6, 6).split(2)), 1e-6),
        (nn.Linear(2100, 2), list(torch.randn(6, 2100).split(1)), 1e-6),
    ]
    for index, (model, batches, tolerance) in enumerate(cases):
        own = store.with_name(f"{index}.safetensors")
        with begin(model, own, estimator=estimator) as observer:
            for repetition in (1, 2):
                for number, batch in enumerate(batches):
                    observer.observe(batch)
                    assert number or observer.flush()  # the first request is measured alone
                assert observer.flush()
                assert observer.stats().last_error is None
                expected = factors_of(model, batches * repetition, estimator)
                assert_same_factors(observer.factors(), expected, tolerance)
                assert_same_factors(memsyn.KroneckerFactors.load(own), expected, tolerance)


def test_the_other_result_is_an_error(store: Path) -> None:
    with begin(a_model(), store, estimator="kronecker") as observer:
        with pytest.raises(memsyn.OptionError, match=r"this observer measures factors, .* call factors\(\)"):
            observer.importance()
        with pytest.raises(memsyn.BatchError, match="nothing has been measured yet"):
            observer.factors()
    expected = pytest.raises(memsyn.OptionError, match=r"measures an importance per weight, .* call importance\(\)")
    with begin(a_model(), store) as observer, expected:
        observer.factors()


def signs_of(places: Any, width: int) -> Tensor:
    """sum v v^T over the samples at these places: the last layer's output gradients are the signs themselves."""
    signs = torch.stack([reference.signs(place, width) for place in places]).double()
    return signs.T @ signs


def test_signs_never_repeat(store: Path) -> None:
    """Not from batch to batch, nor if the model returns to earlier weights, nor after a restart with another seed."""
    model, sample = nn.Linear(2, 32, bias=False).double(), torch.ones(1, 2, dtype=torch.float64)
    weights = [model.weight.detach().clone(), model.weight.detach() + 1]
    with begin(model, store, estimator="kronecker", max_batch=4) as observer:
        for version, places in ((0, [*range(10)]), (1, [*range(10, 20)]), (0, [*range(10), *range(20, 30)])):
            with torch.no_grad():
                model.weight.copy_(weights[version])
            for _ in range(10):
                observer.observe(sample)
            assert observer.flush()
            assert torch.equal(observer.factors().sums["outputs/weight"][0], signs_of(places, 32))
    with begin(model, store, estimator="kronecker", seed=1000) as observer:
        observer.observe(sample)
        assert observer.flush()
        assert torch.equal(observer.factors().sums["outputs/weight"][0], signs_of([*places, 1000], 32))
    found = []
    for name in ("a", "b"):
        with begin(model, store.with_name(name), estimator="kronecker", seed=None) as observer:
            observer.observe(sample)
            assert observer.flush()
            found.append(observer.factors().sums["outputs/weight"])
    assert not torch.equal(*found)


@FACTORS
def test_matrices_are_found_after_samples_that_overflow(estimator: str, store: Path) -> None:
    """The check runs in float64, where exp(300) is finite. In float32 it is not, so these samples are left out."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 1)
            nn.init.ones_(self.first.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).exp())

    model, batches = Growing(), list(torch.randn(10, 2).split(1))
    with begin(model, store, estimator=estimator) as observer:
        observer.observe(torch.full((2, 2), 150.0))
        assert observer.flush()
        assert observer.stats().invalid == 2
        for batch in batches:
            observer.observe(batch)
        assert observer.flush()
        assert_same_factors(observer.factors(), factors_of(model, batches, estimator), 1e-5)


# The caller


def test_it_never_blocks(store: Path) -> None:
    """While the thread is stuck in a model, requests are taken up to the room, then dropped."""
    stuck, free = threading.Event(), threading.Event()

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        stuck.set()
        assert free.wait(60)
        return model(batch)

    model, batch, times = a_model(), requests(1)[0], []
    with begin(model, store, forward=forward, room=20, max_batch=1) as observer:
        observer.observe(batch)
        assert stuck.wait(60)
        for _ in range(500):
            start = time.perf_counter()
            observer.observe(batch)
            times.append(time.perf_counter() - start)
        stats = observer.stats()
        assert sorted(times)[len(times) // 2] < 1e-3
        assert (stats.seen, stats.waiting, stats.dropped, stats.measured) == (501, 20, 481, 0)
        assert stats.lag > 0
        assert not observer.flush(timeout=0.01)
        free.set()
        assert observer.flush()
        assert (observer.stats().measured, observer.stats().waiting, observer.stats().lag) == (20, 0, 0)


def test_it_never_raises(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = a_model(), requests(1)[0]

    class Odd(dict):
        def items(self) -> Any:
            raise RuntimeError("odd")

    odd = [None, "text", 3, torch.tensor(1.0), (), [], {}, {"a": 1}, object(), Odd(), model]
    with begin(model, store) as observer:
        for inputs in odd:
            observer.observe(inputs)
        assert observer.stats().errors == len(odd)
        for inputs in ({"input": "text", "x": batch}, torch.zeros(2, 9), batch.long(), batch[:0], batch.to_sparse()):
            observer.observe(inputs)
        observer.observe(batch, segment=[])  # type: ignore[arg-type]
        observer.observe(batch)
        observer.flush()
        assert_same(observer.importance(), measured(model, [batch]))
    stats = observer.stats()
    assert stats.sampled == stats.measured + stats.dropped + stats.invalid
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert "BatchError: a batch must be a tensor" in caplog.text
    observer.observe(batch)
    observer.close()
    assert not observer.flush()
    assert observer.stats() == stats


def test_many_threads_at_once(store: Path) -> None:
    model, batches = a_model(), requests(100)
    with begin(model, store) as observer:
        threads = [threading.Thread(target=lambda: [observer.observe(b) for b in batches]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert observer.flush()
        assert_same(observer.importance(), measured(model, batches * 4))


def test_other_threads_keep_their_number_of_cores(store: Path) -> None:
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        with begin(a_model(), store) as observer:
            observer.observe(requests(1)[0])
            assert observer.flush()
            thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert (torch.get_num_threads(), found) == (2, [2])
    finally:
        torch.set_num_threads(before)


def test_it_rests_while_the_service_is_busy(store: Path) -> None:
    busy, asked = threading.Event(), threading.Event()
    busy.set()

    def is_busy() -> bool:
        asked.set()
        return busy.is_set()

    with begin(a_model(), store, busy=is_busy, max_batch=1) as observer:
        observer.observe(requests(1)[0])
        asked.clear()
        assert asked.wait(60)
        assert asked.wait(60)
        assert (observer.stats().measured, observer.stats().waiting) == (0, 1)
        busy.clear()
        for _ in range(1000):
            if observer.stats().measured:
                break
            time.sleep(0.01)
        assert observer.stats().measured == 1


def test_it_keeps_its_budget(store: Path) -> None:
    """Whatever is asked: a twentieth of the time, but for the last batch, which may begin when the budget is spent."""
    model, batches = a_model(), requests(100)
    with begin(model, store, budget=5.0, room=64) as observer:
        observer.observe(batches[0])
        assert observer.flush(60)
        spent, start = [observer.stats().seconds], time.monotonic()
        while time.monotonic() < start + 1:
            for batch in batches:
                observer.observe(batch)
            time.sleep(0.001)
            if (now := observer.stats().seconds) > spent[-1]:
                spent.append(now)
        stats, elapsed = observer.stats(), time.monotonic() - start
    assert 0 <= spent[-2] - spent[0] < 0.05 * elapsed
    assert stats.measured > 0
    assert stats.dropped > 0


# Arguments, and what is seen from outside


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": 0}, r"rate must be a number above 0, up to 1; got 0"),
        ({"rate": 2.0}, r"rate must be a number above 0, up to 1; got 2.0"),
        ({"cap": 0}, r"cap must be a number above 0, up to 1; got 0"),
        ({"budget": 101}, r"budget must be a number above 0, up to 100; got 101"),
        ({"interval": "1"}, r"interval must be a number above 0, up to inf; got '1'"),
        ({"room": 0}, r"room must be a whole number, at least 1; got 0"),
        ({"max_batch": 1.5}, r"max_batch must be a whole number, at least 1; got 1.5"),
        ({"estimator": "fisher-empirical"}, r"needs labels, which requests do not have"),
        ({"estimator": "no"}, r"estimator must be one of"),
        ({"last": timedelta(0)}, r"last must be a positive"),
    ],
)
def test_arguments_are_checked(given: dict[str, Any], message: str, store: Path) -> None:
    with pytest.raises(memsyn.OptionError, match=message):
        memsyn.Observer(a_model(), store, **given)


def test_models_and_stores_are_checked(tmp_path: Path) -> None:
    with pytest.raises(memsyn.ModelError, match=r"expected a torch\.nn\.Module"):
        memsyn.Observer("model", tmp_path / "it")  # type: ignore[arg-type]
    with pytest.raises(memsyn.ModelError, match="no parameter that requires a gradient"):
        memsyn.Observer(nn.ReLU(), tmp_path / "it")
    with pytest.raises(memsyn.MemoryFileError, match="its folder does not exist"):
        memsyn.Observer(a_model(), tmp_path / "no" / "it")


def test_prometheus(store: Path) -> None:
    client = pytest.importorskip("prometheus_client", reason="needs the extra observe: make install brings it")
    from memsyn.integrations.prometheus import export

    registry = client.CollectorRegistry()
    with begin(a_model(), store) as observer:
        export(observer, registry)
        observer.observe(requests(3)[2])
        assert observer.flush()
        text = client.generate_latest(registry).decode()
    assert "memsyn_observer_measured_total 3.0" in text
    assert "memsyn_observer_waiting 0.0" in text
    assert text.count("# TYPE memsyn_observer_") == 13
