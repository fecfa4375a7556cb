"""An observer's sums are those that `measure` gives, and nothing of its work reaches who serves."""

import copy
import io
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm
from typer.testing import CliRunner

import memsyn
from memsyn.cli import app
from memsyn.ledger import spearman
from memsyn.parameters import fingerprint, weights
from memsyn.shadow import Onlooker, shadow
from tests.test_measure import Snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def a_model(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1, generator=generator)
    return model


def requests(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [1 + k % 3 for k in range(count)]
    return [torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in sizes]


def begin(model: nn.Module, store: str | Path, **given: Any) -> memsyn.Observer:
    """One that takes everything, and writes when it is told to."""
    return memsyn.Observer(model, store, **{"rate": 1.0, "room": 10**6, "interval": 1e6, "seed": 0, **given})


def measured(model: nn.Module, batches: list[Any], **given: Any) -> memsyn.Importance:
    return memsyn.measure(model, batches, progress=False, **given)


def assert_same(found: memsyn.Importance, expected: memsyn.Importance, tolerance: float = 1e-12) -> None:
    assert found.num_samples == expected.num_samples
    assert found.quantity == expected.quantity
    for name, total in expected.sums.items():
        assert (found.sums[name] - total).norm() <= tolerance * total.norm(), name
    assert found.sums.keys() == expected.sums.keys()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "traffic.safetensors"


class Words(nn.Module):
    """Takes what a language model does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 5, dtype=torch.float64)
        self.head = nn.Linear(5, 4, dtype=torch.float64)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return self.head(self.table(ids).tanh()) * scale


# The sums


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
        for batch in batches[:7]:
            observer.observe((batch, torch.zeros(len(batch))))
    with begin(model, store, estimator=estimator) as observer:
        observer.observe({"input": batches[0]} if estimator == "none" else [batches[0]])
        assert observer.flush()
    stored = memsyn.Importance.load(store)
    assert stored.num_samples >= expected.num_samples + len(batches[0])


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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_attached_it_sees_every_pass_and_leaves_nothing(mode: Any, store: Path) -> None:
    model, batches = a_model(), requests(20)
    model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
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


def test_a_hook_that_only_looks_is_not_in_clones(store: Path) -> None:
    model, batch = a_model(), requests(1)[0]
    with begin(model, store) as observer:
        observer.attach()
        model[0].register_forward_pre_hook(Onlooker())
        model[0].register_forward_hook(Onlooker())
        clone = shadow(model)
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in clone.modules())
        assert len(model._forward_pre_hooks) == len(model[0]._forward_hooks) == 1
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        for other in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
            assert torch.equal(other(batch), model(batch))
        assert observer.stats().seen == 2 * len(batch)


# The caller


def test_it_never_blocks(store: Path) -> None:
    """While the thread is stuck in a model, requests are taken up to the room, then dropped."""
    stuck, free = threading.Event(), threading.Event()

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        stuck.set()
        assert free.wait(60)
        return model(batch)

    model, batch, times = a_model(), requests(1)[0], []
    with begin(model, store, forward=forward, room=20) as observer:
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
        assert observer.flush()
        assert_same(observer.importance(), measured(model, [batch]))
    stats = observer.stats()
    assert stats.sampled == stats.measured + stats.dropped + stats.invalid
    assert [record.levelname for record in caplog.records] == ["WARNING"]
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

    with begin(a_model(), store, busy=is_busy) as observer:
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
    """Of a second, all but the first look at the model, whatever is asked."""
    model, batches = a_model(), requests(100)
    with begin(model, store, budget=5.0, room=64) as observer:
        start = time.monotonic()
        while time.monotonic() < start + 1:
            for batch in batches:
                observer.observe(batch)
            time.sleep(0.001)
        stats, elapsed = observer.stats(), time.monotonic() - start
    assert 0 < stats.seconds < 0.05 * elapsed + 0.05
    assert stats.dropped > 0


# Weights that change


def test_other_weights_begin_another_file(store: Path) -> None:
    model, batches = a_model(), requests(10)
    expected = []
    with begin(model, store) as observer:
        for seed in (1, 2, 1):
            model.load_state_dict(a_model(seed).state_dict())
            expected.append(measured(model, batches))
            for batch in batches:
                observer.observe(batch)
            assert observer.flush()
            if seed == 2:
                assert_same(observer.importance(), expected[1])
        assert observer.stats().versions == 3
        assert observer.stats().measured == 3 * expected[0].num_samples
    (other,) = set(store.parent.iterdir()) - {store}
    assert other.name.startswith("traffic.")
    assert_same(memsyn.Importance.load(store), expected[0] + expected[2])
    assert_same(memsyn.Importance.load(other), expected[1])


def test_touched_weights_are_the_same(store: Path) -> None:
    model, batches = a_model(), requests(10)
    with begin(model, store) as observer:
        for assign in (False, True, False):
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            model.load_state_dict(state, assign=assign)
            for batch in batches:
                observer.observe(batch)
            assert observer.flush()
        assert observer.stats().versions == 1
        assert_same(observer.importance(), measured(model, batches * 3))


def test_samples_whose_weights_are_gone_are_left_out(store: Path) -> None:
    """Those that wait when weights change are measured with the old ones, if the observer has them; else dropped."""
    model, (one, two, three, *_), busy = a_model(), requests(3), threading.Event()
    busy.set()
    with begin(model, store, busy=busy.is_set) as observer:
        observer.observe(one)
        model.load_state_dict(a_model(1).state_dict())
        observer.observe(two)
        expected = measured(model, [two])
        assert observer.flush()
        assert (observer.stats().stale, observer.stats().measured) == (len(one), len(two))
        assert_same(observer.importance(), expected)
        observer.observe(three)
        expected += measured(model, [three])
        model.load_state_dict(a_model(2).state_dict())
        assert observer.flush()
        assert_same(observer.importance(), expected)
        assert_same(memsyn.Importance.load(store), expected)
        assert observer.stats().stale == len(one)


def test_weights_that_change_while_they_are_copied(store: Path) -> None:
    model, batch = a_model(), requests(1)[0]
    changed: list[int] = []

    def forward(clone: nn.Module, inputs: Tensor) -> Tensor:
        if not changed:
            changed.append(1)
            model.load_state_dict(a_model(1).state_dict())
        return clone(inputs)

    with begin(model, store, forward=forward) as observer:
        observer.observe(batch)
        assert observer.flush()
        assert (observer.stats().stale, observer.stats().measured) == (1, 0)
        with pytest.raises(memsyn.BatchError, match="nothing has been measured yet"):
            observer.importance()
        observer.observe(batch)
        assert observer.flush()
        assert_same(observer.importance(), measured(model, [batch]))


def test_a_change_that_torch_does_not_count_is_found_when_sums_are_stored(store: Path) -> None:
    model, batch = a_model(), requests(1)[0]
    with begin(model, store) as observer:
        observer.observe(batch)
        assert observer.flush()
        expected = measured(model, [batch, batch])
        for parameter in model.parameters():
            parameter.data.mul_(2)
        observer.observe(batch)
        assert observer.flush()
        assert_same(memsyn.Importance.load(store), expected)
        observer.observe(batch)
        assert observer.flush()
        assert observer.stats().versions == 2
        assert_same(observer.importance(), measured(model, [batch]))
        assert_same(memsyn.Importance.load(store), expected)


# The store


@pytest.mark.parametrize("given", [{}, {"last": timedelta(days=7)}, {"half_life": timedelta(days=365_000)}])
def test_a_restart_goes_on(given: dict[str, Any], store: Path) -> None:
    model, batches = a_model(), requests(30)
    for start in (0, 10, 20):
        with begin(model, store, **given) as observer:
            for batch in batches[start : start + 10]:
                observer.observe(batch)
            assert observer.flush()
    assert_same(memsyn.Importance.load(store), measured(model, batches), 1e-5 if "half_life" in given else 1e-12)
    assert list(store.parent.iterdir()) == [store]
    header, _ = memsyn.storage.read(store)
    assert header["observed"]["fingerprint"] == fingerprint(weights(model))
    assert header["observed"]["first"][:3] == header["observed"]["last"][:3] == "202"


def test_a_restart_keeps_what_is_of_others(store: Path) -> None:
    """Other weights, other estimators, other windows, damaged files, files of somebody else: none is written to."""
    batches = requests(5)
    store.write_bytes(b"not ours")
    names = {store.name}
    for seed, given in ((1, {}), (2, {}), (1, {"estimator": "fisher"}), (1, {"last": timedelta(days=1)})):
        before = {path: path.read_bytes() for path in store.parent.iterdir()}
        with begin(a_model(seed), store, **given) as observer:
            for batch in batches:
                observer.observe(batch)
            assert observer.flush()
        assert all(path.read_bytes() == data for path, data in before.items())
        (new,) = set(store.parent.iterdir()) - set(before)
        names.add(new.name)
        estimator = given.get("estimator", "mas")
        assert_same(memsyn.Importance.load(new), measured(a_model(seed), batches, estimator=estimator))
    assert len(names) == 5
    new.write_bytes(b"damaged")
    with begin(a_model(1), store, last=timedelta(days=1)) as observer:
        observer.observe(batches[0])
        assert observer.flush()
        assert "are damaged, or of something else" in str(observer.stats().last_error)
        assert (observer.stats().measured, observer.stats().dropped) == (0, 1)


def test_a_store_that_fails_for_a_while(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = a_model(), requests(4)

    def failing(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with begin(model, store) as observer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            observer.observe(batches[0])
            assert observer.flush()
            assert "No space left on device" in str(observer.stats().last_error)
            assert observer.stats().stored is None
        observer.observe(batches[1])
        assert observer.flush()
        assert_same(memsyn.Importance.load(store), measured(model, batches[:2]))


def test_a_store_at_a_url(tmp_path: Path) -> None:
    model, batches, url = a_model(), requests(4), f"memory://{tmp_path}/traffic.safetensors"
    for part in (batches[:2], batches[2:]):
        with begin(model, url) as observer:
            for batch in part:
                observer.observe(batch)
            assert observer.flush()
    assert_same(memsyn.Importance.load(url), measured(model, batches))


def test_three_replicas_are_one(store: Path) -> None:
    model, batches = a_model(), requests(90)
    stores = [store.with_name(f"replica{k}.safetensors") for k in range(3)]
    for k, own in enumerate(stores):
        with begin(model, own) as observer:
            for batch in batches[k::3]:
                observer.observe(batch)
            assert observer.flush()
    with begin(model, store) as observer:
        for batch in batches:
            observer.observe(batch)
        assert observer.flush()
    out = store.with_name("all.safetensors")
    assert CliRunner().invoke(app, ["merge", *map(str, stores), "-o", str(out)]).exit_code == 0
    assert_same(memsyn.Importance.load(out), memsyn.Importance.load(store))


def test_three_replicas_are_one_bit_for_bit_where_sums_are_exact(store: Path) -> None:
    """With small whole numbers no sum is rounded."""
    model, generator = nn.Linear(4, 2), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator))
    batches = [torch.randint(-3, 4, (1 + k % 3, 4), generator=generator).float() for k in range(90)]
    found = []
    for k, part in enumerate([batches[::3], batches[1::3], batches[2::3], batches]):
        with begin(model, store.with_name(f"{k}.safetensors")) as observer:
            for batch in part:
                observer.observe(batch)
            assert observer.flush()
            found.append(observer.importance())
    merged = found[0] + found[1] + found[2]
    assert merged.num_samples == found[3].num_samples
    assert all(torch.equal(merged.sums[name], total) for name, total in found[3].sums.items())


def serve_until_killed(store: Path, said: int) -> None:
    """Observe the same sample over and over; say after each write how many samples had been shown before it began."""
    observer = memsyn.Observer(a_model(), store, rate=1.0, interval=1e6, budget=100.0, room=10**6)
    batch, shown = torch.ones(1, 4, dtype=torch.float64), 0
    while True:
        for _ in range(3):
            observer.observe(batch)
            shown += 1
        observer.flush()
        os.write(said, shown.to_bytes(4, "little"))


@pytest.mark.soak
def test_killed_at_any_moment_it_loses_an_interval_at_most(store: Path, soak: bool) -> None:
    """What is stored before a kill is there after it: the last interval that ended, or the one it was at."""
    generator, num_kills, stored, middle = random.Random(0), 1000 if soak else 25, 0, 0
    one = measured(a_model(), [torch.ones(1, 4, dtype=torch.float64)])
    for _ in tqdm(range(num_kills), "kills of observers"):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            os.close(read)
            try:
                serve_until_killed(store, write)
            finally:
                os._exit(1)
        os.close(write)
        with open(read, "rb", buffering=0) as said:
            reached = said.read(4)
            time.sleep(generator.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            reached = (reached + said.read())[-4:]
        finished = stored + int.from_bytes(reached, "little")
        found = memsyn.Importance.load(store)
        assert finished <= found.num_samples <= finished + 3
        middle += found.num_samples > finished
        middle += len(list(store.parent.iterdir())) > 1
        for name, total in found.sums.items():
            assert torch.allclose(total, one.sums[name] * found.num_samples, rtol=1e-9), name
        stored = found.num_samples
    tqdm.write(f"{num_kills} observers killed, {middle} of them in the middle of a write; {stored} samples stored")


def test_what_is_new_is_stored_at_exit(store: Path) -> None:
    code = (
        "import sys, time, torch, memsyn\n"
        "observer = memsyn.Observer(torch.nn.Linear(4, 2), sys.argv[1], rate=1.0, interval=1e6)\n"
        "observer.observe(torch.ones(1, 4))\n"
        "while not observer.stats().measured: time.sleep(0.01)\n"
        "print(observer.stats().stored)"
    )
    done = subprocess.run([sys.executable, "-c", code, store], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("None\n", "")
    assert memsyn.Importance.load(store).num_samples == 1


def test_a_fork_of_the_process_does_nothing(store: Path) -> None:
    model, batch = a_model(), requests(1)[0]
    with begin(model, store) as observer:
        observer.observe(batch)
        assert observer.flush()
        child = os.fork()
        if not child:
            try:
                observer.observe(batch)
                assert not observer.flush()
                observer.close()
                os._exit(observer.stats().seen)
            finally:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        observer.observe(batch)
        assert observer.flush()
        assert observer.importance().num_samples == 2


# Segments, caps, odd samples


def test_segments_have_sums_of_their_own(store: Path) -> None:
    model, batches, names = a_model(), requests(30), ["tenant-a", "B/../c d.e", None]
    parts = {name: batches[k::3] for k, name in enumerate(names)}
    expected = {name: measured(model, part) for name, part in parts.items()}
    with begin(model, store) as observer:
        for k, batch in enumerate(batches):
            observer.observe(batch, segment=names[k % 3])
        assert observer.flush()
        assert_same(observer.importance(), measured(model, batches))
        assert_same(observer.importance("tenant-a"), expected["tenant-a"])
        mixed = observer.importance({"tenant-a": 3.0, "B/../c d.e": 1.0}).mean()
        for name, omega in mixed.items():
            one, two = (expected[segment].mean()[name] for segment in names[:2])
            assert torch.allclose(omega, (3 * one + two) / 4, rtol=1e-12)
        with pytest.raises(memsyn.BatchError, match="nothing has been measured yet of 'tenant-z'"):
            observer.importance("tenant-z")
        for wrong in ({"tenant-a": -1.0}, {"tenant-a": math.nan}, {"tenant-a": 0.0}, {}):
            with pytest.raises(memsyn.OptionError, match="weights must be finite, not negative, and not all zero"):
                observer.importance(wrong)
    files = {"traffic+tenant-a.safetensors", "traffic+B%2F%2E%2E%2Fc%20d%2Ee.safetensors", store.name}
    assert {path.name for path in store.parent.iterdir()} == files
    assert_same(memsyn.Importance.load(store.with_name("traffic+tenant-a.safetensors")), expected["tenant-a"])


def test_there_are_not_too_many_segments(store: Path) -> None:
    model, batch = a_model(), requests(1)[0]
    with begin(model, store) as observer:
        for k in range(70):
            observer.observe(batch, segment=f"user {k}")
        observer.observe(batch, segment="user 1")
        assert observer.flush()
        stats = observer.stats()
        assert (stats.measured, stats.dropped) == (65, 6)
        assert "there are 64 segments already" in str(stats.last_error)


@pytest.mark.parametrize("cap", [None, 0.2, 0.04])
@pytest.mark.parametrize("max_batch", [1, 32])
def test_one_odd_request_cannot_own_the_memory(cap: float | None, max_batch: int, store: Path) -> None:
    """A larger one is scaled down to the share; all others count as they are."""
    model, usual, odd = nn.Linear(4, 2).double(), torch.ones(1, 4, dtype=torch.float64), 1e4
    one, large = (sum(float(total.sum()) for total in measured(model, [x]).sums.values()) for x in (usual, usual * odd))
    with begin(model, store, cap=cap, max_batch=max_batch) as observer:
        for _ in range(300):
            observer.observe(usual)
        assert observer.flush()
        assert observer.stats().capped == 0
        observer.observe(torch.cat([usual, odd * usual, usual]))
        assert observer.flush()
        found, stats = observer.importance(), observer.stats()
    assert (stats.measured, found.num_samples) == (303, 303)
    whole = sum(float(total.sum()) for total in found.sums.values())
    if cap is None:
        assert stats.capped == 0
        assert whole == pytest.approx(302 * one + large)
    else:
        assert stats.capped == 1
        assert 0.8 * cap <= 1 - 302 * one / whole <= cap


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_what_is_not_finite_is_left_out_alone(bad: float, store: Path) -> None:
    model, batches = a_model(), requests(30)
    model[1] = nn.Identity()
    good = [batch.clone() for batch in batches]
    with begin(model, store) as observer:
        for k, batch in enumerate(batches):
            if k % 7 == 0:
                batch = torch.cat([batch, torch.full((1, 4), bad, dtype=torch.float64)])
            observer.observe(batch)
        assert observer.flush()
        stats = observer.stats()
        assert stats.invalid == 5
        assert "the output" in str(stats.last_error)
        assert_same(observer.importance(), measured(model, good))


def test_a_gradient_that_is_not_finite_is_left_out(store: Path) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).abs().sum(1, keepdim=True).sqrt()

    model, batches = Root(), requests(10)
    with begin(model, store) as observer:
        for batch in batches:
            observer.observe(batch)
        observer.observe(torch.zeros(2, 4, dtype=torch.float64))
        assert observer.flush()
        assert observer.stats().invalid in (0, 2)
        if observer.stats().invalid:
            assert "a gradient is NaN or infinite" in str(observer.stats().last_error)
            assert_same(observer.importance(), measured(model, batches))


def test_a_model_that_cannot_be_measured_is_given_up_until_its_weights_change(store: Path) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.mixes = nn.Linear(4, 2).double(), True

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x - x.mean(0) if self.mixes else x)

    model, batch = Mixing(), torch.randn(4, 4, dtype=torch.float64)
    with begin(model, store, max_batch=4) as observer:
        for _ in range(20):
            observer.observe(batch)
        assert observer.flush()
        stats = observer.stats()
        assert (stats.measured, stats.dropped, stats.errors) == (0, 80, 8)
        assert "SamplesInteractError" in str(stats.last_error)
        model.mixes = False
        with torch.no_grad():
            model.head.weight.mul_(2)
        observer.observe(batch)
        assert observer.flush()
        assert_same(observer.importance(), measured(model, [batch]))


def test_convergence_is_the_rank_correlation_of_halves(store: Path) -> None:
    """Near 0 for halves that share nothing, 1 for the same, and growing with the number of samples."""

    def ranks(values: Any) -> list[float]:
        return [sum(other < own for other in values) + sum(other == own for other in values) / 2 for own in values]

    generator = np.random.default_rng(0)
    for _ in range(5):
        one, two = generator.integers(0, 9, 50).astype(float), generator.normal(size=50)
        assert spearman(one, two) == pytest.approx(np.corrcoef(ranks(one), ranks(two))[0, 1])
    assert math.isnan(spearman(np.ones(3), np.arange(3.0)))
    model, found = a_model(), []
    with begin(model, store, max_batch=1) as observer:
        assert math.isnan(observer.converged())
        batches = [torch.randn(1, 4, dtype=torch.float64) for _ in range(400)]
        for count in (2, 400):
            for batch in batches[:count]:
                observer.observe(batch)
            assert observer.flush()
            found.append(observer.converged())
            if count == 2:
                halves = [torch.cat([t.flatten() for t in measured(model, [b]).sums.values()]) for b in batches[:2]]
                assert found[0] == pytest.approx(spearman(*(half.numpy() for half in halves)))
    assert found[0] < 0.95 < found[1] <= 1


@pytest.mark.soak
def test_a_week_in_fast_forward(store: Path, soak: bool) -> None:
    """The sums are right against float64, and memory is constant."""
    count, width = 10**6 if soak else 50_000, 8
    model, generator = nn.Linear(width, 3, bias=False), np.random.default_rng(0)
    weight, sums = model.weight.detach().double().numpy(), np.zeros((3, width))
    resident: list[int] = []
    with begin(model, store, room=512, max_batch=256, budget=100.0, interval=0.5) as observer:
        for start in tqdm(range(0, count, 250), "requests"):
            inputs = generator.normal(size=(250, width)).astype(np.float32)
            for row in torch.from_numpy(inputs).split(1):
                observer.observe(row)
            own = inputs.astype(np.float64)
            sums += (2 * np.abs(own @ weight.T)).T @ np.abs(own)
            while observer.stats().waiting > 250:
                time.sleep(0.0005)
            if start % (count // 10) == 0:
                resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        assert observer.flush()
        stats = observer.stats()
    assert (stats.seen, stats.measured, stats.dropped) == (count, count, 0)
    found = memsyn.Importance.load(store)
    error = np.abs(found.sums["weight"].double().numpy() / sums - 1).max()
    grown = resident[-1] - resident[2]
    tqdm.write(f"{count} requests: largest error {error:.1e}, memory grew by {grown / 2**20:.1f} MiB")
    assert found.num_samples == count
    assert error < 1e-6
    assert grown < 8 * 2**20


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
    client = pytest.importorskip("prometheus_client")
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
