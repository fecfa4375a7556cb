"""Statistics that outputs depend on and that no optimizer moves: BatchNorm's running mean and variance above all.

Owns which modules are kept as in evaluation and how, and the check whether statistics move while a model is protected.
Must not change a statistic.

A frozen module has an attribute `train` of its own, which hides the method of its class. So nothing runs in a forward
pass, and code that reads `module.training` (a fused operation, a compiled graph) sees what holds.
"""

from collections.abc import Iterable, Mapping, Set
from types import MethodType
from typing import Any, final
from warnings import warn
from weakref import WeakSet, finalize, ref

from torch import Tensor, nn
from torch.optim import Optimizer

from memsyn.errors import MovedStatisticsWarning, OptionError
from memsyn.parameters import canonical_name, moved_statistics, statistics, unwrap
from memsyn.torch_private import named_slots, persistent_buffers, version_of
from memsyn.values.memory import warn_of_moved_statistics


@final
class FrozenStatistics:
    """The handle of `freeze_statistics`; as a context manager it calls `remove()` at its end.

    Attributes:
        modules: names of the modules that are kept as in evaluation.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = tuple(modules)
        self._frozen: WeakSet[nn.Module] = WeakSet(modules.values())
        for module in self._frozen:
            own = vars(module).get("train")
            if not isinstance(own, _StaysInEvaluation):
                own = vars(module)["train"] = _StaysInEvaluation(module)
            own.num_handles += 1

    def remove(self) -> None:
        """Let the modules follow `train()` again, as the last call of it asked; a second call does nothing."""
        for module in list(self._frozen):
            own = vars(module).get("train")
            if isinstance(own, _StaysInEvaluation):
                own.num_handles -= 1
                if own.num_handles == 0:
                    own.end(module)
        self._frozen.clear()

    def __enter__(self) -> "FrozenStatistics":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@final
class _StaysInEvaluation:
    """Takes the place of a module's `train`: its children follow, the module itself stays in evaluation mode."""

    def __init__(self, module: nn.Module) -> None:
        self.num_handles = 0
        self._module = ref(module)
        self._wanted = module.training
        self._replaced = vars(module).get("train")
        """What somebody else had put into the same place."""
        module.training = False

    def __call__(self, mode: bool = True) -> nn.Module:
        module = self._module()
        assert module is not None  # the module holds this object, and not the other way round
        self._wanted = mode
        train = self._replaced or MethodType(type(module).train, module)
        train(mode)
        module.training = False
        return module

    def __reduce__(self) -> Any:
        # A copy of the module is not frozen. When copy and pickle restore this attribute, they have made the module
        # already, so that `getattr` finds the method of its class. A pickled model needs nothing of this package.
        return getattr, (self._module(), "train")

    def end(self, module: nn.Module) -> None:
        """Give the place back, and the mode that was asked for last."""
        if self._replaced is None:
            del vars(module)["train"]
        else:
            vars(module)["train"] = self._replaced
        module.training = self._wanted


