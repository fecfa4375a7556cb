"""A file is replaced whole or not at all: by writers that are killed, that fail, and that come together."""

import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import memsyn
from memsyn.storage import atomic_files, reading_and_writing, safetensors_header

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def save(path: Path, value: int, num_weights: int = 6) -> None:
    """A file that says `value` everywhere, so that half of one and half of another would show."""
    memsyn.Importance({"a": torch.full((num_weights,), float(value)), "b": torch.full((3,), float(value))}, value).save(
        path
    )


def load(path: Path) -> int:
    """What a file says, and says everywhere."""
    importance = memsyn.Importance.load(path)
    values = {float(value) for tensor in importance.sums.values() for value in (tensor.min(), tensor.max())}
    assert values == {importance.num_samples}
    return importance.num_samples


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def forked(action: Callable[[], None]) -> int:
    """Do it in a process of its own, which exits with 0 if it was done."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)  # the parent's threads are not here
        action()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def outcome(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    save(tmp_path / "folder" / "it", 1)
    return tmp_path / "folder" / "it"


@pytest.mark.soak
def test_killed_at_random(path: Path, soak: bool) -> None:
    """Of the writes that a killed process did, the last that it finished is there, or the one it was at."""
    generator, halves, num_kills = random.Random(0), 0, 200 if soak else 10
    for _ in tqdm(range(num_kills), "kills at random"):
        read, write = os.pipe()

        def keep_writing(start: int = load(path) + 1, write: int = write) -> None:
            for value in range(start, start + 1_000):
                save(path, value, 2**18)
                os.write(write, value.to_bytes(4, "little"))

        finished = load(path)
        child = forked(keep_writing)
        os.close(write)
        time.sleep(generator.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert outcome(child) == -signal.SIGKILL
        with open(read, "rb") as said:
            finished = int.from_bytes(said.read()[-4:], "little") or finished
        assert load(path) in {finished, finished + 1}
        assert len(names(path)) <= 2
        halves += len(names(path)) - 1
    tqdm.write(f"{num_kills} writers killed, {halves} of them in the middle of a write")
    assert halves > num_kills / 4
    save(path, 1)
    assert names(path) == ["it"]


@pytest.mark.soak
def test_killed_before_every_line(path: Path, soak: bool) -> None:
    """Until some line the old file is there, from there on the new one."""
    own, num_lines = {atomic_files.__file__, safetensors_header.__file__, reading_and_writing.__file__}, 0
    found, step = [], 1 if soak else 5

    def write(last: int) -> None:
        lines = 0

        def trace(frame, event, argument):
            nonlocal lines
            if frame.f_code.co_filename not in own:
                return None
            lines += event == "line"
            if event == "line" and lines == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        save(path, 2)

    for last in tqdm(itertools.count(1, step), "kills before every line"):
        num_lines = last
        save(path, 1)
        code = outcome(forked(lambda last=last: write(last)))
        assert code in {0, -signal.SIGKILL}
        found.append(load(path))
        assert len(names(path)) <= 2
        if code == 0:
            break
    assert 100 < num_lines < 1_000
    assert found == sorted(found)
    assert set(found[:-1]) == {1, 2}
    save(path, 1)
    assert names(path) == ["it"]


@contextmanager
def no_file_longer_than(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_all_of_the_file(path: Path) -> None:
    for room in range(0, path.stat().st_size, 16):
        with (
            no_file_longer_than(room),
            pytest.raises(memsyn.MemoryFileError, match=r"could not be written: .*too large"),
        ):
            save(path, 2)
        assert (load(path), names(path)) == (1, ["it"])


def test_a_full_disk(path: Path) -> None:
    disk = path.parent / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk; a limit on files' length stands in for it above")
    try:
        save(disk / "it", 1)
        with pytest.raises(memsyn.MemoryFileError, match=r"could not be written: .*No space left on device.*is whole"):
            save(disk / "it", 2, 2**15)
        assert (load(disk / "it"), names(disk / "it")) == (1, ["it"])
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(memsyn.MemoryFileError, match=r"could not be written: .*Read-only file system"):
            save(disk / "it", 2)
        assert (load(disk / "it"), names(disk / "it")) == (1, ["it"])
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_every_call_may_fail(call: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(memsyn.MemoryFileError, match=r"it could not be written: .*Input/output error.*is whole"):
        save(path, 2)
    assert (load(path), names(path)) == (1, ["it"])


def test_an_interrupt_leaves_no_litter(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reading_and_writing, "_check_values", pressed)
    with pytest.raises(KeyboardInterrupt):
        save(path, 2)
    monkeypatch.undo()
    assert (load(path), names(path)) == (1, ["it"])


def test_what_is_renamed_is_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(handle: int) -> None:
        fsync(handle)
        calls.append(("fsync", os.fstat(handle).st_ino, os.fstat(handle).st_size))

    def replaced(source: str, target: Path) -> None:
        calls.append(("replace", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    save(path, 2)
    content = path.stat().st_ino, path.stat().st_size
    assert calls[:2] == [("fsync", *content), ("replace", *content)]
    assert calls[2][:2] == ("fsync", path.parent.stat().st_ino)


@pytest.mark.parametrize("number", [5, 22])
def test_a_folder_that_cannot_be_synced(number: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, folder = os.fsync, path.parent.stat().st_ino

    def failing(handle: int) -> None:
        if os.fstat(handle).st_ino == folder:
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    if number == 22:  # the file system does not do it
        save(path, 2)
    else:
        with pytest.raises(memsyn.MemoryFileError, match=r"is written completely, but its folder could not be synced"):
            save(path, 2)
    assert (load(path), names(path)) == (2, ["it"])


@pytest.mark.parametrize("which", ["folder", "file"])
def test_permission_denied(which: str, path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In a process that is not root's, which may do everything."""
    os.chmod(path.parent if which == "folder" else path, 0o555 if which == "folder" else 0o444)

    def write() -> None:
        os.chdir(path.parent)
        if os.geteuid() == 0:
            os.setuid(65534)
        save(Path("it"), 2)

    assert outcome(forked(write)) == 1
    message = capfd.readouterr().err
    assert "MemoryFileError: it could not be written: [Errno 13] Permission denied" in message
    assert (load(path), names(path)) == (1, ["it"])


