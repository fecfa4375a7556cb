"""What protecting costs, as one line of JSON with all seconds that were taken; `run_all.py` runs it, part by part.

    python benchmarks/costs_of_steps.py steps vit-tiny --pairs 7
    python benchmarks/costs_of_steps.py adapters smollm2 --pairs 7

In one process and in turn: a bare step of training, then a protected one. A form that projects every tenth step is
timed over ten such pairs, so that each sum holds one projection. The same way: reports, an observer's calls, files.
"""

import argparse
import cProfile
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Adam, AdamW
from tqdm import tqdm

import factors
import memsyn
import observe
import profiles
import protect
from models import SUBJECTS

Numbers = dict[str, object]
Step = Callable[[], object]
PENALTIES = ("gradient", "proximal")
PROJECTED = ("projected, every 1", "projected, every 10")
OTHERS = protect.CONTENDERS[len(PENALTIES) :]
CASES = {
    "mlp-small": protect.Case(
        "MLP 784-400-400-10, batch 64, Adam",
        SUBJECTS["mlp"].model,
        lambda: SUBJECTS["mlp"].batch()[:64],
        lambda model: Adam(model.parameters(), lr=1e-4),
    ),
    "mlp-sgd": protect.CASES["mlp-sgd"],
    "mlp-adam": protect.CASES["mlp-adam"],
    "vit-tiny": protect.Case(
        "ViT-Tiny, batch 32, AdamW",
        SUBJECTS["vit-tiny"].model,
        SUBJECTS["vit-tiny"].batch,
        lambda model: AdamW(model.parameters(), lr=1e-4),
    ),
    "resnet18": protect.CASES["resnet18"],
}
FORMS = {
    "mlp-small": (*PENALTIES, *PROJECTED),
    "mlp-sgd": (*PENALTIES, *OTHERS),
    "mlp-adam": (*PENALTIES, *OTHERS),
    "vit-tiny": (*PENALTIES, *PROJECTED, *OTHERS),
    "resnet18": (*PENALTIES, *PROJECTED, *OTHERS),
}
"""The factors of the large MLP are left out: eigenvectors of 4,200 columns take longer than all the rest."""


def every_of(form: str) -> int:
    """Steps between two projections; 1 for forms without any."""
    return int(form.rpartition(" ")[2]) if form.startswith("projected") else 1


def steps_in_turn(bare: Step, steps: dict[str, Step], pairs: int, fewer: int) -> dict[str, list[list[float]]]:
    """Form -> pairs of seconds a step: bare, protected. Forms over several steps have at most `fewer` pairs."""
    found: dict[str, list[list[float]]] = {form: [] for form in steps}
    for step in (bare, *steps.values()):
        step()  # makes the optimizer's state
    for turn in tqdm(range(pairs), leave=False):
        for form, step in steps.items():
            count = every_of(form)
            if count > 1 and turn >= fewer:
                continue
            # Step by step in turn: what else the machine does meets both alike.
            taken = [(seconds(bare, 1), seconds(step, 1)) for _ in range(count)]
            found[form].append([sum(side) / count for side in zip(*taken, strict=True)])
    return found


def functions_of(steps: dict[str, Step]) -> dict[str, dict[str, float]]:
    """Form -> the three functions of memsyn with the most seconds a step, by a profile of ten or of one."""
    found = {}
    for form, step in steps.items():
        if not form.endswith(("gradient", "proximal", *PROJECTED)):
            continue
        count = every_of(form)
        with cProfile.Profile() as profile:
            for _ in range(count):
                step()
        found[form] = profiles.most_of(profile, count)
    return found


def seconds(step: Step, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) / count


