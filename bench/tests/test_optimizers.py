"""The optimizers by name: what they are, and the learning rates that they start from."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench.tests import tiny
from bench.tests.test_methods import build, course, training

from memsyn import MemsynError, OptionError
from memsyn_bench.optimizers import OPTIMIZERS
from memsyn_bench.sequences.sequences import SEQUENCES, default_settings
from memsyn_bench.settings import training_words


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("adam", torch.optim.Adam, {"betas": (0.9, 0.999), "weight_decay": 0}),
        ("adamw", torch.optim.AdamW, {"betas": (0.9, 0.999), "weight_decay": 0.01}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0}),
        ("rmsprop", torch.optim.RMSprop, {"alpha": 0.99, "momentum": 0, "weight_decay": 0}),
    ],
)
def test_a_task_is_learned_with_the_optimizer_of_the_settings(name, kind, options):
    model = build()
    optimizer = training(model, 0, optimizer=name, lr=0.25).optimizer
    assert type(optimizer) is kind
    group, = optimizer.param_groups  # fmt: skip
    assert {option: group[option] for option in options} == options
    assert group["lr"] == 0.25
    assert len(group["params"]) == len(list(model.parameters()))


def test_lion_moves_each_weight_by_the_sign_of_its_gradient():
    pytest.importorskip("lion_pytorch", reason="install lion-pytorch, as memsyn-bench[all] does")
    start, model = build(), course("finetune", 1, optimizer="lion", lr=0.01, epochs=1, batch_size=12).models[0]
    moved = (model.body[1].weight - start.body[1].weight).detach().abs()
    assert torch.allclose(moved, torch.full_like(moved, 0.01))
    assert torch.equal(model.heads[1].weight, start.heads[1].weight)


def test_lion_is_of_a_package_that_may_be_missing(monkeypatch):
    made = []
    monkeypatch.setitem(sys.modules, "lion_pytorch", SimpleNamespace(Lion=lambda ps, lr: made.append((ps, lr)) or 7))
    assert OPTIMIZERS["lion"].make([], 0.5) == 7
    assert made == [([], 0.5)]
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    message = r"--optimizer lion needs lion_pytorch .*: pip install 'memsyn-bench\[lion\]'"
    with pytest.raises(MemsynError, match=message):
        OPTIMIZERS["lion"].make([], 0.5)


def test_the_default_learning_rate_is_the_sequences_times_a_factor(monkeypatch):
    adam = replace(tiny.SEQUENCE, training={"lr": 0.5})
    monkeypatch.setitem(SEQUENCES.entries, "tiny", adam)
    assert OPTIMIZERS["adam"].lr_factor == 1.0
    for name, entry in OPTIMIZERS.items():
        found = default_settings("tiny", optimizer=name)
        assert found == replace(default_settings("tiny"), optimizer=name, lr=0.5 * entry.lr_factor)
        assert f"1 epoch a task, {entry.words}, lr " in training_words(replace(found, epochs=1))
    monkeypatch.setitem(SEQUENCES.entries, "tiny", replace(adam, training={"lr": 0.5, "optimizer": "sgd"}))
    assert default_settings("tiny").lr == default_settings("tiny", optimizer="sgd").lr == 0.5
    assert default_settings("tiny", optimizer="adam").lr == 0.5 / OPTIMIZERS["sgd"].lr_factor
    assert default_settings("tiny").optimizer == "sgd"
    with pytest.raises(OptionError, match="optimizer must be one of adam, adamw, sgd, rmsprop, lion; got 'x'"):
        default_settings("tiny", optimizer="x")
