"""Going on with a pass that was cut off: the same sums, bit for bit, and nothing else is taken for the same pass."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import memsyn
from memsyn.measuring import route_check
from memsyn.measuring.objectives import squared_l2_norm
from memsyn.values import memory
from tests.cases import CASES, Lambda, normal

NUM_BATCHES = 20


class LoaderError(RuntimeError):
    """What a loader of the user's raises."""


def a_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(6, 3))


def some_batches(count: int = NUM_BATCHES) -> list[Tensor]:
    """Of several sizes; the first has one sample, the third none."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn([1, 4, 0, 7][index % 4], 1, 6, 6, generator=generator) for index in range(count)]


def failing(batches: Sequence[Any], at: int, error: BaseException) -> Iterator[Any]:
    yield from batches[:at]
    raise error


def measured(model: nn.Module, batches: Any, path: Path | None, **options: Any) -> memsyn.Importance:
    return memsyn.measure(model, batches, progress=False, checkpoint=path, **{"every": 1e9, **options})


def cut(model: nn.Module, batches: Sequence[Any], at: int, path: Path, **options: Any) -> None:
    with pytest.raises(LoaderError):
        measured(model, failing(batches, at, LoaderError("disk gone")), path, **options)


def assert_same(found: memsyn.Importance, expected: memsyn.Importance) -> None:
    assert (found.num_samples, found.routes, found.quantity) == (
        expected.num_samples,
        expected.routes,
        expected.quantity,
    )
    assert found.sums.keys() == expected.sums.keys()
    for name, total in expected.sums.items():
        assert torch.equal(found.sums[name], total), name


@pytest.mark.parametrize("at", [1, 2, 3, 7, 8, 13, 16, 19, 20])
@pytest.mark.parametrize("every", [0, 1e9])
def test_cut_off_anywhere_it_ends_with_the_same_sums(at: int, every: float, tmp_path: Path) -> None:
    model, batches, path = a_model(), some_batches(), tmp_path / "pass.ckpt"
    expected = measured(model, batches, None)
    cut(model, batches, at, path, every=every)
    assert path.exists()
    assert_same(measured(model, batches, path), expected)
    assert not any(tmp_path.iterdir())


def test_cut_off_after_every_batch(tmp_path: Path) -> None:
    model, batches, path = a_model(), some_batches(), tmp_path / "pass.ckpt"
    expected = measured(model, batches, None)
    for at in range(1, NUM_BATCHES + 1):
        cut(a_model(), batches, at, path)
    assert_same(measured(a_model(), batches, path), expected)


@pytest.mark.filterwarnings("ignore::memsyn.SlowParametersWarning")
@pytest.mark.parametrize(
    "name",
    ["mlp", "transformer, layer norm", "embedding bag", "experts", "lstm", "state space", "tied by a transpose"],
)
def test_what_the_check_found_is_kept(name: str, tmp_path: Path) -> None:
    """Whatever the routes; the first batch may be zeros, which prove little."""
    case, path = CASES[name], tmp_path / "pass.ckpt"
    torch.manual_seed(0)
    model = case.model()
    batches = [case.batch(count, torch.float32) for count in range(2, 12)]
    if isinstance(batches[0], Tensor) and batches[0].is_floating_point():
        batches[0] = torch.zeros_like(batches[0])
    expected = measured(model, batches, None, forward=case.forward)
    for at in (1, 4, 9):
        cut(model, batches, at, path, forward=case.forward)
    assert_same(measured(model, batches, path, forward=case.forward), expected)


@pytest.mark.parametrize("estimator", ["fisher-sampled", "mas-vector", "mas-local"])
def test_other_estimators_go_on_where_they_were(estimator: str, tmp_path: Path) -> None:
    model, batches, path = a_model(), some_batches(), tmp_path / "pass.ckpt"
    expected = measured(model, batches, None, estimator=estimator)
    cut(model, batches, 9, path, estimator=estimator)
    assert_same(measured(model, batches, path, estimator=estimator), expected)


def test_the_batched_kind_goes_on_too(tmp_path: Path) -> None:
    model, batches, path = a_model(), some_batches(), tmp_path / "pass.ckpt"
    expected = measured(model, batches, None, batched=True)
    cut(model, batches, 9, path, batched=True)
    assert_same(measured(model, batches, path, batched=True), expected)


def test_max_samples_counts_those_of_before(tmp_path: Path) -> None:
    model, batches, path = a_model(), some_batches(), tmp_path / "pass.ckpt"
    expected = measured(model, batches, None, max_samples=31)
    cut(model, batches, 6, path, max_samples=31)
    found = measured(model, batches, path, max_samples=31)
    assert found.num_samples == 31
    assert_same(found, expected)


def test_measured_batches_are_not_run_again(tmp_path: Path) -> None:
    model, batches, path = a_model(), some_batches(), tmp_path / "pass.ckpt"
    seen: list[int] = []

    def forward(own: nn.Module, batch: Tensor) -> Any:
        seen.append(len(batch))
        return own(batch)

    cut(model, batches, 13, path, forward=forward)
    seen.clear()
    measured(model, batches, path, forward=forward)
    assert seen == [len(batch) for batch in batches[13:] if len(batch)]


@pytest.mark.parametrize("estimator", ["mas", "mas-local"])
@pytest.mark.parametrize("at", [5, 19])
def test_the_file_is_an_importance_of_the_samples_so_far(at: int, estimator: str, tmp_path: Path) -> None:
    model, batches, path = a_model(), some_batches(), tmp_path / "pass.ckpt"
    cut(model, batches, at, path, estimator=estimator)
    found = memsyn.Importance.load(path)
    sizes = torch.tensor([len(batch) for batch in batches]).cumsum(0).tolist()
    through = sizes.index(found.num_samples) + 1
    assert at - 11 < through <= at
    assert_same(found, measured(model, batches[:through], None, estimator=estimator))


def test_the_error_is_the_loaders_own_and_says_how_to_go_on(tmp_path: Path) -> None:
    model, path = a_model(), tmp_path / "pass.ckpt"
    with pytest.raises(LoaderError) as caught:
        measured(model, failing(some_batches(), 6, LoaderError("disk gone")), path)
    assert str(caught.value) == "disk gone"
    (note,) = caught.value.__notes__
    assert note == (
        f"Measuring was interrupted. {path} holds the first 6 batches (17 samples). Call measure again with the same "
        "arguments to continue from there."
    )


def test_an_error_before_the_first_batch_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(LoaderError) as caught:
        measured(a_model(), failing(some_batches(), 0, LoaderError("disk gone")), tmp_path / "pass.ckpt")
    assert not hasattr(caught.value, "__notes__")
    assert not any(tmp_path.iterdir())


def test_an_error_within_a_batch_leaves_the_file_of_before(tmp_path: Path) -> None:
    model, batches, path = a_model(), some_batches(), tmp_path / "pass.ckpt"
    expected = measured(model, batches, None)
    broken = [*batches[:9], torch.randn(4, 1, 6, 5)]
    with pytest.raises(memsyn.BatchError, match="batch 9: the model failed") as caught:
        measured(model, broken, path, every=0)
    assert "the first 9 batches (25 samples)" in caught.value.__notes__[0]
    assert_same(measured(model, batches, path), expected)


@pytest.fixture
def _as_in_a_terminal() -> Iterator[None]:
    """A process that was started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_the_loader_goes_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, batches, path = a_model(), some_batches(), tmp_path / "pass.ckpt"
    expected = measured(model, batches, None)
    with pytest.raises(KeyboardInterrupt):
        measured(model, failing(batches, 6, KeyboardInterrupt()), path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{path} holds the first 6 batches (17 samples)" in said
    assert_same(measured(model, batches, path), expected)


def interrupting(at: int, times: int) -> Callable[[nn.Module, Tensor], Any]:
    """A forward pass in which Ctrl-C comes while batch `at` is measured."""
    seen: list[int] = []

    def forward(model: nn.Module, batch: Tensor) -> Any:
        seen.append(len(batch))
        if seen.count(7) == at:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return model(batch)

    return forward


@pytest.mark.usefixtures("_as_in_a_terminal")
def test_ctrl_c_within_a_batch_waits_for_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, batches, path = a_model(), some_batches(), tmp_path / "pass.ckpt"
    before = signal.getsignal(signal.SIGINT)
    expected = measured(model, batches, None, forward=lambda own, batch: own(batch))
    with pytest.raises(KeyboardInterrupt):
        measured(model, batches, path, forward=interrupting(at=2, times=1))
    assert "the first 8 batches (24 samples)" in capsys.readouterr().err
    assert_same(measured(model, batches, path, forward=lambda own, batch: own(batch)), expected)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("_as_in_a_terminal")
def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, batches, path = a_model(), some_batches(), tmp_path / "pass.ckpt"
    expected = measured(model, batches, None, forward=lambda own, batch: own(batch))
    with pytest.raises(KeyboardInterrupt):
        measured(model, batches, path, forward=interrupting(at=2, times=2), every=0)
    assert "the first 7 batches (17 samples)" in capsys.readouterr().err
    assert_same(measured(model, batches, path, forward=lambda own, batch: own(batch)), expected)


def test_a_shuffled_loader_gives_the_same_order_again(tmp_path: Path) -> None:
    model, path = a_model(), tmp_path / "pass.ckpt"
    loader = DataLoader(TensorDataset(torch.arange(40.0).repeat(36, 1).T.reshape(40, 1, 6, 6)), 4, shuffle=True)
    torch.manual_seed(3)
    expected = measured(model, loader, None)
    state = torch.get_rng_state()
    with pytest.raises(LoaderError):
        measured(model, (failing(list(loader), 6, LoaderError())), path)
    path.unlink()

    class Halfway:
        def __iter__(self) -> Iterator[Any]:
            for index, batch in enumerate(loader):
                if index == 6:
                    raise LoaderError
                yield batch

    torch.set_rng_state(state)
    with pytest.raises(LoaderError):
        measured(model, Halfway(), path)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert_same(measured(model, loader, path), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_bar_starts_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, batches, path = a_model(), some_batches(), tmp_path / "pass.ckpt"
    cut(model, batches, 15, path)
    memsyn.measure(model, batches, checkpoint=path)
    said = capsys.readouterr().err
    assert "15/20" in said
    assert "20/20" in said
    assert " 1/20" not in said


def change_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("4.weight")[2, 3] += 1e-6


def change_buffer(model: nn.Module) -> None:
    model.get_buffer("1.running_mean")[1] += 0.5


def freeze(model: nn.Module) -> None:
    model.get_parameter("4.bias").requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (change_weight, {}, "it differs in the weights or buffers. Call measure as in that pass; or delete"),
        (change_buffer, {}, "it differs in the weights or buffers"),
        (freeze, {}, "it differs in which parameters require a gradient"),
        (None, {"estimator": "fisher"}, "it differs in estimator"),
        (None, {"batched": True}, "it differs in batched"),
        (None, {"max_samples": 100}, "it differs in max_samples"),
        (None, {"forward": lambda own, batch: own(batch)}, "it differs in whether there is a forward"),
    ],
)
def test_another_pass_is_refused(
    change: Callable[[nn.Module], None] | None, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    model, batches, path = a_model(), some_batches(), tmp_path / "pass.ckpt"
    cut(model, batches, 9, path)
    before = path.read_bytes()
    if change is not None:
        change(model)
    with pytest.raises(memsyn.MismatchError, match=says) as caught:
        measured(model, batches, path, **options)
    assert not hasattr(caught.value, "__notes__")
    assert path.read_bytes() == before


def swap(batches: list[Tensor]) -> None:
    batches[1], batches[5] = batches[5], batches[1]


def shift(batches: list[Tensor]) -> None:
    batches[8] = batches[8] + 1


def drop(batches: list[Tensor]) -> None:
    del batches[6:]


def join(batches: list[Tensor]) -> None:
    batches[0:2] = [torch.cat(batches[0:2])]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swap, "first 9 batches are not those that the checkpoint .*pass.ckpt was measured on. Give the same"),
        (shift, "the first 9 batches are not those"),
        (drop, "there are only 6"),
        (join, "the first 9 batches are not those"),
    ],
)
def test_other_batches_are_refused(change: Callable[[list[Tensor]], None], says: str, tmp_path: Path) -> None:
    model, batches, path = a_model(), some_batches(), tmp_path / "pass.ckpt"
    cut(model, batches, 9, path)
    before = path.read_bytes()
    change(batches)
    with pytest.raises(memsyn.BatchError, match=says) as caught:
        measured(model, batches, path)
    assert not hasattr(caught.value, "__notes__")
    assert path.read_bytes() == before


