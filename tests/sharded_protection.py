"""Protection under fully_shard beside one process with all data, started by test_sharded_protection.py."""

import copy
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

import memsyn
from memsyn.integrations.lightning import MemsynCallback
from memsyn.protecting import held_layers
from memsyn.sharding.parts import local_part, reshard

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
        found = memsyn.measure(model, [batches(name, dtype, 1)[:3]], estimator=estimator, progress=False)
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
    assert reports[0].held == pytest.approx(reports[1].held, abs=1e-4, nan_ok=True)
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
        for form in ("gradient", "proximal", "projected"):
            for kind in ("adamw",) if name == "mixtral" else ("sgd", "adamw"):
                check_steps(name, torch.float64, form, kind)
            check_steps(name, torch.float32, form, "adamw")
    for kind in ("adamw, fused", "adam, one by one", "rmsprop"):
        check_steps("layers", torch.float64, "gradient", kind)
        check_steps("layers", torch.float64, "projected", kind, every=2)
        if kind != "rmsprop":
            check_steps("layers", torch.float64, "proximal", kind)


def oracle(model: nn.Module, twin: nn.Module) -> None:
    """Give a plain model the gradients of the sharded one."""
    for mine, own in zip(model.parameters(), twin.parameters(), strict=True):
        own.grad = None if mine.grad is None else mine.grad.full_tensor().clone()


def check_some_steps() -> None:
    """In more processes than the smallest layer has rows."""
    for name in ("layers", "llama"):
        for form, kind in (("gradient", "sgd"), ("proximal", "adamw"), ("projected", "adamw")):
            check_steps(name, torch.float64, form, kind)


def check_policies() -> None:
    """Mixed precision, weights that stay on the CPU, whole weights after the forward pass, and two copies of parts."""
    size = dist.get_world_size()
    copies = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copies", "parts")) if size > 2 else None
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for options in (
        {"mp_policy": mixed},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"reshard_after_forward": False},
        {"mesh": copies},
    ):
        for form in ("gradient", "proximal", "projected"):
            twin, model, memory = pair("llama", torch.float64, **options)
            made = [OPTIMIZERS["adamw"](own.parameters()) for own in (model, twin)]
            handles = [
                memsyn.protect(optimizer, own, memory, strength=5.0, form=form, every=2)
                for optimizer, own in zip(made, (model, twin), strict=True)
            ]
            for seed in (2, 3, 4):
                made[0].zero_grad()
                loss_of(model, share(batches("llama", torch.float64, seed))).backward()
                oracle(model, twin)
                for optimizer in made:
                    optimizer.step()
                with torch.no_grad():
                    loss_of(model, share(batches("llama", torch.float64, seed)))  # shows whole weights, if it may
                reports = [handle.report() for handle in handles]
                assert abs(reports[0].change - reports[1].change) <= 1e-4 * reports[1].change
            reshard(model)
            assert_same(model, twin, torch.float64, (options, form))


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
    assert float(memsyn.penalty(model, sharded_memory).detach()) == pytest.approx(0.0, abs=1e-12)


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


def trained(
    model: nn.Module, memory: memsyn.Memory, form: str, folder: Path | None = None
) -> tuple[torch.optim.Optimizer, memsyn.Protection]:
    """Protection of a model; resumed from a folder if there is one."""
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    handle = memsyn.protect(optimizer, model, memory, strength=5.0 if folder is None else 1.0, form=form, every=2)
    if folder is not None:
        weights, states = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": states, "protection": handle.state_dict()}
        torch.distributed.checkpoint.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        handle.load_state_dict(state["protection"])
    return optimizer, handle


def check_save() -> None:
    """Save while steps wait, then go on: the others must come to the same weights."""
    for form in ("gradient", "proximal", "projected"):
        _, model, memory = pair("llama", torch.float64)
        optimizer, handle = trained(model, memory, form)
        for seed in (2, 3, 4):
            step(model, optimizer, share(batches("llama", torch.float64, seed)))
        weights, states = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": states, "protection": handle.state_dict()}
        if form != "projected":
            assert all(isinstance(own, DTensor) for own in state["protection"]["importance"].values())
        torch.distributed.checkpoint.save(state, checkpoint_id=FOLDER / form)
        for seed in (5, 6):
            step(model, optimizer, share(batches("llama", torch.float64, seed)))
        handle.flush()
        found = dict(values(model))
        if dist.get_rank() == 0:
            torch.save(found, FOLDER / f"{form}.pt")
    dist.barrier()


