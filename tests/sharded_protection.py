"""Protection under fully_shard beside one process with all data, started by test_sharded_protection.py."""

import copy
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

import memsyn
from memsyn.sharding import local_part, reshard

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
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2, experts_implementation="eager")
    ),
}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam, one by one": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
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
        if any(True for _ in block.parameters()) and not isinstance(block, Conv1D):  # whose output is a view
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
        yield name, parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


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


def check_all_steps() -> None:
    """Each form with SGD and AdamW, on each model, in both precisions."""
    for name in MODELS:
        for dtype in (torch.float64, torch.float32):
            for form in ("gradient", "proximal", "projected"):
                for kind in ("sgd", "adamw"):
                    check_steps(name, dtype, form, kind)
    for kind in ("adamw, fused", "adam, one by one", "rmsprop"):
        check_steps("layers", torch.float64, "gradient", kind)
        check_steps("layers", torch.float64, "projected", kind, every=2)
        if kind != "rmsprop":
            check_steps("layers", torch.float64, "proximal", kind)


def oracle(model: nn.Module, twin: nn.Module) -> None:
    """Give a plain model the gradients of the sharded one."""
    for mine, own in zip(model.parameters(), twin.parameters(), strict=True):
        own.grad = None if mine.grad is None else mine.grad.full_tensor().clone()


