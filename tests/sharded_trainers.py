"""Trainers that cut the model by `fully_shard`, each with its two lines; started by test_sharded_trainers.py.

    accelerate launch --config_file tests/fsdp2.yaml tests/sharded_trainers.py FOLDER [name of a check ...]

Accelerate has no FSDP on CPUs: without a word, it takes DistributedDataParallel. So it is told here that the two
processes have GPUs, and then cuts the model as it does there, on the CPU.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import memsyn
from memsyn.integrations import lightning as in_lightning
from memsyn.integrations.transformers import MemsynCallback
from memsyn.sharding.exchange import gathered
from memsyn.sharding.parts import any_sharded

NUM_WORDS = 13
SIZES = {
    "vocab_size": NUM_WORDS,
    "hidden_size": 16,
    "intermediate_size": 25,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attn_implementation": "eager",
    "use_cache": False,
}


def a_llama(*, tied: bool = False) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def texts(seed: int, count: int) -> Tensor:
    return torch.randint(NUM_WORDS, (count, 5), generator=torch.Generator().manual_seed(seed))


def share(rows: Tensor) -> Tensor:
    """The rows of this process: each second one."""
    return rows[dist.get_rank() :: dist.get_world_size()]


def old_memory(estimator: str, *, tied: bool = False) -> memsyn.Memory:
    """What this process measures alone, on the whole model: as from a file."""
    model = a_llama(tied=tied)
    found = memsyn.measure(model, [{"input_ids": texts(1, 8)}], estimator=estimator, progress=False)
    return memsyn.Memory.empty().consolidate(model, found)


def whole(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: gathered(tensor) for name, tensor in tensors}


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, own in expected.items():
        gap = float((found[name] - own).norm() / own.norm().clamp(min=1e-12))
        assert gap < tolerance, f"{name}: {gap}"


class OnGpus:
    """Lets Accelerate believe that the processes have GPUs."""

    def __enter__(self) -> None:
        self.begin = begin = PartialState.__init__

        def begun(state: PartialState, cpu: bool = False, **options: Any) -> None:
            begin(state, cpu, **options)
            if state.distributed_type == DistributedType.MULTI_CPU:
                state.distributed_type = DistributedType.MULTI_GPU

        PartialState.__init__ = begun  # type: ignore[method-assign]
        self.forget()

    def __exit__(self, *error: object) -> None:
        PartialState.__init__ = self.begin  # type: ignore[method-assign]
        self.forget()

    @staticmethod
    def forget() -> None:
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()


def check_accelerate_says_nothing_on_cpus() -> None:
    """What docs/trainers.md says: without a GPU, the model is not cut, and is measured and protected all the same."""
    OnGpus.forget()
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(a_llama())
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    assert isinstance(model, nn.parallel.DistributedDataParallel)


def check_accelerate(estimator: str, tied: bool) -> None:
    """Measured, protected with accumulation and clipping, and measured again, as one process does."""
    with OnGpus():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = a_llama(tied=tied)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        assert accelerator.is_fsdp2  # by the file that `accelerate launch` has read
        assert isinstance(model, FSDPModule)
        twin = a_llama(tied=tied)
        other = torch.optim.AdamW(twin.parameters(), lr=1e-2)
        found = memsyn.measure(model, [{"input_ids": share(texts(1, 8))}], estimator=estimator, progress=False)
        expected = memsyn.measure(twin, [{"input_ids": texts(1, 8)}], estimator=estimator, progress=False)
        if estimator == "mas":
            check_same(whole(found.sums.items()), expected.sums, 1e-5)
        memory = memsyn.Memory.empty().consolidate(twin, expected)
        handle = memsyn.protect(optimizer, model, memory, strength=1.0, form="auto")
        alone = memsyn.protect(other, twin, memory, strength=1.0, form="auto")
        for seed in range(2, 5):
            rows = texts(seed, 8)
            for half in (rows[:4], rows[4:]):
                with accelerator.accumulate(model):
                    own = share(half)
                    accelerator.backward(model(input_ids=own, labels=own).loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
            twin(input_ids=rows, labels=rows).loss.backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            other.step()
            other.zero_grad()
        for own_handle in (handle, alone):
            own_handle.flush()
        check_same(whole(model.named_parameters()), dict(twin.named_parameters()), 1e-3)
        assert handle.report().held == pytest.approx(alone.report().held, rel=1e-2)


def trained_by_transformers(folder: Path, estimator: str, cut: bool) -> Trainer:
    """Three steps of the Trainer, and the memory when they have ended."""
    rows = texts(2, 16)
    options = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}} if cut else {}
    arguments = TrainingArguments(
        str(folder / f"{cut}"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    callback = MemsynCallback(old_memory(estimator), strength=1.0)
    trainer = Trainer(a_llama(), arguments, train_dataset=data, callbacks=[callback])  # type: ignore[arg-type]
    trainer.train()
    assert any_sharded(list(trainer.model.parameters())) == cut
    assert callback.memory.num_samples == 8 + 12
    trainer.found = callback.memory
    return trainer


def check_transformers(folder: Path, estimator: str) -> None:
    """Cut by the Trainer, the weights, the memory and the logs are those of whole models in two processes."""
    OnGpus.forget()
    expected = trained_by_transformers(folder, estimator, False)
    with OnGpus():
        found = trained_by_transformers(folder, estimator, True)
        check_same(whole(found.model.named_parameters()), dict(expected.model.named_parameters()), 1e-3)
        pairs = zip(found.state.log_history[:3], expected.state.log_history[:3], strict=True)
        for own, other in pairs:
            assert own.keys() == other.keys()
            for name in (key for key in other if key == "loss" or key.startswith("memsyn/")):
                assert own[name] == pytest.approx(other[name], rel=1e-2, abs=1e-4), name
        if estimator == "mas":
            check_same(whole(found.found.importance.items()), expected.found.importance, 1e-3)
        # The file of the sharded run is read by one process, as that of the other.
        found.found.save(folder / "cut.memsyn.safetensors")
        dist.barrier()
        kept = memsyn.Memory.load(folder / "cut.memsyn.safetensors")
        assert kept.names == expected.found.names
        dist.barrier()


class Module(pl.LightningModule):
    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self.net, self.cut = a_llama(), cut

    def configure_model(self) -> None:
        if self.cut and not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.net(input_ids=input_ids).logits
        return logits

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trained_by_lightning(folder: Path, strategy: Any, cut: bool) -> tuple[Module, memsyn.Memory]:
    old = old_memory("mas")
    old = memsyn.Memory(
        *({f"net.{name}": own for name, own in values.items()} for values in (old.anchor, old.importance))
    )
    callback = in_lightning.MemsynCallback(old, strength=1.0)
    module = Module(cut=cut)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=3,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, torch.utils.data.DataLoader(texts(2, 16), batch_size=2))
    assert any_sharded(list(module.parameters())) == cut
    return module, callback.memory


def check_lightning(folder: Path) -> None:
    expected, kept = trained_by_lightning(folder, "ddp", False)
    found, own = trained_by_lightning(folder, ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), True)
    check_same(whole(found.named_parameters()), dict(expected.named_parameters()), 1e-3)
    check_same(whole(own.importance.items()), kept.importance, 1e-3)


def check_old_fsdp() -> None:
    """Lightning's FSDPStrategy is the old one, for GPUs alone; what it makes is an error that says what to use."""
    with pytest.raises(ValueError, match="The strategy `fsdp` requires a GPU accelerator"):
        pl.Trainer(accelerator="cpu", devices=2, strategy=FSDPStrategy())
    old = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    with pytest.raises(memsyn.ModelError, match="in Lightning the ModelParallelStrategy"):
        memsyn.measure(old, [torch.zeros(2, 4)], progress=False)