def test_files_that_are_no_checkpoints_are_refused_and_stay(tmp_path: Path) -> None:
    model, batches, path = a_model(), some_batches(), tmp_path / "file"
    importance = measured(model, batches, None)
    importance.save(path)
    with pytest.raises(memsyn.MismatchError, match="is a finished importance, not a checkpoint"):
        measured(model, batches, path)
    assert_same(memsyn.Importance.load(path), importance)
    memsyn.Memory.empty().consolidate(model, importance).save(path)
    with pytest.raises(memsyn.MemoryFileError, match="is of kind 'memory'"):
        measured(model, batches, path)
    path.unlink()
    cut(model, batches, 9, path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(memsyn.MemoryFileError, match="damaged"):
        measured(model, batches, path)
    with pytest.raises(memsyn.MemoryFileError, match="its folder does not exist"):
        measured(model, batches, tmp_path / "nowhere" / "file")


@pytest.mark.parametrize("every", [-1, float("nan"), "often"])
def test_every_is_a_number_of_seconds(every: Any, tmp_path: Path) -> None:
    with pytest.raises(memsyn.OptionError, match="every must be a number of seconds"):
        measured(a_model(), some_batches(), tmp_path / "file", every=every)


def test_it_is_written_at_intervals(tmp_path: Path) -> None:
    path = tmp_path / "pass.ckpt"
    seen: list[int] = []

    def watched() -> Iterator[Tensor]:
        for index, batch in enumerate(some_batches()):
            if index in (6, 12):
                time.sleep(0.3)
            yield batch
            seen.append(path.stat().st_mtime_ns if path.exists() else 0)

    measured(a_model(), watched(), path, every=0.25)
    assert seen[0] == 0
    assert 2 <= len(set(seen) - {0}) < NUM_BATCHES / 2


def test_gradients_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    model = nn.Linear(4, 1, bias=False)
    good, bad = normal(4)(3, torch.float32), torch.full((3, 4), float("inf"))

    def forward(own: nn.Module, batch: Tensor) -> Tensor:
        return own(batch) if bool(batch.isfinite().all()) else (own.get_parameter("weight") * 1e-30).sqrt().sum(1)

    path = tmp_path / "pass.ckpt"
    with torch.no_grad():
        model.weight.zero_()
    with pytest.raises(memsyn.MemsynError):
        measured(model, [good + 1, bad], path, every=0, forward=forward)
    assert not path.exists() or memsyn.Importance.load(path).num_samples == 3


def test_sums_of_half_a_batch_are_not_written(tmp_path: Path) -> None:
    """The backward pass fails in the first layer, when the last one's sums are made."""
    batches, path = [normal(4)(count, torch.float32) for count in range(2, 14)], tmp_path / "pass.ckpt"
    failing_at: list[int] = []

    def forward(own: nn.Module, batch: Tensor) -> Any:
        hidden = own.get_submodule("a")(batch)
        if len(batch) in failing_at:
            hidden.register_hook(lambda grad: (_ for _ in ()).throw(LoaderError("out of memory")))
        return own.get_submodule("b")(hidden)

    torch.manual_seed(0)
    model = Lambda(lambda own, batch: None, a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    expected = measured(model, batches, None, forward=forward)
    cut(model, batches, 5, path, forward=forward)
    before = path.read_bytes()
    failing_at.append(len(batches[9]))
    with pytest.raises((LoaderError, memsyn.ModelError), match="out of memory"):
        measured(model, batches, path, forward=forward)
    assert path.read_bytes() == before
    failing_at.clear()
    assert_same(measured(model, batches, path, forward=forward), expected)


@pytest.mark.filterwarnings("ignore::memsyn.SlowParametersWarning")
def test_what_was_not_proven_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the inputs are zero at first, so that nothing shows where their weights' samples are."""
    torch.manual_seed(0)
    model = Lambda(lambda own, x: own.a(x[:, :2]) + own.b(x[:, 2:]), a=nn.Linear(2, 3), b=nn.Linear(2, 3, bias=False))
    batches, path, looks = [normal(4)(count, torch.float32) for count in range(2, 12)], tmp_path / "pass.ckpt", [0]
    for batch in batches[:6]:
        batch[:, 2:] = 0
    check = route_check.check

    def counted(*arguments: Any, **options: Any) -> route_check.CheckResult:
        looks[0] += 1
        return check(*arguments, **options)

    monkeypatch.setattr(route_check, "check", counted)
    expected = measured(model, batches, None)
    in_one_go, looks[0] = looks[0], 0
    cut(model, batches, 3, path)
    assert looks[0] < in_one_go
    assert_same(measured(model, batches, path), expected)
    assert looks[0] == in_one_go


# Killed


def kill_until_done(batches: list[Tensor], path: Path, generator: random.Random, seconds: float) -> tuple[int, Path]:
    """Measure in processes that are killed, until one comes to its end; returns how many were killed."""
    result = path.with_suffix(".result")
    for num_killed in range(10_000):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                measured(a_model(), batches, path, every=0).save(result)
            finally:
                os._exit(0)
        time.sleep(generator.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if path.exists():
            memsyn.Importance.load(path)
        if result.exists():
            return num_killed + int(os.WIFSIGNALED(status)), result
    raise AssertionError("it never came to its end")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.soak
def test_killed_at_random_moments_it_ends_with_the_same_sums(soak: bool, tmp_path: Path) -> None:
    at_least = 200 if soak else 10
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator, batches = random.Random(at_least), some_batches(60)
        started = time.monotonic()
        expected = measured(a_model(), batches, tmp_path / "whole.ckpt", every=0)
        seconds = time.monotonic() - started
        num_killed, num_passes = 0, 0
        while num_killed < at_least:
            path = tmp_path / f"{num_passes}.ckpt"
            killed, result = kill_until_done(batches, path, generator, 0.6 * seconds)
            assert_same(memsyn.Importance.load(result), expected)
            num_killed, num_passes = num_killed + killed, num_passes + 1
        assert num_killed > num_passes
        print(f"{num_killed} kills in {num_passes} passes")
    finally:
        torch.set_num_threads(threads)


def test_batches_without_tensors_cannot_be_known_again(tmp_path: Path) -> None:
    model, batches = a_model(), [batch.numpy() for batch in some_batches()]
    with pytest.raises(memsyn.OptionError, match="recognises skipped batches by their tensors"):
        measured(model, batches, tmp_path / "pass.ckpt", forward=lambda own, batch: own(torch.from_numpy(batch)))


def test_a_checkpoint_is_a_local_file_and_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(memsyn.OptionError, match="a checkpoint is a local file, not a URL"):
        measured(a_model(), some_batches(), "memory://pass.ckpt")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def batches() -> Iterator[Tensor]:
        for index, batch in enumerate(some_batches()):
            if index == 5:
                os.chdir(tmp_path / "elsewhere")
            if index == 8:
                raise RuntimeError("the loader fails")
            yield batch

    with pytest.raises(RuntimeError, match="the loader fails"):
        measured(a_model(), batches(), "pass.ckpt")
    assert [entry.name for entry in tmp_path.rglob("*.ckpt")] == ["pass.ckpt"]
    assert (tmp_path / "pass.ckpt").exists()
    with pytest.raises(memsyn.MemoryFileError, match="is the checkpoint of a pass that has not ended"):
        memory.load(tmp_path / "pass.ckpt")


def small_network() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(p.numel()).reshape(p.shape) % 7 / 4 - 0.5)
    return model


@pytest.mark.parametrize("magnitude", ["abs", "square"])
def test_a_local_checkpoint_of_format_1_goes_on(tmp_path: Path, magnitude: str) -> None:
    """In tests/golden_checkpoints: 12 of these 14 batches, cut off, as the code before format 2 wrote them."""
    data = [(torch.arange(15.0).reshape(5, 3) * (k + 1) % 11) / 4 - 1 for k in range(14)]
    estimator = memsyn.Estimator(squared_l2_norm, magnitude, local=True)
    file = tmp_path / "checkpoint"
    shutil.copy(Path(__file__).parent / "golden_checkpoints" / f"0.1.0-local-{magnitude}-checkpoint.safetensors", file)
    resumed = memsyn.measure(small_network(), data, estimator=estimator, checkpoint=file, progress=False)
    whole = memsyn.measure(small_network(), data, estimator=estimator, progress=False)
    assert resumed.num_samples == whole.num_samples == 70
    for name, total in whole.sums.items():
        torch.testing.assert_close(resumed.sums[name], total, rtol=1e-6, atol=0.0)
