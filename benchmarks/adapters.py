"""What protection costs with adapters: a whole step of LoRA over the bare one, of a small Llama or of SmolLM2.

In one run and in turn, a step each, by the time of the process: LoRA with AdamW alone, and under `memsyn.protect` in
its forms. Prints a Markdown table: the median over the rounds of the ratio to the bare step beside it, its quartiles,
and by how many bytes the most that tensors hold during a step exceeds that of the bare step, per weight that adapters
change.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import memsyn
from memsyn_bench.language.model import load_smollm2
from passes import peak_of_tensors

FORMS = ("gradient", "proximal", "projected")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama() -> nn.Module:
    """20 million weights: 6 layers of width 448, and a table of 8,000 tokens that is the head too."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=448,
        intermediate_size=1344,
        num_hidden_layers=6,
        num_attention_heads=7,
        tie_word_embeddings=True,
    )
    network: nn.Module = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    return network


def memory_of(model: nn.Module, tokens: Tensor, form: str) -> memsyn.Memory:
    """An importance of random numbers, or directions that were measured."""
    if form == "projected":
        batch = {"input_ids": tokens}
        factors = memsyn.measure(model, [batch], estimator="inputs", progress=False)
        return memsyn.Memory.empty().consolidate(model, factors)
    parameters = dict(model.named_parameters())
    importance = {name: torch.rand_like(p) for name, p in parameters.items()}
    return memsyn.Memory({name: p.detach() for name, p in parameters.items()}, importance)


def trainer(wrapped: Any, memory: memsyn.Memory | None, form: str) -> Callable[[Tensor], None]:
    """One step of LoRA, protected or not."""
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)
    if memory is not None:
        memsyn.protect(optimizer, wrapped, memory, strength=10.0 if form == "projected" else 1e-3, form=form)

    def step(tokens: Tensor) -> None:
        optimizer.zero_grad()
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def seconds(step: Callable[[Tensor], None], tokens: Tensor) -> float:
    start = time.process_time()
    step(tokens)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="pairs of steps of each form (default 15)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default 8)")
    parser.add_argument("--samples", type=int, default=8, help="of 128 tokens in a batch (default 8)")
    parser.add_argument(
        "--smollm2", action="store_true", help="take SmolLM2-135M in place of a Llama of random weights"
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="of protection (default all)")
    options = parser.parse_args()
    model = load_smollm2().network if options.smollm2 else llama()
    tokens = torch.randint(8000, (options.samples, 128), generator=torch.Generator().manual_seed(1))
    wrapped = peft.get_peft_model(deepcopy(model), peft.LoraConfig(r=options.rank, target_modules=TARGETS)).train()
    adapted = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[-2] in TARGETS)
    steps = {form: trainer(deepcopy(wrapped), memory_of(model, tokens, form), form) for form in options.forms}
    bare = trainer(deepcopy(wrapped), None, "")
    times: list[float] = []
    ratios: dict[str, list[float]] = {form: [] for form in options.forms}
    for turn in tqdm(range(options.rounds + 1), unit="round"):
        for form, step in steps.items():
            plain, own = seconds(bare, tokens), seconds(step, tokens)
            if turn >= 1:  # the first one makes the optimizer's state
                times.append(plain)
                ratios[form].append(own / plain)
    bytes_of_bare = peak_of_tensors(partial(bare, tokens))
    weights = sum(p.numel() for p in model.parameters())
    print(f"{weights:,} weights, {adapted:,} with adapters of rank {options.rank}; {tokens.numel()} tokens a step")
    print(f"bare step {1000 * statistics.median(times):.0f} ms; {platform.processor() or platform.machine()}")
    print("| form | over the bare step | bytes more in the step, per weight |\n|---|---|---:|")
    for form, found in ratios.items():
        low, middle, high = statistics.quantiles(found, n=4)
        more = max(0, peak_of_tensors(partial(steps[form], tokens)) - bytes_of_bare) / adapted
        print(f"| {form} | {middle:.3f}x ({low:.3f}-{high:.3f}) | {more:.2f} |")


if __name__ == "__main__":
    main()