def freeze_statistics(model: nn.Module, *, modules: Iterable[str] | None = None) -> FrozenStatistics:
    """Keep modules with running statistics as in evaluation, although the training loop calls `model.train()`.

    BatchNorm in train mode normalises by the statistics m, v of the batch, and moves its running statistics M and V:
    M <- (1 - momentum) M + momentum m. Outputs in evaluation depend on M and V, so they change while all weights stand
    still. A frozen BatchNorm computes (x - M) / sqrt(V + eps) gamma + beta in training too, and leaves M and V as they
    are; gamma and beta learn. Only these modules are in evaluation mode: dropout stays on elsewhere.

    `protect(..., freeze_statistics=True)` does this while it protects. Use this function with `penalty`, or for modules
    that memsyn does not know.

    Args:
        model: the model, wrapped or compiled or not.
        modules: names of the modules to freeze, as in `named_modules()`. By default all that hold `running_mean` and
            `running_var` (BatchNorm, SyncBatchNorm, InstanceNorm with `track_running_stats`, and their relatives), and
            all with a `spectral_norm`, whose power iteration moves the weights. A module that moves its buffers in
            evaluation too, such as an observer of quantisation, must be stopped by its own means.

    Returns:
        A handle with `remove()`, which is a context manager too. Copies of the model are not frozen.

    Raises:
        OptionError: the model has no module of that name.

    Example:
        >>> import torch, memsyn
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        >>> with memsyn.freeze_statistics(model) as frozen:
        ...     _ = model.train()(torch.ones(4, 2))
        ...     frozen.modules, model[1].running_mean.tolist()
        (('1',), [0.0, 0.0])
        >>> model[1].training
        True
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"expected freeze_statistics(model) with a torch.nn.Module, got a {type(model).__name__}.")
    present = {canonical_name(name): module for name, module in unwrap(model).named_modules()}
    if modules is None:
        return FrozenStatistics({name: module for name, module in present.items() if _has_running_statistics(module)})
    named = [modules] if isinstance(modules, str) else list(modules)
    missing = [name for name in named if name not in present]
    if missing:
        raise OptionError(
            f"modules must be names of submodules, and the model has none named {', '.join(map(repr, missing))}. "
            "named_modules() lists them."
        )
    return FrozenStatistics({name: present[name] for name in named})


def _has_running_statistics(module: nn.Module) -> bool:
    """Whether the module itself holds buffers that torch moves in train mode only.

    Told by the names of the buffers, so that subclasses and copies of torch's layers count too:

        BatchNorm, SyncBatchNorm, InstanceNorm    running_mean, running_var
        spectral_norm, by parametrization         _u, _v
        spectral_norm, old                        weight_u, weight_v, beside the parameter weight_orig
    """
    names = {name for name, buffer in persistent_buffers(module) if buffer.is_floating_point()}
    own = [name for name, _ in module.named_parameters(recurse=False)]
    hidden = [name.removesuffix("_orig") for name in own if name.endswith("_orig")]
    pairs = [{"running_mean", "running_var"}, {"_u", "_v"}, *({f"{name}_u", f"{name}_v"} for name in hidden)]
    return any(pair <= names for pair in pairs)


@final
class WatchedStatistics:
    """The statistics of a protected model: what the memory remembers of them, and whether they move.

    In a step only the buffers' versions are read. Values are compared after the first, second, fourth, ... step that
    changed a version, and after the first, second, fourth, ... step of all: BatchNorm writes without counting, unless
    it also counts its batches.

    Args:
        model: the protected model.
        remembered: the statistics of the memory. If there are none, those of the model as they are now.
        freeze: whether `freeze_statistics` holds while the optimizer is protected.
        ignored: names of statistics that are neither watched nor frozen: of layers that were left out.

    Warns:
        MovedStatisticsWarning: the model's statistics are not those that the memory remembers; later, once, that they
            move.
    """

    def __init__(self, model: nn.Module, remembered: Mapping[str, Tensor], *, freeze: bool, ignored: Set[str]) -> None:
        warn_of_moved_statistics(remembered, model, stacklevel=4)
        self._model, self._freeze, self._ignored = model, freeze, ignored
        self._frozen: FrozenStatistics | None = None
        self._hook: Any = None
        self.take(remembered)

    def take(self, remembered: Mapping[str, Tensor]) -> None:
        """Compare with these statistics from now on, and with the model's as they are where there are no others."""
        present = {name: own for name, own in statistics(self._model).items() if name not in self._ignored}
        held = {name: _held(values, present.get(name)) for name, values in remembered.items()}
        moved = set(moved_statistics(held, self._model))
        self._before = {
            name: held[name] if name in held and name not in moved else buffer.detach().clone()
            for name, buffer in present.items()
        }
        self.remembered = {**self._before, **held}
        own = [(module, dict(persistent_buffers(module))) for module in unwrap(self._model).modules()]
        self._places = [(place, name) for module, kept in own for place, name, _ in named_slots(module) if name in kept]
        self._seen, self._num_steps, self._num_changes = self._versions(), 0, 0

    def num_moved(self) -> int:
        """How many statistics are not as the memory remembers them."""
        return len(moved_statistics(self.remembered, self._model))

    def begin(self, optimizer: Optimizer) -> None:
        """Freeze if that was asked for, and watch after each step until something has moved."""
        if self._freeze:
            known = statistics(self._model)
            watched = {id(known[name]) for name in self._before if name in known}
            own = {
                canonical_name(name): module
                for name, module in unwrap(self._model).named_modules()
                if _has_running_statistics(module) and any(id(b) in watched for b in module.buffers(recurse=False))
            }
            self._frozen = FrozenStatistics(own)
            finalize(self, self._frozen.remove).atexit = False  # the optimizer was dropped, and its protection with it
        if self._before:
            self._hook = optimizer.register_step_post_hook(self._after_step)

    def end(self) -> None:
        """Stop watching, and let the modules follow `train()` again; a second call does nothing."""
        if self._hook is not None:
            self._hook.remove()
        if self._frozen is not None:
            self._frozen.remove()

    def _versions(self) -> list[int]:
        """Numbers that change when a buffer is written to or replaced; read in each step, so this must be fast."""
        buffers: list[Any] = [place.get(name) for place, name in self._places]
        try:
            versions = list(map(version_of, buffers))
        except (RuntimeError, AttributeError):  # made in inference mode, where torch does not count; or removed
            versions = []
        return [*map(id, buffers), *versions]

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        versions = self._versions()
        has_changed, self._seen = versions != self._seen, versions
        self._num_steps += 1
        self._num_changes += has_changed
        if _is_power_of_two(self._num_steps) or (has_changed and _is_power_of_two(self._num_changes)):
            moved = moved_statistics(self._before, self._model)
            if moved:
                self._hook.remove()
                warn(self._message(moved), MovedStatisticsWarning, stacklevel=3)

    def _message(self, moved: Iterable[str]) -> str:
        """What has moved, and the cure."""
        owners = list(dict.fromkeys(name.rpartition(".")[0] for name in moved))
        present = {canonical_name(name): module for name, module in unwrap(self._model).named_modules()}
        modules, first = "module" if len(owners) == 1 else "modules", owners[0] or "the model itself"
        known = [own for own in owners if own in present and _has_running_statistics(present[own])]
        if any(not isinstance(vars(present[own]).get("train"), _StaysInEvaluation) for own in known):
            cure = (
                "model.train() lets them move. Protect with freeze_statistics=True, or use "
                "memsyn.freeze_statistics(model), and load the old ones: "
                "model.load_state_dict(memory.statistics, strict=False)."
            )
        else:
            cure = (
                "If they move in train mode only, freeze them by name: "
                f"memsyn.freeze_statistics(model, modules={owners[:3]}). A module that moves its buffers in evaluation "
                "too, such as an observer of quantisation, must be stopped by its own means."
            )
        return (
            f"the statistics of {len(owners)} {modules} (the first is {first}) have moved since protection began. "
            f"Outputs on old data move with them, although the weights are protected. {cure}"
        )


def _held(values: Tensor, buffer: Tensor | None) -> Tensor:
    """Remembered values beside the buffer."""
    if buffer is None:
        return values
    values = values.to(buffer.device)
    # A memory made by hand may hold the buffer itself, which moves.
    return values.clone() if values.data_ptr() == buffer.data_ptr() else values


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
