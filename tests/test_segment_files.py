"""Files of an observer that exist already, that fail, and whose writer is killed."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm
from typer.testing import CliRunner

import memsyn
from memsyn.cli import app
from memsyn.live import worker
from memsyn.parameters import fingerprint, weights
from memsyn.storage.writer_locks import WriterLocks
from tests.serving import TwoPaths, a_model, assert_same, assert_same_factors, begin, factors_of, measured, requests

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "traffic.safetensors"


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
    header, _ = memsyn.storage.reading_and_writing.read(store)
    assert memsyn.Importance.load(store).fingerprint == fingerprint(weights(model))
    assert header["observed"]["first"][:3] == header["observed"]["last"][:3] == "202"


def plain(model: nn.Module, batch: Tensor) -> Any:
    return model(batch)


def test_a_restart_keeps_what_is_of_others(store: Path) -> None:
    """Other weights, estimators, ways to call the model, windows; damaged files, files of somebody else."""
    batches = requests(5)
    store.write_bytes(b"not ours")
    names = {store.name}
    others = ({"estimator": "fisher"}, {"forward": plain}, {"last": timedelta(days=1)})
    for seed, given in ((1, {}), (2, {}), *((1, other) for other in others)):
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
    assert len(names) == 6
    new.write_bytes(b"damaged")
    with begin(a_model(1), store, last=timedelta(days=1)) as observer:
        observer.observe(batches[0])
        assert not observer.flush()
        assert "are damaged, or were written with other weights or settings" in str(observer.stats().last_error)
        assert (observer.stats().measured, observer.stats().dropped) == (0, 1)


def test_a_store_that_cannot_be_read_for_a_while(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = a_model(), requests(3)
    with begin(model, store) as observer:
        observer.observe(batches[0])
        assert observer.flush()

    def failing(*args: object) -> None:
        raise OSError(24, "Too many open files")

    with begin(model, store) as observer:
        with monkeypatch.context() as patch:
            patch.setattr(memsyn.storage.reading_and_writing, "_read_header", failing)
            observer.observe(batches[1])
            assert not observer.flush()
        assert "Too many open files" in str(observer.stats().last_error)
        assert (observer.stats().measured, observer.stats().dropped) == (0, len(batches[1]))
        observer.observe(batches[2])
        assert observer.flush()
    assert list(store.parent.iterdir()) == [store]
    assert_same(memsyn.Importance.load(store), measured(model, [batches[0], batches[2]]))


def test_a_store_that_fails_for_a_while(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = a_model(), requests(4)

    def failing(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with begin(model, store) as observer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            observer.observe(batches[0])
            assert not observer.flush()
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
    observer = begin(a_model(), store, budget=100.0)
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
        middle += len(list(store.parent.glob("*.tmp"))) + len(list(store.parent.glob(".*.tmp"))) > 0
        for name, total in found.sums.items():
            assert torch.allclose(total, one.sums[name] * found.num_samples, rtol=1e-9), name
        stored = found.num_samples
    tqdm.write(f"{num_kills} observers killed, {middle} of them in the middle of a write; {stored} samples stored")


def test_what_is_new_is_stored_at_exit(store: Path) -> None:
    code = (
        "import sys, time, torch, memsyn\n"
        "given = {'rate': 1.0, 'interval': 1e6, 'max_batch': 1, 'min_samples': 1}\n"
        "observer = memsyn.Observer(torch.nn.Linear(4, 2), sys.argv[1], **given)\n"
        "observer.observe(torch.ones(1, 4))\n"
        "while not observer.stats().measured: time.sleep(0.01)\n"
        "print(observer.stats().stored)"
    )
    done = subprocess.run([sys.executable, "-c", code, store], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("None\n", "")
    assert memsyn.Importance.load(store).num_samples == 1


# Factors


WINDOWS = [{}, {"last": timedelta(days=7)}, {"half_life": timedelta(days=365_000)}]


@pytest.mark.parametrize("given", WINDOWS)
@pytest.mark.parametrize("estimator", ["inputs", "kronecker"])
def test_factors_go_on_after_a_restart(given: dict[str, Any], estimator: str, store: Path) -> None:
    """Also those of matrices that a run does not use, or uses only in a later batch."""
    model, generator = TwoPaths(), torch.Generator().manual_seed(0)
    plain, more = (
        [{"x": torch.randn(1, 4, generator=generator, dtype=torch.float64)} for _ in range(20)] for _ in range(2)
    )
    for batch in more:
        batch["more"] = torch.randn(1, 2, generator=generator, dtype=torch.float64)
    shown: list[Any] = []
    for run in ([plain[:10], more[:10]], [plain[10:]], [more[10:], plain[:3]]):
        with begin(model, store, estimator=estimator, seed=len(shown), max_batch=1, **given) as observer:
            for batches in run:
                for batch in batches:
                    observer.observe(batch)
                shown += batches
                assert observer.flush()
                assert observer.stats().last_error is None
                expected = factors_of(model, shown, estimator)
                tolerance = 1e-5 if "half_life" in given else 1e-12
                assert_same_factors(observer.factors(), expected, tolerance)
                assert_same_factors(memsyn.KroneckerFactors.load(store), expected, tolerance)
    assert list(store.parent.iterdir()) == [store]
    assert memsyn.KroneckerFactors.load(store).fingerprint == fingerprint(weights(model))


def test_factors_are_not_mixed_with_other_sums(store: Path) -> None:
    """Nor are those of the inputs alone with those of both."""
    model, batches, found = a_model(), requests(4), {}
    for estimator in ("mas", "inputs", "kronecker"):
        before = {path: path.read_bytes() for path in store.parent.iterdir()}
        with begin(model, store, estimator=estimator) as observer:
            for batch in batches:
                observer.observe(batch)
            assert observer.flush()
        assert all(path.read_bytes() == data for path, data in before.items())
        (found[estimator],) = set(store.parent.iterdir()) - set(before)
    assert_same(memsyn.Importance.load(found["mas"]), measured(model, batches))
    for estimator in ("inputs", "kronecker"):
        loaded = memsyn.KroneckerFactors.load(found[estimator])
        assert torch.allclose(loaded.inputs("0.weight"), factors_of(model, batches, estimator).inputs("0.weight"))
        assert ("outputs/0.weight" in loaded.sums) == (estimator == "kronecker")


def test_replicas_of_factors_add_up(store: Path) -> None:
    model, batches = a_model(), list(torch.randn(90, 4, dtype=torch.float64).split(1))
    found = []
    for k in range(3):
        own = store.with_name(f"replica{k}.safetensors")
        with begin(model, own, estimator="kronecker", seed=30 * k) as observer:
            for batch in batches[30 * k : 30 * k + 30]:
                observer.observe(batch)
            assert observer.flush()
        found.append(memsyn.KroneckerFactors.load(own))
    assert_same_factors(found[0] + found[1] + found[2], factors_of(model, batches, "kronecker"))


def test_a_store_that_reads_a_weight_in_another_way_is_refused(store: Path) -> None:
    model, batch = nn.Linear(4, 4, bias=False).double(), torch.ones(1, 4, dtype=torch.float64)
    for turned in (False, True):
        with begin(model, store, estimator="inputs") as observer:
            observer.observe(batch)
            assert observer.flush() is not turned
            stats = observer.stats()
            if turned:
                assert (stats.measured, stats.dropped) == (0, 1)
                assert "MismatchError: weight: the sums in the store read this weight" in str(stats.last_error)
        header, groups = memsyn.storage.reading_and_writing.read(store)
        header["matrices"]["weight"]["layout"][3] = True
        memsyn.storage.reading_and_writing.write(store, "factors", header, groups)


# Flush


def vanish(store: Path) -> None:
    shutil.rmtree(store.parent)


def come_back(store: Path) -> None:
    store.parent.mkdir()


def be_a_folder(store: Path) -> None:
    store.unlink()
    store.mkdir()


def be_gone(store: Path) -> None:
    store.rmdir()


def be_a_link(store: Path) -> None:
    store.unlink()
    store.with_name("precious").write_text("mine")
    store.symlink_to(store.with_name("precious"))


def be_no_link(store: Path) -> None:
    assert store.read_text() == "mine"
    store.unlink()


def be_of_others(store: Path) -> None:
    memsyn.Importance({"weight": torch.ones(3)}, 1).save(store)


def be_moved(store: Path) -> None:
    assert memsyn.Importance.load(store).num_samples == 1
    store.rename(store.with_name("other"))


@pytest.mark.parametrize(
    ("harm", "mend", "says"),
    [
        (vanish, come_back, "No such file or directory"),
        (be_a_folder, be_gone, "Is a directory"),
        (be_a_link, be_no_link, r"so that .*traffic\.safetensors is not overwritten: .* Move that file away"),
        (be_of_others, be_moved, r"somebody else has written .*traffic\.safetensors .* a store of its own"),
    ],
)
def test_flush_says_no_while_nothing_can_be_stored(harm: Any, mend: Any, says: str, tmp_path: Path) -> None:
    """And yes when it is stored again, with all samples."""
    store = tmp_path / "folder" / "traffic.safetensors"
    store.parent.mkdir()
    model, batches = a_model(), requests(6)
    with begin(model, store) as observer:
        observer.observe(batches[0])
        assert observer.flush()
        harm(store)
        for batch in batches[1:3]:
            observer.observe(batch)
            assert not observer.flush()
        assert re.search(says, str(observer.stats().last_error))
        assert not observer.flush()
        mend(store)
        assert observer.flush()
        assert_same(memsyn.Importance.load(store), measured(model, batches[:3]))


@pytest.mark.parametrize("call", ["write", "fsync", "open"])
def test_flush_says_no_on_a_disk_that_is_full(call: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the beginning of a file, in its middle, or at its end; the file from before stays."""
    model, batches = a_model(), requests(2)

    def failing(*args: object, **given: object) -> None:
        raise OSError(28, "No space left on device")

    with begin(model, store) as observer:
        observer.observe(batches[0])
        assert observer.flush()
        with monkeypatch.context() as patch:
            if call == "write":
                patch.setattr(memsyn.storage.reading_and_writing, "_bytes_of", failing)
            elif call == "fsync":
                patch.setattr(os, "fsync", failing)
            else:
                patch.setattr(memsyn.storage.atomic_files, "_temporary", failing)
            observer.observe(batches[1])
            assert not observer.flush()
        assert "No space left on device" in str(observer.stats().last_error)
        assert_same(memsyn.Importance.load(store), measured(model, batches[:1]))
        assert observer.flush()
        assert_same(memsyn.Importance.load(store), measured(model, batches))


