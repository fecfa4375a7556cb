"""What a language model still knows: its loss on texts, and its answers to questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from memsyn_bench.language.model import END, Frozen, Tokenizer, chat
from memsyn_bench.language.questions import Question

ANSWER_TOKENS = 12
SCORED_AT_ONCE = 8


def token_loss(logits: Tensor, tokens: Tensor, skipped: int = 0) -> Tensor:
    """The mean cross-entropy of each next token, in nats; the first `skipped` tokens are given."""
    first = max(skipped, 1)
    return F.cross_entropy(logits[:, first - 1 : -1].flatten(0, 1).float(), tokens[:, first:].flatten())


def text_loss(model: Frozen, blocks: Tensor, skipped: int = 0) -> float:
    """The mean loss over all blocks, each with as many tokens."""
    losses = [(len(own), float(token_loss(model.logits(own), own, skipped))) for own in blocks.split(SCORED_AT_ONCE)]
    return sum(number * loss for number, loss in losses) / len(blocks)


def answers(model: Frozen, tokenizer: Tokenizer, questions: Sequence[Question]) -> list[str]:
    """The likeliest answers, in the order of the questions. Those of as many tokens are asked together: no padding."""
    places: dict[int, list[int]] = defaultdict(list)
    prompts = [tokenizer.encode(chat(question.text)) for question in questions]
    for place, prompt in enumerate(prompts):
        places[len(prompt)].append(place)
    found = [""] * len(questions)
    for own in places.values():
        new = model.continued(torch.tensor([prompts[place] for place in own]), ANSWER_TOKENS)
        for place, tokens in zip(own, new.tolist(), strict=True):
            found[place] = tokenizer.decode(tokens).split(END)[0].strip()
    return found


def right_answers(model: Frozen, tokenizer: Tokenizer, questions: Sequence[Question]) -> tuple[bool, ...]:
    """For each question whether its answer is right."""
    found = answers(model, tokenizer, questions)
    return tuple(question.is_right(answer) for question, answer in zip(questions, found, strict=True))
