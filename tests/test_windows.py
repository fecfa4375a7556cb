"""memsyn on Windows, played on this machine: what is POSIX alone is taken away, and open files cannot be renamed.

The stand-in is given to memsyn's own modules, and to no other package.
"""

import ntpath
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import memsyn
from memsyn.live import segment_files
from memsyn.storage import atomic_files

HUGGING_FACE = ("transformers.trainer_callback", "transformers.training_args")

STAND_IN = '''
import importlib, os, pkgutil, sys
from pathlib import Path

import torch

for name in FIRST:
    importlib.import_module(name)

ABSENT = {
    "fork", "forkpty", "register_at_fork", "fchmod", "fchown", "sched_getaffinity", "getuid", "geteuid", "getgid",
    "nice", "getpriority", "setpriority", "setsid", "getpgid", "killpg", "mkfifo", "uname", "sysconf", "getloadavg",
    "statvfs", "O_NONBLOCK", "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "O_SYNC", "wait3",
    "posix_spawn", "sendfile", "pread",
}


def is_open(path):
    """Whether this process has a file open."""
    own = os.path.realpath(path)
    handles = Path("/proc/self/fd").iterdir()
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return any(os.path.realpath(handle) == own for handle in handles) or any(line.endswith(own) for line in mapped)


class WindowsOs:
    """The module os without what Windows lacks; files that are open are neither renamed nor removed."""

    sep, altsep = os.sep, "/"
    calls = []

    def __getattr__(self, name):
        if name in ABSENT:
            raise AttributeError(f"module 'os' has no attribute {name!r} on Windows")
        return getattr(os, name)

    def open(self, path, *args, **more):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return os.open(path, *args, **more)

    def _refuse_open_files(self, *paths):
        for path in paths:
            if os.path.exists(path) and is_open(path):
                raise PermissionError(13, "The process cannot access the file because it is in use", str(path))

    def replace(self, source, target):
        self._refuse_open_files(source, target)
        self.calls.append("replace")
        os.replace(source, target)

    def unlink(self, path):
        self._refuse_open_files(path)
        os.unlink(path)

    remove = unlink


for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # an import of it raises ModuleNotFoundError
try:
    import fcntl
except ModuleNotFoundError:
    pass
else:
    raise AssertionError

import memsyn


def import_all_of(package):
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if found.name == "memsyn.libmemsyn":  # a library of C and no module; there is none on Windows
            continue
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if error.name != "avalanche":  # it needs torchvision, which is not beside every torch
                raise


def be_windows():
    """Give the modules of memsyn that are imported so far os as Windows has it."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("memsyn", "memsyn_bench") and getattr(module, "os", None) is os:
            module.os = WindowsOs()
'''


def on_windows(program: str, *args: object, first: tuple[str, ...] = ()) -> list[str]:
    """The lines that a program prints in a process with the stand-in.

    Args:
        first: other packages, imported before: what they do on Windows is theirs to know.
    """
    code = f"FIRST = {first}\n{STAND_IN}\n{textwrap.dedent(program)}"
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_module_is_imported_and_a_memory_is_saved_and_loaded(tmp_path: Path) -> None:
    lines = on_windows(
        """
        import_all_of(memsyn)
        be_windows()
        model, path = torch.nn.Linear(2, 1, bias=False), Path(sys.argv[1], "it.memsyn.safetensors")
        importance = memsyn.measure(model, [torch.tensor([[1.0, 2.0]])], progress=False)
        for number in (1, 2):  # the second one replaces a file
            memory = memsyn.Memory.empty().consolidate(model, importance, label=f"number {number}")
            memory.save(path)
            again = memsyn.Memory.load(path, like=model)
            assert torch.equal(again.importance["weight"], memory.importance["weight"])
            print(again.history[0].label, *sorted(os.listdir(sys.argv[1])))
        print(WindowsOs.calls)
        """,
        tmp_path,
        first=("typer.testing", "jinja2", "plotly", "lightning.pytorch", *HUGGING_FACE, "prometheus_client"),
    )
    assert lines == [
        "number 1 it.memsyn.safetensors",
        "number 2 it.memsyn.safetensors",
        "['replace', 'replace']",
    ]


