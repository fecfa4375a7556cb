"""The company's story of examples/company.py: a careless training is refused by its cause, a protected one may ship."""

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import memsyn

pytest.importorskip("memsyn_bench", reason="needs the drawings: pip install ./bench")
pytest.importorskip("PIL.Image", reason="the drawings are read by pillow")

EPOCHS = 8


@pytest.fixture(scope="module")
def company() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "examples")
        import company

        yield company


def test_the_gate_refuses_the_careless_training_and_accepts_the_protected_one(
    company: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    company.ship(tmp_path, seed=0, epochs=EPOCHS)
    for name, protected in (("careless", False), ("protected", True)):
        company.extend(tmp_path, f"{name}.safetensors", epochs=EPOCHS, protected=protected)
    assert {path.name for path in tmp_path.iterdir()} == {
        company.MEMORY,
        "shipped.safetensors",
        "requests.safetensors",
        "careless.safetensors",
        "protected.safetensors",
    }
    assert list(load_file(tmp_path / "requests.safetensors")) == ["images"], "the gate has no labels"
    capfd.readouterr()

    assert company.gate(tmp_path, "careless.safetensors") == 2
    output = capfd.readouterr().out
    assert "\nBroken. " in output
    assert re.search(
        r"cause: 8 running statistics moved \(the first is body.1.running_mean\), as those of Batch", output
    )
    shares = re.search(r"(\d+\.\d)% of 800 samples .* With the old ones put back, (\d+\.\d)% give the same", output)
    assert shares is not None
    assert float(shares[2]) > float(shares[1]) + 10
    assert output.endswith("exit code 2\n")

    assert company.gate(tmp_path, "protected.safetensors") == 0
    output = capfd.readouterr().out
    assert re.search(r"\nSafe\. \d+\.\d% of 800 samples give the same answer", output)
    assert "running statistic" not in output

    assert company.mend(tmp_path, "careless.safetensors", epochs=EPOCHS // 4) == 0
    output = capfd.readouterr().out
    assert "Outputs on the old data change by 1.0% in place of" in output
    assert "8 running statistics put back, the first is body.1.running_mean" in output
    assert company.gate(tmp_path, "repaired.safetensors") in (0, 1)  # after so short a training it may be at risk
    output = capfd.readouterr().out
    mended = re.search(r"\n(Safe|At risk)\. (\d+\.\d)% of 800 samples", output)
    assert mended is not None
    assert float(mended[2]) > 95
    assert "running statistic" not in output

    names = ("shipped.safetensors", "careless.safetensors", "protected.safetensors", "repaired.safetensors")
    company.show_accuracy(tmp_path, names)
    shares = re.findall(
        r"  \w+\.safetensors: (\d+\.\d)% of the 80 old classes, (\d+\.\d)% of the 40", capfd.readouterr().out
    )
    (shipped, untrained), (_, careless), (_, protected), repaired = (tuple(map(float, own)) for own in shares)
    assert untrained < 10
    assert min(careless, protected, repaired[1]) > 30
    assert repaired[0] > shipped - 2
    memory = memsyn.Memory.load(tmp_path / company.MEMORY)
    assert memory.anchor
    assert memory.directions is not None
