"""Protect a language model of which each process holds a part: measure, save, load, protect, train, save a checkpoint.

Needs no network and no GPU. pip install 'memsyn[transformers]', then: torchrun --nproc-per-node 2 examples/fsdp.py
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import memsyn


def sharded_model() -> LlamaForCausalLM:
    torch.manual_seed(0)  # the same weights in all processes
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, use_cache=False, **sizes))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.lm_head)  # a large vocabulary is a unit of its own
    return fully_shard(model)


def texts(seed: int) -> list[dict[str, torch.Tensor]]:
    """Batches that differ between processes."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    return [{"input_ids": torch.randint(96, (4, 8), generator=generator)} for _ in range(3)]


def folder_of_all() -> Path:
    """A new folder of the first process, known to all."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    return Path(folder[0])


def main() -> None:
    model, folder = sharded_model(), folder_of_all()

    # Each process measures its share of the old data, and has the memory of all of it: its part of every tensor.
    importance = memsyn.measure(model, texts(seed=1), progress=False)
    memory = memsyn.Memory.empty().consolidate(model, importance, label="old texts")
    memory.save(folder / "model.memsyn.safetensors")  # one file: the first process writes it
    dcp.save({"memory": memory.state_dict()}, checkpoint_id=folder / "memory")  # or each process its part

    # In the next run, which may have another number of processes.
    memory = memsyn.Memory.load(folder / "model.memsyn.safetensors", like=model)
    same = memsyn.Memory.from_checkpoint(folder / "memory", key="memory", like=model)
    assert memsyn.fingerprint(same.anchor) == memsyn.fingerprint(memory.anchor)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = memsyn.protect(optimizer, model, memory)  # the second line of two
    for batch in texts(seed=2)[:2]:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    report = handle.report()  # together: it adds up over processes

    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states, "protection": handle.state_dict()}
    dcp.save(state, checkpoint_id=folder / "step-2")
    if dist.get_rank() == 0:
        print(f"{importance.num_samples} samples measured by {dist.get_world_size()} processes")
        print(f"protected: {report.num_weights} weights, penalty {report.penalty:.3g}")
        print(f"kept: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    dist.init_process_group("gloo")  # on GPUs: "nccl", and torch.cuda.set_device(local rank)
    main()
    dist.barrier()
    dist.destroy_process_group()
