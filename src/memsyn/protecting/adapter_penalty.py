"""The penalty on weights that adapters change: lambda sum Omega (W + s B A - W*)^2, one layer at a time.

Owns its gradient with respect to the adapters, the proximal step of A and B, and when they act in a step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memsyn.adapters import AdaptedLayer, LowRank
from memsyn.errors import MemsynError, ProtectionError
from memsyn.parameters import wide_dtype
from memsyn.protecting.optimizers import PROXIMAL, StepSize, known_kind, step_size
from memsyn.protecting.penalty import BUCKET, ProtectedWeights, known_rows
from memsyn.sharding.exchange import gathered, placed_like, redistributed_like
from memsyn.sharding.parts import is_sharded, local_part
from memsyn.values.memory import Memory
from memsyn.weights_in_effect import adapted_weights


class AdapterSlot(NamedTuple):
    """A protected weight that adapters change."""

    name: str
    layer: AdaptedLayer
    anchor: Tensor
    """theta*, in the dtype of all computation: float32 at least."""
    omega: Tensor

    def in_effect(self) -> Tensor:
        """The rows of the weight in effect that the memory knows, differentiable."""
        weight, bias = self.layer.in_effect()
        return known_rows(bias if bias is not None and self.name.endswith(".bias") else weight, self.omega)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weight."""
        return is_sharded(self.layer.base.weight)

    def protected(self) -> ProtectedWeights:
        """The weight in effect beside the memory's values, or the parts that this process holds."""
        with torch.no_grad():
            return ProtectedWeights(*map(local_part, (self.in_effect(), self.anchor, self.omega)))


def adapter_slots(
    model: nn.Module, memory: Memory, device: torch.device | None, dtype: torch.dtype | None
) -> list[AdapterSlot]:
    """The weights of a memory that adapters change.

    Args:
        model: the model with adapters.
        memory: with anchor and importance, under the names of the base model.
        device: where anchor and importance are held; None: beside the weights.
        dtype: of the importance; None: its own.

    Raises:
        ProtectionError: a weight trains, and its adapters too.
    """
    found = []
    for name, layer in adapted_weights(model, memory.importance.keys()):
        base = layer.base.weight
        if base.requires_grad and layer.parameters():
            raise ProtectionError(
                f"{name} trains, and its adapters too: of two that make one weight, the penalty holds only one. Freeze "
                f"the weight, as PEFT does, or leave it free: exclude={name!r}."
            )
        place = base.device if device is None else device
        wide = torch.float32 if layer.is_quantised else wide_dtype(base)
        omega = placed_like(memory.importance[name], base)
        held = placed_like(memory.anchor[name], base).to(place, wide)
        if local_part(held).data_ptr() == local_part(base).data_ptr():
            held = held.clone()  # merging adapters moves the base weight
        if is_sharded(base) and omega.shape != base.shape:
            raise ProtectionError(
                f"{name} is cut between processes, has adapters, and has more rows than the memory knows. Leave it "
                f"free: exclude={name!r}."
            )
        found.append(AdapterSlot(name, layer, held, omega.to(place, dtype or omega.dtype)))
    return found


class _Factors(NamedTuple):
    """An adapter of LoRA as matrices, restricted to what the memory knows: it adds scale * up @ down."""

    up: Tensor
    down: Tensor
    scale: float

    @property
    def transposed(self) -> "_Factors":
        """The factors of the transposed weight."""
        return _Factors(self.down.T, self.up.T, self.scale)


