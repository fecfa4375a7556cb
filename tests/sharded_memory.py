"""The memory of a process that measures a part of a model with 100 million weights, started by torchrun."""

import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import memsyn
from memsyn.sharding.parts import local_part


def resident(what: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most since the last reset (VmHWM)."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def a_llama(width: int, layers: int) -> nn.Module:
    """A Llama without values, cut for all processes."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        use_cache=False,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    for own in model.model.layers:
        fully_shard(own)
    return fully_shard(model)


def with_values(model: nn.Module) -> nn.Module:
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            local_part(tensor).normal_(0, 0.02)
    return model


def peak_of(run: Callable[[], object]) -> int:
    """The most bytes that were resident while a function ran, beyond those before."""
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return resident("VmHWM") - before


def main() -> None:
    """Print the peak over what it should be: two numbers for each weight of the part, and what a plain pass needs."""
    estimator = sys.argv[1]
    dist.init_process_group("gloo")
    tokens = torch.randint(0, 8192, (2, 16))

    def measure(model: nn.Module) -> None:
        # Ten batches: after eight, there is a second set of sums.
        memsyn.measure(model, [{"input_ids": tokens}] * 10, estimator=estimator, progress=False)

    def plain(model: nn.Module) -> None:
        model(input_ids=tokens).logits.square().sum().backward()

    small = with_values(a_llama(36, 2))  # what is imported and allocated once, whatever the size of the model
    plain(small)
    measure(small)
    model = with_values(a_llama(576, 26))
    num_weights = sum(p.numel() for p in model.parameters())
    layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    part = 4 * num_weights // dist.get_world_size()
    own = peak_of(lambda: plain(model)) - part  # without the gradients, which are a number for each weight
    model.zero_grad()
    peak = peak_of(lambda: measure(model))
    sizes = {"part": part, "layer": layer, "plain": own, "peak": peak}
    words = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
    ratio, by_layer = (part + peak) / (3 * part + own), (part + peak) / (3 * part + layer)
    print(
        f"{num_weights / 1e6:.1f} million weights: {words}; ratio {ratio:.3f}, by one layer {by_layer:.3f}", flush=True
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
