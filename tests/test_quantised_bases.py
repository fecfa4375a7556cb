"""Adapters of PEFT on quantised weights: bitsandbytes and torchao, as far as they run on a CPU."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import memsyn

OLD = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)) @ torch.randn(
    3, 64, generator=torch.Generator().manual_seed(2)
)
"""Inputs in a subspace of 3 directions."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4))


def four_bits(layer: nn.Linear) -> nn.Module:
    found = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    found.load_state_dict(layer.state_dict())
    return found.to("cpu")


def eight_bits(layer: nn.Linear) -> nn.Module:
    found = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    found.load_state_dict(layer.state_dict())
    return found.to("cpu")


def of_torchao(layer: nn.Linear) -> nn.Module:
    quantize_(layer, Int8WeightOnlyConfig())
    return layer


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bitsandbytes 4 bits": four_bits,
    "bitsandbytes 8 bits": eight_bits,
    "torchao 8 bits": of_torchao,
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The libraries say that merging needs more, and that inputs are rounded to 16 bits."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")
        warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
        yield


def quantised(kind: str) -> Any:
    model = network()
    model[0] = KINDS[kind](model[0])
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))


def base_weight(kind: str) -> Tensor:
    """W of a quantised layer, by its library, which packs it in another way at the first call."""
    weight: Any = KINDS[kind](network()[0]).weight
    if kind == "bitsandbytes 4 bits":
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    if kind == "torchao 8 bits":
        return weight.dequantize()
    return weight.data.float() * weight.SCB.unsqueeze(1) / 127


def adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("estimator", ["inputs", "kronecker"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_measured_and_held_by_its_inputs(kind: str, estimator: str) -> None:
    wrapped = quantised(kind)
    before = wrapped(OLD)
    factors = memsyn.measure(wrapped, [OLD], estimator=estimator, weights="effective", progress=False)
    assert torch.equal(wrapped(OLD), before)  # bitsandbytes packs weights in evaluation
    assert factors.names == {"0.weight"}
    assert torch.allclose(factors.inputs("0.weight")[0], OLD.T @ OLD / len(OLD), rtol=1e-4, atol=1e-5)
    memory = memsyn.Memory.empty().consolidate(wrapped, factors)
    moved = {}
    for strength in (0.0, 1e9):
        trained = copy.deepcopy(wrapped)
        first = trained(OLD).detach()
        torch.manual_seed(4)
        new, target = torch.randn(40, 64), torch.randn(40, 4)
        optimizer = torch.optim.AdamW(adapters(trained), lr=0.02)
        handle = memsyn.protect(optimizer, trained, memory, strength=strength)
        for _ in range(30):
            optimizer.zero_grad()
            loss = (trained(new) - target).square().mean()
            loss.backward()
            optimizer.step()
        handle.remove()
        moved[strength] = ((trained(OLD) - first).norm() / first.norm()).item()
    assert moved[0.0] > 0.3
    assert moved[1e9] < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_output_gradients_of_a_quantised_base_are_those_of_its_weights(kind: str) -> None:
    """Against a model with the same weights in floating point."""
    wrapped = quantised(kind)
    found = memsyn.measure(wrapped, [OLD], estimator="kronecker", weights="effective", progress=False)
    plain = network()
    plain[0].weight.data = base_weight(kind)
    expected = memsyn.measure(plain, [OLD], estimator="kronecker", progress=False)
    ours, theirs = found.outputs("0.weight"), expected.outputs("0.weight")
    # Eight bits of bitsandbytes round the inputs too.
    assert float((ours - theirs).norm() / theirs.norm()) < (0.05 if kind == "bitsandbytes 8 bits" else 1e-4)


@pytest.mark.parametrize("estimator", ["mas", "kronecker"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_of_the_whole_model_holds_the_same_model_quantised(kind: str, estimator: str) -> None:
    model = network()
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [OLD], estimator=estimator, progress=False))
    wrapped = quantised(kind)
    optimizer = torch.optim.AdamW(adapters(wrapped), lr=0.02)
    handle = memsyn.protect(optimizer, wrapped, memory, strength=1e9)
    if estimator == "mas":
        rounded = memory.importance["0.weight"] * (base_weight(kind) - memory.anchor["0.weight"]).square()
        assert handle.value() == pytest.approx(1e9 * float(rounded.sum()), rel=0.02)
    first = wrapped(OLD).detach()
    for _ in range(10):
        optimizer.zero_grad()
        wrapped(OLD + 1).square().mean().backward()
        optimizer.step()
    handle.remove()
    # The penalty pulls the weights in effect to those that were measured, and so mends the rounding.
    allowed = 0.1 if estimator == "mas" else 1e-4
    assert ((wrapped(OLD) - first).norm() / first.norm()).item() < allowed


@pytest.mark.parametrize("kind", KINDS)
def test_an_importance_of_quantised_weights_is_refused(kind: str) -> None:
    with pytest.raises(memsyn.OptionError, match=r"quantised, and have no gradient\. Measure with estimator='inputs'"):
        memsyn.measure(quantised(kind), [OLD], weights="effective", progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_compared_with_the_memory_of_the_whole_one(kind: str) -> None:
    model = network()
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [OLD], progress=False))
    found = memsyn.compare(quantised(kind), memory, [OLD], kind="values", progress=False)
    assert 1e-5 < float(torch.as_tensor(found.change).mean()) < 0.2
