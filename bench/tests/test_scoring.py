"""Scoring, against what it is defined as, on networks whose answers are written down."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from memsyn.errors import OptionError
from memsyn_bench.running.retrieval import EVALUATION_BATCH
from memsyn_bench.running.scoring import score
from memsyn_bench.sequences.networks import MultiHead, SharedHead
from memsyn_bench.task import Task


def task_of(name, num_classes, images, labels):
    nothing = torch.zeros(0, images.shape[1])
    return Task(name, tuple(map(str, range(num_classes))), nothing, torch.zeros(0).long(), images, torch.tensor(labels))


def with_weights(model, weights):
    with torch.no_grad():
        for head, weight in zip(model.heads, weights, strict=True):
            head.weight.copy_(torch.tensor(weight))
            head.bias.zero_()
    return model


TASKS = [
    task_of("first", 2, torch.eye(3)[[0, 1, 2, 2]], [0, 1, 0, 1]),
    task_of("second", 3, torch.eye(3)[[0, 1, 2]], [0, 1, 1]),
]
# An image e_k gives each output the k-th weight of its row.
FIRST = [[1.0, 0.0, 0.3], [0.0, 1.0, 0.2]]
SECOND = [[2.0, 0.0, 0.0], [0.0, 0.5, 0.4], [0.0, 0.0, 0.0]]


@pytest.fixture
def model():
    return with_weights(MultiHead(nn.Identity(), 3, head_sizes=[2, 3, 4]), [FIRST, SECOND, [[9.0] * 3] * 4])


def test_multi_head_asks_the_head_of_the_task(model):
    # e_2 is always called 0 by the first head and 1 by the second.
    assert score(model, TASKS, "multi-head") == (
        75.0,
        100.0,
    )
    assert score(model, TASKS[:1], "multi-head") == (75.0,)


def test_class_incremental_asks_all_heads_so_far_and_no_later_one(model):
    # Outputs 0 1 | 2 3 4: e_0 is called 2 (2.0 > 1.0), e_1 is 1 (1.0 > 0.5), e_2 is 3 (0.4 > 0.3).
    assert score(model, TASKS, "class-incremental") == pytest.approx((25.0, 200 / 3))
    assert score(model, TASKS[:1], "class-incremental") == (75.0,)


def test_class_incremental_is_the_argmax_over_the_tasks_outputs():
    generator = torch.Generator().manual_seed(0)
    model = MultiHead(nn.Identity(), 6, head_sizes=[3, 5, 4, 2])
    tasks = []
    for size in (3, 5, 4):
        labels = torch.randint(size, (EVALUATION_BATCH + 9,), generator=generator).tolist()
        tasks.append(task_of("noise", size, torch.randn(EVALUATION_BATCH + 9, 6, generator=generator), labels))
    expected, offset = [], 0
    with torch.no_grad():
        for task in tasks:
            named = model(task.test_images)[:, :12].argmax(dim=1)
            expected.append(100 * float((named == task.test_labels + offset).double().mean()))
            offset += len(task.class_names)
    assert score(model, tasks, "class-incremental") == pytest.approx(tuple(expected))
    assert max(expected) > 0
    told = score(model, tasks, "multi-head")
    assert all(more >= less for more, less in zip(told, expected, strict=True))


def test_domain_incremental_asks_the_one_head():
    model = with_weights(SharedHead(nn.Identity(), 3, num_classes=2), [FIRST])
    tasks = [TASKS[0], task_of("other", 2, torch.eye(3)[[0, 1]], [1, 1])]
    assert score(model, tasks, "domain-incremental") == (
        75.0,
        50.0,
    )


def test_classes_in_use_are_scored_apart_from_the_others(model):
    # The second head calls e_0, e_1, e_2 by 0, 1, 1; the labels are 0, 1, 1 and 2.
    second = task_of("second", 3, torch.eye(3)[[0, 1, 2, 2]], [0, 1, 1, 2])
    tasks = [replace(TASKS[0], classes_in_use=(1,)), replace(second, classes_in_use=(0, 1))]
    assert score(model, tasks, "in-use") == (50.0, 100.0)
    assert score(model, tasks, "other-classes") == (100.0, 0.0)
    assert score(model, tasks, "multi-head") == (75.0, 75.0)
    assert score(model, TASKS, "in-use") == score(model, TASKS, "multi-head")  # none named: all are in use


def test_a_model_is_left_in_eval_mode_and_without_gradients(model):
    model.train()
    score(model, TASKS, "multi-head")
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_scoring_that_does_not_fit_is_refused(model):
    with pytest.raises(OptionError, match=r"scoring must be one of multi-head, .*; got 'task'"):
        score(model, TASKS, "task")
    with pytest.raises(OptionError, match=r"scoring of task first needs 2 outputs, and the model gives 9"):
        score(model, TASKS, "domain-incremental")
    shared = SharedHead(nn.Identity(), 3, num_classes=3)
    with pytest.raises(OptionError, match=r"scoring of task first needs 5 outputs.*gives 3\. Choose"):
        score(shared, TASKS, "class-incremental")
