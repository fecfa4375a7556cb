"""SI and RWalk against closed forms, and against the formulas written out weight by weight in float64."""

import pytest
import torch
from torch import Tensor

from memsyn_bench.methods.trajectory import PathIntegral, RiemannianWalk


def descent(steps: int, *, lr: float = 0.1, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients and weights of a descent on 1/2 sum h_i theta_i^2 that is pushed about; the weights are one longer."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.tensor([0.1, 1.0, 4.0, 0.0], dtype=torch.float64)
    weights, gradients = [torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)], []
    for _ in range(steps):
        noise = torch.randn(4, generator=generator, dtype=torch.float64)
        gradients.append(h * weights[-1])
        weights.append(weights[-1] - lr * gradients[-1] + 0.6 * noise)
    return gradients, weights


def feed(watcher, gradients, weights):
    for gradient, after in zip(gradients, weights[1:], strict=True):
        watcher.add({"w": gradient}, {"w": after})
    return watcher


def test_the_path_integral_of_gradient_flow_is_the_drop_of_the_loss():
    # On 1/2 h theta^2 with small steps: omega_i = 1/2 h (theta_0^2 - theta_T^2), so the sum is the drop of the loss.
    h, lr = torch.tensor([0.5, 2.0], dtype=torch.float64), 1e-4
    theta = torch.tensor([3.0, -1.0], dtype=torch.float64)
    path = PathIntegral({"w": theta}, damping=0.25)
    for _ in range(5000):
        gradient = h * theta
        theta = theta - lr * gradient
        path.add({"w": gradient}, {"w": theta})
    start = torch.tensor([3.0, -1.0], dtype=torch.float64)
    drop = 0.5 * h * (start.square() - theta.square())
    assert torch.allclose(path.omega["w"], drop, rtol=1e-3)
    assert torch.allclose(path.finish()["w"], drop / ((theta - start).square() + 0.25), rtol=1e-3)


def test_si_is_its_formula_weight_by_weight():
    gradients, weights = descent(7, seed=7)
    before = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)}
    found = feed(PathIntegral({"w": weights[0]}, before, damping=1e-3), gradients, weights).finish()["w"]
    assert found.dtype == torch.float64
    negative = 0
    for i in range(4):
        omega = sum(-float(g[i]) * float(b[i] - a[i]) for g, a, b in zip(gradients, weights, weights[1:], strict=False))
        negative += omega < 0
        way = float(weights[-1][i] - weights[0][i])
        assert float(found[i]) == pytest.approx(float(before["w"][i]) + max(0.0, omega) / (way**2 + 1e-3), rel=1e-12)
    assert 0 < negative < 4


def test_a_weight_that_made_the_loss_worse_has_no_importance():
    path = PathIntegral({"w": torch.zeros(2)}, {"w": torch.tensor([0.5, 0.5])})
    path.add({"w": torch.tensor([1.0, -1.0])}, {"w": torch.tensor([2.0, 2.0])})
    assert path.finish()["w"].tolist() == [0.5, pytest.approx(0.5 + 2 / (4 + 1e-3))]


def test_weights_without_a_gradient_have_no_path():
    path = PathIntegral({"w": torch.zeros(1), "head": torch.zeros(1)})
    path.add({"w": torch.ones(1)}, {"w": -torch.ones(1), "head": torch.zeros(1)})
    assert path.finish()["head"].tolist() == [0.0]
    assert path.carried() == {}


def test_half_precision_is_summed_in_float32():
    path = PathIntegral({"w": torch.zeros(1, dtype=torch.bfloat16)})
    for _ in range(1000):
        path.add({"w": torch.full((1,), -1.0, dtype=torch.bfloat16)}, {"w": torch.ones(1, dtype=torch.bfloat16)})
        path.last["w"].zero_()
    assert path.omega["w"].dtype == torch.float32
    assert path.omega["w"].item() == 1000.0  # in bfloat16 the sum stops at 256


def slow_walk(gradients, weights, *, fisher, interval, decay, damping):
    """RWalk's Fisher information and score over one task, weight by weight."""
    scores, fishers = [], []
    for i in range(len(weights[0])):
        score, f = 0.0, None if fisher is None else fisher[i]
        for first in range(0, len(gradients), interval):
            steps = range(first, min(first + interval, len(gradients)))
            energy = sum(-float(gradients[t][i]) * float(weights[t + 1][i] - weights[t][i]) for t in steps)
            mean = sum(float(gradients[t][i]) ** 2 for t in steps) / len(steps)
            f = mean if f is None else decay * mean + (1 - decay) * f
            way = float(weights[steps[-1] + 1][i] - weights[first][i])
            score += max(0.0, energy) / (0.5 * f * way**2 + damping)
        scores.append(score)
        fishers.append(f)
    return fishers, scores


@pytest.mark.parametrize("interval", [1, 3, 100])
def test_rwalk_is_its_formula_weight_by_weight_over_two_tasks(interval):
    options = {"interval": interval, "decay": 0.9, "damping": 1e-3}
    fisher = score = None
    carried: dict[str, dict[str, Tensor]] = {}
    for seed in (0, 1):
        gradients, weights = descent(8, seed=seed)
        walk = feed(
            RiemannianWalk({"w": weights[0]}, carried.get("fisher"), carried.get("score"), **options),
            gradients,
            weights,
        )
        found, carried = walk.finish()["w"], walk.carried()
        fisher, own = slow_walk(gradients, weights, fisher=fisher, **options)
        score = own if score is None else [(old + new) / 2 for old, new in zip(score, own, strict=True)]
        expected = [f / max(fisher) + s / max(score) for f, s in zip(fisher, score, strict=True)]
        assert found.tolist() == pytest.approx(expected, rel=1e-10)


def test_rwalk_scales_over_the_whole_network():
    walk = RiemannianWalk({"a": torch.zeros(2), "b": torch.zeros(1)}, interval=1)
    walk.add(
        {"a": torch.tensor([-1.0, -2.0]), "b": torch.tensor([-4.0])},
        {"a": torch.tensor([0.1, 0.1]), "b": torch.tensor([0.1])},
    )
    omega = walk.finish()
    # F = g^2: 1, 4, 16. s = 0.1 |g| / (0.005 g^2 + 0.001): 100/6, 200/21, 400/81.
    assert omega["a"].tolist() == pytest.approx([1 / 16 + 1, 4 / 16 + 200 / 21 / (100 / 6)], rel=1e-5)
    assert omega["b"].tolist() == pytest.approx([1 + 400 / 81 / (100 / 6)], rel=1e-5)


def test_a_head_without_gradients_keeps_its_fisher_information_and_score():
    start = {"w": torch.zeros(1), "old": torch.zeros(1), "new": torch.zeros(1)}
    carried = {"fisher": {"old": torch.tensor([4.0])}, "score": {"old": torch.tensor([3.0])}}
    walk = RiemannianWalk(start, **carried, interval=2)
    for step in (1, 2, 3):
        walk.add({"w": torch.tensor([-1.0])}, {"w": torch.tensor([0.1 * step])})
    omega = walk.finish()
    assert walk.fisher["old"].item() == 4.0
    assert walk.score["old"].item() == 3.0
    assert omega["new"].tolist() == [0.0]
    assert carried["fisher"].keys() == {"old"}  # what was carried here is not changed
