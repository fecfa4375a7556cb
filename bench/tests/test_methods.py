"""Every entry against its definition, on a small multi-head network in float64."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from bench.tests import tiny
from tests.training import assert_close
from torch import nn

from memsyn import measure
from memsyn_bench.data.strata import evenly, ranks_in_classes
from memsyn_bench.methods.distillation import CODE_WEIGHT, codes, distillation, fit_encoder
from memsyn_bench.methods.registry import METHODS
from memsyn_bench.methods.rehearsal import PER_TASK, Rehearsal
from memsyn_bench.methods.trajectory import SI_DAMPING, WALK_DAMPING, WALK_DECAY, WALK_INTERVAL
from memsyn_bench.running import runner
from memsyn_bench.running.training import task_training, train
from memsyn_bench.sequences.networks import MultiHead
from memsyn_bench.sequences.sequences import SEQUENCES
from memsyn_bench.settings import Settings
from memsyn_bench.task import Task

SETTINGS = Settings(sequence="tiny", size=8, epochs=2, batch_size=4, lr=0.02)
NUM_TASKS = 3
PENALISING = [
    name
    for name in METHODS
    if name.startswith(("l2", "imm", "ewc", "si", "rwalk", "mas")) and name != "mas-new"  # it measures at the beginning
]


def make_task(index: int) -> Task:
    generator = torch.Generator().manual_seed(index)
    labels = torch.arange(3).repeat(4)
    kinds = torch.randn(3, 3, 2, 2, generator=generator, dtype=torch.float64)
    images = kinds[labels] + 0.5 * torch.randn(12, 3, 2, 2, generator=generator, dtype=torch.float64)
    return Task(f"task {index}", ("a", "b", "c"), images, labels, images, labels)


TASKS = [make_task(index) for index in range(NUM_TASKS)]


def build() -> MultiHead:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh())
    model = MultiHead(backbone, 8, head_sizes=[3] * NUM_TASKS).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.6, 0.6, generator=generator)
    return model


def augment(images, generator):
    return images + 0.1 * torch.randn(images.shape, generator=generator, dtype=images.dtype)


def training(model, index, **changes):
    settings = replace(SETTINGS, **changes)
    return task_training(model, TASKS[index], index, settings=settings, augment=augment, seed=0)


@dataclass
class Course:
    """A method after some tasks, and the model after each."""

    method: object
    models: list
    trainings: list


def course(name, num_tasks, strength=0.0, **changes):
    model, method = build(), METHODS[name].make(strength)
    models, trainings = [], []
    for index in range(num_tasks):
        now = training(model, index, **changes)
        trainings.append(train(now, method, after_epoch=lambda: None))
        method.end(now)
        models.append(copy.deepcopy(model))
    return Course(method, models, trainings)


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def added_gradients(method, model, index, images, **changes):
    """What a method adds to gradients of zero."""
    model.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    method.before_step(training(model, index, **changes), images)
    return gradients_of(model)


def plain_steps(model, index, observe=lambda gradients: None, pull=None):
    """The training loop written out: the batches of the benchmark, Adam, and the proximal step of a penalty.

    `pull`: (strength, importance, anchor); s is how far a unit of gradient moves a weight, by Adam's formula.
    """
    generator = torch.Generator().manual_seed(index + 1)
    task, optimizer = TASKS[index], torch.optim.Adam(model.parameters(), lr=SETTINGS.lr)
    for _ in range(SETTINGS.epochs):
        for chosen in torch.randperm(12, generator=generator).split(SETTINGS.batch_size):
            images = augment(task.train_images[chosen], generator)
            model.zero_grad()
            F.cross_entropy(model(images, index), task.train_labels[chosen]).backward()
            observe_after = observe(gradients_of(model))
            optimizer.step()
            for name, parameter in model.named_parameters():
                if pull is not None and parameter.grad is not None:
                    strength, importance, anchor = pull
                    state = optimizer.state[parameter]
                    s = SETTINGS.lr / ((state["exp_avg_sq"] / (1 - 0.999 ** state["step"].item())).sqrt() + 1e-8)
                    k = 2 * s * strength * importance[name]
                    parameter.data = (parameter.data + k * anchor[name]) / (1 + k)
            if observe_after:
                observe_after()


def plain_course(num_tasks):
    """Fine-tuning written out: the model after each task."""
    model, models = build(), []
    for index in range(num_tasks):
        plain_steps(model, index)
        models.append(copy.deepcopy(model))
    return models


def each_gradient(model, index, scalars):
    """Per sample of a task, the gradients of scalars(logits (1, C)): name -> list of tensors."""
    found = []
    for image in TASKS[index].train_images:
        for scalar in scalars(model(image[None], index)):
            model.zero_grad()
            scalar.backward(retain_graph=True)
            found.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in
                          model.named_parameters()})  # fmt: skip
    return found


def slow_mas(model, index):
    """1/N sum_k |d ||y_k||^2 / d theta|, one sample at a time."""
    found = each_gradient(model, index, lambda logits: [logits.square().sum()])
    return {name: sum(g[name].abs() for g in found) / len(found) for name in found[0]}


def slow_fisher(model, index):
    """1/N sum_k sum_c p_c (d log p_c / d theta)^2, one sample and one class at a time."""

    def scalars(logits):
        log_p = logits.log_softmax(1)[0]
        return [log_p[c] * log_p[c].detach().exp().sqrt() for c in range(3)]

    found = each_gradient(model, index, scalars)
    return {name: sum(g[name].square() for g in found) / 12 for name in found[0]}


def assert_same(found, expected, rtol=1e-8):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=rtol, atol=1e-12), name


def test_finetuning_is_the_plain_loop():
    for found, expected in zip(course("finetune", 3).models, plain_course(3), strict=True):
        assert_close(found, expected)


def test_alone_learns_each_task_from_the_first_weights():
    found = course("alone", 3).models[2]
    expected = build()
    plain_steps(expected, 2)
    assert_close(found, expected)


def test_with_a_frozen_body_only_heads_learn_after_the_first_task():
    models = course("frozen", 3).models
    assert_close(models[0], plain_course(1)[0])
    assert_close(models[0].body, models[2].body, rtol=0.0)
    assert not torch.equal(models[0].heads[2].weight, models[2].heads[2].weight)
    assert torch.equal(models[1].heads[1].weight, models[2].heads[1].weight)
    assert all(parameter.requires_grad for parameter in models[2].parameters())


def test_the_warm_up_trains_the_head_alone():
    start, model = build(), course("mas", 2, warmup=2).models[1]
    assert_close(model.body, start.body, rtol=0.0)
    assert not torch.equal(model.heads[1].weight, start.heads[1].weight)
    assert not torch.equal(course("mas", 1, warmup=1).models[0].body[1].weight, start.body[1].weight)


@pytest.mark.parametrize("name", PENALISING)
def test_a_penalty_pulls_back_by_its_proximal_step(name):
    strength = 0.3
    found = course(name, 2, strength)
    first = course(name, 1, strength)
    memory, model = first.method.memory, first.models[0]
    assert all(bool((omega >= 0).all()) for omega in memory.importance.values())
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            assert name.startswith("imm") or torch.equal(parameter, memory.anchor[n])
            parameter.copy_(memory.anchor[n])
    rehearses = name == "mas-rehearsal"
    if not rehearses:
        plain_steps(model, 1, pull=(strength, memory.importance, memory.anchor))
        now = found.method.memory.anchor
        assert_same(now, weights_of(model))
    value = sum(float((memory.importance[n] * (now_n - memory.anchor[n]).square()).sum()) for n, now_n in
                found.method.memory.anchor.items())  # fmt: skip
    assert found.trainings[0].penalty == 0.0 < value
    assert found.trainings[1].penalty == pytest.approx(strength * value, rel=1e-8)


def test_l2_holds_every_weight_that_was_trained_with_one():
    importance = course("l2", 2, 0.1).method.memory.importance
    for name, omega in importance.items():
        assert torch.equal(omega, torch.full_like(omega, 0.0 if name.startswith("heads.2") else 1.0)), name


@pytest.mark.parametrize(("name", "slow"), [("mas", slow_mas), ("ewc", slow_fisher), ("mas-rehearsal", slow_mas)])
def test_mas_and_ewc_sum_exact_importances_at_the_last_weights(name, slow):
    found = course(name, 2)
    expected = {n: torch.zeros_like(p) for n, p in build().named_parameters()}
    for index, model in enumerate(found.models):
        expected = {n: value + slow(model, index)[n] for n, value in expected.items()}
    assert_same(found.method.memory.importance, expected)
    assert_same(found.method.memory.anchor, weights_of(found.models[1]), rtol=0.0)


def test_batched_mas_takes_the_absolute_value_after_the_mean_over_a_training_batch():
    found = course("mas-batched", 1)
    each = each_gradient(found.models[0], 0, lambda logits: [logits.square().sum()])
    expected = {
        name: sum(sum(g[name] for g in each[start : start + 4]).abs() for start in (0, 4, 8)) / 12 for name in each[0]
    }
    assert_same(found.method.memory.importance, expected)
    exact = course("mas", 1).method.memory.importance
    assert all(bool((exact[n] >= omega - 1e-12).all()) for n, omega in expected.items())
    assert float(sum(exact[n].sum() for n in exact)) > 1.05 * float(sum(omega.sum() for omega in expected.values()))


@pytest.mark.parametrize(
    ("name", "estimator", "images"),
    [
        ("mas-local", "mas-local", lambda task: task.train_images),
        ("mas-test", "mas", lambda task: task.test_images),
        ("mas-both", "mas", lambda task: torch.cat([task.test_images, task.train_images])),
        ("mas-local-test", "mas-local", lambda task: task.test_images),
        ("mas-local-both", "mas-local", lambda task: torch.cat([task.test_images, task.train_images])),
        ("mas-in-use", "mas", lambda task: task.train_images[task.train_labels == 1]),
    ],
)
def test_importance_is_of_the_images_that_the_name_says(name, estimator, images, monkeypatch):
    tasks = [replace(task, classes_in_use=(1,), test_images=2 * task.test_images[:5]) for task in TASKS]
    monkeypatch.setitem(globals(), "TASKS", tasks)
    found = course(name, 2)
    sums = [
        measure(model, [images(task)], forward=lambda m, x, t=t: m(x, t), estimator=estimator, progress=False).mean()
        for t, (task, model) in enumerate(zip(TASKS[:2], found.models, strict=True))
    ]
    assert_same(found.method.memory.importance, {n: sums[0][n] + sums[1][n] for n in sums[0]})


def watched(model, index, pull=None):
    """(gradients without the penalty, weights before, weights after) of every step."""
    steps = []

    def observe(gradients):
        before = weights_of(model)
        return lambda: steps.append((gradients, before, weights_of(model)))

    plain_steps(model, index, observe, pull)
    return steps


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_si_is_the_path_integral_of_the_loss_without_the_penalty(strength):
    model = build()
    omega = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for index in (0, 1):
        start = weights_of(model)
        path = {n: torch.zeros_like(p) for n, p in start.items()}
        for gradients, before, after in watched(model, index, (strength, omega, start)):
            for n, gradient in gradients.items():
                path[n] -= gradient * (after[n] - before[n])
        end = weights_of(model)
        omega = {n: omega[n] + path[n].clamp(min=0) / ((end[n] - start[n]) ** 2 + SI_DAMPING) for n in omega}
    found = course("si", 2, strength).method.memory
    assert_same(found.importance, omega)
    assert_same(found.anchor, weights_of(model))


def test_rwalk_goes_on_over_the_tasks():
    model = build()
    fisher, score = {}, {}
    for index in (0, 1):
        steps = watched(model, index)
        assert len(steps) < WALK_INTERVAL
        for n in steps[0][0]:
            mean = sum(gradients[n].square() for gradients, _, _ in steps) / len(steps)
            fisher[n] = WALK_DECAY * mean + (1 - WALK_DECAY) * fisher.get(n, mean)
            energy = -sum(gradients[n] * (after[n] - before[n]) for gradients, before, after in steps)
            way = steps[-1][2][n] - steps[0][1][n]
            own = energy.clamp(min=0) / (0.5 * fisher[n] * way.square() + WALK_DAMPING)
            score[n] = (score[n] + own) / 2 if n in score else own
    largest = [max(float(v.max()) for v in values.values()) for values in (fisher, score)]
    found = course("rwalk", 2).method.memory.importance
    for n, omega in found.items():
        expected = fisher[n] / largest[0] + score[n] / largest[1] if n in fisher else torch.zeros_like(omega)
        assert torch.allclose(omega, expected, rtol=1e-8), n


@pytest.mark.parametrize("name", ["imm-mean", "imm-mode"])
def test_imm_merges_the_weights_of_all_tasks(name):
    found, solutions = course(name, 3), plain_course(3)  # without L2 transfer each task starts as in fine-tuning
    fisher = [slow_fisher(model, index) for index, model in enumerate(solutions)]
    for n, merged in weights_of(found.models[2]).items():
        own = [weights_of(model)[n] for model in solutions]
        if n.startswith("heads."):
            counts = [torch.full_like(merged, float(n.startswith(f"heads.{index}."))) for index in range(3)]
        else:
            counts = [torch.ones_like(merged)] * 3
        if name == "imm-mode":
            counts = [values[n] for values in fisher]
        expected = sum(c * w for c, w in zip(counts, own, strict=True)) / sum(counts)
        assert torch.allclose(merged, expected, rtol=1e-8), n
    assert_same(found.method.memory.anchor, weights_of(solutions[2]))


def test_l2_transfer_keeps_imm_near_the_last_tasks_own_weights():
    way = {}
    for strength in (0.0, 10.0):
        own = [course("imm-mean", num, strength).method.memory.anchor["body.1.weight"] for num in (1, 2)]
        way[strength] = float((own[1] - own[0]).norm())
    assert 0 < way[10.0] < 0.5 * way[0.0]


def test_distillation_is_the_cross_entropy_of_softened_probabilities():
    logits, recorded = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0], [0.0, 4.0]])
    q = [[1 / (1 + 2.718281828), 2.718281828 / (1 + 2.718281828)], [1 / (1 + 2.718281828**2)]]
    first = -(q[0][0] * -0.313261687 + q[0][1] * -1.313261687)  # log of 1 / (1 + e^-1), 1 / (1 + e)
    second = -(q[1][0] * -2.126928011 + (1 - q[1][0]) * -0.126928011)  # log of 1 / (1 + e^2), 1 / (1 + e^-2)
    assert distillation(logits, recorded).item() == pytest.approx((first + second) / 2, rel=1e-6)


@pytest.mark.parametrize("name", ["lwf", "ebll"])
def test_lwf_and_ebll_add_the_gradient_of_what_the_old_network_said(name):
    strength = 0.7
    before = course(name, 2, strength)
    method, old, model = before.method, before.models[1], copy.deepcopy(before.models[1])
    method.begin(training(model, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    images = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    found = added_gradients(method, model, 2, images)
    model.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for image in images:
        for head in (0, 1):
            q = (old(image[None], head)[0] / 2).softmax(0).detach()
            loss = loss - (q * (model(image[None], head)[0] / 2).log_softmax(0)).sum() / 5
            if name == "ebll":
                encoder = method.kept[f"encoder{head}"]
                now, then = (
                    torch.sigmoid(encoder["weight"] @ m.body(image[None])[0] + encoder["bias"]) for m in (model, old)
                )
                loss = loss + CODE_WEIGHT * 0.5 * (now - then.detach()).square().sum() / 5
    (strength * loss).backward()
    expected = gradients_of(model)
    for n, gradient in found.items():
        assert torch.allclose(gradient, expected.get(n, torch.zeros_like(gradient)), rtol=1e-8, atol=1e-14), n
    assert not expected.keys() & {"heads.2.weight", "heads.2.bias"}
    assert set(method.kept) == ({"encoder0", "encoder1"} if name == "ebll" else set())


def test_lwf_without_strength_is_finetuning():
    assert_close(course("lwf", 3, 0.0).models[2], plain_course(3)[2])


def test_an_encoder_is_under_complete_and_keeps_what_the_features_and_the_head_need():
    generator = torch.Generator().manual_seed(3)
    basis = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    inner = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    features = 5.0 + 3.0 * inner @ basis  # two dimensions in eight, far from mean 0 and deviation 1
    features[:, 7] = 4.0  # a unit that never changes
    head = nn.Linear(8, 2).double()
    encoder = fit_encoder(features, (inner[:, 0] > 0).long(), head, torch.Generator().manual_seed(0))
    assert encoder["weight"].shape == (2, 8)
    found = codes(encoder, features)
    assert found.shape == (60, 2)
    assert bool(((found > 0) & (found < 1)).all())
    with_one = torch.cat([found.logit(), torch.ones(60, 1, dtype=torch.float64)], 1)
    left = features[:, :7] - with_one @ torch.linalg.lstsq(with_one, features[:, :7]).solution
    assert float(left.square().sum() / (features[:, :7] - features[:, :7].mean(0)).square().sum()) < 0.02
    assert head.weight.grad is None
    again = fit_encoder(features, (inner[:, 0] > 0).long(), head, torch.Generator().manual_seed(0))
    assert_same(again, encoder, rtol=0.0)


def test_joint_training_adds_the_mean_loss_of_every_old_task():
    found = course("joint", 2)
    model, method = found.models[1], found.method
    now = replace(training(model, 2, batch_size=12), augment=lambda images, generator: images)
    model.zero_grad()
    method.before_step(now, TASKS[2].train_images)
    gradients = gradients_of(model)
    model.zero_grad()
    sum(F.cross_entropy(model(TASKS[j].train_images, j), TASKS[j].train_labels) for j in (0, 1)).backward()
    assert_same(gradients, gradients_of(model))


def test_rehearsal_adds_the_mean_loss_of_one_batch_of_its_buffer():
    method, model, drawn = Rehearsal(per_task=6), build(), []
    for index in (0, 1):
        method.end(training(model, index))
    buffer = method.kept

    def noted(images, generator):
        drawn.append(images)
        return images

    for size, num in ((4, 4), (12, 12), (50, 12)):
        drawn.clear()
        now = replace(training(model, 2, batch_size=size), augment=noted)
        model.zero_grad()
        method.before_step(now, TASKS[2].train_images[:4])
        images = torch.cat(drawn)
        assert len(images) == num == len(images.flatten(1).unique(dim=0))
        gradients = gradients_of(model)
        losses = []
        for image in images:
            place = [(j, (g["images"] == image).flatten(1).all(1).nonzero()) for j, g in enumerate(buffer.values())]
            (task, where), = [(j, where) for j, where in place if len(where)]  # fmt: skip
            losses.append(F.cross_entropy(model(image[None], task), buffer[f"task{task}"]["labels"][where[0]]))
        model.zero_grad()
        torch.stack(losses).mean().backward()
        assert_same(gradients, gradients_of(model))


def test_a_buffer_is_of_training_images_even_over_classes_and_drawn_by_the_seed():
    methods = [Rehearsal(per_task=7) for _ in range(2)]
    for method in methods:
        method.end(training(build(), 0))
    stored = methods[0].kept["task0"]
    assert sorted(stored["labels"].bincount().tolist()) == [2, 2, 3]
    for image, label in zip(stored["images"], stored["labels"], strict=True):
        where = (TASKS[0].train_images == image).flatten(1).all(1)
        assert TASKS[0].train_labels[where].tolist() == [int(label)]
    assert torch.equal(stored["images"], methods[1].kept["task0"]["images"])
    few = Rehearsal()
    few.end(training(build(), 0))
    assert len(few.kept["task0"]["labels"]) == min(PER_TASK, 12)


def test_ranks_number_each_class_by_itself():
    labels = torch.tensor([0, 0, 0, 2, 2, 0])
    ranks = ranks_in_classes(labels, torch.Generator().manual_seed(0))
    assert sorted(ranks[labels == 0].tolist()) == [0, 1, 2, 3]
    assert sorted(ranks[labels == 2].tolist()) == [0, 1]
    chosen = evenly(labels, 4, torch.Generator().manual_seed(0))
    assert labels[chosen].bincount().tolist() == [2, 0, 2]
    assert len(set(chosen.tolist())) == 4
    orders = {tuple(evenly(labels, 2, torch.Generator().manual_seed(seed)).tolist()) for seed in range(30)}
    assert len(orders) > 4


def test_mas_with_rehearsal_is_both():
    found = course("mas-rehearsal", 2)
    assert set(found.method.kept) == {"1.task0", "1.task1"}
    plain = Rehearsal()
    plain.load(found.method.memory, {name[2:]: group for name, group in found.method.kept.items()})
    images, model = TASKS[2].train_images[:4], found.models[1]
    both, alone = (added_gradients(method, model, 2, images) for method in (found.method, plain))
    assert_same(both, alone, rtol=0.0)
    assert any(bool(gradient.any()) for gradient in both.values())


def size_of(*groups):
    return sum(8 * value.numel() for group in groups for value in group.values())


def test_bytes_are_those_of_the_tensors_held():
    model = weights_of(build())
    trained = {name: value for name, value in model.items() if name.startswith(("body", "heads.1"))}
    images = dict.fromkeys(range(2), TASKS[0].train_images)
    labels = dict.fromkeys(range(2), TASKS[0].train_labels)
    encoders = {0: torch.zeros(2, 8), 1: torch.zeros(2)}
    expected = {  # kept after two tasks, held at the end of the second
        "finetune": (0, 0),
        "frozen": (0, 0),
        "alone": (size_of(model), size_of(model)),
        "joint": (size_of(images, labels), size_of(images, labels) // 2),
        "lwf": (0, size_of(model)),
        "ebll": (2 * size_of(encoders), size_of(encoders, model)),
        "mas": (size_of(model, model), size_of(model, model)),
        "si": (size_of(model, model), size_of(model, model, model, model, model, trained)),
        "imm-mean": (4 * size_of(model), 4 * size_of(model)),
        "mas-rehearsal": (size_of(model, model, images, labels), size_of(model, model) + size_of(images, labels) // 2),
    }
    for name, sizes in expected.items():
        found = course(name, 2)
        assert (found.method.num_bytes(), found.trainings[1].num_bytes) == sizes, name


@pytest.fixture
def _tiny_sequence(monkeypatch):
    monkeypatch.setitem(SEQUENCES.entries, "tiny", tiny.SEQUENCE)


def numbers(results):
    return [replace(record, seconds=0.0) for record in next(iter(results.values()))[0]]


@pytest.mark.usefixtures("_tiny_sequence")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_after_an_interruption_bit_for_bit(tmp_path, monkeypatch, name):
    def run(folder):
        return runner.run(SETTINGS, methods=[name], num_seeds=1, out=tmp_path / folder)

    whole = numbers(run("whole"))
    for stop in (1, 2):
        calls = []

        def interrupted(*args, calls=calls, **kwargs):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return train(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(runner, "train", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run("cut")
        assert len(list((tmp_path / "cut").glob("*.checkpoint.safetensors"))) == 1, stop
    assert numbers(run("cut")) == whole
    assert len({record.loss for record in whole}) == 3


@pytest.mark.usefixtures("_tiny_sequence")
def test_every_method_sees_the_same_batches_in_the_same_order(tmp_path, monkeypatch):
    seen = {}
    for name in METHODS:
        own = seen[name] = []

        def noted(images, generator, own=own):
            augmented = tiny.augment(images, generator)
            if generator.initial_seed() < 500:  # the loop's own
                own.append(augmented)
            return augmented

        monkeypatch.setitem(SEQUENCES.entries, "tiny", replace(tiny.SEQUENCE, augment=noted))
        runner.run(replace(SETTINGS, epochs=1), methods=[name], num_seeds=1, out=tmp_path / name)
    for name, batches in seen.items():
        assert len(batches) == len(seen["finetune"]) == 3 * 3
        assert all(torch.equal(a, b) for a, b in zip(batches, seen["finetune"], strict=True)), name
