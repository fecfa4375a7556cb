"""Optimizers that are not torch's, from the libraries that people use, and stand-ins for those that need a GPU."""

from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import schedulefree
import torch
from lion_pytorch import Lion
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

Make = Callable[[Any], Any]


class CopiedAdam(Optimizer):
    """Adam as people copy it into their own file: the state has other names, and `step` is its own."""

    def __init__(self, parameters: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group["lr"], *group["betas"])
        return loss

    def _step_one(self, parameter: nn.Parameter, lr: float, beta1: float, beta2: float) -> None:
        state = self.state[parameter]
        if not state:
            state.update(t=0, m=torch.zeros_like(parameter), v=torch.zeros_like(parameter))
        state["t"] += 1
        state["m"].lerp_(parameter.grad, 1 - beta1)
        state["v"].lerp_(parameter.grad.square(), 1 - beta2)
        mean, square = state["m"] / (1 - beta1 ** state["t"]), state["v"] / (1 - beta2 ** state["t"])
        parameter.sub_(lr * mean / (square.sqrt() + 1e-8))


class Adam8bit(CopiedAdam):
    """Keeps its moments in 8 bits, as that of bitsandbytes does: a scale for each tensor, and 256 levels."""

    def _step_one(self, parameter: nn.Parameter, lr: float, beta1: float, beta2: float) -> None:
        super()._step_one(parameter, lr, beta1, beta2)
        for name in ("m", "v"):
            moment = self.state[parameter][name]
            scale = moment.abs().max() / 127 + 1e-30
            self.state[parameter][name] = (moment / scale).round() * scale


class ZeroingSGD(SGD):
    """A step that ends in zero_grad()."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.zero_grad()
        return loss


class ZeroingAdam(Adam):
    """A step that ends in zero_grad()."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.zero_grad()
        return loss


class PlainSubclass(SGD):
    """Does not override `step`."""


UNKNOWN: dict[str, Make] = {
    "schedulefree.SGDScheduleFree": lambda p: schedulefree.SGDScheduleFree(p, lr=0.05),
    "schedulefree.AdamWScheduleFree": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01),
    "schedulefree.RAdamScheduleFree": lambda p: schedulefree.RAdamScheduleFree(p, lr=0.02),
    "pytorch_optimizer.Lion": lambda p: pytorch_optimizer.Lion(p, lr=0.001),
    "lion_pytorch.Lion": lambda p: Lion(p, lr=0.001, decoupled_weight_decay=False),
    "pytorch_optimizer.AdaFactor": lambda p: pytorch_optimizer.AdaFactor(p, lr=0.003, scale_parameter=False),
    "pytorch_optimizer.AdaBelief": lambda p: pytorch_optimizer.AdaBelief(p, lr=0.003),
    "pytorch_optimizer.Prodigy": lambda p: pytorch_optimizer.Prodigy(p, lr=1.0),
    "torch Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.003),
    "torch RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "torch NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "torch ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "torch RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.001),
    "copied Adam": lambda p: CopiedAdam(p, lr=0.01),
    "8-bit Adam": lambda p: Adam8bit(p, lr=0.01),
    "SGD with zero_grad in step": lambda p: ZeroingSGD(p, lr=0.05),
    "Adam with zero_grad in step": lambda p: ZeroingAdam(p, lr=0.01),
}
"""Optimizers whose `step` memsyn does not know."""

WRAPPERS: dict[str, Make] = {
    "Lookahead of SGD": lambda p: pytorch_optimizer.Lookahead(SGD(p, lr=0.05, momentum=0.5), k=5),
    "Lookahead of AdamW": lambda p: pytorch_optimizer.Lookahead(AdamW(p, lr=0.01, weight_decay=0.0), k=5),
    "Lookahead of Lion": lambda p: pytorch_optimizer.Lookahead(pytorch_optimizer.Lion(p, lr=0.002), k=5),
    "SAM of SGD": lambda p: pytorch_optimizer.SAM(p, SGD, rho=0.001, lr=0.05),
    "SAM of AdamW": lambda p: pytorch_optimizer.SAM(p, AdamW, rho=0.001, lr=0.01, weight_decay=0.0),
    "schedulefree.ScheduleFreeWrapper": lambda p: schedulefree.ScheduleFreeWrapper(SGD(p, lr=0.05), momentum=0.9),
    "pytorch_optimizer.ScheduleFreeWrapper": lambda p: pytorch_optimizer.ScheduleFreeWrapper(SGD(p, lr=0.05)),
}
"""Optimizers around an inner one."""


def set_mode(optimizer: Any, mode: str) -> None:
    """Call `train()` or `eval()` where an optimizer has them."""
    switch = getattr(optimizer, mode, None)
    if switch is not None:
        switch()


def descend(model: nn.Module, optimizer: Any, loss: Callable[[], Tensor], steps: int) -> None:
    """The usual loop; with SAM, the loop of its documentation."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = loss()
        found.backward()
        return found

    set_mode(optimizer, "train")
    for _ in range(steps):
        closure()
        optimizer.step(*([closure] if isinstance(optimizer, pytorch_optimizer.SAM) else []))
    set_mode(optimizer, "eval")
