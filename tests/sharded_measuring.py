"""What processes measure together of a model that fully_shard has cut: test_sharded_measuring.py starts them."""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import memsyn
from memsyn.sharding.exchange import gathered
from memsyn.sharding.parts import is_sharded, local_part

Data = list[Any]
"""One list of batches for each process."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tied(nn.Module):
    """A small language model whose table is its head."""

    def __init__(self, width: int = 6, words: int = 11) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Conv(nn.Module):
    """A convolution, a normalisation with statistics, and a scale that an operation without a rule uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten())
        self.scale = nn.Parameter(torch.rand(80))
        self.head = nn.Linear(80, 3)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.logaddexp(self.body(x), self.scale))


def shard(model: nn.Module, parts: Iterable[nn.Module], **options: Any) -> nn.Module:
    for part in parts:
        fully_shard(part, **options)
    return fully_shard(model, **options)


def alone(model: nn.Module, data: Data, **options: Any) -> Any:
    """The sum of what each process's batches give in one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", memsyn.SlowParametersWarning)
        found = [memsyn.measure(model, batches, progress=False, **options) for batches in data if len(batches)]
    whole = found[0]
    for other in found[1:]:
        whole = whole + other
    return whole


def together(model: nn.Module, data: Data, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", memsyn.SlowParametersWarning)
        return memsyn.measure(model, data[dist.get_rank()], progress=False, **options)


def check_same(found: Any, expected: Any, tolerance: float) -> None:
    """||x - ref|| <= tolerance max(||ref||, 1e-6 ||ref of the model||) for each parameter, as in docs/exactness.md."""
    assert found.num_samples == expected.num_samples
    assert found.sums.keys() == expected.sums.keys()
    total = sum(float(own.double().square().sum()) for own in expected.sums.values()) ** 0.5
    for name, own in expected.sums.items():
        error = float((gathered(found.sums[name]).double() - own.double()).norm())
        assert error <= tolerance * max(float(own.double().norm()), 1e-6 * total), (name, error, float(own.norm()))


def shares(data: Tensor, size: int) -> Data:
    """Uneven shares for all processes."""
    world = dist.get_world_size()
    cuts = [round(len(data) * (k / world) ** 1.5) for k in range(world + 1)]
    return [list(data[cuts[k] : cuts[k + 1]].split(size)) for k in range(world)]


def check_equal_to_one_process() -> None:
    """Every estimator, precision, and way to share the data out."""
    words = torch.randint(0, 11, (13, 5))
    empty = [[], *shares(words, 3)[1:]]
    uneven, single = shares(words, 3), shares(words, 1)
    for estimator, dtype, data in (
        ("mas", torch.float64, single),
        ("mas", torch.float64, empty),
        ("mas", torch.float32, uneven),
        ("kronecker", torch.float64, single),
        ("kronecker", torch.float64, empty),
        ("kronecker", torch.float32, uneven),
        ("inputs", torch.float64, empty),
    ):
        model = Tied().to(dtype)
        expected = alone(model, data, estimator=estimator)
        found = together(shard(model, model.blocks), data, estimator=estimator)
        check_same(found, expected, 1e-9 if dtype == torch.float64 else 1e-6)
        assert all(is_sharded(own) for name, own in found.sums.items() if name.startswith("table"))
    model = Tied().double()
    expected = alone(model, shares(words, 3))
    found = together(shard(model, model.blocks), shares(words, 3), max_samples=10**6)
    assert found.routes == expected.routes


def check_settings() -> None:
    """Every way to shard gives the same."""
    words = torch.randint(0, 11, (13, 5))
    data, world = shares(words, 3), dist.get_world_size()
    settings: list[dict[str, Any]] = [
        {"reshard_after_forward": True},
        {"reshard_after_forward": False},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.float64, reduce_dtype=torch.bfloat16)},
    ]
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
        settings += [{"mesh": mesh}, {"reshard_after_forward": 2}]
    for estimator in ("mas", "kronecker"):
        expected = alone(Tied().double(), data, estimator=estimator)
        for options in settings if estimator == "mas" else settings[-1:]:
            model = Tied().double()
            check_same(together(shard(model, model.blocks, **options), data, estimator=estimator), expected, 1e-9)
        for wrapped_first in (True, False):
            model = Tied().double()
            for index, block in enumerate(model.blocks):
                inner = checkpoint_wrapper(block) if wrapped_first else fully_shard(block)
                model.blocks[index] = fully_shard(inner) if wrapped_first else checkpoint_wrapper(inner)
            check_same(together(fully_shard(model), data, estimator=estimator), expected, 1e-9)
        frozen = Tied().double()
        frozen.blocks[1].requires_grad_(False)
        expected = alone(frozen, data, estimator=estimator)
        check_same(together(shard(frozen, frozen.blocks), data, estimator=estimator), expected, 1e-9)
    half = Tied().bfloat16()
    expected = alone(half, data)
    mixed = Tied().bfloat16().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    check_same(together(shard(mixed, mixed.blocks, mp_policy=policy), data), expected, 1e-6)


def check_images() -> None:
    """Convolutions, statistics in training mode, and a parameter that is measured one sample at a time."""
    images = torch.randn(11, 1, 6, 6, dtype=torch.float64)
    data = shares(images, 4)
    for estimator in ("mas", "kronecker", "mas-vector", "fisher"):
        model = Conv().double()
        expected = alone(model, data, estimator=estimator)
        model = shard(Conv().double(), [])
        state = {name: local_part(own).clone() for name, own in model.state_dict().items()}
        flags, rng = [module.training for module in model.modules()], torch.get_rng_state()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        found = together(model, data, estimator=estimator)
        check_same(found, expected, 1e-9)
        assert found.routes["scale"] == "one sample at a time"
        assert all(torch.equal(own, local_part(model.state_dict()[name])) for name, own in state.items())
        assert flags == [module.training for module in model.modules()]
        assert torch.equal(rng, torch.get_rng_state())
        assert all(bool((local_part(p.grad) == 1).all()) for p in model.parameters())  # type: ignore[arg-type]
        assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def language_model(kind: str, *, tied: bool = True) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "use_cache": False,
        "tie_word_embeddings": tied,
    }
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    config = transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager" if kind == "mixtral" else "grouped_mm"
    return transformers.MixtralForCausalLM(config)


def check_language_models() -> None:
    """Llama with a tied table, padding in one process alone, and a mixture of experts."""
    torch.manual_seed(1)
    tokens = torch.randint(0, 40, (9, 7))
    mask = torch.ones_like(tokens)
    mask[6:, 4:] = 0
    rows = [{"input_ids": own, "attention_mask": m} for own, m in zip(tokens.split(2), mask.split(2), strict=True)]
    world = dist.get_world_size()
    data = [rows[: 6 - world], *[[row] for row in rows[6 - world :]]]
    assert len(data) == world
    for kind, tied, dtype, tolerance in (
        ("llama", True, torch.float64, 1e-9),
        ("llama", False, torch.float32, 1e-6),
        ("mixtral", False, torch.float64, 1e-9),
        ("mixtral with grouped_mm", False, torch.float32, 1e-6),
    ):
        for estimator in ("mas", "kronecker"):
            expected = alone(language_model(kind, tied=tied).to(dtype), data, estimator=estimator)
            model = language_model(kind, tied=tied).to(dtype)
            found = together(shard(model, model.model.layers), data, estimator=estimator)
            check_same(found, expected, tolerance)


def check_remembered() -> None:
    """A memory of what the processes measured is that of one process, in the file too."""
    data, folder = shares(torch.randint(0, 11, (13, 5)), 3), os.environ["FOLDER"]
    for estimator in ("mas", "kronecker"):
        plain = Tied().double()
        expected = memsyn.Memory.empty().consolidate(plain, alone(plain, data, estimator=estimator))
        model = Tied().double()
        shard(model, model.blocks)
        memory = memsyn.Memory.empty().consolidate(model, together(model, data, estimator=estimator))
        memory.save(f"{folder}/{estimator}.safetensors")
        dist.barrier()
        found = memsyn.Memory.load(f"{folder}/{estimator}.safetensors")
        assert found.matches(plain)
        for name, omega in expected.importance.items():
            torch.testing.assert_close(found.importance[name], omega, rtol=1e-9, atol=1e-15)
        if estimator == "kronecker":
            torch.manual_seed(5)
            moved = {name: own + 0.01 * torch.randn_like(own) for name, own in plain.state_dict().items()}
            change, other = (memory.predicted_change(moved, plain) for memory in (found, expected))
            assert change == pytest.approx(other, rel=1e-6)


def check_errors() -> None:
    """What goes wrong is said in all processes."""
    rank = dist.get_rank()
    words = torch.randint(0, 11, (8, 5))
    model = Tied()
    shard(model, model.blocks)

    def broken() -> Iterable[Tensor]:
        yield words
        if rank == 0:
            raise ValueError("the disk is full")
        yield words

    error, says = (ValueError, "disk is full") if rank == 0 else (memsyn.ProcessError, "failed in another process")
    with pytest.raises(error, match=says):
        memsyn.measure(model, broken(), progress=False)
    with pytest.raises(memsyn.BatchError, match="no samples"):
        memsyn.measure(model, [], progress=False)
    for name, option in (("batched", True), ("checkpoint", "x"), ("group", dist.group.WORLD)):
        with pytest.raises(memsyn.OptionError, match=f"{name}= is not for a sharded model"):
            memsyn.measure(model, [words], progress=False, **{name: option})  # type: ignore[arg-type]
    with pytest.raises(memsyn.OptionError, match="mas-local"):
        memsyn.measure(model, [words], progress=False, estimator="mas-local")
    check_same(memsyn.measure(model, [words], progress=False), alone(Tied(), [[words]] * dist.get_world_size()), 1e-6)
    with torch.no_grad():
        for parameter in model.blocks[1].parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(memsyn.OutputError, match="NaN"):
        memsyn.measure(model, [words], progress=False)
    short = shard(nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 2)), [])
    with pytest.raises(memsyn.ModelError, match="max_norm"):
        memsyn.measure(short, [words % 5], progress=False)
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    cut = parallelize_module(Block(6), mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    with pytest.raises(memsyn.ModelError, match="fully_shard did not make, as of tensor parallelism"):
        memsyn.measure(cut, [torch.randn(2, 6)], progress=False)
    with pytest.raises(memsyn.ModelError, match="by tensor parallelism"):
        memsyn.measure(fully_shard(cut, mesh=mesh["data"]), [torch.randn(2, 6)], progress=False)
    fixed = shard(nn.Linear(4, 2).requires_grad_(False), [])
    with pytest.raises(memsyn.ModelError, match="nothing to measure"):
        memsyn.measure(fixed, [torch.randn(2, 4)], progress=False)


def check_death() -> None:
    """The process that is killed in the second batch is the last; the others say so."""

    died = 0.0

    def until_death() -> Iterable[Tensor]:
        nonlocal died
        yield torch.randint(0, 11, (4, 5))
        died = time.monotonic()
        if dist.get_rank() == dist.get_world_size() - 1:
            os._exit(9)
        yield torch.randint(0, 11, (4, 5))

    model = Tied()
    shard(model, model.blocks)
    with pytest.raises(memsyn.ProcessError, match="another process has ended or does not answer"):
        memsyn.measure(model, until_death(), progress=False)
    seconds = time.monotonic() - died
    print(f"process {dist.get_rank()} saw it after {seconds:.1f} s", file=sys.stderr, flush=True)
    os._exit(0)


CHECKS: dict[str, Callable[[], None]] = {
    own.__name__.removeprefix("check_"): own
    for own in (
        check_equal_to_one_process,
        check_settings,
        check_images,
        check_remembered,
        check_language_models,
        check_errors,
        check_death,
    )
}


def main() -> None:
    warnings.simplefilter("error", memsyn.NotMeasuredWarning)
    dist.init_process_group("gloo")
    for name in sys.argv[1:]:
        torch.manual_seed(3)
        CHECKS[name]()
    print(f"process {dist.get_rank()} is done", file=sys.stderr, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
