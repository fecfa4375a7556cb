"""Protection under fully_shard beside one process with all data; started by torchrun from test_sharded_protection.py."""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

import memsyn

VOCABULARY = 19
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
    "attn_implementation": "eager",
}


def of_layers() -> nn.Module:
    """Fewer rows than processes (3), a convolution, a norm, and a layer whose rows are inputs."""
    body = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.LayerNorm(6), nn.Tanh()]
    return nn.Sequential(*body, Conv1D(11, 6), nn.Tanh(), nn.Linear(11, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": of_layers,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2, experts_implementation="eager")),
}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam, one by one": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False, amsgrad=True),
}


def built(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


def batches(name: str, dtype: torch.dtype, seed: int) -> Tensor:
    """As many samples as can be divided among 1, 2 and 4 processes."""
    generator = torch.Generator().manual_seed(seed)
    if name == "layers":
        return torch.randn(8, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(VOCABULARY, (8, 5), generator=generator)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    return found if isinstance(found, Tensor) else found.logits


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    found = outputs(model, x)
    wanted = torch.linspace(-1, 1, found[0].numel(), dtype=found.dtype).reshape(found[0].shape)
    return (found - wanted).square().sum(-1).mean()


def share(data: Tensor) -> Tensor:
    """What this process trains on."""
    return data.chunk(dist.get_world_size())[dist.get_rank()]


def sharded(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    """Each block on its own, and the rest together, as FSDP2 is used."""
    blocks = model.model.layers if isinstance(model, (LlamaForCausalLM, MixtralForCausalLM)) else model
    for block in blocks:
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def memory_of(model: nn.Module, name: str, dtype: torch.dtype) -> memsyn.Memory:
    """Importance and directions of a plain model, the same in all processes."""
    memory = memsyn.Memory.empty()
    for estimator in ("mas", "kronecker"):
        found = memsyn.measure(model, [batches(name, dtype, 1)], estimator=estimator, progress=False)
        memory = memory.consolidate(model, found, rank=4)
    return memory


_MEMORIES: dict[Any, memsyn.Memory] = {}


def pair(name: str, dtype: torch.dtype, **options: Any) -> tuple[nn.Module, nn.Module, memsyn.Memory]:
    """A plain model, the same under fully_shard, and their memory."""
    twin = built(name, dtype)
    if (name, dtype) not in _MEMORIES:
        _MEMORIES[name, dtype] = memory_of(twin, name, dtype)
    return twin, sharded(copy.deepcopy(twin), **options), _MEMORIES[name, dtype]


def values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def assert_same(model: nn.Module, twin: nn.Module, dtype: torch.dtype, what: object) -> None:
    limit = 1e-9 if dtype == torch.float64 else 1e-6
    for (name, mine), (_, expected) in zip(values(model), values(twin), strict=True):
        apart = float((mine - expected).abs().max())
        assert apart <= limit * max(1.0, float(expected.abs().max())), f"{what}: {name} is {apart:.2g} off"


def step(model: nn.Module, optimizer: torch.optim.Optimizer, data: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model, data).backward()
    optimizer.step()


def check_steps(name: str, dtype: torch.dtype, form: str, kind: str, every: int = 10) -> None:
    """Two steps, and two more that a projection takes together, are those of one process with all data."""
    twin, model, memory = pair(name, dtype)
    made = [OPTIMIZERS[kind](own.parameters()) for own in (model, twin)]
    strength = 5.0 if form == "projected" else 0.5
    handles = [
        memsyn.protect(optimizer, own, memory, strength=strength, form=form, every=every)
        for optimizer, own in zip(made, (model, twin), strict=True)
    ]
    free = copy.deepcopy(twin)
    other = OPTIMIZERS[kind](free.parameters())
    for seed in (2, 3):
        data = batches(name, dtype, seed)
        step(model, made[0], share(data))
        step(twin, made[1], data)
        step(free, other, data)
    reports = [handle.report() for handle in handles]
    assert abs(reports[0].held - reports[1].held) < 1e-4
    assert reports[0].num_weights == reports[1].num_weights
    assert reports[0].layers.keys() == reports[1].layers.keys()
    for mine, expected in ((reports[0].change, reports[1].change), (reports[0].penalty, reports[1].penalty)):
        assert mine is not None
        assert expected is not None
        assert abs(mine - expected) <= 1e-4 * abs(expected)
    assert reports[0].change
    for handle in handles:
        handle.flush()
    assert_same(model, twin, dtype, (name, dtype, form, kind))
    moved = [float((a - b).abs().max()) for (_, a), (_, b) in zip(values(model), values(free), strict=True)]
    assert max(moved) > 1e-4  # protection did something


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    checks = sys.argv[1:]
    init_device_mesh("cpu", (dist.get_world_size(),))
    for name in MODELS:
        for form in ("gradient", "proximal", "projected"):
            for kind in ("sgd", "adamw"):
                check_steps(name, torch.float64, form, kind)
                if dist.get_rank() == 0:
                    print(name, form, kind, flush=True)
    dist.barrier()
    dist.destroy_process_group()
    print(f"process {os.environ['RANK']} is done", file=sys.stderr, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