def test_an_observer_stores_its_sums(tmp_path: Path) -> None:
    lines = on_windows(
        """
        be_windows()
        model, store = torch.nn.Linear(2, 1, bias=False), Path(sys.argv[1], "traffic.safetensors")
        torch.nn.init.ones_(model.weight)
        for _ in range(2):  # the second one goes on from the file
            with memsyn.Observer(model, store, rate=1.0, min_samples=1) as observer:
                observer.observe(torch.tensor([[1.0, 2.0], [3.0, -3.0]]), segment="a:b/c")
                assert observer.flush()
                assert observer.stats().last_error is None, observer.stats().last_error
        found = memsyn.Importance.load(Path(sys.argv[1], "traffic+a%3Ab%2Fc.safetensors"))
        print(found.num_samples, found.mean()["weight"].tolist(), len(os.listdir(sys.argv[1])))
        """,
        tmp_path,
    )
    assert lines == ["4 [[3.0, 6.0]] 1"]


def test_an_upload_is_read_from_a_closed_file() -> None:
    lines = on_windows(
        """
        import memsyn.storage.urls
        be_windows()
        from fsspec.implementations.memory import MemoryFileSystem

        def put_file(self, local, path, **more):
            assert not is_open(local)
            self.pipe_file(path, Path(local).read_bytes())

        MemoryFileSystem.put_file = put_file
        memsyn.Importance({"weight": torch.ones(3)}, 2).save("memory://it.safetensors")
        print(memsyn.Importance.load("memory://it.safetensors").mean())
        """,
        first=("fsspec.implementations.memory", "fsspec.implementations.local"),
    )
    assert lines == ["{'weight': tensor([0.5000, 0.5000, 0.5000])}"]


def test_the_benchmark_prepares_pictures_and_appends_results(tmp_path: Path) -> None:
    lines = on_windows(
        """
        import memsyn_bench
        import_all_of(memsyn_bench)
        be_windows()
        from PIL import Image
        from memsyn_bench.data.paper8 import Picture, prepared
        from memsyn_bench.running.record import _append
        folder = Path(sys.argv[1])
        Image.new("RGB", (8, 8), (10, 20, 30)).save(folder / "it.png")
        for number in range(2):
            pixels, labels = prepared([Picture(folder / "it.png", 7)], 8, folder, "train")
            print(pixels[0, :, 0, 0].tolist(), labels.tolist())
            _append(folder / "results.jsonl", {"number": number})
        print(*(folder / "results.jsonl").read_text().split())
        """,
        tmp_path,
        first=("typer.testing", "jinja2", "plotly", "PIL.Image", "matplotlib.pyplot", "scipy.io", "fsspec"),
    )
    assert lines == ["[10, 20, 30] [7]", "[10, 20, 30] [7]", '{"number": 0} {"number": 1}']


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "fcntl", None)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    """A young one may be another writer's, which has just closed it to rename it."""
    young, old = (tmp_path / f".it.{digits * 8}.tmp" for digits in ("0a", "0b"))
    for path in (young, old):
        path.touch()
    os.utime(old, (0, 0))
    memsyn.Importance({"weight": torch.ones(3)}, 1).save(tmp_path / "it")
    assert {path.name for path in tmp_path.iterdir()} == {"it", young.name}


def test_the_store_of_an_observer_in_a_folder_with_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, a folder ends at either slash."""
    monkeypatch.setattr(segment_files.os, "path", ntpath)
    names = {
        store: segment_files._path(store, "a.b", "1a2b3c4d")
        for store in (
            r"C:\my.models\traffic.safetensors",
            "C:/my.models/traffic.safetensors",
            "s3://b.c/d/t.safetensors",
        )
    }
    assert names == {
        r"C:\my.models\traffic.safetensors": r"C:\my.models\traffic+a%2Eb.1a2b3c4d.safetensors",
        "C:/my.models/traffic.safetensors": "C:/my.models/traffic+a%2Eb.1a2b3c4d.safetensors",
        "s3://b.c/d/t.safetensors": "s3://b.c/d/t+a%2Eb.1a2b3c4d.safetensors",
    }
