"""A Llama of two small layers with random weights, and a tokenizer of single characters, in place of SmolLM2."""

import torch

from memsyn_bench.language.model import END, SEPARATOR, SYSTEM, Assistant
from memsyn_bench.language.questions import Question
from memsyn_bench.language.texts import Domain

SPECIAL = [END, SEPARATOR, "<|im_start|>", SYSTEM]
"""One token each, so that prompts stay short."""
NUM_TOKENS = 128

QUESTIONS = [
    Question("letters", "a b?", ("a",)),
    Question("letters", "c?", ("b", "c")),
    Question("digits", "1+1?", ("2",)),
]
DOMAINS = {
    "abc": Domain("the alphabet", lambda: ["abcdefgh " * 20, "hgfedcba " * 20, "aabbccdd " * 20]),
    "digits": Domain("digits", lambda: ["0123456789 " * 20, "9876543210 " * 20, "1133557799 " * 20]),
    "dots": Domain("marks", lambda: [".,.,:; " * 20, ";:.,!? " * 20, "!!??.. " * 20]),
}
ENGLISH = Domain("English", lambda: ["the quick brown fox " * 10, "jumps over the lazy dog " * 10])


class Characters:
    """Each character is a token, by its code; special tokens come first."""

    def encode(self, text):
        for number, special in enumerate(SPECIAL):
            text = text.replace(special, chr(number))
        return [ord(character) for character in text]

    def decode(self, tokens):
        return "".join(SPECIAL[token] if token < len(SPECIAL) else chr(token) for token in tokens)


def assistant(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=NUM_TOKENS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=0, bos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = LlamaForCausalLM(config).eval()
    return Assistant(network, Characters())