def test_a_store_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(memsyn.MemoryFileError, match=r"is a folder: give the name of a file in it"):
        begin(a_model(), tmp_path)


# Two observers


IN_USE = r"traffic.*safetensors is in use: another observer, in this process or in another, writes to it"


@pytest.mark.parametrize("given", [{}, {"estimator": "fisher"}, {"last": timedelta(days=1)}])
@pytest.mark.parametrize("end", ["", "memory://"])
def test_a_second_observer_on_a_store_is_refused(end: str, given: dict[str, Any], store: Path) -> None:
    """Also with other settings: both would begin with the same name. It is free again when the first one is closed."""
    path = f"{end}{store}"
    with begin(a_model(), path), pytest.raises(memsyn.MemoryFileError, match=IN_USE):
        begin(a_model(), path, **given)
    with begin(a_model(), path, **given):
        pass
    assert not list(store.parent.iterdir())


def test_an_observer_of_another_process_is_refused_until_that_is_killed(store: Path) -> None:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        try:
            serve_until_killed(store, write)
        finally:
            os._exit(1)
    assert os.read(read, 4)
    try:
        with pytest.raises(memsyn.MemoryFileError, match=IN_USE):
            begin(a_model(), store)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
    with begin(a_model(), store) as observer:
        observer.observe(requests(1)[0])
        assert observer.flush()
    assert {path.suffix for path in store.parent.iterdir()} <= {".safetensors", ".tmp"}


