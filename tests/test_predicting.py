"""The predicted change in a report: its unit, which weights count as the old ones, and what is said of it."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsyn
from memsyn.comparing.prediction import predict
from memsyn.protecting.protection import Protection

SEEN = torch.randn(50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NEW = torch.randn(12, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
CAN = "predicted to have changed by"


def network(*, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def remembered(model: nn.Module, *estimators: str) -> memsyn.Memory:
    memory = memsyn.Memory.empty()
    for estimator in estimators or ("kronecker",):
        found = memsyn.measure(model, [SEEN], estimator=estimator, progress=False)
        memory = memory.consolidate(model, found, rank=None)
    return memory


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, num: int = 7, looks: Callable[[], Any] = list) -> None:
    for index in range(num):
        optimizer.zero_grad()
        (model(NEW) - index).square().mean().backward()
        optimizer.step()
        looks()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# The unit


@pytest.mark.parametrize("form", ["projected", "proximal", "gradient"])
def test_the_change_is_that_of_a_comparison(form: str) -> None:
    """Of a linear model with one output the prediction is exact: sqrt(E ||y' - y||^2 / E ||y||^2)."""
    torch.manual_seed(0)
    old = nn.Linear(4, 1).double()
    model, memory = copy.deepcopy(old), remembered(old, "mas", "kronecker")
    optimizer = sgd(model)
    handle = memsyn.protect(optimizer, model, memory, form=form)
    assert handle.report().change == 0.0
    steps(model, optimizer)
    handle.flush()
    found = memsyn.compare(model, old, [SEEN], kind="values", progress=False)
    lengths = found.norms.square()
    measured = math.sqrt(float((found.change.square() * lengths).mean() / lengths.mean()))
    report = handle.report()
    assert report.change == pytest.approx(measured, rel=1e-9)
    assert report.changes == pytest.approx({"weight": measured})
    assert report.change == predict(memory, model.state_dict()).change > 0.01


def test_the_change_of_a_network_is_near_the_measured_one() -> None:
    old = network()
    model, memory = copy.deepcopy(old), remembered(old)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    handle = memsyn.protect(optimizer, model, memory)
    steps(model, optimizer, 10)
    y, z = old(SEEN).detach(), model(SEEN).detach()
    measured = float(((z - y).square().sum() / y.square().sum()).sqrt())
    report = handle.report()
    assert report.change == pytest.approx(measured, rel=0.35)
    assert report.changes.keys() == {"0", "2", "4"}
    total = sum(change**2 for change in report.changes.values())
    assert report.change == pytest.approx(math.sqrt(total), rel=1e-12)


# Nothing is moved


def test_steps_that_wait_count_as_projected_and_stay_as_they_are() -> None:
    model = network()
    memory = remembered(model)
    optimizer = sgd(model)
    handle = memsyn.protect(optimizer, model, memory, every=10)
    steps(model, optimizer, 7)
    before = values(model)
    report = handle.report()
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)
    raw = memsyn.protect(torch.optim.SGD(model.parameters()), model, memory, strength=0.0, reference=network())
    handle.flush()
    assert handle.report().change == pytest.approx(report.change, rel=1e-9)
    assert raw.report().change == report.change == pytest.approx(handle.report().change, rel=1e-9)
    assert any(not torch.equal(before[name], own) for name, own in values(model).items())


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(4, size).double() for size in (4, 4, 2))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(torch.tanh(self.first(x))).tanh())


@pytest.mark.parametrize("make", [network, Tied])
def test_a_training_with_reports_is_the_training_without(make: Callable[[], nn.Module]) -> None:
    ends = []
    for looks in (False, True):
        model = make()
        memory = remembered(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        handle = memsyn.protect(optimizer, model, memory, every=4)
        seen: list[float | None] = []
        steps(model, optimizer, 10, (lambda h=handle, s=seen: s.append(h.report().change)) if looks else list)
        waiting = handle.report().change
        handle.flush()
        assert handle.report().change == pytest.approx(waiting, rel=1e-9)
        assert not looks or all(seen)
        ends.append(values(model))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_two_optimizers_of_one_model_report_the_whole_model() -> None:
    model = network()
    memory = remembered(model)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.05) for layer in (model[0], model[4])]
    handles = [memsyn.protect(optimizer, model, memory) for optimizer in optimizers]
    for _ in range(3):
        model.zero_grad()
        model(NEW).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    waiting = [handle.report().change for handle in handles]
    for handle in handles:
        handle.flush()
    assert waiting[0] == waiting[1] == pytest.approx(handles[0].report().change, rel=1e-9)
    assert handles[0].report().changes["2"] == 0.0 < handles[0].report().changes["0"]


# The old weights


def old_weights(handle: Protection) -> dict[str, Tensor]:
    return dict(handle._watched.predictor.before)


