"""A memory of the base model on the same model with adapters of PEFT: the weights in effect are measured and held."""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import memsyn
from memsyn.adapters import plain_model
from memsyn.comparing.prediction import predict
from memsyn.integrations.lightning import MemsynCallback as LightningCallback
from memsyn.integrations.transformers import MemsynCallback as TrainerCallback
from memsyn.weights_in_effect import WeightsInEffect

DATA = torch.randn(24, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LR = 0.1


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 4)).double()


def learned(model: nn.Module, estimator: str = "mas", data: Any = DATA) -> memsyn.Memory:
    return memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [data], estimator=estimator, progress=False))


LORA = peft.LoraConfig(r=3, target_modules=["0", "2"], lora_alpha=5, lora_dropout=0.3)
CONFIGS = {
    "lora": LORA,
    "rslora": peft.LoraConfig(r=3, target_modules=["0", "2"], use_rslora=True),
    "lora with biases": peft.LoraConfig(r=2, lora_alpha=1, target_modules=["0", "2"], lora_bias=True),
    "dora": peft.LoraConfig(r=3, target_modules=["0", "2"], use_dora=True),
    "ia3": peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
    "oft": peft.OFTConfig(target_modules=["0"], oft_block_size=4, use_cayley_neumann=False),
}
LOW_RANK = ("lora", "rslora")


def adapted(model: nn.Module, config: Any = LORA, *, moved: bool = True) -> Any:
    """A copy of the model with adapters, in float64; `moved`: by a random amount."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).to(torch.float64)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapters(wrapped) if moved else ():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return wrapped


def adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def merged(model: Any) -> dict[str, Tensor]:
    """The weights in effect, by PEFT itself."""
    return dict(copy.deepcopy(model).merge_and_unload(safe_merge=True).named_parameters())


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(adapters(model), **{"lr": LR, **options})


def distance(memory: memsyn.Memory, weights: dict[str, Tensor]) -> Tensor:
    """sum Omega (W - W*)^2"""
    terms = [(omega * (weights[n] - memory.anchor[n]).square()).sum() for n, omega in memory.importance.items()]
    return torch.stack(terms).sum()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """PEFT warns of what its own layers cannot undo."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unmerge result can be inaccurate")
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        yield


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_penalty_is_that_of_the_weights_in_effect(kind: str) -> None:
    model = network()
    memory = learned(model)
    wrapped = adapted(model, CONFIGS[kind])
    before = [p.clone() for p in wrapped.parameters()]
    expected = distance(memory, merged(wrapped))
    assert float(expected.detach()) > 1e-3
    assert memsyn.penalty(wrapped, memory).item() == pytest.approx(expected.item(), rel=1e-10)
    handle = memsyn.protect(sgd(wrapped), wrapped, memory, strength=2.0)
    assert handle.form == ("proximal" if kind in LOW_RANK else "gradient")
    assert handle.value() == pytest.approx(2 * expected.item(), rel=1e-10)
    assert handle.report().penalty == pytest.approx(2 * expected.item(), rel=1e-10)
    assert all(torch.equal(p, old) for p, old in zip(wrapped.parameters(), before, strict=True))


