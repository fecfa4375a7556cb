"""Weights that change under an observer: sums of different weights are never mixed, and the service is left alone."""

import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import memsyn
from memsyn.cli import app
from memsyn.live.weights_versions import PrivateDraws, WeightsVersion
from tests.serving import a_model, assert_same, begin, measured, requests


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "traffic.safetensors"


def test_a_change_of_weights_is_seen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    version, earlier = WeightsVersion(model), []
    earlier.append(version.current())
    model.eval()(torch.ones(1, 2))
    model[0].weight.sum().backward()
    assert version.refresh() == earlier[0]

    def changed(what: str) -> None:
        assert version.refresh() not in earlier, what
        earlier.append(version.current())

    torch.optim.SGD(model.parameters(), lr=0.1).step()
    changed("an optimizer")
    model.load_state_dict(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict())
    changed("load_state_dict")
    model.load_state_dict(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict(), assign=True)
    changed("load_state_dict(assign=True)")
    model[0].weight.data = torch.ones(2, 2)
    changed("data")
    model.train()(torch.rand(3, 2))
    assert version.refresh() in earlier, "torch does not count what moves statistics: that is for the fingerprint"
    version.renew()
    changed("renew")
    with torch.inference_mode():
        model[0].weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    changed("a tensor that does not count")


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


def test_a_module_that_takes_the_place_of_another_is_other_weights(store: Path) -> None:
    """From the first request on; and what was observed of one is not added to what was of the other."""
    model, batches = a_model(), requests(4)
    with begin(model, store) as observer:
        observer.attach()
        model(batches[0])
        assert observer.flush()
        before = observer.importance()
        model[0] = a_model(1)[0]
        for batch in batches[1:]:
            model(batch)
            assert observer.flush()
        assert (observer.stats().versions, observer.stats().stale) == (2, 0)
        assert_same(observer.importance(), measured(model, batches[1:]))
        with pytest.raises(memsyn.MismatchError, match="were measured at different weights"):
            before + observer.importance()
    one, other = sorted(store.parent.iterdir())
    result = CliRunner().invoke(app, ["merge", str(one), str(other), "-o", str(store.with_name("all"))])
    assert result.exit_code == 1
    assert "different weights" in " ".join(result.stderr.split())


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


def test_counts_survive_weights_that_change_while_they_are_copied(store: Path) -> None:
    model, batch = a_model(), requests(1)[0]

    def forward(clone: nn.Module, inputs: Tensor) -> Tensor:
        if inputs.isfinite().all() and not changed:
            changed.append(1)
            model.load_state_dict(a_model(1).state_dict())
        return clone(inputs)

    changed: list[int] = []
    with begin(model, store, forward=forward) as observer:
        for inputs in (torch.nan * batch, batch, batch):
            observer.observe(inputs)
            assert observer.flush()
        stats = observer.stats()
        assert (stats.sampled, stats.invalid, stats.stale, stats.measured, stats.dropped) == (3, 1, 1, 1, 0)


def test_the_copy_must_be_of_the_fingerprint(store: Path) -> None:
    """What torch does not count may change after the fingerprint was taken, and before the weights are copied."""
    model, batch, changed = a_model(), requests(1)[0], []

    def forward(clone: nn.Module, inputs: Tensor) -> Tensor:
        if not changed:
            changed.append(1)
            for parameter in model.parameters():
                parameter.data.mul_(2)
        return clone(inputs)

    with begin(model, store, forward=forward) as observer:
        observer.observe(batch)
        assert observer.flush()
        assert (observer.stats().stale, observer.stats().measured) == (1, 0)
        observer.observe(batch)
        assert observer.flush()
        assert (observer.stats().stale, observer.stats().measured) == (1, 1)
        assert_same(observer.importance(), measured(model, [batch]))


def test_a_failing_look_leaves_the_served_model_alone(store: Path) -> None:
    """Buffers that are loaded while the first samples are looked at stay, though these cannot be measured."""
    model, looked = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval(), threading.Event()

    def forward(clone: nn.Module, inputs: Tensor) -> Tensor:
        if not looked.is_set():
            model.load_state_dict({**model.state_dict(), "1.running_mean": torch.ones(2)})
            looked.set()
        values = clone(inputs)
        return values - values.mean(0)

    with begin(model, store, forward=forward) as observer:
        observer.observe(torch.randn(4, 2))
        assert not observer.flush()
        assert looked.is_set()
        assert "SamplesInteractError" in str(observer.stats().last_error)
    assert model[1].running_mean.tolist() == [1.0, 1.0]


def test_after_a_reload_nothing_is_lost(store: Path) -> None:
    """Though there is something to store, and the first requests to the new weights wait already."""
    model, batches = a_model(), requests(6)
    with begin(model, store, max_batch=1) as observer:
        observer.observe(batches[0])
        while observer.stats().waiting:
            time.sleep(0.001)
        model.load_state_dict(a_model(1).state_dict())
        for batch in batches[1:]:
            observer.observe(batch)
        assert observer.flush()
        stats = observer.stats()
        assert (stats.versions, stats.stale, stats.dropped) == (2, 0, 0)
        assert_same(observer.importance(), measured(model, batches[1:]))
    assert_same(memsyn.Importance.load(store), measured(a_model(), batches[:1]))