def go_on(model: nn.Module, memory: memsyn.Memory, form: str, own_share: Callable[[Tensor], Tensor]) -> None:
    """Go on from what other processes saved, and compare with how they went on."""
    optimizer, handle = trained(model, memory, form, FOLDER / form)
    assert handle.strength == 5.0
    for seed in (5, 6):
        step(model, optimizer, own_share(batches("llama", torch.float64, seed)))
    handle.flush()
    assert handle.report().change is not None  # the memory is the same
    expected = torch.load(FOLDER / f"{form}.pt")
    for name, mine in values(model):
        assert torch.allclose(mine, expected[name], rtol=1e-9, atol=1e-11), (form, name)


def check_load() -> None:
    """What four processes saved goes on in these."""
    for form in ("gradient", "proximal", "projected"):
        _, model, memory = pair("llama", torch.float64)
        go_on(model, memory, form, share)


def go_on_alone() -> None:
    """The same in one process with plain tensors, without a process group."""
    for form in ("gradient", "proximal", "projected"):
        twin = built("llama", torch.float64)
        go_on(twin, memory_of(twin, "llama", torch.float64), form, lambda data: data)


def check_state() -> None:
    """A state of another memory, whole or in parts: it is taken over, and outputs are not predicted any more."""
    for whole in (True, False):
        twin, model, memory = pair("layers", torch.float64)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        handle = memsyn.protect(optimizer, model, memory, strength=5.0, form="proximal")
        other = sharded(copy.deepcopy(twin))
        with torch.no_grad():
            for own in (twin, other):
                next(own.parameters()).add_(0.1)
        near = [memory.select(exclude="8.*"), memory.select(exclude="8.*")][0]
        moved = replace(
            near, anchor={n: p.detach() for n, p in (twin if whole else other).named_parameters() if n in near.anchor}
        )
        assert handle.report().change == 0.0
        handle.load_state_dict({**handle.state_dict(), "anchor": moved.anchor, "importance": moved.importance})
        report = handle.report()
        assert report.change is None
        assert "another memory" in report.unknown
        expected = 5.0 * sum(
            float((memory.importance[n] * (p.detach() - memory.anchor[n]).square()).sum())
            for n, p in twin.named_parameters()
            if n in moved.anchor
        )
        assert handle.value() == pytest.approx(expected, rel=1e-9)
        assert report.penalty == pytest.approx(expected, rel=1e-9)
        handle.remove()


