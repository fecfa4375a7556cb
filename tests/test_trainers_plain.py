"""README's plain loop on a small GPT in plain torch, trained as nanoGPT trains its own.

Tied tables, a decay for matrices alone, accumulation, clipping, and a warm-up with a cosine. docs/trainers.md names
these tests in its table.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memsyn

WIDTH, LENGTH, VOCABULARY = 64, 9, 18
COUNT, JUMP = 16, 17  # the first token of a text says how it goes on; tokens 0 to 15 are the numbers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.c_attn(x).split(WIDTH, dim=2)
        query, key, value = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH, bias=False), Attention(), nn.LayerNorm(WIDTH, bias=False)
        self.c_fc, self.c_proj = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    """Logits and loss; the logits of the last token alone if there are no targets."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight  # tied
        for parameter in (p for p in self.parameters() if p.dim() == 2):
            nn.init.normal_(parameter, std=0.05)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def all_logits(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(*batch)[0]


def texts(first: int, step: int) -> tuple[Tensor, Tensor]:
    """Tokens, and the next ones as targets."""
    rows = torch.tensor([[first, *((start + step * k) % 16 for k in range(9))] for start in range(16)])
    return rows[:, :-1], rows[:, 1:]


OLD, NEW = texts(COUNT, 1), texts(JUMP, 3)


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.99))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    steps: int,
    rate: float = 1e-3,
    before_step: Callable[[], object] = lambda: None,
) -> None:
    """The loop of nanoGPT: the learning rate is set by hand, two small batches make one, and the norm is clipped."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        part = min((step + 1) / 10, 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * part
        for _ in range(2):
            rows = torch.randint(16, (8,), generator=generator)
            _, loss = model(data[0][rows], data[1][rows])
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before_step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Of the tokens that the ones before determine: all but the first number."""
    right = all_logits(model, data).argmax(-1) == data[1]
    return float(right[:, 1:].float().mean())


@pytest.fixture(scope="module")
def start() -> nn.Module:
    """A model that counts in ones."""
    torch.manual_seed(0)
    model = GPT()
    train(model, optimizer_of(model), OLD, 150, rate=3e-3)
    return model


def test_it_learns_new_texts_and_keeps_the_old_ones(start: nn.Module, tmp_path: Path) -> None:
    free, model = copy.deepcopy(start), copy.deepcopy(start)
    train(free, optimizer_of(free), NEW, 150)
    factors = memsyn.measure(model, [OLD], estimator="kronecker", forward=all_logits, progress=False)
    memsyn.Memory.empty().consolidate(model, factors).save(tmp_path / "model.memsyn.safetensors")
    memory = memsyn.Memory.load(tmp_path / "model.memsyn.safetensors", like=model)
    optimizer = optimizer_of(model)
    handle = memsyn.protect(optimizer, model, memory)
    train(model, optimizer, NEW, 150)
    handle.remove()
    assert model.wte.weight is model.lm_head.weight
    assert accuracy(start, OLD) == 1
    assert accuracy(free, OLD) < 0.5
    assert accuracy(model, OLD) > 0.9
    assert min(accuracy(free, NEW), accuracy(model, NEW)) > 0.95


def test_it_equals_the_penalty_as_a_term(start: nn.Module) -> None:
    """Clipping is for the gradient of the loss alone."""
    start = copy.deepcopy(start).double()
    importance = memsyn.measure(start, [OLD], forward=all_logits, progress=False)
    memory = memsyn.Memory.empty().consolidate(start, importance)
    model, twin, free = (copy.deepcopy(start) for _ in range(3))
    optimizer = optimizer_of(model)
    handle = memsyn.protect(optimizer, model, memory, strength=0.5, form="gradient")
    train(model, optimizer, NEW, 20)
    handle.remove()

    def term() -> Tensor:  # each weight once, also the tied one
        own = dict(twin.named_parameters())
        return sum(((memory.importance[n] * (own[n] - memory.anchor[n]) ** 2).sum() for n in own), torch.zeros(()))

    train(twin, optimizer_of(twin), NEW, 20, before_step=lambda: (0.5 * term()).backward())
    train(free, optimizer_of(free), NEW, 20)
    begun, unprotected = dict(start.named_parameters()), dict(free.named_parameters())
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        moved = float((expected - begun[name]).detach().norm())
        assert float((found - expected).detach().norm()) < 1e-9 * moved, name
        assert float((unprotected[name] - expected).detach().norm()) > 1e-2 * moved, name


def test_the_report_follows_the_training(start: nn.Module) -> None:
    """`report()` between steps, where README's loop looks whether to stop."""
    factors = memsyn.measure(start, [OLD], estimator="kronecker", forward=all_logits, progress=False)
    model = copy.deepcopy(start)
    optimizer = optimizer_of(model)
    handle = memsyn.protect(optimizer, model, memsyn.Memory.empty().consolidate(model, factors), strength=0.1)
    changes = [handle.report().change]
    train(model, optimizer, NEW, 40, before_step=lambda: changes.append(handle.report().change))
    handle.remove()
    old, new = all_logits(start, OLD).detach(), all_logits(model, OLD).detach()
    measured = float(((new - old).square().sum() / old.square().sum()).sqrt())
    assert changes[0] == 0
    assert 0 < changes[2] < changes[-1]
    assert measured / 6.3 < changes[-1] < 6.3 * measured  # docs/prediction.md