def steps_of(name: str, pairs: int, fewer: int) -> Numbers:
    """Whole training steps of a network, in all forms."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model().train()
    batch = case.batch()
    targets = torch.randint(model(batch).shape[-1], (len(batch),))
    parameters = dict(model.named_parameters())
    importance = memsyn.Memory(
        {name: p.detach() + 1e-3 * torch.randn_like(p) for name, p in parameters.items()},
        {name: torch.rand_like(p) for name, p in parameters.items()},
    )
    projecting = directions(model, batch) if PROJECTED[0] in FORMS[name] else importance
    steps: dict[str, Step] = {}
    for form in FORMS[name]:
        own = deepcopy(model)
        if form in PROJECTED:
            steps[form] = projected_step(case, own, projecting, every_of(form), batch, targets)
        else:
            steps[form] = partial(protect.trainer(case, own, importance, form), batch, targets)
    bare = partial(protect.trainer(case, deepcopy(model), None, ""), batch, targets)
    return {"title": case.title, "pairs": steps_in_turn(bare, steps, pairs, fewer), "functions": functions_of(steps)}


def directions(model: nn.Module, batch: Tensor) -> memsyn.Memory:
    """Kronecker factors of a copy in eval mode, as a memory."""
    own = deepcopy(model).eval()
    measured = memsyn.measure(own, [batch, batch], estimator="kronecker", progress=False)
    return memsyn.Memory.empty().consolidate(own, measured)


def projected_step(
    case: protect.Case, model: nn.Module, memory: memsyn.Memory, every: int, batch: Tensor, targets: Tensor
) -> Step:
    optimizer = case.optimizer(model)
    memsyn.protect(optimizer, model, memory, every=every)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch), targets).backward()
        optimizer.step()

    return step


def adapted_steps(name: str, pairs: int, fewer: int, samples: int) -> Numbers:
    """Steps of LoRA of rank 8 on all linear layers, of a small Llama or of SmolLM2."""
    adapters, peft = import_module("adapters"), import_module("peft")
    model = adapters.load_smollm2().network if name == "smollm2" else adapters.llama()
    tokens = torch.randint(8000, (samples, 128), generator=torch.Generator().manual_seed(1))
    wrapped = peft.get_peft_model(deepcopy(model), peft.LoraConfig(r=8, target_modules=adapters.TARGETS)).train()
    measured = memsyn.measure(model, [{"input_ids": tokens}], estimator="kronecker", progress=False)
    projecting = memsyn.Memory.empty().consolidate(model, measured)
    steps: dict[str, Step] = {}
    for form in PENALTIES:
        steps[form] = partial(
            adapters.trainer(deepcopy(wrapped), adapters.memory_of(model, tokens, form), form), tokens
        )
    for form in PROJECTED:
        steps[form] = adapted_step(deepcopy(wrapped), projecting, every_of(form), tokens)
    bare = partial(adapters.trainer(deepcopy(wrapped), None, ""), tokens)
    weights = round(sum(p.numel() for p in model.parameters()) / 1e6)
    title = f"{'SmolLM2' if name == 'smollm2' else 'Llama'}, {weights} million weights, {tokens.numel()} tokens"
    return {"title": title, "pairs": steps_in_turn(bare, steps, pairs, fewer), "functions": functions_of(steps)}


def adapted_step(wrapped: Any, memory: memsyn.Memory, every: int, tokens: Tensor) -> Step:
    optimizer = AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)
    memsyn.protect(optimizer, wrapped, memory, strength=10.0, form="projected", every=every)

    def step() -> None:
        optimizer.zero_grad()
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def report_of(name: str, pairs: int) -> Numbers:
    """A report of a projected handle, after a projection and while changes wait for one."""
    subject, size = SUBJECTS[name], factors.STEPS[name]
    model = subject.model()
    batch = torch.cat([subject.batch()] * 2)[:size]
    memory = directions(model, batch)
    actions: dict[str, Step] = {"bare step": factors.training(deepcopy(model), batch, None, 1, 1)}
    for word, every in (("report", 1), ("report, changes wait", 10**6)):
        own = deepcopy(model)
        optimizer = Adam(own.parameters(), lr=1e-4)
        handle = memsyn.protect(optimizer, own, memory, every=every)
        own(batch).square().mean().backward()
        optimizer.step()
        actions[word] = handle.report
    found: dict[str, list[float]] = {word: [] for word in actions}
    for action in actions.values():
        action()
    for _ in range(pairs):
        for word, action in actions.items():
            found[word].append(seconds(action, 1))
    return {"title": f"{subject.title.rpartition(',')[0]}, batch {size}", "seconds": found}


def files_of(name: str, pairs: int) -> Numbers:
    """A memory of importance saved and loaded, beside the same tensors written and read by safetensors."""
    model = CASES[name].model()
    tensors = {key: p.detach().clone() for key, p in model.named_parameters()}
    memory = memsyn.Memory(tensors, {key: torch.rand_like(p) for key, p in tensors.items()})
    plain = {f"{kind}/{key}": p for kind in ("anchor", "importance") for key, p in getattr(memory, kind).items()}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "own.memsyn.safetensors", Path(folder) / "plain.safetensors"

        def write_plainly() -> None:
            save_file(plain, theirs)
            with theirs.open("rb") as file:
                os.fsync(file.fileno())  # as memsyn does

        actions: dict[str, Step] = {
            "plain save": write_plainly,
            "save": lambda: memory.save(ours),
            "plain load": lambda: load_file(theirs),
            "load": lambda: memsyn.Memory.load(ours, like=model),
        }
        found: dict[str, list[float]] = {word: [] for word in actions}
        for turn in range(pairs + 1):
            for word, action in actions.items():
                taken = seconds(action, 1)
                if turn:
                    found[word].append(taken)
        size = ours.stat().st_size
    weights = sum(p.numel() for p in tensors.values())
    return {"title": f"{weights / 1e6:.1f} million weights", "bytes": size, "seconds": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["steps", "adapters", "report", "files", "observer"], metavar="PART")
    parser.add_argument("name", nargs="?", default="vit-tiny", metavar="NAME")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--fewer", type=int, default=7, help="pairs of ten steps each, where a projection waits")
    parser.add_argument("--samples", type=int, default=4, help="of 128 tokens, for adapters (default 4)")
    parser.add_argument("--calls", type=int, default=20_000, help="calls of an observer, of which the mean is taken")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    parts: dict[str, Callable[[], Numbers]] = {
        "steps": lambda: steps_of(given.name, given.pairs, given.fewer),
        "adapters": lambda: adapted_steps(given.name, given.pairs, given.fewer, given.samples),
        "report": lambda: report_of(given.name, given.pairs),
        "files": lambda: files_of(given.name, given.pairs),
        "observer": lambda: {"calls": list(observe.costs_of_calls(given.calls))},
    }
    print(json.dumps(parts[given.part]()))


if __name__ == "__main__":
    main()
