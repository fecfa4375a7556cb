"""How a language model learns a new domain without losing the old: a table of methods.

Owns what distinguishes them. The loop is in `learning`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from memsyn_bench.extras import import_extra
from memsyn_bench.language.model import INSTALL

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LORA_RANK = 8
PRESERVED = 0.5
"""The share of the singular directions that OSF keeps, its default."""

Extra = Literal["kl", "replay"]


@dataclass(frozen=True)
class LanguageMethod:
    """A method: at most one of a memory, an adapter and a further loss."""

    summary: str
    lr: float = 5e-4
    strength: float | None = None
    """The factor of what is protected; None: the default of `memsyn.protect`, or no strength at all."""
    estimator: str | None = None
    """What is measured for the memory, as `memsyn.measure` takes it."""
    rank: int | None = 64
    """How many directions of each matrix the memory keeps."""
    adapter: Callable[[nn.Module], Any] | None = None
    """network -> the network as peft trains it. Its change is merged into the weights after each domain."""
    extra: Extra | None = None
    """A further loss, times the strength."""


def _lora(network: nn.Module, layers: list[str]) -> Any:
    peft = import_extra("peft", purpose="this method", install=INSTALL)
    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=layers, task_type="CAUSAL_LM")
    return peft.get_peft_model(network, config)


def _osf(network: nn.Module) -> Any:
    peft = import_extra("peft", purpose="this method", install=INSTALL)
    return peft.get_peft_model(network, peft.OSFConfig(target_modules=ATTENTION + MLP, effective_rank=PRESERVED))


LANGUAGE_METHODS: dict[str, LanguageMethod] = {
    "finetune": LanguageMethod("all linear layers learn, nothing is protected", lr=1e-4),
    "lora": LanguageMethod(
        "LoRA of rank 8 on all linear layers", lr=1e-3, adapter=lambda network: _lora(network, ATTENTION + MLP)
    ),
    "lora-attention": LanguageMethod(
        "LoRA on attention alone", lr=1e-3, adapter=lambda network: _lora(network, ATTENTION)
    ),
    "lora-mlp": LanguageMethod("LoRA on the MLPs alone", lr=1e-3, adapter=lambda network: _lora(network, MLP)),
    "osf": LanguageMethod("PEFT's orthogonal subspace fine-tuning", adapter=_osf),
    "kl": LanguageMethod("KL divergence from the model before, on the new text", strength=1.0, extra="kl"),
    "replay": LanguageMethod("cross-entropy of the memory's text in each step", strength=1.0, extra="replay"),
    "mas": LanguageMethod("MAS: an importance of each weight", estimator="mas"),
    "projected-inputs": LanguageMethod("projection, directions of inputs alone", estimator="inputs"),
    "projected": LanguageMethod("projection, directions of inputs and outputs", estimator="kronecker"),
}