def test_old_weights_are_copied_only_if_nothing_else_holds_them() -> None:
    model = network()
    alone, both, importance = (remembered(model, *names) for names in ((), ("mas", "kronecker"), ("mas",)))
    handle = memsyn.protect(sgd(model), model, both)
    assert {own.data_ptr() for own in old_weights(handle).values()} == {own.data_ptr() for own in both.anchor.values()}
    handle = memsyn.protect(sgd(model), model, alone)
    copies, own = old_weights(handle), values(model)
    assert copies.keys() == own.keys()
    torch.testing.assert_close(copies, own, rtol=0, atol=0)
    assert not {t.data_ptr() for t in copies.values()} & {p.data_ptr() for p in model.parameters()}
    for memory in (importance, remembered(model, "inputs")):
        assert old_weights(memsyn.protect(sgd(model), model, memory)) == {}


def test_an_anchor_that_is_the_weights_themselves_is_copied() -> None:
    model = network()
    both = remembered(model, "mas", "kronecker")
    live = memsyn.Memory(
        {name: p.detach() for name, p in model.named_parameters()}, both.importance, both.history, both.counts,
        both.directions,
    )  # fmt: skip
    optimizer = sgd(model)
    handle = memsyn.protect(optimizer, model, live)
    steps(model, optimizer)
    assert handle.report().change > 0


def test_an_anchor_that_is_older_than_the_directions_is_not_taken() -> None:
    model = network()
    memory = remembered(model, "mas")
    with torch.no_grad():
        model[0].weight += 0.01
    factors = memsyn.measure(model, [SEEN], estimator="kronecker", progress=False)
    memory = memory.consolidate(model, factors, rank=None)
    assert memsyn.protect(sgd(model), model, memory).report().change == 0.0


def test_weights_that_have_moved_need_a_reference() -> None:
    old = network()
    memory, model = remembered(old), copy.deepcopy(old)
    optimizer = sgd(model)
    handle = memsyn.protect(optimizer, model, memory)
    steps(model, optimizer, 10)
    change = handle.report().change
    state = handle.state_dict()
    resumed = copy.deepcopy(model)
    handle = memsyn.protect(sgd(resumed), resumed, memory)
    report = handle.report()
    assert report.change is None
    assert "6 parameters (the first is 0.bias) had moved since the last consolidation" in report.unknown
    assert "protect(..., reference=old_state_dict)" in report.unknown
    handle.remove()
    wrapped = {f"_forward_module.{name}": own for name, own in old.state_dict().items()}
    for reference in (old, old.state_dict(), wrapped):
        handle = memsyn.protect(sgd(resumed), resumed, memory, reference=reference)
        assert handle.report().change == pytest.approx(change, rel=1e-12)
        handle.load_state_dict(state)
        assert handle.report().change == pytest.approx(change, rel=1e-12)


def test_a_reference_must_be_the_model_that_was_measured() -> None:
    model = network()
    memory = remembered(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].weight += 1
    with pytest.raises(memsyn.MismatchError, match=r"1 parameters differ, the first is 2\.weight\. Give the weights"):
        memsyn.protect(sgd(model), model, memory, reference=other)
    with pytest.raises(memsyn.OptionError, match=r"reference must be the model that was measured.*got a str"):
        memsyn.protect(sgd(model), model, memory, reference="old.pt")
    assert memsyn.protect(sgd(model), model, memory).report().change == 0.0  # not protected by the failed calls


def test_a_replaced_head_leaves_the_change_of_the_others() -> None:
    old = network()
    both, alone = remembered(old, "mas", "kronecker"), remembered(old)
    model = copy.deepcopy(old)
    model[4] = nn.Linear(5, 7).double()
    optimizer = sgd(model)
    handle = memsyn.protect(optimizer, model, both, exclude="4.*")
    steps(model, optimizer, 10)
    report = handle.report()
    assert report.changes.keys() == {"0", "2"}
    mixed = copy.deepcopy(model)
    mixed[4] = copy.deepcopy(old[4])  # the outputs of the old head
    assert report.change == pytest.approx(predict(both, mixed.state_dict()).change, rel=1e-9)
    assert report.change > 0
    handle.remove()
    handle = memsyn.protect(sgd(model), model, alone, exclude="4.*", reference=old)
    assert handle.report().change == pytest.approx(report.change, rel=1e-9)
    handle.remove()
    model = copy.deepcopy(old)
    model[4] = nn.Linear(5, 7).double()
    assert memsyn.protect(sgd(model), model, alone, exclude="4.*").report().change == 0.0


def test_the_state_of_another_memory_has_no_old_weights() -> None:
    model, other = network(), network()
    with torch.no_grad():
        other[0].weight += 0.01
    for names, form in (((), "projected"), (("mas", "kronecker"), "proximal")):
        state = memsyn.protect(sgd(other), other, remembered(other, *names), form=form).state_dict()
        handle = memsyn.protect(sgd(model), model, remembered(model, *names), form=form)
        handle.load_state_dict(handle.state_dict())
        assert handle.report().change == 0.0
        handle.load_state_dict(state)
        assert handle.report().change is None
        assert "of another memory. Protect with that one" in handle.report().unknown