def effective_by_hand(kind: str, layer: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias in effect, from the definitions of the papers."""
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    if kind == "ia3":
        scale = layer.ia3_l["default"].flatten()
        return (weight * scale, bias) if layer.is_feedforward else (weight * scale[:, None], bias * scale)
    if kind == "oft":
        skew = torch.zeros(2, 4, 4, dtype=weight.dtype)
        row, column = torch.triu_indices(4, 4, 1)
        skew[:, row, column] = layer.oft_R["default"].weight
        skew = skew - skew.transpose(1, 2)
        identity = torch.eye(4, dtype=weight.dtype)
        rotation = torch.block_diag(*((identity + one) @ torch.linalg.inv(identity - one) for one in skew))
        return weight @ rotation, bias
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scale = {"lora": 5 / 3, "rslora": 8 / 3**0.5, "lora with biases": 0.5, "dora": 8 / 3}[kind]
    whole = weight + scale * b @ a
    if kind == "dora":
        whole = layer.lora_magnitude_vector["default"].weight[:, None] * whole / whole.norm(dim=1, keepdim=True)
    if kind == "lora with biases":
        bias = bias + scale * layer.lora_B["default"].bias
    return whole, bias


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_gradient_is_that_of_the_penalty_on_the_weights_in_effect(kind: str, maximize: bool) -> None:
    model = network()
    memory = learned(model)
    wrapped = adapted(model, CONFIGS[kind])
    weights = dict(model.named_parameters())
    for index in ("0",) if kind == "oft" else ("0", "2"):
        found = effective_by_hand(kind, wrapped.base_model.model[int(index)])
        weights |= {f"{index}.weight": found[0], f"{index}.bias": found[1]}
    expected = torch.autograd.grad(0.7 * distance(memory, weights), adapters(wrapped))
    optimizer = sgd(wrapped, lr=0.0, maximize=maximize)
    memsyn.protect(optimizer, wrapped, memory, strength=0.7, form="gradient")
    for parameter in adapters(wrapped):
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()
    sign = -1 if maximize else 1
    for parameter, gradient in zip(adapters(wrapped), expected, strict=True):
        assert torch.allclose(parameter.grad - 2.0, sign * gradient, rtol=1e-9, atol=1e-12)


def test_no_weight_is_left_out_of_the_gradient_by_a_closure() -> None:
    model = network()
    memory = learned(model)
    wrapped = adapted(model)
    optimizer = torch.optim.LBFGS(adapters(wrapped), lr=1.0, max_iter=200, line_search_fn="strong_wolfe")
    handle = memsyn.protect(optimizer, wrapped, memory, strength=1.0)
    before = handle.value()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p * 0.0).sum() for p in adapters(wrapped))
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert handle.value() < 1e-6 * before


def conv1d() -> nn.Module:
    layer = Conv1D(10, 8)
    nn.init.normal_(layer.weight, std=0.4)
    return layer


def layouts() -> dict[str, tuple[Callable[[], nn.Module], Tensor, Any]]:
    """Layers whose weights PEFT holds in another shape or order: model, data, adapters."""
    tokens = torch.randint(12, (16, 5), generator=torch.Generator().manual_seed(1))
    images = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def build(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def built() -> nn.Module:
            torch.manual_seed(0)
            return nn.Sequential(*(layer() for layer in layers)).double()

        return built

    return {
        "table": (
            build(lambda: nn.Embedding(12, 6), lambda: nn.Flatten(), lambda: nn.Linear(30, 3)),
            tokens,
            peft.LoraConfig(r=2, target_modules=["0"]),
        ),
        "convolution": (
            build(lambda: nn.Conv2d(2, 4, 3), lambda: nn.Flatten(), lambda: nn.Linear(36, 3)),
            images,
            peft.LoraConfig(r=2, target_modules=["0"]),
        ),
        "Conv1D": (
            build(conv1d, lambda: nn.Tanh(), lambda: nn.Linear(10, 3)),
            DATA,
            peft.LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True),
        ),
    }


@pytest.mark.parametrize("kind", layouts())
@pytest.mark.parametrize("form", ["gradient", "proximal", "projected"])
def test_weights_in_other_layouts_are_held(kind: str, form: str) -> None:
    build, data, config = layouts()[kind]
    model = build()
    memory = learned(model, "kronecker" if form == "projected" else "mas", data)
    wrapped = adapted(model, config, moved=form != "projected")
    if form != "projected":
        assert memsyn.penalty(wrapped, memory).item() == pytest.approx(
            distance(memory, merged(wrapped)).item(), rel=1e-9
        )
    if form == "gradient":
        expected = torch.autograd.grad(memsyn.penalty(wrapped, memory), adapters(wrapped))
        optimizer = sgd(wrapped, lr=0.0)
        memsyn.protect(optimizer, wrapped, memory, strength=1.0, form=form)
        for parameter in adapters(wrapped):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for parameter, gradient in zip(adapters(wrapped), expected, strict=True):
            assert torch.allclose(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
        return
    # Data that fill all directions leave no room at an infinite strength; unused rows of a table stay free.
    moved = {}
    for strength in (0.0, 1e9):
        trained = copy.deepcopy(wrapped)
        optimizer = torch.optim.Adam(adapters(trained), lr=0.01)
        handle = memsyn.protect(optimizer, trained, memory, strength=strength, form=form)
        for _ in range(20):
            optimizer.zero_grad()
            trained(data).square().mean().backward()
            optimizer.step()
        handle.remove()
        moved[strength] = ((trained(data) - model(data)).norm() / model(data).norm()).item()
    assert moved[0.0] > 0.01
    assert moved[1e9] < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_merged_weights_stay_at_a_huge_strength(optimizer: Any, dtype: torch.dtype) -> None:
    """It ran with a value of 0 while the weights in effect moved."""
    model, data = network().to(dtype), DATA.to(dtype)
    memory = learned(model, data=data)
    target = torch.randn(24, 4, dtype=dtype)
    moved = {}
    for strength in (0.0, 1e9, 1e37):
        wrapped = adapted(model, moved=False).to(dtype)
        own = optimizer(adapters(wrapped), lr=0.05)
        handle = memsyn.protect(own, wrapped, memory, strength=strength)
        for _ in range(50):
            own.zero_grad()
            (wrapped(data) - target).square().mean().backward()
            own.step()
        handle.remove()
        weights = merged(wrapped)
        moved[strength] = max((weights[n] - model.get_parameter(n)).abs().max().item() for n in memory.names)
    assert moved[0.0] > 0.1
    assert moved[1e9] < 1e-6
    assert moved[1e37] < 1e-6


def test_the_proximal_step_is_the_minimum_over_b_then_over_a() -> None:
    model = network()
    memory = learned(model)
    wrapped = adapted(model)
    layer = wrapped.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    optimizer = sgd(wrapped, momentum=0.5)
    memsyn.protect(optimizer, wrapped, memory, strength=3.0)
    for parameter in adapters(wrapped):
        parameter.grad = torch.ones_like(parameter)
    a_moved, b_moved = a.detach() - LR, b.detach() - LR
    optimizer.step()
    size = LR / (1 - 0.5)
    omega = memory.importance["0.weight"]

    def objective(up: Tensor, down: Tensor) -> Tensor:
        held = 3.0 * (omega * (5 / 3 * up @ down).square()).sum()
        return held + ((up - b_moved).square().sum() + (down - a_moved).square().sum()) / (2 * size)

    new_b, new_a = b.detach().requires_grad_(), a.detach().requires_grad_()
    (slope_b,) = torch.autograd.grad(objective(new_b, a_moved), new_b)
    (slope_a,) = torch.autograd.grad(objective(b.detach(), new_a), new_a)
    start = torch.autograd.grad(objective(b_moved.requires_grad_(), a_moved), b_moved)[0]
    assert float(start.norm()) > 0.1
    # The curvature has a millionth of its mean added, against rounding.
    assert float(slope_b.norm()) < 1e-5 * float(start.norm())
    assert float(slope_a.norm()) < 1e-5 * float(start.norm())


def whole_second_moment(data: Tensor) -> Tensor:
    """A, scaled to mean eigenvalue 1."""
    moment = data.T @ data
    return moment / moment.diagonal().mean()


def test_the_projection_of_a_and_b_has_its_closed_form() -> None:
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    strength = 7.0
    memory = learned(model, "kronecker")
    wrapped = adapted(model, peft.LoraConfig(r=2, target_modules=["0"]), moved=False)
    layer = wrapped.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    drawn = a.detach().clone()
    optimizer = sgd(wrapped)
    handle = memsyn.protect(optimizer, wrapped, memory, strength=strength, every=1)
    moment = whole_second_moment(DATA)
    damp = torch.linalg.inv(torch.eye(8, dtype=torch.float64) + strength * moment)
    assert torch.allclose(a, drawn @ damp, rtol=1e-9)
    assert torch.equal(wrapped(DATA), model(DATA))
    start = a.detach().clone()
    for parameter in adapters(wrapped):
        parameter.grad = torch.randn_like(parameter)
    gradients = [p.grad.clone() for p in (a, b)]
    optimizer.step()
    # Gradients are damped before the step, and the change after it.
    assert torch.allclose(a, start - LR * gradients[0] @ damp @ damp, rtol=1e-8, atol=1e-12)
    assert memory.directions is not None
    outputs = memory.directions.layers["0.weight"].outputs
    assert outputs is not None
    s, u = torch.linalg.eigh(outputs.dense()[0])

    def damped(change: Tensor, down: Tensor) -> Tensor:
        size = max(float(down.square().sum(1).mean()), 1 / 3)
        z, v = torch.linalg.eigh(down @ moment @ down.T / size)
        return u @ ((u.T @ change @ v) / (1 + strength * z * (0.9 * s[:, None] + 0.1))) @ v.T

    assert torch.allclose(b, -damped(damped(LR * gradients[1], start), a.detach()), rtol=1e-7, atol=1e-12)
    assert handle.form == "projected"


@pytest.mark.parametrize("estimator", ["inputs", "kronecker"])
def test_outputs_for_old_inputs_stay_if_these_lie_in_a_subspace(estimator: str) -> None:
    """B trains freely, since A has no part in the subspace from the start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6)).double()
    old = torch.randn(40, 3, dtype=torch.float64) @ torch.randn(3, 12, dtype=torch.float64)
    memory = learned(model, estimator, old)
    found = {}
    for strength in (0.0, 1e12):
        torch.manual_seed(1)
        wrapped = adapted(model, peft.LoraConfig(r=4, target_modules=["0"]), moved=False)
        new, target = torch.randn(64, 12, dtype=torch.float64), torch.randn(64, 6, dtype=torch.float64)
        before = (wrapped(new) - target).square().mean().item()
        optimizer = torch.optim.AdamW(adapters(wrapped), lr=0.02)
        handle = memsyn.protect(optimizer, wrapped, memory, strength=strength)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (wrapped(new) - target).square().mean()
            loss.backward()
            optimizer.step()
        handle.remove()
        weights = merged(wrapped)
        change = (weights["0.weight"] - model[0].weight) @ old.T
        share = (change.norm() / (model[0].weight @ old.T).norm()).item()
        found[strength] = share, before - loss.item()
    assert found[0.0][0] > 0.3
    assert found[1e12][0] < 1e-9
    assert found[1e12][1] > 0.5 * found[0.0][1]


