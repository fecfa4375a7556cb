"""One writer to a file, whatever ends it, and whatever lives on."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
def holder(path: Path, then: str = "0") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock, and prints a number when it does: what `then` is."""
    code = (
        "import os, sys, time\nfrom memsyn.storage.writer_locks import WriterLocks\n"
        f"locks = WriterLocks()\nlocks.hold(sys.argv[1])\nfound = {then}\n"
        "if found is not None: print(found, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


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
    with holder(path) as process:
        line(process)
        with IN_USE:
            WriterLocks().hold(path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (path.parent / ".it.st.lock").exists()
        with held(path):
            pass
    assert not list(path.parent.iterdir())


def test_a_fork_that_lives_on_does_not_keep_a_dead_writers_lock(path: Path) -> None:
    with holder(path, "os.fork() or None") as process:  # only the parent prints its child's number
        child = int(line(process))
        try:
            with IN_USE:
                WriterLocks().hold(path)
            process.send_signal(signal.SIGKILL)
            process.wait()
            os.kill(child, 0)  # it lives
            assert not [f for f in Path(f"/proc/{child}/fd").iterdir() if os.readlink(f).endswith(".lock")]
            with held(path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


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
    locks.hold(path.parent / "no" / "it.st")
    locks.hold(path)
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


def test_never_two_at_once(path: Path) -> None:
    """Processes that take the lock, and remove its file, over and over."""
    code = """
import os, random, sys, time
from memsyn.errors import MemoryFileError
from memsyn.storage.writer_locks import WriterLocks
taken = 0
while taken < 30:
    locks = WriterLocks()
    try:
        locks.hold(sys.argv[1])
    except MemoryFileError:
        time.sleep(0.0005)
        continue
    handle = os.open(sys.argv[1] + ".inside", os.O_CREAT | os.O_EXCL)  # an error if another one is inside
    os.close(handle)
    time.sleep(0.0002 * random.random())
    os.unlink(sys.argv[1] + ".inside")
    taken += 1
    locks.release()
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert not list(path.parent.iterdir())