def test_a_reload_that_cannot_be_followed_ends_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to train, or sums that cannot be written: samples are dropped, and never added to those of others."""
    model, batch = a_model(), requests(1)[0]
    with begin(model, store, max_batch=1) as observer:
        observer.observe(batch)
        assert observer.flush()
        model.load_state_dict(a_model(1).state_dict())
        model.requires_grad_(False)
        for _ in range(10):
            observer.observe(batch)
            assert not observer.flush()
        stats = observer.stats()
        assert (stats.measured, stats.dropped, stats.versions) == (1, 10, 1)
        assert "no parameter that requires a gradient any more" in str(stats.last_error)
        model.requires_grad_(True)
        observer.observe(batch)
        while observer.stats().waiting:
            time.sleep(0.001)
        assert_same(observer.importance(), measured(model, [batch]))

        def failing(*args: object) -> None:
            raise RuntimeError("no such thing")

        with monkeypatch.context() as patch:
            patch.setattr(memsyn.live.segment_files, "write", failing)
            model.load_state_dict(a_model(2).state_dict())
            observer.observe(batch)
            while observer.stats().waiting:
                time.sleep(0.001)
        assert "no such thing" in str(observer.stats().last_error)
        assert observer.stats().versions == 3
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


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, given: Tensor) -> Tensor:
        torch.rand(3)
        return self.layer(given)


def test_what_it_draws_is_not_taken_from_others(store: Path) -> None:
    model, batches, before = Drawing(), requests(4), torch.get_rng_state()
    with begin(model, store) as observer:
        for batch in batches:
            observer.observe(batch)
            assert observer.flush()
        assert (observer.stats().errors, observer.stats().measured) == (0, sum(map(len, batches)))
    assert torch.equal(torch.get_rng_state(), before)


def test_outputs_that_are_drawn_are_still_refused(store: Path) -> None:
    with begin(a_model(), store, forward=lambda model, batch: model(batch) * torch.rand(1)) as observer:
        observer.observe(requests(2)[1])
        assert not observer.flush()
        assert "SamplesInteractError" in str(observer.stats().last_error)


def test_draws_from_a_generator_of_its_own_are_nobody_elses() -> None:
    """Random signs are such draws. They do not keep the slow dispatch mode on."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with PrivateDraws() as draws:
        first = torch.randint(2, (9,), generator=torch.Generator().manual_seed(1))
        assert draws.num_draws == 0
        torch.rand(3)
        assert draws.num_draws == 1
    assert torch.equal(first, torch.randint(2, (9,), generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.rand(3), expected)


# Models that cannot be measured


class Failing(nn.Module):
    """Counts its passes, and fails in one of several ways while it is broken."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how, self.is_broken, self.num_passes = nn.Linear(4, 2).double(), how, True, 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_passes += 1
        output = self.layer(x)
        if not self.is_broken:
            return output
        if self.how == "an exception":
            raise ValueError("broken")
        if self.how == "SystemExit":
            raise SystemExit
        if self.how == "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        changes = {
            "detached": lambda: output.detach(),
            "NaN": lambda: output * torch.nan,
            "overflow": lambda: output * 1e200,
            "gradient": lambda: output.clamp(max=0).double().sqrt().nan_to_num() + (0 * output).sqrt(),
            "no output": lambda: None,
            "text": lambda: "text",
        }
        return changes[self.how]()


KINDS = ["an exception", "SystemExit", "out of memory", "detached", "NaN", "overflow", "gradient", "no output", "text"]


@pytest.mark.parametrize("how", KINDS)
def test_whatever_fails_is_given_up_and_taken_up_again(how: str, store: Path) -> None:
    """With batches of 8 samples, 15 tries for each of three batches, then one each, then one now and then.

    A try may be a few passes while the model was never checked.
    """
    served, size = Failing(how), 8
    batch = torch.randn(size, 4, dtype=torch.float64)

    def forward(clone: nn.Module, inputs: Tensor) -> Tensor:
        served.num_passes += 1
        assert isinstance(clone, Failing)
        clone.is_broken = served.is_broken
        return clone(inputs)

    def show(count: int) -> None:
        for _ in range(count):
            observer.observe(batch)
        observer.flush()

    with begin(served, store, forward=forward, max_batch=size, room=10**6) as observer:
        show(100)
        stats, passes = observer.stats(), served.num_passes
        assert (stats.measured, stats.waiting, stats.sampled) == (0, 0, 100 * size)
        assert stats.invalid + stats.dropped == 100 * size
        assert passes <= 250
        assert stats.errors <= 8 + 9
        show(100)
        assert served.num_passes - passes <= 20
        served.is_broken = False
        show(65)
        assert observer.stats().measured > 0
        show(10)
        assert observer.flush()
        assert observer.stats().measured >= 10 * size
        served.is_broken = True
        show(20)
        served.is_broken = False
        before = observer.stats().measured
        with torch.no_grad():
            served.layer.weight.mul_(2)
        show(1)
        assert observer.stats().measured == before + size, "other weights are tried at once"


def test_a_segment_too_many_is_no_failure_of_the_model(store: Path) -> None:
    model, batch = a_model(), requests(1)[0]
    with begin(model, store) as observer:
        for k in range(90):
            observer.observe(batch, segment=f"user {k}")
        observer.observe(batch, segment="user 1")
        assert not observer.flush()
        assert (observer.stats().measured, observer.stats().dropped) == (65, 26)


def test_giving_up_is_said_and_so_is_the_end_of_it(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "memsyn")
    broken = [True]

    def forward(clone: nn.Module, inputs: Tensor) -> Tensor:
        return clone(inputs) * (torch.nan if broken[0] else 1.0)

    with begin(a_model(), store, forward=forward, max_batch=1) as observer:
        for _ in range(20):
            observer.observe(requests(1)[0])
        observer.flush()
        broken[0] = False
        for _ in range(20):
            observer.observe(requests(1)[0])
        observer.flush()
    events = [record.__dict__["event"] for record in caplog.records]
    assert {"weights", "error", "given_up", "recovered", "dropped"} <= set(events)
    assert events.count("given_up") == events.count("recovered") == 1
