"""Each example runs, has at most 60 lines, and shows that with memsyn the old is kept, and the new is learned."""

import re
import runpy
from pathlib import Path

import pytest

from tests.test_sharded_measuring import torchrun

EXAMPLES = Path(__file__).parent.parent / "examples"
LINE = re.compile(r"^(fine-tuned|with memsyn): old ([\d.]+)(?:%| pixels) -> ([\d.]+)(?:%| pixels), new ([\d.]+)", re.M)


def test_no_example_is_forgotten() -> None:
    others = {"company", "fsdp"}  # test_company.py, and below
    found = {path.stem for path in EXAMPLES.glob("*.py")} - others
    assert found == {"detection", "entities", "lora", "retrieval", "sft"}


@pytest.mark.parametrize("name", ["entities", "lora", "retrieval", "sft"])
@pytest.mark.filterwarnings("ignore")  # of the trainers: many, and not ours
def test_an_example_keeps_the_old_and_learns_the_new(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    found = {kind: [*map(float, numbers)] for kind, *numbers in LINE.findall(capsys.readouterr().out)}
    begun, forgotten, _ = found["fine-tuned"]
    _, kept, learned = found["with memsyn"]
    assert forgotten < begun - 20
    assert kept > begun - 10
    assert learned > 85


def test_detection_keeps_the_old_and_learns_the_new(capsys: pytest.CaptureFixture[str]) -> None:
    assert len((EXAMPLES / "detection.py").read_text().splitlines()) <= 60
    runpy.run_path(str(EXAMPLES / "detection.py"), run_name="__main__")
    found = {kind: [*map(float, numbers)] for kind, *numbers in LINE.findall(capsys.readouterr().out)}
    begun, forgotten, _ = found["fine-tuned"]
    _, kept, learned = found["with memsyn"]
    assert forgotten > 3 * begun  # of errors, in pixels
    assert kept < 2 * begun
    assert learned < 2 * begun


def test_a_model_that_two_processes_hold_is_measured_kept_and_protected() -> None:
    done = torchrun(2, "../examples/fsdp.py")
    assert done.returncode == 0, done.stderr[-6000:]
    assert "24 samples measured by 2 processes" in done.stdout
    found = re.search(r"^protected: (\d+) weights, penalty (\S+)$", done.stdout, re.MULTILINE)
    assert found is not None
    assert int(found[1]) == 93696
    assert float(found[2]) > 0
    assert "kept: memory, model.memsyn.safetensors, step-2" in done.stdout