def check_refusals() -> None:
    """What cannot be projected in parts is an error by name, or a warning, in all processes."""

    torch.manual_seed(0)

    def refused(model: nn.Module, data: Tensor, says: str, rank: int | None = 4, **options: Any) -> None:
        factors = memsyn.measure(model, [data], estimator="kronecker", progress=False)
        memory = memsyn.Memory.empty().consolidate(model, factors, rank=rank)
        fully_shard(model, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(memsyn.ProtectionError, match=says):
            memsyn.protect(optimizer, model, memory)

    grouped = nn.Sequential(nn.Conv2d(10, 10, 3, groups=5), nn.Flatten(), nn.Linear(10, 2))
    refused(
        grouped,
        torch.randn(4, 10, 3, 3),
        r"5 groups of 0.weight do not divide evenly .* exclude=\['0.weight', '0.bias'\]",
    )
    columns = {"shard_placement_fn": lambda p: Shard(1) if p.shape == (8, 8) else None}
    plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2, bias=False))
    refused(copy.deepcopy(plain), torch.randn(4, 8), r"0.weight is placed as Shard\(dim=1\)", **columns)
    for form in ("gradient", "proximal"):
        plain_steps(plain, form, **columns)
    biased = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    refused(
        biased, torch.randn(4, 6), "0.bias is not cut between processes as 0.weight is", ignored_params={biased[0].bias}
    )
    limits = held_layers.SMALL_SUM, held_layers.SMALL_SHARE
    held_layers.SMALL_SUM, held_layers.SMALL_SHARE = 0, 8
    turned = nn.Sequential(nn.Linear(6, 4), Conv1D(12, 4), nn.Linear(12, 2))
    refused(
        turned,
        torch.randn(4, 6),
        r"1.weight is cut between processes along its inputs, of which the memory keeps 5 directions of 5",
    )
    _, model, memory = pair("llama", torch.float64)
    with pytest.warns(memsyn.OutputSideWarning, match=r"15 matrices .* are projected by their inputs alone"):
        handle = memsyn.protect(torch.optim.SGD(model.parameters(), lr=0.1), model, memory)
    handle.remove()
    held_layers.SMALL_SUM, held_layers.SMALL_SHARE = limits
    _, model, memory = pair("layers", torch.float64)
    for form in ("gradient", "projected"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = memsyn.protect(optimizer, model, memory, form=form)
        optimizer.zero_grad()
        loss_of(model, share(batches("layers", torch.float64, 2))).backward()
        first = model[3].weight
        first.grad = first.grad.redistribute(placements=[Replicate()])
        with pytest.raises(memsyn.ProtectionError, match=r"3.weight is placed as .*Shard.* as .*Replicate"):
            optimizer.step()
        handle.remove()
    wide = fully_shard(nn.Linear(8, 5, bias=False), shard_placement_fn=lambda p: Shard(1))
    small = memsyn.Memory({"weight": torch.zeros(4, 8)}, {"weight": torch.ones(4, 8)})
    with pytest.raises(memsyn.ModelError, match=r"a tensor of shape \(5, 8\) is cut along another dimension than 0"):
        memsyn.penalty(wide, small)
    for groups in (3, 4) if dist.get_world_size() == 4 else (4,):  # of three groups, the last process holds none
        grouped_steps(groups)


def plain_steps(model: nn.Module, form: str, **options: Any) -> None:
    """The penalty forms take parameters that are cut along any dimension."""
    twin, data = copy.deepcopy(model).double(), torch.randn(8, 8, dtype=torch.float64)
    memory = memsyn.Memory.empty().consolidate(twin, memsyn.measure(twin, [data], progress=False))
    model = fully_shard(copy.deepcopy(twin), **options)
    for own, batch in ((model, share(data)), (twin, data)):
        optimizer = torch.optim.AdamW(own.parameters(), lr=0.1)
        memsyn.protect(optimizer, own, memory, form=form, strength=5.0)
        for _ in range(2):
            step(own, optimizer, batch)
    assert_same(model, twin, torch.float64, form)


def grouped_steps(groups: int) -> None:
    """A grouped convolution is projected group by group."""
    layers = nn.Conv2d(2 * groups, 3 * groups, 3, groups=groups), nn.Flatten(), nn.Linear(3 * groups, 2)
    twin = nn.Sequential(*layers).double()
    data = torch.randn(8, 2 * groups, 3, 3, dtype=torch.float64)
    factors = memsyn.measure(twin, [data], estimator="kronecker", progress=False)
    memory = memsyn.Memory.empty().consolidate(twin, factors, rank=2)
    model = fully_shard(copy.deepcopy(twin))
    for own, batch in ((model, share(data)), (twin, data)):
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        memsyn.protect(optimizer, own, memory, every=2)
        for _ in range(2):
            step(own, optimizer, batch)
    assert_same(model, twin, torch.float64, "groups")


def check_adapters() -> None:
    """LoRA under fully_shard, fresh and not: each form that is for it, beside one process."""
    for form, kind, fresh in (
        ("gradient", "adamw", False),
        ("gradient", "sgd", True),
        ("projected", "adamw", True),
        ("projected", "sgd", False),
    ):
        base = built("llama", torch.float64)
        memory = memory_of(base, "llama", torch.float64).select(only="*proj*")
        torch.manual_seed(7)
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=fresh)
        twin = get_peft_model(base, config).double()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.3 if parameter.requires_grad else 1.0)
        model = copy.deepcopy(twin)
        for block in (*model.base_model.model.model.layers, model):
            fully_shard(block)
        made, handles = [], []
        for own in (model, twin):
            made.append(OPTIMIZERS[kind]([p for p in own.parameters() if p.requires_grad]))
            handles.append(memsyn.protect(made[-1], own, memory, strength=5.0, form=form, every=2))
        for seed in (2, 3):
            data = batches("llama", torch.float64, seed)
            step(model, made[0], share(data))
            step(twin, made[1], data)
        assert_same(model, twin, torch.float64, (form, kind, fresh))
        reports = [handle.report() for handle in handles]
        for mine, expected in (
            ("penalty", "penalty"),
            ("bound", "bound"),
            ("num_weights", "num_weights"),
            ("held", "held"),
            ("change", "change"),
        ):
            mine, expected = getattr(reports[0], mine), getattr(reports[1], expected)
            assert mine == pytest.approx(expected, rel=1e-9, nan_ok=True)
        assert reports[0].change
        penalties = [float(memsyn.penalty(own, memory).detach()) for own in (model, twin)]
        assert penalties[0] == pytest.approx(penalties[1], rel=1e-9)
        for handle in handles:
            handle.remove()
        with pytest.raises(memsyn.OptionError, match=r"q_proj.weight is cut between processes: use form='gradient'"):
            memsyn.protect(made[0], model, memory, form="proximal")
        handle = memsyn.protect(made[0], model, replace(memory, directions=None))
        assert handle.form == "gradient"
        handle.remove()
        name = "model.layers.0.self_attn.q_proj.weight"
        fewer = memsyn.Memory({name: memory.anchor[name][:5]}, {name: memory.importance[name][:5]})
        with pytest.raises(memsyn.ProtectionError, match=r"has adapters, and has more rows than the memory knows"):
            memsyn.protect(made[0], model, fewer)


