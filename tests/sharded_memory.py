"""The memory of a process that measures a part of a model with 100 million weights, started by torchrun."""

import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import memsyn


def resident(what: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most since the last reset (VmHWM)."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    """Print the peak over what it should be: the part of the weights, two numbers for each, and one layer."""
    estimator = sys.argv[1]
    dist.init_process_group("gloo")
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=13,
        num_attention_heads=12,
        use_cache=False,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    num_weights = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    for own in model.model.layers:
        fully_shard(own)
    fully_shard(model)
    tokens = torch.randint(0, 8192, (2, 16))
    # What is loaded and allocated once, whatever the size of the model: the small model has the same layers, but narrow.
    before = resident("VmRSS")
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(0, 0.02)
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq.copy_(1.0 / 10000 ** (torch.arange(0, 64, 2) / 64))
    Path("/proc/self/clear_refs").write_text("5")
    found = memsyn.measure(model, [{"input_ids": tokens}] * 3, estimator=estimator, progress=False)
    peak = resident("VmHWM") - before
    part = 4 * num_weights / dist.get_world_size()
    expected = 3 * part + 4 * layer
    print(
        f"weights {num_weights / 1e6:.1f}M, layer {layer / 1e6:.1f}M, part {part / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, "
        f"expected {expected / 1e6:.0f} MB, ratio {peak / expected:.3f}, in parts {sum(v.to_local().numel() * 4 for v in found.sums.values() if hasattr(v, 'to_local')) / 1e6:.0f}",
        flush=True,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