def check_observer(folder: Path) -> None:
    model = a_llama()
    fully_shard(model)
    for onlookers in (False, True):
        with pytest.raises(memsyn.ModelError, match="cannot be observed while it serves"):
            memsyn.Observer(model, folder / f"store-{dist.get_rank()}", onlookers=onlookers)


def main(folder: Path, names: list[str]) -> None:
    dist.init_process_group("gloo")
    warnings.simplefilter("ignore")  # of the trainers: many, and not ours
    checks: dict[str, Callable[[], None]] = {
        "accelerate, mas": lambda: check_accelerate("mas", False),
        "accelerate, kronecker, tied": lambda: check_accelerate("kronecker", True),
        "accelerate, cpu": check_accelerate_says_nothing_on_cpus,
        "transformers, mas": lambda: check_transformers(folder, "mas"),
        "transformers, kronecker": lambda: check_transformers(folder, "kronecker"),
        "old FSDP": check_old_fsdp,
        "lightning": lambda: check_lightning(folder),
        "observer": lambda: check_observer(folder),
    }
    for name in names or checks:
        checks[name]()
        print(f"<{dist.get_rank()} is done: {name}>", file=sys.stderr, flush=True)
    os._exit(0)  # all is checked: threads of torch were once seen to abort the interpreter's own way out


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