def check_still() -> None:
    """A part that does not move in one process, beside one that does: both damp the change together."""
    twin, model, _ = pair("layers", torch.float64)
    used = {"forward": lambda own, x: own(x)[:, :2], "estimator": "kronecker", "progress": False}
    memory = memsyn.Memory.empty().consolidate(
        twin, memsyn.measure(twin, [batches("layers", torch.float64, 1)], **used)
    )
    for own, batch in (
        (model, share(batches("layers", torch.float64, 2))),
        (twin, batches("layers", torch.float64, 2)),
    ):
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        memsyn.protect(optimizer, own, memory, every=2, form="projected")
        for _ in range(4):
            optimizer.zero_grad()
            own(batch)[:, 0].square().mean().backward()
            optimizer.step()
    assert_same(model, twin, torch.float64, "still")


def check_converted() -> None:
    """After `protect`, the same parameters get other memory, and then another dtype too."""
    for form in ("gradient", "proximal", "projected"):
        for convert in (lambda own: own.double().float(), lambda own: own.double()):
            twin, model, memory = pair("layers", torch.float32)
            for own in (model, twin):
                optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
                handle = memsyn.protect(optimizer, own, memory, strength=5.0, form=form, every=2)
                convert(own)
                dtype = next(own.parameters()).dtype
                for seed in (2, 3):
                    data = batches("layers", dtype, seed)
                    step(own, optimizer, share(data) if own is model else data)
                handle.remove()
            assert_same(model, twin, torch.float32, (form, dtype))


def in_parts(memory: memsyn.Memory, model: nn.Module) -> memsyn.Memory:
    """A memory as one that was measured under fully_shard: DTensors of the parameters' placement."""
    places = dict(model.named_parameters())

    def cut(name: str, own: Tensor) -> Tensor:
        return distribute_tensor(own, places[name].device_mesh, places[name].placements)

    assert memory.directions is not None
    diagonal = {n: replace(own, squares=cut(n, own.squares)) for n, own in memory.directions.diagonal.items()}
    assert diagonal
    return replace(
        memory,
        anchor={name: cut(name, own) for name, own in memory.anchor.items()},
        importance={name: cut(name, own) for name, own in memory.importance.items()},
        directions=replace(memory.directions, diagonal=diagonal),
    )


def check_memory_in_parts() -> None:
    """A sharded memory protects as the whole one does, also a model of another placement, or none."""
    for form in ("gradient", "proximal", "projected"):
        twin, model, memory = pair("mixtral", torch.float64)
        other = copy.deepcopy(twin)
        parts = in_parts(memory, model)
        reports = []
        for own, held in ((model, parts), (twin, memory), (other, parts)):
            optimizer = OPTIMIZERS["adamw"](own.parameters())
            handle = memsyn.protect(optimizer, own, held, strength=5.0, form=form, every=2)
            for seed in (2, 3):
                data = batches("mixtral", torch.float64, seed)
                step(own, optimizer, share(data) if own is model else data)
            reports.append(handle.report())
            state = handle.state_dict()
            handle.load_state_dict(state)
            assert handle.report().change == pytest.approx(reports[-1].change, rel=1e-9)
            handle.remove()
        assert_same(model, twin, torch.float64, form)
        assert_same(other, twin, torch.float64, form)
        assert reports[0].change == pytest.approx(reports[1].change, rel=1e-9)
        assert reports[2].change == pytest.approx(reports[1].change, rel=1e-9)


def check_exception() -> None:
    """Lightning tells the callback of the process that failed alone: it must not wait for the others."""
    _, model, memory = pair("llama", torch.float64)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    handle = memsyn.protect(optimizer, model, memory, every=5)
    step(model, optimizer, share(batches("llama", torch.float64, 2)))
    callback = MemsynCallback(memory)
    callback.protections = [handle]
    if dist.get_rank() == 0:
        callback.on_exception(None, None, RuntimeError())
    dist.barrier()
    handle.remove()


FOLDER = Path(os.environ.get("SHARDED_FOLDER", "."))

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
