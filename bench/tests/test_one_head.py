"""One head over the classes of all tasks: the network, the scorings, the loss over own classes, the head of means."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bench.tests import tiny
from bench.tests.test_methods import SETTINGS, TASKS, assert_same, augment, gradients_of
from torch import nn

from memsyn import measure
from memsyn_bench.methods.method import CombinedMethods
from memsyn_bench.methods.one_head import SHRINKAGE, DiscriminantHead, OwnClasses
from memsyn_bench.methods.registry import METHODS
from memsyn_bench.methods.rehearsal import Rehearsal
from memsyn_bench.running import runner
from memsyn_bench.running.scoring import score
from memsyn_bench.running.training import task_training, train
from memsyn_bench.sequences.networks import MultiHead, OneHead, SharedHead
from memsyn_bench.sequences.sequences import SEQUENCES, perceptron_network, with_one_head
from memsyn_bench.settings import Settings
from memsyn_bench.task import Task

COUNTS = [3, 3, 3]


def build():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU())
    model = OneHead(backbone, 8, class_counts=COUNTS).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.6, 0.6, generator=generator)
    return model


def training(model, index, **changes):
    settings = replace(SETTINGS, **changes)
    return task_training(model, TASKS[index], index, settings=settings, augment=augment, seed=0)


def learn(model, method, num_tasks, **changes):
    for index in range(num_tasks):
        now = training(model, index, **changes)
        train(now, method, after_epoch=lambda: None)
        method.end(now)
    return model


def test_the_tasks_own_classes_come_first():
    model, images = build(), TASKS[0].test_images
    whole = model(images)
    for task in range(3):
        order = [(3 * task + place) % 9 for place in range(9)]
        assert torch.equal(model(images, task), whole[:, order])
        assert model.place_of(task) == (0, 3 * task)
        assert torch.equal(model.classify(model.body(images), task), model(images, task))


def test_every_network_says_where_a_tasks_classes_are():
    models = [MultiHead(nn.Identity(), 4, head_sizes=[2, 3]), SharedHead(nn.Identity(), 4, num_classes=3)]
    assert [[model.place_of(task) for task in (0, 1)] for model in models] == [[(0, 0), (1, 0)], [(0, 0), (0, 0)]]
    features = torch.randn(5, 4)
    for model in models:
        assert torch.equal(model.classify(features, 1), model(features, 1))
        assert torch.equal(model.classify(features), model(features))


def test_one_head_is_drawn_by_its_seed_over_the_classes_of_all_tasks():
    tasks = [Task("t", ("a", "b"), *2 * (torch.zeros(1, 784), torch.zeros(1).long()))] * 5
    first, again, other = (
        with_one_head(partial(perceptron_network, 256), tasks, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first.heads[0].weight.shape == (10, 256)
    images = torch.rand(3, 784)
    assert torch.equal(first(images), again(images))
    assert not torch.equal(first(images), other(images))
    # The backbone is drawn as that of the sequence with a head for each task.
    assert_same(
        first.body.state_dict(), perceptron_network(256, tasks, torch.Generator().manual_seed(1)).body.state_dict()
    )


def test_importance_through_one_head_is_that_of_single_images():
    model, images = build(), TASKS[1].train_images
    found = measure(model, images.split(5), forward=lambda m, x: m(x, 1), progress=False)
    sums = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for image in images:
        model.zero_grad()
        model(image[None], 1).square().sum().backward()
        for name, value in model.named_parameters():
            sums[name] += value.grad.abs()
    assert_same(found.sums, sums)


def test_scorings_of_one_head_with_and_without_the_task():
    model = build()
    whole = torch.stack([model(task.test_images) for task in TASKS]).detach()
    for num_tasks in (1, 3):
        expected = [
            100
            * float((whole[task, :, : 3 * num_tasks].argmax(1) == TASKS[task].test_labels + 3 * task).double().mean())
            for task in range(num_tasks)
        ]
        assert score(model, TASKS[:num_tasks], "class-incremental") == pytest.approx(tuple(expected))
    given = [
        100 * float((whole[task, :, 3 * task : 3 * task + 3].argmax(1) == TASKS[task].test_labels).double().mean())
        for task in range(3)
    ]
    assert score(model, TASKS, "task-given") == pytest.approx(tuple(given))


def test_the_loss_over_own_classes_moves_no_other_row_of_the_head():
    start = build()
    own, free = (learn_second(method) for method in (OwnClasses(), METHODS["finetune"].make(0.0)))
    others = [0, 1, 2, 6, 7, 8]
    assert torch.equal(own.heads[0].weight[others], start.heads[0].weight[others])
    assert not torch.equal(own.heads[0].weight[3:6], start.heads[0].weight[3:6])
    assert all((free.heads[0].weight != start.heads[0].weight).any(1))


def learn_second(method):
    model = build()
    train(training(model, 1), method, after_epoch=lambda: None)
    return model


def test_the_loss_is_the_cross_entropy_over_the_tasks_own_logits():
    model, now = build(), training(build(), 1)
    images, labels = TASKS[1].train_images, TASKS[1].train_labels
    outputs = OwnClasses().loss_outputs(now, model(images, 1))
    assert torch.equal(outputs, model(images)[:, 3:6])
    result = train(training(build(), 1, epochs=1, batch_size=12), OwnClasses(), after_epoch=lambda: None)
    first = training(build(), 1)
    order = torch.randperm(12, generator=first.generator)
    seen = augment(images[order], first.generator)
    assert result.losses[0] == pytest.approx(F.cross_entropy(model(seen)[:, 3:6], labels[order]).item())


def test_stored_images_keep_the_loss_over_all_classes():
    model = build()
    method = CombinedMethods(OwnClasses(), Rehearsal())
    method.parts[1].end(training(model, 0))
    model.zero_grad()
    now = replace(training(model, 1, batch_size=12), augment=lambda images, generator: images)
    method.before_step(now, TASKS[1].train_images)
    found, again = gradients_of(model), copy.deepcopy(model)
    again.zero_grad()
    F.cross_entropy(again(TASKS[0].train_images), TASKS[0].train_labels).backward()
    assert_same(found, gradients_of(again))
    assert all(found["heads.0.weight"].abs().sum(1) > 0)


def discriminants_by_definition(features, labels):
    """LDA written out over all images at once."""
    classes = labels.unique()
    means = torch.stack([features[labels == c].mean(0) for c in classes])
    deviations = torch.cat([features[labels == c] - means[c] for c in classes])
    covariance = deviations.T @ deviations / len(features)
    size = len(covariance)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.trace() / size * torch.eye(size).double()
    inverse = torch.linalg.inv(covariance)
    return means @ inverse, -0.5 * ((means @ inverse) * means).sum(1)


def test_the_head_is_that_of_linear_discriminant_analysis_over_all_tasks_so_far():
    model, start = build(), build()
    method = DiscriminantHead()
    for num in (1, 2, 3):
        method.end(training(model, num - 1))
        features = start.body(torch.cat([task.train_images for task in TASKS[:num]])).detach()
        labels = torch.cat([task.train_labels + 3 * index for index, task in enumerate(TASKS[:num])])
        weight, bias = discriminants_by_definition(features, labels)
        found = {"weight": model.heads[0].weight[: 3 * num], "bias": model.heads[0].bias[: 3 * num]}
        assert_same(found, {"weight": weight, "bias": bias})
        assert torch.equal(model.heads[0].weight[3 * num :], start.heads[0].weight[3 * num :])
    assert sorted(method.kept) == ["head0", "within"]
    assert method.kept["head0"]["counts"].tolist() == [4] * 9


def test_heads_of_their_own_share_the_covariance():
    backbone = build().body
    model = MultiHead(backbone, 8, head_sizes=COUNTS).double()
    one, method, other = build(), DiscriminantHead(), DiscriminantHead()
    for index in range(3):
        method.end(task_training(model, TASKS[index], index, settings=SETTINGS, augment=augment, seed=0))
        other.end(training(one, index))
    assert_same({"w": torch.cat([head.weight for head in model.heads])}, {"w": one.heads[0].weight})


def test_a_head_of_means_knows_old_classes_that_cross_entropy_forgets():
    """The backbone is held still, so that only the head can forget."""
    accuracies = {}
    for name, method in (("finetune", METHODS["frozen"].make(0.0)), ("lda", DiscriminantHead())):
        model = build()
        parts = CombinedMethods(method, OwnClasses()) if name == "lda" else method
        for index in range(3):
            model.body.requires_grad_(False)
            now = training(model, index, epochs=20)
            train(now, parts, after_epoch=lambda: None)
            parts.end(now)
        accuracies[name] = sum(score(model, TASKS, "class-incremental")) / 3
    assert accuracies["finetune"] < 60 < accuracies["lda"]


@pytest.mark.parametrize("name", ["projected-lda", "projected-lda-rehearsal"])
def test_the_projection_leaves_the_head_to_the_means(name):
    method = METHODS[name].make(0.0)
    model = learn(build(), method, 3)
    assert method.memory.directions is not None
    features = torch.cat([model.body(image[None]) for image in TASKS[2].train_images])
    expected = torch.stack([features[TASKS[2].train_labels == label].sum(0) for label in range(3)]).detach()
    sums = next(group for key, group in method.kept.items() if key.endswith("head0"))["sums"]
    assert_same({"sums": sums[6:]}, {"sums": expected})


def tiny_one_head(tasks, generator):
    model = tiny.build(tasks, generator)
    return OneHead(model.body, model.body.num_features, class_counts=[3] * len(tasks))


def test_every_method_can_learn_classes_that_share_one_head(tmp_path, monkeypatch):
    sequence = replace(tiny.SEQUENCE, build=tiny_one_head, scorings=("class-incremental", "task-given"))
    monkeypatch.setitem(SEQUENCES.entries, "tiny", sequence)
    settings = Settings(sequence="tiny", size=8, epochs=1, batch_size=4, lr=0.01)
    results = runner.run(settings, methods=tuple(METHODS), num_seeds=1, out=tmp_path)
    for method in METHODS:
        for record in results[method][0]:
            assert len(record.accuracies) == len(record.scores["task-given"]) == record.task + 1
            assert all(own <= given for own, given in zip(record.accuracies, record.scores["task-given"], strict=True))
