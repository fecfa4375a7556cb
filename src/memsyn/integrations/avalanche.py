"""A plugin for Avalanche that takes the place of its `MASPlugin`, with exact importance. Needs `avalanche-lib`.

Owns when the plugin measures and where the penalty joins the loss. Both are as in Avalanche's plugin.
"""

from typing import Any, final

from avalanche.models.utils import avalanche_forward
from avalanche.training.plugins.strategy_plugin import SupervisedPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader

from memsyn import Memory, OptionError, measure, penalty


@final
class MASPlugin(SupervisedPlugin):  # type: ignore[misc]
    """Memory Aware Synapses, with the arguments of `avalanche.training.plugins.MASPlugin`.

    The loss and the rule are the same: lambda_reg sum Omega (theta - theta*)^2 is added to the loss, and after an
    experience Omega becomes alpha Omega + (1 - alpha) Omega', with the Omega' of this experience. What differs is
    Omega': the absolute value is taken for each sample, not for the mean of a batch, so that the batch size does not
    matter; and the model is measured in evaluation mode, so that dropout is off and running statistics stay.

    Args:
        lambda_reg: the strength of the penalty. Importance by sample is larger than by batch, so take a smaller one
            than with Avalanche's plugin.
        alpha: the weight of the old importance, from 0 to 1.
        verbose: whether to show a progress bar while measuring.

    Raises:
        OptionError: lambda_reg is negative.

    Example:
        >>> from memsyn.integrations.avalanche import MASPlugin                                   # doctest: +SKIP
        >>> Naive(model=model, optimizer=optimizer, plugins=[MASPlugin(lambda_reg=0.1)])          # doctest: +SKIP
    """

    def __init__(self, lambda_reg: float = 1.0, alpha: float = 0.5, verbose: bool = False) -> None:
        super().__init__()
        if not lambda_reg >= 0:
            raise OptionError(f"lambda_reg must be a number of at least 0; got {lambda_reg!r}.")
        self.lambda_reg, self.alpha, self.verbose = lambda_reg, alpha, verbose
        self.memory = Memory.empty()
        """What the plugin remembers. Save it, or protect it in a loop of your own."""

    def before_backward(self, strategy: Any, **given: Any) -> None:
        """Add the penalty to the loss."""
        if self.memory.names:
            strategy.loss += self.lambda_reg * penalty(strategy.model, self.memory)

    def after_training_exp(self, strategy: Any, **given: Any) -> None:
        """Measure the experience, and consolidate."""
        data = strategy.experience.dataset
        loader = DataLoader(data, batch_size=strategy.train_mb_size, collate_fn=getattr(data, "collate_fn", None))

        def forward(model: nn.Module, batch: Any) -> Tensor:
            tasks = batch[-1]
            # As a number, since a tensor makes a model with several heads choose rows by the data, which is slow.
            same = len(tasks) > 0 and bool((tasks == tasks[0]).all())
            output: Tensor = avalanche_forward(model, batch[0].to(strategy.device), int(tasks[0]) if same else tasks)
            return output

        found = measure(strategy.model, loader, forward=forward, progress=self.verbose)
        self.memory = self.memory.consolidate(strategy.model, found, rule="ema", decay=self.alpha)
