"""One domain is learned: the training loop, its clock and its peak of memory.

Owns the loop, and when a memory is measured. What methods are is in `methods`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memsyn import Memory, measure, protect
from memsyn_bench.language.methods import LanguageMethod
from memsyn_bench.language.model import PRECISIONS, Frozen, let_linear_layers_learn
from memsyn_bench.language.scoring import token_loss
from memsyn_bench.language.texts import Text

MEASURED_AT_ONCE = 4
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Lesson:
    """How a domain is learned."""

    method: LanguageMethod
    lr: float
    strength: float | None
    steps: int
    batch_size: int
    precision: str


@dataclass(frozen=True, eq=False)
class Learned:
    """What came of a domain: the network as a plain one, and what it took."""

    network: nn.Module
    seconds: float
    peak_bytes: int | None


def remembered(memory: Memory, network: nn.Module, blocks: Tensor, method: LanguageMethod, label: str) -> Memory:
    """The memory with what the method measures on blocks of tokens; the same one for methods without."""
    if method.estimator is None:
        return memory
    let_linear_layers_learn(network)
    batches = [{"input_ids": own, "use_cache": False} for own in blocks.split(MEASURED_AT_ONCE)]
    found = measure(network, batches, estimator=method.estimator, progress=False)
    return memory.consolidate(network, found, label=label, rank=method.rank)


def learn(
    network: nn.Module, memory: Memory, new: Tensor, old: Text, lesson: Lesson, generator: torch.Generator
) -> Learned:
    """Learn from blocks of tokens of a new domain.

    Args:
        network: a plain network. It is changed.
        memory: what is protected.
        new: blocks of the domain, (N, T).
        old: the memory's text, for methods that replay it.
        lesson: how it is learned.
        generator: draws the batches; an adapter's first weights come from its seed.
    """
    method, dtype = lesson.method, PRECISIONS[lesson.precision]
    let_linear_layers_learn(network)
    _restart_peak()
    start = time.perf_counter()
    before = Frozen(network, lesson.precision) if method.extra == "kl" else None
    model = _adapted(network, method, generator)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lesson.lr)
    handle = protect(optimizer, model, memory, strength=lesson.strength) if memory.names else None
    model.train()
    batches, replayed = _drawn(new, lesson.batch_size, generator), _drawn(old.training, lesson.batch_size, generator)
    for _ in range(lesson.steps):
        tokens = next(batches)
        logits = _logits(model, tokens, dtype)
        loss = token_loss(logits, tokens)
        if before is not None:
            loss = loss + (lesson.strength or 0.0) * divergence(before.logits(tokens), logits)
        if method.extra == "replay":
            own = next(replayed)
            loss = loss + (lesson.strength or 0.0) * token_loss(_logits(model, own, dtype), own, old.skipped)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if handle is not None:
        handle.remove()
    plain = model if method.adapter is None else model.merge_and_unload()
    return Learned(plain.eval(), time.perf_counter() - start, _peak_bytes())


def _adapted(network: nn.Module, method: LanguageMethod, generator: torch.Generator) -> Any:
    """The network with its adapter. peft draws from the global generator, which is as before afterwards."""
    if method.adapter is None:
        return network
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        return method.adapter(network)


def divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """The mean over positions of KL(p || q), in nats: p is of the expected logits, q of the others."""
    old, new = expected.log_softmax(-1), logits.float().log_softmax(-1)
    return (old.exp() * (old - new)).sum(-1).mean()


def _logits(model: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _drawn(blocks: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches without end: each pass over the blocks in an order of its own. Incomplete batches are left out.

    The order is drawn from a generator of its own, so that two texts do not take numbers from each other.
    """
    own = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=generator)))
    while True:
        for chosen in torch.randperm(len(blocks), generator=own).split(batch_size):
            if len(chosen) == min(batch_size, len(blocks)):
                yield blocks[chosen]


def _restart_peak() -> None:
    """Let the kernel count this process's peak of memory anew. Only Linux has this."""
    if CLEAR.exists():
        CLEAR.write_text("5")


def _peak_bytes() -> int | None:
    """The most memory that the process has held since; None where the kernel does not say."""
    if not CLEAR.exists():
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    return None if found is None else 1024 * int(found[1])
