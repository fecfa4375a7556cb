"""Passes over batches in plain PyTorch, the exact values, and how time, memory and error are taken.

Must not import memsyn: the pass of another library, in an interpreter of its own, is timed by this file too.
The objective is memsyn's: s_k, the sum of the squares of all outputs for sample k.
"""

import copy
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

Values = dict[str, Tensor]
"""Parameter name -> importance per weight, a mean over samples."""
Pass = Callable[[nn.Module, Sequence[Tensor]], Values]


def ordinary(model: nn.Module, batches: Sequence[Tensor]) -> Values:
    """What training costs: a forward and a backward pass of each batch. It has no importance to show."""
    for batch in batches:
        model.zero_grad()
        model(batch).square().sum().backward()
    return {}


def one_by_one(model: nn.Module, batches: Sequence[Tensor]) -> Values:
    """1/N sum_k |d s_k / d theta| by a backward pass for each sample."""
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        for sample in batch.split(1):
            model.zero_grad()
            model(sample).square().sum().backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    totals[name] += parameter.grad.abs()
    return {name: total / sum(map(len, batches)) for name, total in totals.items()}


def per_sample_gradients(model: nn.Module, batches: Sequence[Tensor]) -> Values:
    """1/N sum_k |d s_k / d theta| by `vmap(grad)`: the gradients of all samples of a batch at once."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def score(values: Values, sample: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, values, (sample.unsqueeze(0),))
        return output.square().sum()

    for batch in batches:
        gradients = torch.vmap(torch.func.grad(score), (None, 0))(parameters, batch)
        for name, gradient in gradients.items():
            totals[name] += gradient.abs().sum(0)
    return {name: total / sum(map(len, batches)) for name, total in totals.items()}


def mean_first(model: nn.Module, batches: Sequence[Tensor]) -> Values:
    """The mean over batches of |d mean_k s_k / d theta|: what is often computed in place of the importance."""
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        (model(batch).square().sum() / len(batch)).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                totals[name] += parameter.grad.abs()
    return {name: total / len(batches) for name, total in totals.items()}


def exact(model: nn.Module, batches: Sequence[Tensor]) -> Values:
    """The truth: one sample at a time in float64, on a copy."""
    return one_by_one(*in_float64(model, batches))


def in_float64(model: nn.Module, batches: Sequence[Tensor]) -> tuple[nn.Module, list[Tensor]]:
    """A copy of the model, and the batches, in double precision; token ids stay as they are."""
    precise = [batch.double() if batch.is_floating_point() else batch for batch in batches]
    return copy.deepcopy(model).double(), precise


def relative_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """||x - ref|| / ||ref|| over all weights of the model."""
    assert set(found) == set(expected), sorted(set(found) ^ set(expected))
    off = math.hypot(*(float((found[name].to(value) - value).norm()) for name, value in expected.items()))
    return off / math.hypot(*(float(value.norm()) for value in expected.values()))


def seconds(run: Pass, model: nn.Module, batches: Sequence[Tensor]) -> float:
    """How long a pass takes."""
    on_cuda = batches[0].is_cuda
    if on_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(model, batches)
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Pass, model: nn.Module, batches: Sequence[Tensor]) -> int:
    """By how much memory grows, at most, during a pass: the weights and the batches are there already.

    On the CPU the growth of the resident set (Linux only). The mark of the highest resident set is reset before, since
    making the model may have left it higher; `getrusage` cannot be reset, and a child inherits its parent's.
    """
    # What is loaded at the first call of anything is no cost of this model.
    run(nn.Linear(2, 2).to(batches[0].device), [torch.ones(2, 2, device=batches[0].device)])
    gc.collect()
    if batches[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(model, batches)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    before = _resident("VmRSS")
    run(model, batches)
    return _resident("VmHWM") - before


def peak_of_tensors(action: Callable[[], object]) -> int:
    """The most bytes that tensors on the CPU hold during an action, beyond those before it: a profile of them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        action()
    held = most = 0
    events = (event for event in found.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
