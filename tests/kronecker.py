"""Factors and memories made by hand, of a model whose numbers can be worked out on paper."""

import torch
from torch import nn

from memsyn import KroneckerFactors, Memory
from memsyn.matrices import Layout, Matrix

ROUTES = {
    "0.weight": "Kronecker factors", "0.bias": "Kronecker factors", "1.weight": "Kronecker factors",
    "2.weight": "rule", "2.bias": "unused",
}  # fmt: skip
MATRICES = {
    "0.weight": Matrix("0.weight", "0.bias", Layout(1, 2, 2, False, False)),
    "1.weight": Matrix("1.weight", None, Layout(1, 1, 2, False, False)),
}


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False), nn.LayerNorm(1))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(1.0)
    return made


def factors(direction: int = 0, *, num_samples: int = 4, outputs: bool = True) -> KroneckerFactors:
    """Layer 0 meets inputs in one direction of three. Layer 1 has A = diag(0.5, 1.5), and so 1.6 filled directions."""
    sums = {
        "inputs/0.weight": torch.diag_embed(8 * nn.functional.one_hot(torch.tensor([direction]), 3).float()),
        "outputs/0.weight": torch.eye(2)[None] * num_samples,
        "positions/0.weight": torch.tensor(8.0, dtype=torch.float64),
        "inputs/1.weight": torch.diag_embed(torch.tensor([[2.0, 6.0]])),
        "outputs/1.weight": torch.ones(1, 1, 1) * num_samples,
        "positions/1.weight": torch.tensor(4.0, dtype=torch.float64),
        "diagonal/2.weight": torch.ones(1),
        "diagonal/2.bias": torch.zeros(1),
    }
    if outputs:
        return KroneckerFactors(sums, num_samples, MATRICES, ROUTES)
    sums = {name: total for name, total in sums.items() if not name.startswith("outputs/")}
    return KroneckerFactors(sums, num_samples, MATRICES, ROUTES, magnitude="second moments of inputs")


def memory(*directions: int, outputs: bool = True) -> Memory:
    """A consolidation for each direction."""
    found = Memory.empty()
    for direction in directions:
        found = found.consolidate(model(), factors(direction, outputs=outputs), label=f"task {direction}")
    return found