def check_policies() -> None:
    """Mixed precision, weights that stay on the CPU, whole weights after the forward pass, and two copies of parts."""
    size = dist.get_world_size()
    copies = init_device_mesh("cpu", (2, size // 2)) if size > 2 else None
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for options in (
        {"mp_policy": mixed},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"reshard_after_forward": False},
        {"mesh": copies},
    ):
        for form in ("gradient", "proximal", "projected"):
            twin, model, memory = pair("llama", torch.float32, **options)
            made = [OPTIMIZERS["adamw"](own.parameters()) for own in (model, twin)]
            handles = [
                memsyn.protect(optimizer, own, memory, strength=5.0, form=form, every=2)
                for optimizer, own in zip(made, (model, twin), strict=True)
            ]
            for seed in (2, 3, 4):
                made[0].zero_grad()
                loss_of(model, share(batches("llama", torch.float32, seed))).backward()
                oracle(model, twin)
                for optimizer in made:
                    optimizer.step()
                with torch.no_grad():
                    loss_of(model, share(batches("llama", torch.float32, seed)))  # shows whole weights, if it may
                reports = [handle.report() for handle in handles]
                assert abs(reports[0].change - reports[1].change) <= 1e-4 * reports[1].change
            reshard(model)
            assert_same(model, twin, torch.float32, (options, form))


def grown(name: str, model: nn.Module) -> nn.Module:
    """More rows: of a head and its bias, or of a table that is the head too."""
    torch.manual_seed(5)
    if name == "layers":
        old = model[-1]
        model[-1] = nn.Linear(11, 8).to(old.weight)
        with torch.no_grad():
            model[-1].weight[:3], model[-1].bias[:3] = old.weight, old.bias
    else:
        model.resize_token_embeddings(VOCABULARY + 12, mean_resizing=False)
    return model


def check_grown() -> None:
    """Some processes hold known rows alone, some a few of them, some none."""
    for name in ("layers", "llama"):
        for form in ("gradient", "proximal", "projected"):
            twin = built(name, torch.float64)
            memory = memory_of(twin, name, torch.float64)
            twin = grown(name, twin)
            model = sharded(copy.deepcopy(twin))
            made = [OPTIMIZERS["adamw"](own.parameters()) for own in (model, twin)]
            with pytest.warns(memsyn.GrownParametersWarning):
                handles = [
                    memsyn.protect(optimizer, own, memory, strength=5.0, form=form, every=2)
                    for optimizer, own in zip(made, (model, twin), strict=True)
                ]
            for seed in (2, 3):
                data = batches(name, torch.float64, seed)
                step(model, made[0], share(data))
                step(twin, made[1], data)
            assert_same(model, twin, torch.float64, (name, form))
            reports = [handle.report() for handle in handles]
            assert reports[0].num_weights == reports[1].num_weights
            assert abs(reports[0].change - reports[1].change) <= 1e-9
            assert abs(memsyn.penalty(model, memory) - memsyn.penalty(twin, memory)) < 1e-9


def check_accumulation() -> None:
    """Several backward passes of which the last sums over processes, then clipping, then the step."""
    for form in ("gradient", "proximal", "projected"):
        twin, model, memory = pair("llama", torch.float64)
        made = [OPTIMIZERS["adamw"](own.parameters()) for own in (model, twin)]
        for optimizer, own in zip(made, (model, twin), strict=True):
            memsyn.protect(optimizer, own, memory, strength=5.0, form=form, every=2)
        for seed in (2, 3):
            data = batches("llama", torch.float64, seed)
            halves = share(data).chunk(2)
            for index, half in enumerate(halves):
                model.set_requires_gradient_sync(index == len(halves) - 1)
                (loss_of(model, half) / 2).backward()
            loss_of(twin, data).backward()
            for own, optimizer in zip((model, twin), made, strict=True):
                nn.utils.clip_grad_norm_(own.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        assert_same(model, twin, torch.float64, form)


def check_no_communication() -> None:
    """A step of the penalty forms talks to no process; a projection sums small tensors, and gathers nothing."""
    for form in ("gradient", "proximal", "projected"):
        for kind in ("sgd", "adamw"):
            _, model, memory = pair("llama", torch.float32)
            optimizer = OPTIMIZERS[kind](model.parameters())
            memsyn.protect(optimizer, model, memory, strength=1e-3, form=form, every=1)
            for _ in range(2):
                loss_of(model, share(batches("llama", torch.float32, 2))).backward()
                with CommDebugMode() as seen, counted_reductions() as sizes:
                    optimizer.step()
                assert seen.get_total_counts() == len(sizes), seen.get_comm_counts()
                num_weights = sum(p.numel() for p in model.parameters())
                assert len(sizes) == (3 if form == "projected" else 0), sizes
                assert sum(sizes) < num_weights, sizes


@contextmanager
def counted_reductions() -> Iterator[list[int]]:
    """The sizes of what `all_reduce` is called with."""
    sizes: list[int] = []
    before = dist.all_reduce

    def reduced(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return before(tensor, *args, **kwargs)

    dist.all_reduce = reduced
    try:
        yield sizes
    finally:
        dist.all_reduce = before


def check_penalty() -> None:
    """The term for a loss: its value is whole in each process, and its gradient beside that of the loss."""
    for name in ("layers", "llama"):
        twin, model, memory = pair(name, torch.float64)
        for own in (model, twin):
            with torch.no_grad():
                for parameter in own.parameters():
                    parameter.mul_(1.1)
        data = batches(name, torch.float64, 2)
        for before in (True, False):  # the root's weights are whole after the forward pass
            for own, batch in ((model, share(data)), (twin, data)):
                own.zero_grad()
                if before:
                    term = memsyn.penalty(own, memory)
                    loss = loss_of(own, batch) + 3 * term
                else:
                    loss = loss_of(own, batch)
                    term = memsyn.penalty(own, memory)
                    loss = loss + 3 * term
                loss.backward()
                own.value = float(term.detach())
            assert abs(model.value - twin.value) <= 1e-9 * twin.value
            oracle(model, gradients := copy.deepcopy(twin))
            for mine, expected in zip(gradients.parameters(), twin.parameters(), strict=True):
                assert torch.allclose(mine.grad, expected.grad, rtol=1e-9, atol=1e-12)
    _, model, memory = pair("layers", torch.float64)
    places = dict(model.named_parameters())
    cut = {
        n: distribute_tensor(own, places[n].device_mesh, places[n].placements) for n, own in memory.importance.items()
    }
    sharded_memory = replace(memory, importance=cut)
    assert memsyn.Relative(0.5).of(sharded_memory) == pytest.approx(memsyn.Relative(0.5).of(memory), rel=1e-12)
    assert float(memsyn.penalty(model, sharded_memory)) == pytest.approx(0.0, abs=1e-12)


def check_scaler() -> None:
    """A step that GradScaler skips in one process is skipped in all."""
    for kind in ("adamw", "adamw, fused"):
        twin, model, memory = pair("layers", torch.float32)
        made = [OPTIMIZERS[kind](own.parameters()) for own in (model, twin)]
        scalers = [torch.amp.GradScaler("cpu", init_scale=16.0) for _ in made]
        for optimizer, own in zip(made, (model, twin), strict=True):
            memsyn.protect(optimizer, own, memory, strength=5.0, form="proximal")
        for seed in (2, 3, 4):
            data = batches("layers", torch.float32, seed)
            for own, optimizer, scaler, batch in zip((model, twin), made, scalers, (share(data), data), strict=True):
                optimizer.zero_grad()
                scaler.scale(loss_of(own, batch)).backward()
                if seed == 3:
                    first = next(p for p in own.parameters() if p.grad is not None)
                    local_part(first.grad).mul_(float("inf") if dist.get_rank() == 0 or own is twin else 1.0)
                scaler.step(optimizer)
                scaler.update()
        assert_same(model, twin, torch.float32, kind)


CHECKS = {name.removeprefix("check_"): own for name, own in dict(globals()).items() if name.startswith("check_")}


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        start = time.perf_counter()
        CHECKS[name]()
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    dist.barrier()
    dist.destroy_process_group()
    print(f"process {os.environ['RANK']} is done", file=sys.stderr, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