def test_a_folder_that_is_not_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(memsyn.MemoryFileError, match=r"could not be written: .*No such file or directory: '.*/no'"):
        save(path.parent / "no" / "it", 2)

    def vanishes(*args: object) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(path.parent)

    monkeypatch.setattr(reading_and_writing, "_check_values", vanishes)
    with pytest.raises(memsyn.MemoryFileError, match=r"could not be written: .*No such file or directory"):
        save(path, 2)
    assert not path.parent.exists()


def test_what_is_no_file_is_not_replaced(path: Path) -> None:
    os.mkfifo(path.parent / "pipe")
    with pytest.raises(memsyn.MemoryFileError, match=r"could not be written: .*Not a regular file"):
        save(path.parent / "pipe", 2)
    with pytest.raises(memsyn.MemoryFileError, match=r"could not be read: .*Not a regular file"):
        load(path.parent / "pipe")
    with pytest.raises(memsyn.MemoryFileError, match=r"could not be written: .*Is a directory"):
        save(path.parent, 2)
    assert names(path) == ["it", "pipe"]


def test_a_link_stays_one(path: Path) -> None:
    (path.parent / "link").symlink_to(path)
    save(path.parent / "link", 2)
    assert (path.parent / "link").is_symlink()
    assert load(path) == 2


def test_a_new_file_has_the_mode_of_the_umask_and_then_keeps_its_own(path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.chmod(0o600)
    save(path, 2)
    assert path.stat().st_mode & 0o777 == 0o600


def test_writers_at_once(path: Path) -> None:
    """One wins whole, none fails, and readers never see anything else."""

    def keep_writing(value: int) -> None:
        for _ in range(30):
            save(path, value, 2**14)

    children = [forked(lambda value=value: keep_writing(value)) for value in (2, 3, 4)]
    threads = [threading.Thread(target=keep_writing, args=(value,)) for value in (5, 6)]
    for thread in threads:
        thread.start()
    seen = {load(path) for _ in range(200)}
    for thread in threads:
        thread.join()
    assert [outcome(child) for child in children] == [0, 0, 0]
    assert seen <= {1, 2, 3, 4, 5, 6}
    assert load(path) in {2, 3, 4, 5, 6}
    assert names(path) == ["it"]


def test_a_living_writer_keeps_its_temporary_file(path: Path) -> None:
    with atomic_files.replace_file(path) as file:
        file.write(b"the slower one")
        save(path, 2)
        assert load(path) == 2
    assert path.read_bytes() == b"the slower one"
    assert names(path) == ["it"]


def test_only_what_killed_writers_left_is_removed(path: Path) -> None:
    left, others = f".it.{'0a' * 8}.tmp", [".it.0a.tmp", ".it2.0a0a0a0a0a0a0a0a.tmp", "it.tmp"]
    for name in [left, *others]:
        (path.parent / name).touch()
    (path.parent / f".it.{'0b' * 8}.tmp").symlink_to(path.parent / "it.tmp")
    save(path, 2)
    assert names(path) == sorted(["it", *others, f".it.{'0b' * 8}.tmp"])


def test_a_temporary_file_taken_for_a_leftover_is_made_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer may look at it between its creation and its lock."""
    real, taken = atomic_files._lock, []

    def taken_once(handle: int, *, wait: bool) -> None:
        if wait and not taken:
            taken.extend(path.parent.glob(".it.*.tmp"))
            os.unlink(taken[0])
        real(handle, wait=wait)

    monkeypatch.setattr(atomic_files, "_lock", taken_once)
    save(path, 2)
    assert len(taken) == 1
    assert (load(path), names(path)) == (2, ["it"])


def test_a_file_system_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object, **options: object) -> None:
        raise OSError(95, "Operation not supported")

    (path.parent / f".it.{'0a' * 8}.tmp").touch()
    monkeypatch.setattr(atomic_files, "_lock", failing)
    save(path, 2)
    assert load(path) == 2
    assert names(path) == [f".it.{'0a' * 8}.tmp", "it"]  # it may be a living writer's
