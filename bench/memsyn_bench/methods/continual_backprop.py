"""Continual backpropagation: hidden units of little use start afresh while a task is learned.

Owns which units there are, and their use. The package ccbp-pytorch owns what is replaced and when.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from memsyn import ModelError
from memsyn_bench.extras import import_extra
from memsyn_bench.methods.method import Method, TaskTraining

REPLACEMENT_RATE = 1e-4
"""The share of mature units that each step replaces: the largest that the authors' code tries on permuted MNIST."""
MATURITY = 100
"""Steps for which a new unit is safe."""
UTILITY_DECAY = 0.99


@dataclass(frozen=True)
class HiddenUnits:
    """The units of one layer: the rows of `layer`'s weight, after `activation`; `outgoing` reads them."""

    name: str
    layer: nn.Linear | nn.Conv2d
    activation: nn.Module
    outgoing: nn.Linear | nn.Conv2d


@final
class ContinualBackprop(Method):
    """Fine-tuning; each step replaces the mature units of least utility (Dohare et al. 2024, Algorithm 1).

    The utility of unit i is a running mean, decay 0.99, of mean |h_i| sum_k |w_ik|, with its activation h over a batch
    (and positions) and its outgoing weights w. A new unit has fresh incoming weights and outgoing weights of zero.
    The package divides each batch's utilities by their mean over the layer, and gives a new unit the mean utility.

    In a network with a head for each task, the last layer's units are judged by the present task's head, which alone
    is set to zero. Scales and shifts of a normalisation stay.
    """

    def __init__(self) -> None:
        super().__init__()
        self._units: list[HiddenUnits] = []
        self._use: dict[int, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._wrapper: Any = None

    def begin(self, training: TaskTraining) -> None:
        """Follow the activations, and continue with the ages and utilities of the task before."""
        package = import_extra("ccbp_pytorch", purpose="continual-backprop", install="memsyn-bench[continual-backprop]")
        self._units = list(hidden_units(training))
        self._hooks = [own.activation.register_forward_hook(self._keep(own)) for own in self._units]
        configs = [
            package.NeuronConfig(param=own.layer.weight, bias=own.layer.bias, outgoing_param=own.outgoing.weight)
            for own in self._units
        ]

        def fresh(weight: Tensor) -> Tensor:
            bound = 1 / math.sqrt(weight[0].numel())
            return weight.uniform_(-bound, bound, generator=training.method_generator)

        self._wrapper = package.CCBP(
            _SteppedOptimizer(training.optimizer),
            neuron_configs=configs,
            continuous=False,
            replacement_rate=REPLACEMENT_RATE,
            reset_interval=1,
            maturity_steps=MATURITY,
            utility_ema_decay=UTILITY_DECAY,
            utility_fn=lambda config: self._use[id(config.param)],
            init_fn=fresh,
        )
        for own, state in zip(self._units, self._wrapper.neuron_states.values(), strict=True):
            state.update({key: value.clone() for key, value in self.kept.get(own.name, {}).items()})

    def _keep(self, units: HiddenUnits) -> Any:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            used = output.detach().abs().transpose(0, 1).flatten(1).mean(1)
            outgoing = units.outgoing.weight.detach().abs().transpose(0, 1).flatten(1).sum(1)
            self._use[id(units.layer.weight)] = used * outgoing

        return hook

    def after_step(self, training: TaskTraining) -> None:
        """Replace units."""
        # The package carries the fraction of a unit over and rounds it at random as well, which replaces more than the
        # rate says. Without the carried part the mean is right.
        self._wrapper.remainder.clear()
        seed = int(torch.randint(2**31, (), generator=training.method_generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._wrapper.step()

    def end(self, training: TaskTraining) -> None:
        """Keep ages, utilities and the first biases."""
        super().end(training)
        for hook in self._hooks:
            hook.remove()
        states = self._wrapper.neuron_states.values()
        self.kept = {
            own.name: {key: value.clone() for key, value in state.items() if value is not None}
            for own, state in zip(self._units, states, strict=True)
        }
        self._units, self._hooks, self._wrapper, self._use = [], [], None, {}


@final
class _SteppedOptimizer:
    """The loop's optimizer as the package wraps one, except that the loop has made the step already."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    def step(self, closure: None = None) -> None:
        """Nothing is left to do."""


def hidden_units(training: TaskTraining) -> Iterator[HiddenUnits]:
    """The layers of a backbone that is a plain stack: each Linear or Conv2d with an nn.ReLU before the next one.

    Raises:
        ModelError: there is none, or a layer does not read the units of the layer before.
    """
    heads = training.model.heads
    head = heads[training.index] if len(heads) > 1 else heads[0]
    assert isinstance(head, nn.Linear)
    layer: tuple[str, nn.Linear | nn.Conv2d] | None = None
    activation: nn.Module | None = None
    num_found = 0
    for name, module in [*training.model.body.named_modules(), ("the head", head)]:
        if isinstance(module, nn.ReLU):
            activation = module
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            if layer is not None and activation is not None:
                if layer[1].weight.shape[0] != module.weight.shape[1]:
                    raise ModelError(
                        f"continual-backprop needs a plain stack of layers, and {name} reads "
                        f"{module.weight.shape[1]} inputs after the {layer[1].weight.shape[0]} units of {layer[0]}. "
                        "Choose another method for this network."
                    )
                num_found += 1
                yield HiddenUnits(layer[0], layer[1], activation, module)
            layer, activation = (name, module), None
    if not num_found:
        raise ModelError(
            "continual-backprop needs a backbone with nn.ReLU modules after its Linear or Conv2d layers, and there is "
            "none. Choose another method for this network."
        )
