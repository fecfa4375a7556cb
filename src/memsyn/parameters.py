"""The names of a model's parameters, the same in memory, in errors and on disk.

Owns unwrapping (DataParallel, DistributedDataParallel, torch.compile) and the canonical name of every
parameter. Must not change the model.
"""

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DataParallel, DistributedDataParallel or a compiled model."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":  # its class lives in torch._dynamo: slow to import
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def canonical_name(name: str) -> str:
    """The name of a parameter without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the unwrapped model by its canonical name; a tied one by its first name."""
    return {canonical_name(name): parameter for name, parameter in unwrap(model).named_parameters()}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by canonical name."""
    return {name: p for name, p in named_parameters(model).items() if p.requires_grad}