# The words


def test_what_cannot_be_told_says_why_and_what_to_do() -> None:
    model = network()
    known = remembered(model)
    assert known.directions is not None
    earlier = replace(known, directions=replace(known.directions, squared_outputs=None))
    cases: list[tuple[nn.Module, memsyn.Memory, str]] = [
        (model, remembered(model, "mas"), "the memory holds no directions, which predict the change of outputs. "
         "Measure with estimator='kronecker' and consolidate that too, or compare on data: memsyn.compare("),
        (model, remembered(model, "inputs"), "the memory holds second moments of inputs alone, which do not predict "
         "the change of outputs. Measure with estimator='kronecker', or compare on data"),
        (model, earlier, "the memory does not tell how long the outputs are: they are zero, or a part of it was made "
         "by an earlier memsyn. Measure the factors again, or compare on data"),
    ]  # fmt: skip
    for own, memory, why in cases:
        report = memsyn.protect(sgd(own), own, memory).report()
        assert report.change is None
        assert report.changes == {}
        assert str(report).startswith(f"How far outputs on the remembered data have changed is not known: {why}")
        assert "memsyn/predicted_change" not in report.scalars()


def test_a_report_begins_with_the_predicted_change() -> None:
    model = network()
    optimizer = sgd(model)
    handle = memsyn.protect(optimizer, model, remembered(model))
    first, *_ = str(handle.report()).splitlines()
    assert first == "Outputs on the remembered data are predicted to be as they were: no remembered weight has moved."
    steps(model, optimizer, 10)
    report = handle.report()
    first, second, *_ = str(report).splitlines()
    order = sorted(report.changes, key=lambda layer: -report.changes[layer])
    named = ", ".join(f"{layer} ({report.changes[layer]:.1%})" for layer in order)
    assert first == f"Outputs on the remembered data are {CAN} {report.change:.1%}, most by {named}."
    assert second.startswith("Protected: ")
    assert f", outputs changed by {report.change:.1%}" in repr(report)
    html = report._repr_html_()
    assert "predicted change" in html
    assert f"{report.changes['0']:.1%}" in html
    handle.remove()
    assert str(handle.report()).splitlines()[:2] == [first, str(handle.report()).splitlines()[1]]
    assert "Nothing is protected" in str(handle.report())
    small = memsyn.Report(0.0, 0.0, {}, 0.0, change=3e-4, changes={"0": 3e-4})
    assert str(small).startswith(f"Outputs on the remembered data are {CAN} less than 0.1%, most by 0 (0.0%).")


def test_statistics_that_moved_are_not_counted_and_the_words_say_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    model.eval()(SEEN)
    memory = remembered(model)
    optimizer = sgd(model)
    handle = memsyn.protect(optimizer, model, memory)
    change = handle.report().change
    model.train()
    with pytest.warns(memsyn.MovedStatisticsWarning):
        steps(model, optimizer, 1)
    report = handle.report()
    first, *_, last = str(report).splitlines()
    assert change == 0.0 < report.change
    assert first.endswith("The 2 statistics that moved change them too, and are not counted.")
    assert last.startswith("Not protected: 2 statistics")
    assert report.scalars()["memsyn/moved_statistics"] == 2.0


def test_weights_that_are_not_finite_have_lost_the_outputs() -> None:
    model = network()
    memory = remembered(model)
    optimizer = sgd(model)
    handle = memsyn.protect(optimizer, model, memory)
    old = copy.deepcopy(model.state_dict())
    optimizer.step()
    for value in (math.nan, math.inf):
        with torch.no_grad():
            model[2].weight[0, 0] = value
        report = handle.report()
        assert report.change == math.inf
        assert report.changes["0"] == 0.0
        first, *_ = str(report).splitlines()
        assert first == "Outputs on the remembered data are lost: a weight is NaN or infinite."
        assert "memsyn/predicted_change" not in report.scalars()
        found = predict(memory, model.state_dict(), old)
        assert found.verdict(1e9).answer == "broken"
        assert found.to_json()["change"] is None


def test_the_scalars_are_those_that_are_known() -> None:
    model = network()
    for form, memory in (("projected", remembered(model)), ("proximal", remembered(model, "mas"))):
        optimizer = sgd(model)
        handle = memsyn.protect(optimizer, model, memory, form=form)
        start = copy.deepcopy(model.state_dict())
        steps(model, optimizer, 10)
        report = handle.report()
        expected = {"memsyn/held": report.held, "memsyn/moved_statistics": 0.0}
        extra = (
            {"memsyn/predicted_change": report.change} if form == "projected" else {"memsyn/penalty": report.penalty}
        )
        assert report.scalars() == {**expected, **extra}
        assert all(type(own) is float for own in report.scalars().values())
        handle.remove()
        model.load_state_dict(start)
    unknown = memsyn.Report(0.5, 1.0, {}, math.nan, form="gradient")
    assert unknown.scalars() == {"memsyn/penalty": 0.5, "memsyn/moved_statistics": 0.0}