@final
class _Problem(NamedTuple):
    """A weight (m, n) as W + sum of s B A, its anchor and its importance; views of what the model holds."""

    base: Tensor
    anchor: Tensor
    omega: Tensor
    factors: list[_Factors]

    @classmethod
    def of(cls, slot: AdapterSlot, terms: list[LowRank]) -> "_Problem":
        turned, known = slot.layer.is_transposed, len(slot.omega)

        def matrix(tensor: Tensor) -> Tensor:
            return tensor.T if turned else tensor.flatten(1)

        factors = []
        for term in terms:
            up, down = term.up.detach().flatten(1), term.down.detach().flatten(1)
            factors.append(_Factors(up if turned else up[:known], down[:, :known] if turned else down, term.scale))
        base = known_rows(slot.layer.base_weight().detach(), slot.omega)
        return cls(matrix(base), matrix(slot.anchor), matrix(slot.omega), factors)

    @property
    def transposed(self) -> "_Problem":
        """The same of the transposed weight."""
        return _Problem(self.base.T, self.anchor.T, self.omega.T, [own.transposed for own in self.factors])

    def rows(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """W + s B A - W* and Omega, of some rows, in the anchor's dtype."""
        dtype, place = self.anchor.dtype, self.base.device
        moved = self.base[start:end].to(dtype) - self.anchor[start:end].to(place)
        for own in self.factors:
            moved.addmm_(own.up[start:end].to(dtype), own.down.to(dtype), alpha=own.scale)
        return moved, self.omega[start:end].to(place, dtype)


def _gradients(slot: AdapterSlot, factor: float) -> tuple[Tensor, Iterable[tuple[nn.Parameter, Tensor]]]:
    """sum Omega (W_eff - W*)^2, and the gradients of factor times it with respect to the adapters.

    With G = 2 factor Omega (W + s B A - W*): dB = s G A^T and dA = s B^T G. For DoRA and other kinds of adapters, by
    autograd through the weight in effect. So it is if the weight is sharded: torch then gathers A, which is small, and
    sums its gradient over processes.
    """
    if slot.layer.is_low_rank() and not slot.is_sharded:
        return _low_rank_gradients(slot, factor)
    with torch.enable_grad():
        moved = slot.in_effect().to(slot.anchor.dtype) - slot.anchor.to(slot.layer.base.weight.device)
        value = (slot.omega.to(moved) * moved.square()).sum()
    wanted = slot.layer.parameters()
    found = torch.autograd.grad(factor * value, wanted, allow_unused=True) if value.requires_grad else ()
    pairs = [(p, g) for p, g in zip(wanted, found, strict=False) if g is not None]
    return gathered(value), [(p, redistributed_like(g, p)) for p, g in pairs]


@torch.no_grad()
def _low_rank_gradients(slot: AdapterSlot, factor: float) -> tuple[Tensor, list[tuple[nn.Parameter, Tensor]]]:
    terms = slot.layer.terms() or []
    problem, found = _Problem.of(slot, terms), []
    moved, omega = problem.rows(0, len(problem.base))
    weighted = omega * moved
    value = torch.sum(moved.mul_(weighted))
    for term, own in zip(terms, problem.factors, strict=True):
        twice = 2 * factor * own.scale
        found.append((term.up, _in_place_of(term.up, twice * (weighted @ own.down.to(weighted).T))))
        found.append((term.down, _in_place_of(term.down, twice * (own.up.to(weighted).T @ weighted))))
    return value, found


def _in_place_of(parameter: Tensor, known: Tensor) -> Tensor:
    """A gradient in a parameter's shape, zero for the rows or columns of which the memory knows nothing."""
    whole = parameter.flatten(1).shape
    padded = nn.functional.pad(known, (0, whole[1] - known.shape[1], 0, whole[0] - known.shape[0]))
    return padded.reshape(parameter.shape)


def _pull_(slot: AdapterSlot, strength: float | Tensor, sizes: Mapping[int, StepSize]) -> None:
    """The proximal step of B, then of A, of each adapter of LoRA, in place.

    Given A, the penalty is quadratic in each row b of B, so its proximal step is a linear system of r unknowns: with d
    the row of W + s B A - W*, P the optimizer's divisor and k = 2 size strength,

        b <- b - (P + k s^2 A diag(Omega) A^T)^-1 k s A (Omega d)

    For A the same holds with rows and columns exchanged. No strength makes it diverge. With an infinite strength, the
    weights in effect stand as near to the anchor as A and B can bring them.
    """
    terms = slot.layer.terms() or []
    problem = _Problem.of(slot, terms)
    for index, term in enumerate(terms):
        for parameter, own in ((term.up, problem), (term.down, problem.transposed)):
            if id(parameter) in sizes:
                size, preconditioner = sizes[id(parameter)]
                divisor = torch.ones_like(parameter, dtype=torch.float64)
                if preconditioner is not None:
                    divisor = preconditioner.root * preconditioner.squares.double().sqrt() + preconditioner.eps
                matrix = divisor.flatten(1)
                _pull_rows_(own, index, 2 * size * strength, matrix.T if parameter is term.down else matrix)


_JITTER: Final = 1e-6
"""Added to the curvature, relative to its mean: a rounding error of float32 must not make it negative."""


def _pull_rows_(problem: _Problem, index: int, factor: float | Tensor, divisor: Tensor) -> None:
    up, down, scale = problem.factors[index]
    wide, rank = down.to(problem.anchor.dtype), down.shape[0]
    step = max(1, BUCKET // max(down.shape[1], rank**2))
    pairs = torch.triu_indices(rank, rank, device=down.device).split(max(1, BUCKET // down.shape[1]), 1)
    for start in range(0, len(up), step):
        moved, omega = problem.rows(start, start + step)
        gradient = (moved.mul_(omega) @ wide.T).double().mul_(factor * scale)
        curvature = torch.empty(len(moved), rank, rank, dtype=torch.float64, device=down.device)
        for one, other in pairs:  # A diag(Omega) A^T, of which one half is computed
            part = (omega @ (wide[one] * wide[other]).T).double().mul_(factor * scale**2)
            curvature[:, one, other] = curvature[:, other, one] = part
        diagonal = curvature.diagonal(dim1=1, dim2=2)
        diagonal += divisor[start : start + len(moved)] + _JITTER * diagonal.mean(1, keepdim=True)
        lower = torch.linalg.cholesky_ex(curvature).L
        up[start : start + len(moved)] -= torch.cholesky_solve(gradient.unsqueeze(2), lower).squeeze(2).to(up)


@final
class AdapterPenalty:
    """The penalty on the weights that adapters change, inside the steps of an optimizer.

    Args:
        slots: the weights.
    """

    def __init__(self, slots: Sequence[AdapterSlot]) -> None:
        self.slots = slots
        self._stepped: set[int] = set()
        """id of a parameter of adapters that the step in progress moves."""
        self._before, self._num_grown = 0.0, 0

    def begin(self, optimizer: Optimizer, form: str, strength: float) -> bool:
        """The gradients are there, and the step comes next. Returns whether it moves a protected weight.

        Raises:
            ProtectionError: the penalty diverges, or an adapter was added that the proximal form cannot hold.
        """
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        moving = [p for slot in self.slots for p in slot.layer.parameters() if p.grad is not None and id(p) in groups]
        self._stepped = {id(p) for p in moving}
        if form == PROXIMAL:
            check_low_rank(self.slots, ProtectionError)
        elif moving:
            self._add_gradients(optimizer, strength, {id(p): bool(groups[id(p)].get("maximize")) for p in moving})
        return bool(moving)

    def _add_gradients(self, optimizer: Optimizer, strength: float, maximized: Mapping[int, bool]) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler when a fused optimizer unscales
        total = torch.zeros(())
        for slot in self.slots:
            value, gradients = _gradients(slot, strength)
            total = total.to(value) + value
            for parameter, gradient in gradients:
                if id(parameter) in maximized and parameter.grad is not None:
                    sign = -1.0 if maximized[id(parameter)] else 1.0
                    gradient = gradient * sign if scale is None else gradient * (sign * scale.to(gradient.device))
                    parameter.grad.add_(gradient.to(parameter.grad))
        if known_kind(optimizer) in (None, torch.optim.SGD) and not isinstance(optimizer, torch.optim.LBFGS):
            self._check_growth(float(total), strength)

    def _check_growth(self, value: float, strength: float) -> None:
        """A penalty that grows by more than a fifth in each of many steps in a row diverges."""
        # The penalty on weights that drift away evenly grows as t^2: by less than a fifth from step 11 on.
        self._num_grown = self._num_grown + 1 if value > _GROWTH * self._before > 0 else 0
        self._before = value
        if self._num_grown >= _TOO_MANY or not math.isfinite(value):
            raise ProtectionError(
                f"strength {strength:g} makes the penalty on the weights of adapters diverge: it has grown in each of "
                f"the last steps. Load the adapters from before, and use a smaller strength or learning rate, or SGD, "
                "Adam or AdamW with form='proximal', which no strength makes diverge."
            )

    @torch.no_grad()
    def pull(self, optimizer: Optimizer, strength: float | Tensor) -> None:
        """The proximal step of what the last step has moved."""
        groups = {id(p): (group, p) for group in optimizer.param_groups for p in group["params"]}
        found = {key: step_size(optimizer, *groups[key]) for key in self._stepped if key in groups}
        sizes = {key: size for key, size in found.items() if size is not None}
        for slot in self.slots if sizes else ():
            _pull_(slot, strength, sizes)


_GROWTH: Final = 1.2
"""A penalty that is so many times as large as before the last step may diverge."""

_TOO_MANY: Final = 20
"""After so many of such steps in a row it does."""


def check_low_rank(slots: Sequence[AdapterSlot], error: type[MemsynError]) -> None:
    """Refuse adapters for which there is no proximal step.

    Raises:
        OptionError, ProtectionError: as `error` says; names the first of them.
    """
    cut = [slot.name for slot in slots if slot.is_sharded]
    if cut:
        raise error(
            f"form='proximal' is for adapters that each process holds as a whole, and {cut[0]} is cut between "
            "processes: use form='gradient' or 'auto'."
        )
    others = [slot for slot in slots if not slot.layer.is_low_rank()]
    if others:
        raise error(
            f"form='proximal' is for LoRA, whose weight in effect is W + s B A, and {others[0].name} is adapted in "
            f"another way, by PEFT's {others[0].layer.kind}: use form='gradient' or 'auto'."
        )
