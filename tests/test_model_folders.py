"""Folders of Hugging Face as the new weights of `memsyn gate`: loaded offline, whole, and without a function."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import memsyn
from memsyn import Memory
from memsyn.cli.model_folders import model_of_folder
from tests.commands import call
from tests.test_gate import as_json
from tests.test_padding import TEXT, build_of, sentences

IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture
def bert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A classifier of texts; its memory, its folder, and 200 requests are in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = build_of("BertForSequenceClassification", "BertConfig", **TEXT, num_labels=3)
    importance = memsyn.measure(model, [sentences(9)], progress=False)
    factors = memsyn.measure(model, [sentences(9)], estimator="kronecker", progress=False)
    Memory.empty().consolidate(model, importance).consolidate(model, factors).save("memory")
    write(model, "old")
    save_file(requests(), "inputs.safetensors")
    return model


def requests(count: int = 200) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 23, (count, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def write(model: nn.Module, folder: str, **options: Any) -> str:
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    return folder


def moved(model: nn.Module, by: float) -> nn.Module:
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.mark.parametrize("shard", ["5KB", "1GB"])
def test_a_folder_is_compared_as_its_model_is(bert: nn.Module, shard: str, capfd: pytest.CaptureFixture[str]) -> None:
    new = moved(bert, 0.05)
    capfd.readouterr()
    write(new, "new", max_shard_size=shard)
    assert (len(list(Path("new").glob("*.safetensors"))) > 3) == (shard == "5KB")
    capfd.readouterr()
    expected = memsyn.compare(new, bert, [requests()], progress=False)
    assert expected.verdict().answer == "broken"
    found = as_json("memory", "new", "--data", "inputs.safetensors", code=2)["comparison"]
    assert found["kind"] == "classes"
    for name in ("agreement", "mean_change", "mean_divergence"):
        assert found[name] == pytest.approx(getattr(expected, name), rel=1e-5)
    assert found["taken"] == found["moved_statistics"] == []
    assert as_json("memory", "old", "--data", "inputs.safetensors", code=0)["comparison"]["mean_change"] == 0
    assert capfd.readouterr().err == "", "no bars and no reports of transformers"


def test_a_folder_is_predicted_without_data(bert: nn.Module) -> None:
    new = moved(bert, 0.02)
    write(new, "new")
    save_file(new.state_dict(), "state")
    predicted = as_json("memory", "new", code=2)["predicted"]
    assert predicted == as_json("memory", "state", code=2)["predicted"]
    assert predicted["change"] > 0.05


def test_a_folder_may_hold_the_old_weights(bert: nn.Module) -> None:
    factors = memsyn.measure(bert, [sentences(9)], estimator="kronecker", progress=False)
    Memory.empty().consolidate(bert, factors).save("directions")
    found = as_json("directions", "old", "--reference", "old", "--data", "inputs.safetensors", code=0)
    assert found["comparison"]["agreement"] == 1.0
    assert as_json("directions", "old", "--reference", "old", code=0)["predicted"]["change"] == 0.0


def test_texts_of_other_lengths_are_run_without_padding(bert: nn.Module) -> None:
    """Lines of JSON: texts of 3 to 5 tokens."""
    write(moved(bert, 0.05), "new")
    texts = [row[: 3 + k // 40 % 3] for k, row in enumerate(requests()["input_ids"].tolist())]
    Path("texts.jsonl").write_text("\n".join(json.dumps({"input_ids": text}) for text in texts))
    alone = [{"input_ids": torch.tensor([text])} for text in texts]
    expected = memsyn.compare(moved(bert, 0.05), bert, alone, progress=False)
    found = as_json("memory", "new", "--data", "texts.jsonl", code=2)["comparison"]
    assert found["num_samples"] == 200
    assert found["agreement"] == pytest.approx(expected.agreement)
    assert found["mean_change"] == pytest.approx(expected.mean_change, rel=1e-4)
    assert found["worst"] == expected.worst()


def test_a_language_model_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gpt = build_of("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=1, n_head=2, vocab_size=23, n_positions=16)
    vit = build_of("ViTForImageClassification", "ViTConfig", **SIZES, **IMAGE, num_labels=3)
    inputs = {
        "gpt": (gpt, {"input_ids": requests()["input_ids"]}, "tokens"),
        "vit": (
            vit,
            {"pixel_values": torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))},
            "classes",
        ),
    }
    for name, (model, tensors, kind) in inputs.items():
        write(model, name)
        save_file(tensors, f"{name}.safetensors")
        importance = memsyn.measure(model, [tensors], max_samples=4, progress=False)
        Memory.empty().consolidate(model, importance).save("memory")
        found = as_json("memory", name, "--data", f"{name}.safetensors", code=0)
        assert (found["comparison"]["kind"], found["comparison"]["agreement"]) == (kind, 1.0)


def test_folders_that_are_no_model(bert: nn.Module) -> None:
    Path("plain").mkdir()
    save_file(bert.state_dict(), "plain/model.safetensors")
    for arguments in ((), ("--data", "inputs.safetensors")):
        error = refused("plain", *arguments)
        assert "plain is a folder without config.json: give a state_dict in a file, or a folder that save_" in error
    assert (
        "plain is a folder: with --model, give a state_dict in a file. A folder of Hugging Face is loaded"
        in refused("plain", "--data", "inputs.safetensors", "--model", "tests.story:build")
    )
    config = json.loads(Path("old/config.json").read_text())
    for names in (None, [], "none", {}, "json"):
        Path("plain/config.json").write_text("{" if names == "json" else json.dumps({**config, "architectures": names}))
        if names == "none":
            Path("plain/config.json").write_text("[]")
        assert "plain/config.json names no architecture, such as BertForSequenceClassification: wr" in refused("plain")
    for name in ("MyOwnModel", "pipeline", "BertConfig"):
        Path("plain/config.json").write_text(json.dumps({**config, "architectures": [name]}))
        assert f"names the architecture '{name}', which is no model of transformers 5." in refused("plain")


def refused(folder: str, *arguments: str) -> str:
    """The one line that says why a folder is not loaded."""
    result = call("gate", "memory", folder, *arguments, code=1)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


def test_what_is_not_the_whole_model_is_refused(bert: nn.Module) -> None:
    state = load_file("old/model.safetensors")
    for changed, message in (
        (
            {name: values for name, values in state.items() if name != "classifier.weight"},
            "lacks 1 tensors, the first is",
        ),
        ({**state, "other": torch.ones(1)}, "holds, and the model does not, 1 tensors, the first is other"),
        (
            {**state, "classifier.bias": torch.ones(5)},
            "reshapes 1 tensors, the first is classifier.bias: it is not a wh",
        ),
    ):
        save_file(changed, "old/model.safetensors", {"format": "pt"})
        with pytest.raises(memsyn.MismatchError, match=message):
            model_of_folder(Path("old"))
        assert message in refused("old", "--data", "inputs.safetensors")


def test_files_that_are_damaged_or_gone_are_refused(bert: nn.Module) -> None:
    write(bert, "shards", max_shard_size="5KB")
    next(Path("shards").glob("*-00002-*")).unlink()
    Path("old/model.safetensors").write_text("half")
    (Path("pickled")).mkdir()
    Path("pickled/config.json").write_bytes(Path("old/config.json").read_bytes())
    torch.save(bert.state_dict(), "pickled/pytorch_model.bin")
    for folder in ("shards", "old", "pickled"):
        with pytest.raises(memsyn.MemoryFileError, match=f"{folder} could not be loaded as BertForSequenceClassificat"):
            model_of_folder(Path(folder))
        assert f"error: {folder} could not be loaded as BertForSequenceClassification: " in refused(folder)


def test_a_memory_of_another_model_is_an_error(bert: nn.Module) -> None:
    other = nn.Sequential(nn.Linear(4, 3))
    Memory.empty().consolidate(other, memsyn.measure(other, [torch.ones(2, 4)], progress=False)).save("memory")
    assert "the memory is of another architecture" in refused("old", "--data", "inputs.safetensors")


def test_without_transformers_the_error_says_what_to_install(bert: nn.Module) -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"  # an import raises ModuleNotFoundError
        "from memsyn.cli import app; app(['gate', 'memory', 'old', '--data', 'inputs.safetensors'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: old is a folder of Hugging Face, which needs transformers: pip install 'memsyn[transformers]'.\n"
    )


def test_other_commands_do_not_import_transformers(bert: nn.Module) -> None:
    save_file(bert.state_dict(), "state")
    program = (
        "import sys\nfrom memsyn.cli import app\n"
        "try: app(['gate', 'memory', 'state'])\n"
        "finally: print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
