"""Models merged by importance, held against the solution of the dense linear system and against definitions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import memsyn
from memsyn import Memory, MismatchError, OptionError, merge_models
from memsyn.cli import app
from memsyn.errors import MemoryFileError, MissingFileError
from memsyn.storage.reading_and_writing import read
from memsyn.storage.weights_files import StoredWeights
from memsyn.values.memory import load_mapped


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Tanh(), nn.Linear(16, 3)
    ).double()


def images(seed: int) -> list[Tensor]:
    return [torch.randn(12, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)]


def remembered(model: nn.Module, data: list[Tensor], estimator: str = "kronecker", rank: int | None = 64) -> Memory:
    found = memsyn.measure(model, data, estimator=estimator, progress=False)
    options = {} if estimator == "mas" else {"rank": rank}
    return Memory.empty().consolidate(model, found, **options)


def states(*models: nn.Module) -> list[dict[str, Tensor]]:
    return [dict(model.state_dict()) for model in models]


@pytest.mark.parametrize("estimator", ["kronecker", "inputs"])
@pytest.mark.parametrize("rank", [None, 2])
def test_matrices_solve_the_dense_system(estimator: str, rank: int | None) -> None:
    models = [network(seed) for seed in range(3)]
    memories = [remembered(model, images(seed), estimator, rank) for seed, model in enumerate(models)]
    merged = merge_models(states(*models), memories)
    for weight, bias in (("0.weight", "0.bias"), ("4.weight", "4.bias")):
        systems, sides, starts = [], [], []
        for model, memory in zip(models, memories, strict=True):
            assert memory.directions is not None
            own = memory.directions.layers[weight]
            layout, groups = own.matrix.layout, own.matrix.layout.groups
            state = model.state_dict()
            joined = torch.cat([layout.matrix(state[weight]), state[bias].reshape(groups, -1, 1)], 2)
            a = own.inputs.dense()
            s = (
                torch.eye(layout.outputs).double().expand(groups, -1, -1)
                if own.outputs is None
                else own.outputs.dense()
            )
            whole = torch.stack([torch.kron(s[g], a[g]) for g in range(groups)])
            systems.append(whole * own.scales[0] * own.scales[1])
            starts.append(joined.reshape(groups, -1, 1))
            sides.append(systems[-1] @ starts[-1])
        mean = torch.stack(starts).mean(0)
        whole = torch.stack(systems).sum(0)
        # The solution that is nearest to the mean.
        expected = mean + torch.linalg.pinv(whole, hermitian=True, rtol=1e-10) @ (
            torch.stack(sides).sum(0) - whole @ mean
        )
        found = torch.cat([layout.matrix(merged[weight]), merged[bias].reshape(groups, -1, 1)], 2).reshape(
            groups, -1, 1
        )
        assert (whole @ (found - expected)).norm() < 1e-4 * (whole @ (mean - expected)).norm()


def test_importances_weight_the_mean() -> None:
    models = [network(seed) for seed in range(2)]
    memories = [remembered(model, images(seed), "mas") for seed, model in enumerate(models)]
    merged = merge_models(states(*models), memories)
    for name, own in merged.items():
        omegas = [memory.importance[name] for memory in memories]
        weights = [model.state_dict()[name] for model in models]
        torch.testing.assert_close(own, (omegas[0] * weights[0] + omegas[1] * weights[1]) / (omegas[0] + omegas[1]))


def test_what_no_model_relies_on_is_the_mean_and_what_one_relies_on_is_its_own() -> None:
    models = [nn.Linear(3, 2, bias=False).double() for _ in range(2)]
    rows = torch.eye(3, dtype=torch.float64)
    for estimator in ("mas", "kronecker", "inputs"):
        memories = [remembered(model, [rows[place].repeat(16, 1)], estimator) for place, model in enumerate(models)]
        merged = merge_models(states(*models), memories)["weight"]
        one, other = (model.weight.detach() for model in models)
        torch.testing.assert_close(merged[:, 0], one[:, 0], atol=1e-4, rtol=0)
        torch.testing.assert_close(merged[:, 1], other[:, 1], atol=1e-4, rtol=0)
        torch.testing.assert_close(merged[:, 2], (one + other)[:, 2] / 2)


@pytest.mark.parametrize("estimator", ["mas", "kronecker"])
def test_equal_models_stay_and_the_order_does_not_count(estimator: str) -> None:
    models = [network(seed) for seed in range(2)]
    memories = [remembered(model, images(seed), estimator) for seed, model in enumerate(models)]
    same = merge_models(states(models[0], models[0]), [memories[0], memories[0]])
    merged = merge_models(states(*models), memories)
    reverse = merge_models(states(*models[::-1]), memories[::-1])
    for name, own in models[0].state_dict().items():
        torch.testing.assert_close(same[name], own)
        torch.testing.assert_close(merged[name], reverse[name], atol=1e-4, rtol=1e-3)


def test_a_head_of_one_model_is_taken_and_statistics_are_averaged() -> None:
    models = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2)]
    for number, model in enumerate(models):
        model(torch.randn(8, 2, generator=torch.Generator().manual_seed(number)))
        model.eval()
    given = states(*models)
    memories = [remembered(model, [torch.randn(4, 2)], "mas") for model in models]
    given[1] = {**given[1], "head.weight": torch.full((1, 2), 5.0)}
    given[1]["1.num_batches_tracked"] = torch.tensor(7)
    merged = merge_models(given, memories)
    assert merged["head.weight"].tolist() == [[5.0, 5.0]]
    assert merged["1.num_batches_tracked"] == 1
    means = [own["1.running_mean"] for own in given]
    torch.testing.assert_close(merged["1.running_mean"], (means[0] + means[1]) / 2)


def test_half_precision_stays_and_is_computed_in_float32() -> None:
    models = [network(seed).float() for seed in range(2)]
    for model in models:
        model.load_state_dict({name: own.bfloat16().float() for name, own in model.state_dict().items()})
    memories = [remembered(model, [images(seed)[0].float()], "mas") for seed, model in enumerate(models)]
    wide = merge_models(states(*models), memories)
    given = [{name: own.bfloat16() for name, own in state.items()} for state in states(*models)]
    merged = merge_models(given, memories)
    assert all(own.dtype == torch.bfloat16 for own in merged.values())
    assert all(torch.equal(own, wide[name].bfloat16()) for name, own in merged.items())


def test_errors_say_what_to_do() -> None:
    models = [network(seed) for seed in range(2)]
    data = images(0)
    memories = [remembered(model, data, "mas") for model in models]
    given = states(*models)
    with pytest.raises(OptionError, match="got 1 models and 1 memories"):
        merge_models(given[:1], memories[:1])
    with pytest.raises(OptionError, match="got 2 models and 1 memories"):
        merge_models(given, memories[:1])
    with pytest.raises(MismatchError, match=r"0\.weight has other values in model 0 than in memory 0.*same order"):
        merge_models(given, memories[::-1])
    factors = [remembered(model, data) for model in models]
    with pytest.raises(MismatchError, match=r"has other values in model 0 than in memory 0"):
        merge_models(given, factors[::-1])
    with pytest.raises(OptionError, match="nothing of one kind"):
        merge_models(given, [memories[0], factors[1]])
    with pytest.raises(MismatchError, match=r"memory 1 and model 1 have no parameter in common.*convert --rename"):
        merge_models([given[0], {"other": torch.ones(2)}], memories)
    wider = {**given[1], "4.weight": torch.ones(4, 16).double()}
    with pytest.raises(MismatchError, match=r"4\.weight has the shapes \(3, 16\) and \(4, 16\).*a name of its own"):
        merge_models([given[0], wider], memories)


def saved(folder: Path, estimator: str = "kronecker") -> tuple[list[Path], list[Path]]:
    models = [network(seed) for seed in range(2)]
    paths, memories = [], []
    for seed, model in enumerate(models):
        paths.append(folder / f"model{seed}.safetensors")
        save_file(model.state_dict(), paths[-1])
        memories.append(folder / f"memory{seed}.safetensors")
        remembered(model, images(seed), estimator).save(memories[-1])
    return paths, memories


def command(paths: list[Path], memories: list[Path], out: Path) -> list[str]:
    return ["merge-models", *map(str, paths), *(f"--memory={path}" for path in memories), "-o", str(out)]


@pytest.mark.parametrize("estimator", ["mas", "kronecker"])
def test_files_are_merged_as_values_are(tmp_path: Path, estimator: str) -> None:
    paths, memories = saved(tmp_path, estimator)
    out = tmp_path / "merged.safetensors"
    result = CliRunner().invoke(app, [*command(paths, memories, out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"out": str(out), "num_models": 2, "num_tensors": 6}
    expected = merge_models([load_file(path) for path in paths], [Memory.load(path) for path in memories])
    found = load_file(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(own, expected[name]) for name, own in found.items())


def test_folders_become_a_folder_with_the_other_files(tmp_path: Path) -> None:
    paths, memories = saved(tmp_path)
    folders = []
    for number, path in enumerate(paths):
        folders.append(tmp_path / f"folder{number}")
        folders[-1].mkdir()
        state = load_file(path)
        names = list(state)
        shards = {f"model-{i}.safetensors": names[3 * i : 3 * i + 3] for i in range(2)}
        for shard, own in shards.items():
            save_file({name: state[name] for name in own}, folders[-1] / shard)
        index = {"weight_map": {name: shard for shard, own in shards.items() for name in own}}
        (folders[-1] / "model.safetensors.index.json").write_text(json.dumps(index))
        (folders[-1] / "config.json").write_text(f'{{"number": {number}}}')
    out, whole = tmp_path / "out", tmp_path / "whole.safetensors"
    assert CliRunner().invoke(app, command(folders, memories, out)).exit_code == 0
    assert CliRunner().invoke(app, command(paths, memories, whole)).exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert (out / "config.json").read_text() == '{"number": 0}'
    found, expected = load_file(out / "model.safetensors"), load_file(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(own, expected[name]) for name, own in found.items())
    (folders[1] / "model-1.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"names 1 files that do not exist.*model-1\.safetensors"):
        StoredWeights(folders[1])
    (folders[1] / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(MemoryFileError, match=r"index\.json could not be read: KeyError"):
        StoredWeights(folders[1])
    (folders[0] / "model.safetensors.index.json").unlink()
    with pytest.raises(MissingFileError, match=r"holds 2 files of safetensors and no model\.safetensors\.index\.json"):
        StoredWeights(folders[0])


def test_bad_files_leave_the_old_output(tmp_path: Path) -> None:
    paths, memories = saved(tmp_path)
    out = tmp_path / "merged.safetensors"
    out.write_bytes(b"old")
    result = CliRunner().invoke(app, command(paths, memories[::-1], out))
    assert result.exit_code == 1
    assert "memory 0: the memory is of other weights" in result.stderr
    assert out.read_bytes() == b"old"
    result = CliRunner().invoke(app, command(paths, memories, paths[0]))
    assert result.exit_code == 1
    assert "which is only read: give another file" in result.stderr
    (tmp_path / "text").write_text("no tensors")
    result = CliRunner().invoke(app, command([paths[0], tmp_path / "text"], memories, out))
    assert result.exit_code == 1
    assert "could not be read as safetensors" in result.stderr
    result = CliRunner().invoke(app, command([paths[0], tmp_path / "none"], memories, out))
    assert result.exit_code == 1
    assert "none does not exist" in result.stderr


def test_a_mapped_memory_is_the_memory_and_its_damage_is_found(tmp_path: Path) -> None:
    _, memories = saved(tmp_path)
    mapped, whole = load_mapped(memories[0]), Memory.load(memories[0])
    for group, members in whole.groups().items():
        for name, tensor in members.items():
            assert torch.equal(mapped.groups()[group][name], tensor)
    data = bytearray(memories[0].read_bytes())
    data[-3] ^= 1
    memories[0].write_bytes(data)
    with pytest.raises(MemoryFileError, match="checksum"):
        load_mapped(memories[0])
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(MemoryFileError, match="no memsyn metadata"):
        read(tmp_path / "plain.safetensors", mapped=True)


LIMITED = """
import sys
from memsyn.cli import app
from memsyn.values import model_merging
limit = int(sys.argv[1])
def data():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon"))) * 1024
before, most = data(), 0
merged_layer = model_merging._merged_layer
def watched(*arguments):
    global most
    found = merged_layer(*arguments)
    most = max(most, data() - before)
    return found
model_merging._merged_layer = watched
app(sys.argv[2:], standalone_mode=False)
print(most)
assert most < limit, (most, limit)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_layer_at_a_time_is_in_memory(tmp_path: Path) -> None:
    layers, width = 24, 512  # 1 MiB a layer; two models and two memories of importance and anchor: 144 MiB
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    omega = {name: torch.rand_like(own) for name, own in model.state_dict().items()}
    paths, memories = [], []
    for number in range(2):
        state = {name: own + number for name, own in model.state_dict().items()}
        paths.append(tmp_path / f"model{number}.safetensors")
        save_file(state, paths[-1])
        memories.append(tmp_path / f"memory{number}.safetensors")
        history = (
            Memory.empty().consolidate(nn.Linear(1, 1), memsyn.measure(nn.Linear(1, 1), [torch.ones(1, 1)])).history
        )
        Memory(state, omega, history, dict.fromkeys(state, 1)).save(memories[-1])
    arguments = command(paths, memories, tmp_path / "merged.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(48 * 2**20), *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "2 models merged, 24 tensors" in result.stdout
