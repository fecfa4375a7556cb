"""Continual backpropagation: which units are replaced, what they become, and what is kept."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from bench.tests.test_methods import SETTINGS, TASKS, assert_same, augment
from torch import nn

from memsyn import MemsynError, ModelError
from memsyn_bench.methods import continual_backprop
from memsyn_bench.methods.continual_backprop import ContinualBackprop, hidden_units
from memsyn_bench.methods.registry import METHODS
from memsyn_bench.running.training import task_training, train
from memsyn_bench.sequences.networks import MultiHead, SmallConvNet, WordTransformer

FLOATS = [replace(task, train_images=task.train_images.float(), test_images=task.test_images.float()) for task in TASKS]
"""The package computes in float32."""

pytest.importorskip("ccbp_pytorch", reason="install ccbp-pytorch, as memsyn-bench[all] does")


def build(activation=nn.ReLU):
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), activation(), nn.Linear(8, 6), activation())
    model = MultiHead(backbone, 6, head_sizes=[3] * 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.6, 0.6, generator=generator)
    return model


def training(model, index=0, **changes):
    settings = replace(SETTINGS, **changes)
    return task_training(model, FLOATS[index], index, settings=settings, augment=augment, seed=0)


def one_step(monkeypatch, *, rate, maturity=0):
    """The weights right after the optimizer's step and after the replacement that follows; the training."""
    monkeypatch.setattr(continual_backprop, "REPLACEMENT_RATE", rate)
    monkeypatch.setattr(continual_backprop, "MATURITY", maturity)
    model, method = build(), ContinualBackprop()
    now = training(model)
    method.begin(now)
    loss = nn.functional.cross_entropy(model(now.task.train_images, 0), now.task.train_labels)
    loss.backward()
    now.optimizer.step()
    before = copy.deepcopy(model)
    moments = {
        name: now.optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters() if p.grad is not None
    }
    method.after_step(now)
    return before, model, moments, now


def test_the_units_of_least_contribution_start_afresh(monkeypatch):
    before, after, moments, now = one_step(monkeypatch, rate=0.25)
    images, start = now.task.train_images, build()
    with torch.no_grad():
        hidden = start.body[:3](images)
    # At the first step all utilities start at 1, and the new ones have the weight 0.01.
    least = ((hidden.abs().mean(0)) * start.body[3].weight.abs().sum(0)).argsort()[:2].tolist()
    changed = (before.body[1].weight != after.body[1].weight).any(1).nonzero().flatten().tolist()
    assert changed == sorted(least)
    kept = [unit for unit in range(8) if unit not in least]
    same = (before.body[3].weight == after.body[3].weight)[:, kept].all(1)  # the next layer replaces one unit too
    assert same.sum() == 5
    assert (after.body[3].weight[same][:, least] == 0).all()
    assert (after.body[1].weight[least].abs() <= 12**-0.5).all()
    assert torch.equal(after.body[1].bias[least], start.body[1].bias[least])
    assert torch.equal(before.body[1].weight[kept], after.body[1].weight[kept])
    state = now.optimizer.state[after.body[1].weight]["exp_avg"]
    assert (state[least] == 0).all()
    assert torch.equal(state[kept], moments["body.1.weight"][kept])


def test_young_units_are_safe(monkeypatch):
    before, after, _, _ = one_step(monkeypatch, rate=0.5, maturity=5)
    assert_same(dict(after.named_parameters()), dict(before.named_parameters()), rtol=0.0)


def test_as_many_units_are_replaced_as_the_rate_says(monkeypatch):
    """8 units, 0.01 of them in each of 600 steps: 48 replacements are expected, with a deviation of 7."""
    monkeypatch.setattr(continual_backprop, "REPLACEMENT_RATE", 0.01)
    monkeypatch.setattr(continual_backprop, "MATURITY", 0)
    model, method = build(), ContinualBackprop()
    now = training(model)
    method.begin(now)
    model(now.task.train_images, 0)
    num = 0
    for _ in range(600):
        before = model.body[1].weight.detach().clone()
        method.after_step(now)
        num += int((model.body[1].weight != before).any(1).sum())
    assert 27 < num < 69


def test_a_rate_of_zero_is_finetuning_and_the_global_generator_is_left_alone(monkeypatch):
    monkeypatch.setattr(continual_backprop, "REPLACEMENT_RATE", 0.0)
    models = [build(), build()]
    state = torch.get_rng_state()
    for model, method in zip(models, (ContinualBackprop(), METHODS["finetune"].make(0.0)), strict=True):
        for index in range(2):
            now = training(model, index)
            train(now, method, after_epoch=lambda: None)
            method.end(now)
    assert_same(*(dict(model.named_parameters()) for model in models), rtol=0.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_ages_and_utilities_go_on_with_the_next_task_and_hooks_end():
    model, method = build(), ContinualBackprop()
    for index in range(2):
        now = training(model, index)
        train(now, method, after_epoch=lambda: None)
        method.end(now)
        assert method.kept["1"]["age"].tolist() == [6.0 * (index + 1)] * 8  # 2 epochs of 3 batches, none replaced
        assert (method.kept["3"]["utility"] != 1).all()
    assert not any(module._forward_hooks for module in model.modules())
    assert sorted(method.kept) == ["1", "3"]
    assert torch.equal(method.kept["1"]["bias_init"], build().body[1].bias)


def test_the_units_of_a_convolution_are_its_channels():
    body = SmallConvNet(widths=(8, 8, 8, 16))
    model = MultiHead(body, 16, head_sizes=[3, 3])
    units = list(hidden_units(replace(training(build(), 1), model=model)))
    assert [len(own.layer.weight) for own in units] == [8, 8, 8, 16]
    assert units[-1].outgoing is model.heads[1]
    assert all(isinstance(own.activation, nn.ReLU) for own in units)


@pytest.mark.parametrize(
    ("body", "num_features", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh()), 8, "needs a backbone with nn.ReLU modules after"),
        (WordTransformer(), 64, "needs a backbone with nn.ReLU modules after"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten()), 16,
            "the head reads 16 inputs after the 4 units of 0",
        ),
    ],
)  # fmt: skip
def test_other_networks_are_refused(body, num_features, message):
    now = replace(training(build()), model=MultiHead(body, num_features, head_sizes=[3]))
    with pytest.raises(ModelError, match=message):
        ContinualBackprop().begin(now)


def test_the_package_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ccbp_pytorch", None)
    message = r"continual-backprop needs ccbp_pytorch .*: pip install 'memsyn-bench\[continual-backprop\]'"
    with pytest.raises(MemsynError, match=message):
        ContinualBackprop().begin(training(build()))
