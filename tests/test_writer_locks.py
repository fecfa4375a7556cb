"""One writer to a file, whatever ends it, and whatever lives on."""

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import memsyn
from memsyn.storage import writer_locks
from memsyn.storage.writer_locks import WriterLocks

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
IN_USE = pytest.raises(memsyn.MemoryFileError, match=r"it\.st is in use: .* give this one a store of its own")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "it.st"


@contextmanager
def held(path: str | Path) -> Iterator[WriterLocks]:
    locks = WriterLocks()
    locks.hold(path)
    yield locks
    locks.release()


@contextmanager
def child(work: Callable[[], object]) -> Iterator[tuple[int, int]]:
    """A forked process that does some work, says so by a byte, and sleeps: its number, and a pipe to read from."""
    read, write = os.pipe()
    process_id = os.fork()
    if not process_id:
        with suppress(BaseException):
            work()
            os.write(write, b"1")
            time.sleep(60)
        os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"1"
    try:
        yield process_id, read
    finally:
        os.close(read)
        with suppress(ChildProcessError, ProcessLookupError):
            killed(process_id)


def killed(process_id: int) -> None:
    os.kill(process_id, signal.SIGKILL)
    os.waitpid(process_id, 0)


def test_a_second_writer_of_one_process_is_refused(path: Path) -> None:
    with held(path) as first:
        first.hold(path)  # again: nothing
        with IN_USE:
            WriterLocks().hold(path)
        with IN_USE:  # the attempt did not unlock it
            WriterLocks().hold(str(path))
        assert [p.name for p in path.parent.iterdir()] == [".it.st.lock"]
    assert not list(path.parent.iterdir())
    with held(path):
        pass


def test_other_names_of_a_file_are_the_same(path: Path) -> None:
    path.touch()
    (path.parent / "link.st").symlink_to(path)
    (path.parent / "folder").mkdir()
    (path.parent / "same").symlink_to(path.parent)
    with held(path):
        for other in (path.parent / "same" / "it.st", path.parent / "folder" / ".." / "it.st"):
            with IN_USE:
                WriterLocks().hold(other)
        with pytest.raises(memsyn.MemoryFileError, match=r"link\.st is in use"):
            WriterLocks().hold(path.parent / "link.st")
        os.link(path.parent / ".it.st.lock", path.parent / ".other.st.lock")  # as another mount gives it
        with pytest.raises(memsyn.MemoryFileError, match=r"other\.st is in use"):
            WriterLocks().hold(path.parent / "other.st")


def test_another_process_is_refused_until_it_is_killed(path: Path) -> None:
    with child(lambda: WriterLocks().hold(path)) as (process_id, _):
        with IN_USE:
            WriterLocks().hold(path)
        killed(process_id)
        assert (path.parent / ".it.st.lock").exists()
        with held(path):
            pass
    assert not list(path.parent.iterdir())


def test_a_fork_that_lives_on_does_not_keep_a_dead_writers_lock(path: Path) -> None:
    def work() -> None:
        WriterLocks().hold(path)
        fork = os.fork()
        if not fork:
            time.sleep(60)
            os._exit(0)
        (path.parent / "fork").write_text(str(fork))

    with child(work) as (process_id, _):
        fork = int((path.parent / "fork").read_text())
        try:
            with IN_USE:
                WriterLocks().hold(path)
            killed(process_id)
            os.kill(fork, 0)  # it lives
            assert not [f for f in Path(f"/proc/{fork}/fd").iterdir() if os.readlink(f).endswith(".lock")]
            with held(path):
                pass
        finally:
            os.kill(fork, signal.SIGKILL)


def test_a_fork_holds_nothing_and_releases_nothing(path: Path) -> None:
    with held(path) as locks:
        child = os.fork()
        if not child:
            try:
                locks.release()
                WriterLocks().hold(path)
                os._exit(0)
            except memsyn.MemoryFileError:
                os._exit(7)
            finally:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        with IN_USE:
            WriterLocks().hold(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.ENOLCK, errno.EPERM])
def test_what_cannot_be_locked_is_let_pass(code: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk must not keep a service from its start. The lock is tried again by the next call."""
    locks = WriterLocks()

    def failing(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(writer_locks, "_lock" if code == errno.ENOLCK else "_locked", failing)
        locks.hold(path)
    assert not (path.parent / ".it.st.lock").exists() or code == errno.ENOLCK
    locks.hold(path.parent / "no" / "it.st")
    locks.hold(path)
    assert (path.parent / ".it.st.lock").exists()
    with IN_USE:
        WriterLocks().hold(path)
    locks.release()


def test_a_link_or_a_pipe_in_the_place_of_the_lock_is_left_alone(path: Path) -> None:
    lock, other = path.parent / ".it.st.lock", path.parent / "precious"
    other.write_text("mine")
    lock.symlink_to(other)
    with held(path):
        pass
    assert (other.read_text(), lock.is_symlink()) == ("mine", True)
    lock.unlink()
    os.mkfifo(lock)
    began = time.monotonic()
    with held(path):
        pass
    assert time.monotonic() - began < 1


def test_urls_are_known_in_one_process() -> None:
    url = "memory://folder/it.st"
    with held(url), IN_USE:
        WriterLocks().hold(url)
    with held(url):
        pass


def take_and_release(path: Path, times: int) -> None:
    for _ in range(times):
        locks = WriterLocks()
        while True:
            try:
                locks.hold(path)
                break
            except memsyn.MemoryFileError:
                time.sleep(0.0005)
        inside = os.open(path.with_suffix(".inside"), os.O_CREAT | os.O_EXCL)  # an error if another one is inside
        os.close(inside)
        os.unlink(path.with_suffix(".inside"))
        locks.release()


def test_never_two_at_once(path: Path) -> None:
    """Processes that take the lock, and remove its file, over and over."""
    processes = []
    for _ in range(3):
        processes.append(os.fork())
        if not processes[-1]:
            with suppress(BaseException):
                take_and_release(path, 100)
                os._exit(0)
            os._exit(1)
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes] == [0, 0, 0]
    assert not list(path.parent.iterdir())