def test_the_file_of_a_segment_has_one_writer(store: Path) -> None:
    """The store of one is the name of a segment's file of the other."""
    model, batch = a_model(), requests(1)[0]
    with begin(model, store) as one, begin(model, store.with_name("traffic+a.safetensors")) as other:
        for observer, segment in ((other, None), (one, "a"), (one, "b")):
            observer.observe(batch, segment=segment)
        assert other.flush()
        assert not one.flush()
        assert re.search(IN_USE, str(one.stats().last_error))
        assert (one.stats().measured, one.stats().dropped) == (1, 1)
    assert memsyn.Importance.load(store.with_name("traffic+a.safetensors")).num_samples == 1


@pytest.mark.parametrize("end", ["", "memory://"])
def test_two_observers_without_locks_lose_nothing_in_silence(
    end: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two machines that share a bucket. Of 80 samples 40 are stored; the other observer says that its are not."""
    monkeypatch.setattr(WriterLocks, "hold", lambda self, path: None)
    monkeypatch.setattr(worker, "BATCH_WAIT", 0.01)  # measured at once, and stored by a flush
    model, path, answers = a_model(), f"{end}{store}", []
    shown = torch.randn(80, 1, 4, dtype=torch.float64)
    with begin(model, path, budget=100.0) as one, begin(model, path, budget=100.0) as other:
        for k, batch in enumerate(shown):
            (one, other)[k % 2].observe(batch)
            if k % 16 >= 14:
                wait_until_measured(one)
                wait_until_measured(other)
                answers.append((one, other)[k % 2].flush())
        assert answers == [True, False] * 5
        assert_same(memsyn.Importance.load(path), measured(model, list(shown[::2])))
        assert re.search(r"somebody else has written .*traffic\.safetensors", str(other.stats().last_error))
        assert other.importance().num_samples == 40


def wait_until_measured(observer: memsyn.Observer) -> None:
    end = time.monotonic() + 10
    while observer.stats().waiting and time.monotonic() < end:
        observer._worker._signals.queue_full.set()
        time.sleep(0.001)


def test_a_file_that_is_written_after_it_was_read_is_kept(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checksum is another one by then."""
    monkeypatch.setattr(WriterLocks, "hold", lambda self, path: None)
    monkeypatch.setattr(worker, "BATCH_WAIT", 0.01)
    model, batches = a_model(), requests(4)
    with begin(model, store) as first:
        first.observe(batches[0])
        assert first.flush()
    with begin(model, store) as one, begin(model, store) as other:
        other.observe(batches[1])
        wait_until_measured(other)  # it has read the file, and not written it
        one.observe(batches[2])
        assert one.flush()
        assert not other.flush()
        assert_same(memsyn.Importance.load(store), measured(model, [batches[0], batches[2]]))


def test_half_a_file_at_a_url_is_written_again(tmp_path: Path) -> None:
    """An interrupted upload leaves it: it is nobody's."""
    import fsspec

    model, batches, url = a_model(), requests(2), f"memory://{tmp_path}/traffic.safetensors"
    with begin(model, url) as observer:
        observer.observe(batches[0])
        assert observer.flush()
        store = fsspec.filesystem("memory")
        store.pipe_file(url, store.cat_file(url)[:100])
        observer.observe(batches[1])
        assert observer.flush()
    assert_same(memsyn.Importance.load(url), measured(model, batches))


def test_a_write_that_fails_after_the_rename_is_known_as_ones_own(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = a_model(), requests(2)

    def failing(path: Path) -> None:
        raise memsyn.MemoryFileError("its folder could not be synced")

    with begin(model, store) as observer:
        with monkeypatch.context() as patch:
            patch.setattr(memsyn.storage.atomic_files, "_sync_folder", failing)
            observer.observe(batches[0])
            assert not observer.flush()
        assert memsyn.Importance.load(store).num_samples == 1
        observer.observe(batches[1])
        assert observer.flush()
    assert_same(memsyn.Importance.load(store), measured(model, batches))
