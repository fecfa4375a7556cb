"""Whether a change of the code changed a number: digests of importances, files, observed sums, losses and runs.

`python benchmarks/bitwise.py record FILE` writes them as JSON, `compare FILE` computes them again and names every one
that differs. Run both on one machine with one torch: other kernels round otherwise. Everything runs on one thread.
"""

import argparse
import hashlib
import importlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

import memsyn

sys.path.insert(0, str(Path(__file__).parents[1]))
cases = importlib.import_module("tests.cases")
zoo = importlib.import_module("tests.zoo")

ESTIMATORS = ("mas", "mas-local", "mas-vector", "fisher", "fisher-sampled", "fisher-empirical", "mas-probabilities")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def outcome(action: Callable[[], Any]) -> Any:
    """What an action gives; an error is an outcome, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return action()
        except memsyn.MemsynError as error:
            return type(error).__name__


def importance_of(model: nn.Module, batches: list[Any], **options: Any) -> Any:
    found = memsyn.measure(model, batches, progress=False, **options)
    return [digest(found.sums), found.num_samples, dict(sorted(found.routes.items())), found.objective, found.magnitude]


def importances() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every case and specimen, by the estimators that can be asked of it, over batches of several sizes."""
    for name, case in {**cases.CASES, **getattr(cases, "MORE", {})}.items():
        for estimator in ESTIMATORS:
            if estimator == "mas-vector" and "than a tile" in name:  # thousands of backward passes
                continue

            def action(case: Any = case, estimator: str = estimator) -> Any:
                torch.manual_seed(0)
                model = case.model().to(torch.float32)
                batches = [case.batch(size, torch.float32) for size in (5, 3, 1)]
                return importance_of(model, batches, forward=case.forward, estimator=estimator)

            yield f"case {name} {estimator}", action
    for name, specimen in zoo.ZOO.items():
        for estimator in ("mas", "mas-local"):

            def measured(specimen: Any = specimen, estimator: str = estimator) -> Any:
                torch.manual_seed(0)
                model = specimen.model(specimen.attentions[-1]).to(torch.float32)
                return importance_of(model, [specimen.batch()], forward=specimen.forward, estimator=estimator)

            yield f"zoo {name} {estimator}", measured


def network() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    return model, [torch.randn(5, 6) for _ in range(11)]


def files() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What stands in files, tensor by tensor, and what is read back."""

    def memory(rule: str) -> Any:
        model, data = network()
        held = memsyn.Memory.empty()
        for part in (data[:4], data[4:]):
            held = held.consolidate(model, memsyn.measure(model, part, progress=False), rule=rule)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.01)
        with tempfile.TemporaryDirectory() as folder:
            held.save(f"{folder}/file")
            again = memsyn.Memory.load(f"{folder}/file")
            raw = sorted(digest({"": value}) for value in load_file(f"{folder}/file").values())
        return [digest(again.anchor), digest(again.importance), again.counts, raw]

    def observed(**options: Any) -> Any:
        model, data = network()
        with tempfile.TemporaryDirectory() as folder:
            options |= {"rate": 1.0, "budget": 100.0, "min_samples": 1}
            with memsyn.Observer(model, f"{folder}/sums.safetensors", **options) as observer:
                for batch in data:
                    observer.observe(batch)
                    observer.flush()
            found = memsyn.Importance.load(f"{folder}/sums.safetensors")
        return [digest(found.sums), found.num_samples, found.routes]

    for rule in ("sum", "mean", "ema", "max"):
        yield f"memory {rule}", partial(memory, rule)
    one_thread = {"process": False} if "process" in (memsyn.Observer.__init__.__kwdefaults__ or {}) else {}
    for estimator in ("mas", "mas-local"):
        for cap in (None, 0.05):
            yield (
                f"observer {estimator} cap {cap}",
                partial(observed, estimator=estimator, cap=cap, **one_thread),
            )


def trainings() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Losses and weights of protected training, and what the handle says of it."""
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
        "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
    }

    def training(name: str, form: str, penalised: bool) -> Any:
        model, data = network()
        held = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, data, progress=False))
        optimizer = makers[name](model.parameters())
        handle = None if penalised else memsyn.protect(optimizer, model, held, form=form, strength=memsyn.Relative(0.1))
        losses = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(data[0]).square().mean() + model(data[1]).sum()
            if penalised:
                loss = loss + 0.3 * memsyn.penalty(model, held)
            loss.backward()
            return loss  # type: ignore[no-any-return]

        for _ in range(7):
            losses.append(float(optimizer.step(closure)).hex())  # type: ignore[arg-type]
        told = [] if handle is None else [handle.value().hex(), repr(handle.report())]
        return [losses, digest(dict(model.named_parameters())), told]

    for name in makers:
        for form in ("gradient", "proximal", "auto"):
            yield f"training {name} {form}", partial(training, name, form, False)
        yield f"training {name} penalty", partial(training, name, "auto", True)


def runs() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The benchmark's records of a tiny sequence, every method."""
    try:
        place, tiny = "memsyn_bench", importlib.import_module("bench.tests.tiny")
        runner, sequences, settings, registry = (
            importlib.import_module(f"{place}.{name}")
            for name in ("running.runner", "sequences.sequences", "settings", "methods.registry")
        )
    except ModuleNotFoundError:
        place, tiny = "memsyn.bench", importlib.import_module("tests.tiny")
        runner, sequences, settings, registry = (
            importlib.import_module(f"{place}.{name}")
            for name in ("runner", "sequences", "settings", "methods.registry")
        )
    getattr(sequences.SEQUENCES, "entries", sequences.SEQUENCES)["tiny"] = tiny.SEQUENCE

    def run(method: str) -> Any:
        options = settings.Settings(sequence="tiny", size=8, epochs=2, batch_size=4, lr=0.01, strength=1.0)
        with tempfile.TemporaryDirectory() as folder:
            runner.run(options, methods=[method], num_seeds=1, out=Path(folder))
            lines = [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "when" and "second" not in key} for line in lines]

    for method in registry.METHODS:
        if method != "mas-in-use":
            yield f"run {method}", partial(run, method)


def everything() -> dict[str, Any]:
    torch.set_num_threads(1)
    actions = [*importances(), *files(), *trainings(), *runs()]
    found = {name: outcome(action) for name, action in tqdm(actions)}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    found = everything()
    if given.action == "record":
        given.file.write_text(json.dumps(found, indent=1))
        print(f"{len(found)} recorded.")
        return
    before = json.loads(given.file.read_text())
    differing = [name for name in before if found.get(name) != before[name]]
    for name in differing:
        print(f"{name}:\n  before {before[name]!s:.400}\n  now    {found.get(name)!s:.400}")
    print(f"{len(before) - len(differing)} of {len(before)} the same.")
    raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
