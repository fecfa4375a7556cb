"""MASPlugin for Avalanche: its hooks as Avalanche calls them, and beside Avalanche's own where that is installed.

Avalanche needs torchvision, and so an environment of its own: see docs/trainers.md.
"""

import copy
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import memsyn

INSTALLED = importlib.util.find_spec("avalanche") is not None
MODULE = "memsyn.integrations.avalanche"


class MultiTask(nn.Module):
    """A head for each task, as Avalanche's MultiTaskModule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads = nn.Linear(4, 5), nn.ModuleList(nn.Linear(5, 2) for _ in range(2))

    def forward(self, x: Tensor, tasks: Any) -> Tensor:
        features = torch.tanh(self.body(x))
        if isinstance(tasks, int):
            return self.heads[tasks](features)
        return torch.stack([self.heads[int(task)](row) for row, task in zip(features, tasks, strict=True)])


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class, with stand-ins for the two names of Avalanche that it uses."""
    for name in ("avalanche", "avalanche.models", "avalanche.training", "avalanche.training.plugins"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    utils = types.ModuleType("avalanche.models.utils")
    utils.avalanche_forward = lambda model, x, t: model(x, t) if isinstance(model, MultiTask) else model(x)
    base = types.ModuleType("avalanche.training.plugins.strategy_plugin")
    base.SupervisedPlugin = type("SupervisedPlugin", (), {})
    for module in (utils, base):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE).MASPlugin
    sys.modules.pop(MODULE, None)


def experience(task: int, count: int = 10) -> TensorDataset:
    generator = torch.Generator().manual_seed(task)
    data = torch.randn(count, 4, generator=generator)
    return TensorDataset(data, (data.sum(1) > 0).long(), torch.full((count,), task))


def strategy_of(model: nn.Module, size: int = 4) -> types.SimpleNamespace:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return types.SimpleNamespace(model=model, optimizer=optimizer, train_mb_size=size, device=torch.device("cpu"))


def train(strategy: types.SimpleNamespace, plugin: Any, data: TensorDataset) -> None:
    """Avalanche's loop, as far as the plugin sees it."""
    strategy.experience = types.SimpleNamespace(dataset=data)
    for _ in range(5):
        x, y, tasks = data.tensors
        output = strategy.model(x, tasks) if isinstance(strategy.model, MultiTask) else strategy.model(x)
        strategy.loss = F.cross_entropy(output, y)
        strategy.optimizer.zero_grad()
        plugin.before_backward(strategy)
        strategy.loss.backward()
        strategy.optimizer.step()
    plugin.after_training_exp(strategy)


def by_definition(model: nn.Module, data: TensorDataset) -> dict[str, Tensor]:
    """The mean over samples of |d ||y_k||^2 / d theta|; 0 of a head that no sample uses."""
    parameters = dict(model.named_parameters())
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x, _, task in data:
        output = model(x[None], task[None]) if isinstance(model, MultiTask) else model(x[None])
        grads = torch.autograd.grad(output.square().sum(), [*parameters.values()], allow_unused=True)
        for name, grad in zip(found, grads, strict=True):
            found[name] += 0 if grad is None else grad.abs() / len(data)
    return found


@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize("kind", [MultiTask, lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))])
def test_the_plugin_by_its_definition(kind: Any, size: int, plugin: Any) -> None:
    torch.manual_seed(0)
    model = kind()
    mine, strategy = plugin(0.5, alpha=0.3), strategy_of(model, size)
    expected, anchor = {}, {}
    for task in range(2):
        before = copy.deepcopy(model)
        train(strategy, mine, experience(task))
        twin, again = strategy_of(before, size), types.SimpleNamespace(after_training_exp=lambda strategy: None)

        def add(strategy: Any, anchor: Any = anchor, expected: Any = expected) -> None:
            named = strategy.model.named_parameters()
            strategy.loss += 0.5 * sum((expected[n] * (p - anchor[n]) ** 2).sum() for n, p in named if n in expected)

        again.before_backward = add
        train(twin, again, experience(task))
        torch.testing.assert_close(
            dict(before.named_parameters()), dict(model.named_parameters()), rtol=1e-5, atol=1e-6
        )
        new = by_definition(model, experience(task))
        expected = {n: 0.3 * expected[n] + 0.7 * v if n in expected else v for n, v in new.items()}
        anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.testing.assert_close(dict(mine.memory.importance), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(dict(mine.memory.anchor), anchor, rtol=0, atol=0)
    assert [entry.num_samples for entry in mine.memory.history] == [10, 10]


def test_the_plugin_refuses_a_negative_strength(plugin: Any) -> None:
    with pytest.raises(memsyn.OptionError, match=r"lambda_reg must be a number of at least 0; got -1"):
        plugin(-1)


@pytest.mark.skipif(not INSTALLED, reason="in an environment of its own: pip install '.[avalanche]'")
@pytest.mark.filterwarnings("ignore")  # of Avalanche
def test_beside_avalanches_own_plugin() -> None:
    """With batches of one sample, Avalanche's importance is exact too: all weights are then the same."""
    classic = importlib.import_module("avalanche.training.plugins").MASPlugin
    mine = importlib.import_module(MODULE).MASPlugin
    naive = importlib.import_module("avalanche.training.supervised").Naive
    benchmarks = importlib.import_module("avalanche.benchmarks")
    utils = importlib.import_module("avalanche.benchmarks.utils.classification_dataset")
    as_dataset = utils._make_taskaware_tensor_classification_dataset
    found = []
    for plugin in (classic(lambda_reg=0.5, alpha=0.3), mine(lambda_reg=0.5, alpha=0.3)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        parts = [as_dataset(*experience(task, 12).tensors[:2], task_labels=0) for task in range(3)]
        strategy = naive(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), criterion=nn.CrossEntropyLoss(),
            train_mb_size=1, train_epochs=2, device="cpu", plugins=[plugin], evaluator=None,
        )  # fmt: skip
        for one in benchmarks.benchmark_from_datasets(train=parts).train_stream:
            torch.manual_seed(1)  # its plugin draws from the generators when it measures
            strategy.train(one)
        found.append((dict(model.named_parameters()), plugin))
    (theirs, classic_plugin), (ours, own_plugin) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    expected = {name: value.data for name, value in classic_plugin.importance.items()}
    torch.testing.assert_close(dict(own_plugin.memory.importance), expected, rtol=1e-3, atol=1e-6)