def test_an_adapter_that_was_trained_keeps_a_and_damps_b() -> None:
    """A reads old inputs, so B must not move: not where A may not be changed without changing the function."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6)).double()
    old = torch.randn(40, 3, dtype=torch.float64) @ torch.randn(3, 12, dtype=torch.float64)
    wrapped = adapted(model, peft.LoraConfig(r=2, target_modules=["0"]))
    factors = memsyn.measure(wrapped, [old], estimator="kronecker", weights="effective", progress=False)
    memory = memsyn.Memory.empty().consolidate(wrapped, factors)
    first = wrapped(old).detach()
    optimizer = sgd(wrapped)
    handle = memsyn.protect(optimizer, wrapped, memory, strength=1e12)
    assert torch.equal(wrapped(old), first)
    fresh = torch.randn(30, 12, dtype=torch.float64)
    start = wrapped(fresh).detach()
    for _ in range(30):
        optimizer.zero_grad()
        (wrapped(fresh) - 1).square().mean().backward()
        optimizer.step()
    handle.remove()
    assert ((wrapped(old) - first).norm() / first.norm()).item() < 1e-9
    assert ((wrapped(fresh) - start).norm() / start.norm()).item() > 0.01


def test_names_fit_without_a_warning() -> None:
    model = network()
    memory = learned(model)
    wrapped = adapted(model, moved=False)
    memory.check(wrapped)
    assert memory.fitted(wrapped).names == memory.names
    assert memsyn.penalty(wrapped, memory).item() == 0.0
    assert list(WeightsInEffect(wrapped)) == list(dict(model.named_parameters()))


def test_a_prefix_around_the_adapters_is_found_with_a_warning() -> None:
    class Module(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

    model = network()
    memory = learned(model)
    outer = Module(adapted(model))
    with pytest.warns(memsyn.RenamedParametersWarning, match=r"4 of 4 .*: 0\.bias is net\.0\.bias"):
        found = memsyn.penalty(outer, memory)
    assert found.item() == pytest.approx(distance(memory, merged(outer.net)).item(), rel=1e-10)


def test_a_saved_memory_loads_like_a_model_with_adapters(tmp_path: Any) -> None:
    model = network()
    for estimator in ("mas", "kronecker"):
        memory = learned(model, estimator)
        memory.save(tmp_path / "m")
        memsyn.Memory.load(tmp_path / "m", like=adapted(model, moved=False))
        with pytest.warns(memsyn.MovedWeightsWarning, match="have other weights in the model"):
            memsyn.Memory.load(tmp_path / "m", like=adapted(model))


def test_merging_changes_neither_the_value_nor_what_is_held() -> None:
    model = network()
    memory = learned(model)
    wrapped = adapted(model)
    optimizer = sgd(wrapped)
    handle = memsyn.protect(optimizer, wrapped, memory, strength=2.0)
    before = handle.value()
    wrapped.merge_adapter()
    assert handle.value() == pytest.approx(before, rel=1e-9)
    wrapped.unmerge_adapter()
    assert handle.value() == pytest.approx(before, rel=1e-9)
    wrapped(DATA).square().mean().backward()
    optimizer.step()
    assert handle.value() != pytest.approx(before, rel=1e-6)
    handle.remove()
    value = memsyn.penalty(wrapped, memory).item()
    plain = wrapped.merge_and_unload()
    assert memsyn.penalty(plain, memory).item() == pytest.approx(value, rel=1e-9)
    own = torch.optim.SGD(plain.parameters(), lr=LR)
    assert memsyn.protect(own, plain, memory, strength=2.0).value() == pytest.approx(2 * value, rel=1e-9)


def test_a_second_task_has_a_new_adapter_with_another_name_and_rank() -> None:
    model = network()
    wrapped = adapted(model)
    first = memsyn.measure(wrapped, [DATA], weights="effective", progress=False)
    memory = learned(model).consolidate(wrapped, first)
    assert memory.names == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert memsyn.penalty(wrapped, memory).item() == 0.0
    # What the first adapter has learned must stay in effect: it is active too, or merged.
    for name in memory.names:
        assert torch.allclose(memory.anchor[name], merged(wrapped)[name], rtol=1e-12)
    wrapped.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"]))
    wrapped.base_model.set_adapter(["default", "second"])
    wrapped.to(torch.float64)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(".second." in name)
    optimizer = sgd(wrapped)
    handle = memsyn.protect(optimizer, wrapped, memory, strength=1.0)
    assert handle.value() == pytest.approx(0.0, abs=1e-20)
    with torch.no_grad():
        adapters(wrapped)[1].add_(0.1)
    weights = dict(copy.deepcopy(wrapped).merge_and_unload(adapter_names=["default", "second"]).named_parameters())
    assert handle.value() == pytest.approx(distance(memory, weights).item(), rel=1e-9)
    # Without the first adapter, another weight is in effect. That is said by its distance.
    wrapped.base_model.set_adapter("second")
    weights = dict(copy.deepcopy(wrapped).merge_and_unload(adapter_names=["second"]).named_parameters())
    assert handle.value() == pytest.approx(distance(memory, weights).item(), rel=1e-9)


def test_a_switched_off_adapter_is_not_in_effect() -> None:
    model = network()
    memory = learned(model)
    wrapped = adapted(model)
    assert memsyn.penalty(wrapped, memory).item() > 0.0
    with wrapped.disable_adapter():
        assert memsyn.penalty(wrapped, memory).item() == 0.0


def test_modules_to_save_are_held_in_their_copies() -> None:
    model = network()
    memory = learned(model)
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    wrapped = adapted(model, config)
    optimizer = sgd(wrapped)
    handle = memsyn.protect(optimizer, wrapped, memory, strength=1e12)
    expected = distance(memory, merged(wrapped)).item()
    assert handle.value() == pytest.approx(1e12 * expected, rel=1e-9)
    copied = wrapped.base_model.model[2].modules_to_save["default"].weight
    assert (copied - memory.anchor["2.weight"]).norm().item() > 0.1
    wrapped(DATA).square().mean().backward()
    optimizer.step()
    assert (copied - memory.anchor["2.weight"]).abs().max().item() < 1e-9
    wrapped.add_adapter("other", peft.LoraConfig(r=1, target_modules=["0"], modules_to_save=["2"]))
    wrapped.set_adapter("other")
    in_use = wrapped.base_model.model[2].modules_to_save["other"].weight
    assert WeightsInEffect(wrapped)["2.weight"] is in_use
    with wrapped.disable_adapter():
        assert WeightsInEffect(wrapped)["2.weight"] is wrapped.base_model.model[2].original_module.weight


def llama(vocabulary: int = 20, *, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, num_key_value_heads=1, **sizes)
    return LlamaForCausalLM(config).double().eval()


TOKENS = {"input_ids": torch.randint(20, (6, 5), generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("estimator", ["mas", "kronecker"])
@pytest.mark.parametrize("modules", [["q_proj", "down_proj"], ["embed_tokens", "v_proj"], ["embed_tokens", "lm_head"]])
def test_a_language_model_with_tied_tables_is_held(estimator: str, modules: list[str]) -> None:
    model = llama()
    memory = learned(model, estimator, TOKENS)
    config = peft.LoraConfig(r=4, target_modules=modules)
    moved = {}
    for strength in (0.0, 1e9):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            wrapped = adapted(model, config, moved=False)
        optimizer = torch.optim.AdamW(adapters(wrapped), lr=0.02)
        handle = memsyn.protect(optimizer, wrapped, memory, strength=strength)
        assert handle.report().num_weights > 0
        for _ in range(8):
            optimizer.zero_grad()
            wrapped(**TOKENS, labels=TOKENS["input_ids"]).loss.backward()
            optimizer.step()
        handle.remove()
        new, old = wrapped(**TOKENS).logits, model(**TOKENS).logits
        moved[strength] = ((new - old).norm() / old.norm()).item()
    assert moved[0.0] > 0.05
    assert moved[1e9] < 1e-3


@pytest.mark.parametrize("estimator", ["mas", "kronecker"])
def test_a_table_that_has_grown_is_held_in_its_old_rows_and_one_that_has_shrunk_is_said(estimator: str) -> None:
    model = llama()
    memory = learned(model, estimator, TOKENS)
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "v_proj"])
    grown, shrunk = llama(tied=True), llama(tied=True)
    grown.resize_token_embeddings(23, mean_resizing=False)
    shrunk.resize_token_embeddings(17)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        larger, smaller = adapted(grown, config, moved=False), adapted(shrunk, config, moved=False)
    optimizer = torch.optim.Adam(adapters(larger), lr=0.02)
    with pytest.warns(memsyn.GrownParametersWarning, match=r"embed_tokens\.weight \(20 to 23 rows\)"):
        handle = memsyn.protect(optimizer, larger, memory, strength=1e9)
    first = larger(**TOKENS).logits[..., :20].detach()
    new = {"input_ids": TOKENS["input_ids"] + 3}
    for _ in range(8):
        optimizer.zero_grad()
        larger(**new, labels=new["input_ids"]).loss.backward()
        optimizer.step()
    handle.remove()
    assert ((larger(**TOKENS).logits[..., :20] - first).norm() / first.norm()).item() < 1e-3
    with pytest.raises(memsyn.MismatchError, match=r"embed_tokens\.weight .*exclude=\['model\.embed_tokens\.weight'\]"):
        memsyn.protect(sgd(smaller), smaller, memory)
    own = sgd(smaller)
    handle = memsyn.protect(own, smaller, memory, exclude="model.embed_tokens.weight")
    assert handle.report().num_weights > 0


def test_statistics_under_adapters_are_known_and_frozen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    model(DATA)
    model.eval()
    memory = learned(model)
    wrapped = adapted(model, peft.LoraConfig(r=2, target_modules=["0"]), moved=False)
    optimizer = sgd(wrapped)
    handle = memsyn.protect(optimizer, wrapped, memory, strength=1.0, freeze_statistics=True)
    wrapped.train()
    wrapped(DATA + 3).sum().backward()
    optimizer.step()
    assert handle.report().moved_statistics == 0
    assert torch.equal(wrapped.base_model.model[1].running_mean, memory.statistics["1.running_mean"])
    handle.remove()


@pytest.mark.parametrize("estimator", ["mas", "kronecker", "mas-local"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_measured_in_effect_is_what_the_merged_model_gives(kind: str, estimator: str) -> None:
    wrapped = adapted(network(), CONFIGS[kind])
    before = {name: (p.clone(), p.requires_grad) for name, p in wrapped.named_parameters()}
    found = memsyn.measure(wrapped, [DATA], estimator=estimator, weights="effective", progress=False)
    plain = copy.deepcopy(wrapped).merge_and_unload().requires_grad_()
    expected = memsyn.measure(plain, [DATA], estimator=estimator, progress=False)
    assert found.names == expected.names == dict(network().named_parameters()).keys()
    assert found.sums.keys() == expected.sums.keys()
    for name, total in expected.sums.items():
        assert torch.allclose(found.sums[name], total, rtol=1e-8, atol=1e-10)
    for name, parameter in wrapped.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
    memory = memsyn.Memory.empty().consolidate(wrapped, found)
    memory.check(plain)


def test_a_forward_that_was_replaced_under_the_adapters_runs_the_weights_in_effect() -> None:
    wrapped = adapted(network())
    old = wrapped.get_base_model().forward
    wrapped.get_base_model().forward = lambda x: 2 * old(x)  # as TRL does
    plain = copy.deepcopy(wrapped).merge_and_unload(safe_merge=True).requires_grad_(True)
    del plain.forward
    found = memsyn.measure(wrapped, [DATA], weights="effective", progress=False).mean()
    expected = memsyn.measure(plain, [DATA], forward=lambda model, x: 2 * model(x), progress=False).mean()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], value, rtol=1e-9) for name, value in expected.items())
    assert min(float(value.sum()) for value in found.values()) > 0


def test_what_is_measured_of_adapters_is_never_chosen_by_accident() -> None:
    model = network()
    wrapped = adapted(model)
    with pytest.raises(memsyn.OptionError, match=r"weights='effective': .*weights='adapters': .*it was not said"):
        memsyn.measure(wrapped, [DATA], progress=False)
    with pytest.raises(memsyn.OptionError, match="got weights='all'"):
        memsyn.measure(wrapped, [DATA], weights="all", progress=False)
    with pytest.raises(memsyn.OptionError, match="weights='adapters' is for models with adapters of PEFT"):
        memsyn.measure(model, [DATA], weights="adapters", progress=False)
    own = memsyn.measure(wrapped, [DATA], weights="adapters", progress=False)
    assert own.names == {n for n, p in wrapped.named_parameters() if p.requires_grad}
    plain, in_effect = (memsyn.measure(model, [DATA], weights=w, progress=False) for w in (None, "effective"))
    assert all(torch.equal(plain.sums[name], in_effect.sums[name]) for name in plain.names)
    memory = memsyn.Memory.empty().consolidate(wrapped, own)
    handle = memsyn.protect(sgd(wrapped), wrapped, memory, strength=1.0)
    with torch.no_grad():
        adapters(wrapped)[0].add_(0.1)
    name = next(n for n, p in wrapped.named_parameters() if p.requires_grad)
    assert handle.value() == pytest.approx(0.01 * float(memory.importance[name].sum()), rel=1e-9)


def test_a_moved_adapter_is_said_when_its_importance_is_consolidated() -> None:
    wrapped = adapted(network())
    plain = plain_model(wrapped)
    mark = memsyn.fingerprint(plain)
    found = replace(memsyn.measure(plain, [DATA], progress=False), fingerprint=mark)
    memsyn.Memory.empty().consolidate(wrapped, found)
    with torch.no_grad():
        adapters(wrapped)[0].add_(0.1)
    with pytest.warns(memsyn.MovedWeightsWarning, match="measured at other weights"):
        memsyn.Memory.empty().consolidate(wrapped, found)


def test_models_are_compared_by_the_weights_in_effect() -> None:
    model = network()
    memory = learned(model).consolidate(model, memsyn.measure(model, [DATA], estimator="kronecker", progress=False))
    wrapped = adapted(model)
    plain = copy.deepcopy(wrapped).merge_and_unload()
    for reference in (memory, model, model.state_dict()):
        found = memsyn.compare(wrapped, reference, [DATA], kind="values", progress=False)
        expected = memsyn.compare(plain, reference, [DATA], kind="values", progress=False)
        assert float(expected.change.mean()) > 0.01
        assert torch.allclose(torch.as_tensor(found.change), torch.as_tensor(expected.change), rtol=1e-9)
        assert found.taken == expected.taken == ()
    change, same = (memory.predicted_change(own) for own in (wrapped, plain))
    assert change.keys() == same.keys()
    assert all(change[layer] == pytest.approx(same[layer], rel=1e-9) for layer in same)


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("form", ["projected", "gradient"])
def test_the_report_predicts_the_change_by_the_weights_in_effect(form: str, every: int) -> None:
    model = network()
    memory = learned(model, "kronecker")
    if form == "gradient":
        memory = learned(model).consolidate(model, memsyn.measure(model, [DATA], estimator="kronecker", progress=False))
    wrapped = adapted(model, moved=False)
    optimizer = sgd(wrapped)
    options = {"every": every} if form == "projected" else {}
    handle = memsyn.protect(optimizer, wrapped, memory, form=form, strength=1e-3, reference=model, **options)
    assert handle.report().change == 0
    for _ in range(4):
        optimizer.zero_grad()
        wrapped(DATA).square().mean().backward()
        optimizer.step()
    before = [p.clone() for p in wrapped.parameters()]
    report = handle.report()
    assert all(torch.equal(p, old) for p, old in zip(wrapped.parameters(), before, strict=True))
    handle.flush()
    expected = memory.predicted_change(merged(wrapped), model)
    scale = memory.directions.squared_outputs
    # Steps that wait count as projected. B is damped by A as it is, which waits too.
    tolerance = 1e-9 if every == 1 else 1e-3
    assert report.change == pytest.approx((sum(expected.values()) / scale) ** 0.5, rel=tolerance)
    assert report.change > 0.01


def test_a_handle_is_saved_and_loaded() -> None:
    model = network()
    for estimator in ("mas", "kronecker"):
        memory = learned(model, estimator)
        wrapped = adapted(model)
        state = memsyn.protect(sgd(wrapped), wrapped, memory, strength=3.0).state_dict()
        again = adapted(model)
        handle = memsyn.protect(sgd(again), again, memory, strength=1.0)
        handle.load_state_dict(state)
        assert handle.strength == 3.0
        expected = 3.0 * distance(memory, merged(again)).item() if estimator == "mas" else 0.0
        assert handle.value() == pytest.approx(expected, rel=1e-9)


def test_a_scaled_gradient_gets_a_scaled_penalty() -> None:
    model = network()
    memory = learned(model)
    wrapped = adapted(model)
    expected = torch.autograd.grad(memsyn.penalty(wrapped, memory), adapters(wrapped))
    before = [p.detach().clone() for p in adapters(wrapped)]
    optimizer = sgd(wrapped, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    memsyn.protect(optimizer, wrapped, memory, strength=1.0, form="gradient")
    scaler.scale(sum((p * 0.0).sum() for p in adapters(wrapped))).backward()
    scaler.step(optimizer)
    scaler.update()
    for parameter, old, gradient in zip(adapters(wrapped), before, expected, strict=True):
        assert torch.allclose(parameter, old - LR * gradient, rtol=1e-6, atol=1e-9)


def test_what_the_proximal_form_cannot_hold_is_said() -> None:
    model = network()
    memory = learned(model)
    wrapped = adapted(model, CONFIGS["dora"])
    with pytest.raises(memsyn.OptionError, match=r"0\.weight is adapted in another way, by PEFT's lora Linear: use"):
        memsyn.protect(optimizer := sgd(wrapped), wrapped, memory, form="proximal")
    assert memsyn.protect(optimizer, wrapped, memory).form == "gradient"  # the first call has left nothing behind
    wrapped = adapted(model)
    optimizer = sgd(wrapped)
    memsyn.protect(optimizer, wrapped, memory, strength=1.0)
    wrapped.add_adapter("second", CONFIGS["dora"])
    wrapped.set_adapter("second")
    optimizer.add_param_group({"params": [p for n, p in wrapped.named_parameters() if ".second." in n]})
    for parameter in adapters(wrapped):
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises((memsyn.OptionError, memsyn.ProtectionError), match="form='proximal' is for LoRA"):
        optimizer.step()


def test_what_the_projected_form_cannot_hold_is_said() -> None:
    model = network()
    memory = learned(model, "kronecker")
    for kind in ("dora", "ia3", "oft", "lora with biases"):
        wrapped = adapted(model, CONFIGS[kind])
        with pytest.raises(
            memsyn.ProtectionError, match=r"0\.weight is adapted by PEFT's .*projected form is for LoRA"
        ):
            memsyn.protect(sgd(wrapped), wrapped, memory)


def test_adapters_on_what_is_no_matrix_cannot_be_projected() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(8, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x * self.table(torch.arange(8)).T)

    model = Positions().double()
    memory = learned(model, "kronecker")
    wrapped = adapted(model, peft.LoraConfig(r=1, target_modules=["table"]))
    with pytest.raises(memsyn.ProtectionError, match=r"table\.weight is no matrix.*exclude='table\.weight'"):
        memsyn.protect(sgd(wrapped), wrapped, memory)


@pytest.mark.parametrize("estimator", ["mas", "kronecker"])
def test_a_weight_that_trains_beside_its_adapters_is_refused(estimator: str) -> None:
    model = network()
    memory = learned(model, estimator)
    wrapped = adapted(model)
    wrapped.base_model.model[0].base_layer.weight.requires_grad_()
    with pytest.raises(memsyn.ProtectionError, match=r"0\.weight trains, and its adapters too"):
        memsyn.protect(sgd(wrapped), wrapped, memory)


def test_adapters_whose_weight_is_unknown_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 3)).double()
    images = torch.randn(6, 2, 5, 5, dtype=torch.float64)
    memory = learned(model, data=images)
    wrapped = adapted(model, peft.IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.raises(memsyn.ModelError, match=r"0\.weight is adapted by PEFT's ia3 Conv2d.*exclude='0\.\*'"):
        memsyn.protect(sgd(wrapped), wrapped, memory)


def test_a_layer_that_is_not_linear_has_no_weight_in_effect() -> None:
    model = network()
    memory = learned(model)
    wrapped = adapted(model, CONFIGS["ia3"])
    layer = wrapped.base_model.model[0]
    forward = layer.forward
    layer.forward = lambda x: forward(x).tanh()
    with pytest.raises(memsyn.ModelError, match=r"ia3 Linear, which is not linear in its inputs"):
        memsyn.penalty(wrapped, memory)


def test_a_penalty_that_diverges_is_an_error() -> None:
    model = network()
    memory = learned(model)
    wrapped = adapted(model)
    optimizer = sgd(wrapped)
    memsyn.protect(optimizer, wrapped, memory, strength=3e3, form="gradient")

    def train() -> None:
        for _ in range(100):
            optimizer.zero_grad()
            wrapped(DATA).square().mean().backward()
            optimizer.step()

    with pytest.raises(memsyn.ProtectionError, match="strength 3000 makes the penalty on the weights of adapters"):
        train()


def test_a_penalty_that_does_not_diverge_is_none() -> None:
    """It grows from 0 while the new task is learned."""
    model = network()
    memory = learned(model)
    wrapped = adapted(model, moved=False)
    optimizer = sgd(wrapped, lr=1e-3)
    handle = memsyn.protect(optimizer, wrapped, memory, strength=1e-3, form="gradient")
    for _ in range(100):
        optimizer.zero_grad()
        (wrapped(DATA) - 3).square().sum().backward()
        optimizer.step()
    assert handle.value() > 0.0


def test_adapters_alone_are_what_an_optimizer_must_hold() -> None:
    model = network()
    memory = learned(model)
    wrapped = adapted(model)
    other = torch.optim.SGD(network().parameters(), lr=LR)
    with pytest.raises(memsyn.ProtectionError, match="the optimizer holds none of the memory's 4 parameters"):
        memsyn.protect(other, wrapped, memory)
    optimizer = sgd(wrapped)
    handle = memsyn.protect(optimizer, wrapped, memory, strength=1.0)
    with torch.no_grad():
        adapters(wrapped)[0].add_(0.1)
    with pytest.warns(memsyn.NotProtectedWarning, match="1 protected parameters"):
        handle.report()


def test_adapters_of_weights_outside_of_the_memory_are_named() -> None:
    model = network()
    memory = learned(model).select(only="0.*")
    wrapped = adapted(model)
    with pytest.warns(
        memsyn.NewParametersWarning, match=r"1 parameters of the model are not in the memory.*: 2\.weight"
    ):
        handle = memsyn.protect(sgd(wrapped), wrapped, memory, strength=1.0)
    expected = (memory.importance["0.weight"] * (merged(wrapped)["0.weight"] - memory.anchor["0.weight"]) ** 2).sum()
    assert handle.value() == pytest.approx(expected.item(), rel=1e-9)


class OfLightning(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(adapters(self), lr=0.02)


@pytest.mark.filterwarnings("ignore")  # of the trainer: many, and not ours
@pytest.mark.parametrize("estimator", ["mas", "kronecker"])
def test_the_callback_of_lightning_protects_and_extends_a_memory_of_the_base(estimator: str, tmp_path: Any) -> None:
    model = network()
    memory = learned(model, estimator)
    module = OfLightning(adapted(model, moved=False))
    data = torch.utils.data.TensorDataset(DATA, torch.ones(24, 4, dtype=torch.float64))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    callback = LightningCallback(memory, strength=1e9)
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_epochs=2, logger=False, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **silent
    )
    with pytest.warns(memsyn.RenamedParametersWarning, match=r"is net\.0"):
        trainer.fit(module, loader)
    weights = merged(module.net)
    held = max((weights[n] - model.get_parameter(n)).abs().max().item() for n in memory.names)
    assert held < 1e-3
    assert callback.memory.num_samples == 48
    assert callback.memory.names == {f"net.{name}" for name in memory.names}


@pytest.mark.filterwarnings("ignore")  # of the trainer: many, and not ours
def test_the_callback_of_transformers_protects_and_extends_a_memory_of_the_base(tmp_path: Any) -> None:
    model = llama().float()
    memory = learned(model, "mas", TOKENS)
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["v_proj"]))
    data = [{"input_ids": row, "labels": row} for row in TOKENS["input_ids"]]
    callback = TrainerCallback(memory, strength=1e9)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, report_to=[], use_cpu=True, learning_rate=0.02, disable_tqdm=True
    )
    Trainer(model=wrapped, args=arguments, train_dataset=data, callbacks=[callback]).train()
    name = "model.layers.0.self_attn.v_proj.weight"
    assert (merged(wrapped)[name] - model.get_parameter(name)).abs().max().item() < 1e-3
    assert callback.memory.num_samples == 12
    assert callback.memory.names == memory.names


def test_weights_around_which_there_are_adapters_are_not_taken_for_those_in_effect() -> None:
    model = network()
    memory = learned(model).consolidate(model, memsyn.measure(model, [DATA], estimator="kronecker", progress=False))
    wrapped = adapted(model)
    for reference in (None, model.state_dict()):
        with pytest.raises(
            memsyn.MismatchError, match=r"adapters of PEFT \(base_model.model.0.base_layer.weight is one"
        ):
            predict(memory, wrapped.state_dict(), reference)
    with pytest.raises(memsyn.OptionError, match="has adapters of PEFT, and the memory holds the weights in effect"):
        memsyn.repair(wrapped, memory, batches=[DATA])
    assert memsyn.compare(wrapped, memory, [DATA], kind="classes", progress=False).mean_change > 0.1
    whole = copy.deepcopy(wrapped).merge_and_unload()
    assert predict(memory, whole.state_dict()).change > 0.1
    assert memsyn.repair(whole, memory, batches=[DATA]).measured[1].mean_change <= 0.05
