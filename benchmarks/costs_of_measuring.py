"""What measuring costs, as one line of JSON with all seconds that were taken; `run_all.py` runs it, part by part.

    python benchmarks/costs_of_measuring.py pass mlp --batches 20 --pairs 7

In one process and in turn: an ordinary forward and backward pass, and what is compared with it. Owns how each part is
measured; `tools/performance_page.py` makes ratios and words of the numbers.
"""

import argparse
import cProfile
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

import layer_calls
import memsyn
import products
import profiles
from measure import CONTENDERS, Setup, peak_of
from memsyn.kernels import outer_products
from models import SUBJECTS
from passes import ordinary, peak_of_tensors

Numbers = dict[str, object]
Action = Callable[[], object]
ESTIMATORS = ("mas", "mas-local", "inputs", "kronecker")
SHAPES = (
    "mlp 784-400",
    "vit 192-576",
    "vit 768-192",
    "gpt2 768-2304",
    "lstm 256-1024",
    "resnet 64-64 at 32",
    "resnet 128-128 at 16",
    "resnet 512-512 at 4",
    "pointwise 16-96 at 32",
    "pointwise 672-112 at 4",
    "depthwise 240, 5x5 at 8",
)


def measured(model: nn.Module, batches: Sequence[Tensor], estimator: str = "mas") -> None:
    """The whole of `memsyn.measure`."""
    memsyn.measure(model, batches, estimator=estimator, progress=False)


def seconds(action: Action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def in_turn(actions: dict[str, Action], pairs: int, title: str) -> dict[str, list[float]]:
    """The seconds of each action; all run once in every round."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in tqdm(range(pairs), title, leave=False):
        for name, action in actions.items():
            found[name].append(seconds(action))
    return found


def subject(name: str, num_batches: int) -> tuple[nn.Module, list[Tensor]]:
    """A model in eval mode, and its batches."""
    return setup(num_batches).subject(name)


def setup(num_batches: int) -> Setup:
    return Setup(num_batches, 1, "cpu", {"memsyn": CONTENDERS["memsyn"]}, None)


def whole_pass(name: str, pairs: int, num_batches: int, estimators: Sequence[str]) -> Numbers:
    """Each estimator over the same batches, its route check and all. What cannot run is named with its error."""
    model, batches = subject(name, num_batches)
    ordinary(model, batches[:1])
    actions: dict[str, Action] = {"ordinary": partial(ordinary, model, batches)}
    failed = {}
    for estimator in estimators:
        try:
            measured(model, batches[:1], estimator)  # warms up
        except (RuntimeError, memsyn.MemsynError) as error:
            failed[estimator] = str(error).split("\n")[0]
        else:
            actions[estimator] = partial(measured, model, batches, estimator)
    return {"batches": num_batches, "seconds": in_turn(actions, pairs, name), "failed": failed}


def first_look(name: str, pairs: int) -> Numbers:
    """Processor seconds of the first batch, of a steady one, and of an ordinary pass of the same batch.

    What the first batch costs beyond a steady one is the first look: how each parameter is measured, and the check.
    """
    model, batches = subject(name, 1)
    ordinary(model, batches)
    layer_calls.batch_times(model, batches * 2)
    found: dict[str, list[float]] = {"ordinary": [], "first": [], "steady": []}
    for _ in tqdm(range(pairs), f"first look of {name}", leave=False):
        start = time.process_time()
        ordinary(model, batches * 2)
        found["ordinary"].append((time.process_time() - start) / 2)
        # The third batch is not timed: `measure` folds sums after the last one.
        first, steady = layer_calls.batch_times(model, batches * 3)[:2]
        found["first"].append(first)
        found["steady"].append(steady)
    return {"seconds": found}


def python_per_layer(rounds: int) -> Numbers:
    """Microseconds of Python for each small layer and steady batch: beyond the ordinary pass, and of that pass.

    Also the number of calls of Python functions, and by a profile the functions with the most time.
    """
    found = [layer_calls.microseconds_of_layer() for _ in tqdm(range(rounds), "layers", leave=False)]
    profile, num_batches = cProfile.Profile(), 20
    batches = [torch.ones(2, 4)] * (num_batches + 1)
    model = layer_calls.small_layers(layer_calls.NUM_LAYERS)
    memsyn.measure(model, profiled(batches, profile), progress=False)
    return {
        "beyond": [beyond for beyond, _ in found],
        "ordinary": [own for _, own in found],
        "calls": layer_calls.calls_of_layer(),
        "functions": profiles.most_of(profile, num_batches * layer_calls.NUM_LAYERS),
    }


def profiled(
    batches: Sequence[Tensor], steady: cProfile.Profile, first: cProfile.Profile | None = None
) -> Iterator[Tensor]:
    """The batches; one profile is of all but the first, the other of the first."""
    for index, batch in enumerate(batches):
        if index == 0 and first is not None:
            first.enable()
        if index == 1:
            if first is not None:
                first.disable()
            steady.enable()
        yield batch
    steady.disable()


def where(name: str, num_batches: int, estimators: Sequence[str]) -> Numbers:
    """A profile of the first batch and of steady ones, and what weight gradients take of an ordinary pass."""
    model, batches = subject(name, num_batches + 1)
    steady = batches[1:]
    measured(model, batches[:1])  # imports what is imported late
    places: dict[str, dict[str, float]] = {}
    at_first: dict[str, dict[str, float]] = {}
    for estimator in estimators:
        profile, of_first = cProfile.Profile(), cProfile.Profile()
        try:
            memsyn.measure(model, profiled(batches, profile, of_first), estimator=estimator, progress=False)
        except (RuntimeError, memsyn.MemsynError):
            profile.disable()  # `pass` names the error
            of_first.disable()
            continue
        places[estimator] = profiles.seconds_by_place(profile)
        at_first[estimator] = profiles.seconds_by_place(of_first)
    whole = partial(ordinary, model, steady)
    whole()
    taken = [seconds(whole) for _ in range(3)]
    parameters = dict(model.named_parameters())
    # The gradient still has to reach the first layer. GPT-2's first parameter is its head too, so take the next one.
    first = list(parameters)[1 if name == "gpt2" else 0]
    for own, parameter in parameters.items():
        parameter.requires_grad_(own == first)
    without = [seconds(whole) for _ in range(3)]
    return {
        "batches": num_batches,
        "places": places,
        "places of the first": at_first,
        "ordinary": taken,
        "without weight gradients": without,
    }


def memory(name: str, num_batches: int) -> Numbers:
    """Bytes by which the resident set grows at most, in a process for each; and those of tensors, by a profile."""
    own = setup(min(num_batches, 2))
    resident = {who: peak_of(name, who, own) for who in ("ordinary", "memsyn")}
    model, batches = own.subject(name)
    runs: dict[str, Callable[[], object]] = {
        "ordinary": partial(ordinary, model, batches),
        "memsyn": partial(measured, model, batches),
    }
    tensors = {who: peak_of_tensors(run) for who, run in runs.items()}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"bytes": resident, "bytes of tensors": tensors, "bytes of weights": weights}


def scaling(name: str, pairs: int, num_batches: int) -> Numbers:
    """More data, and wider networks where they are quick."""
    actions: dict[str, Action] = {}
    model, batches = subject(name, num_batches)
    base = max(1, num_batches // 4)
    for factor in (1, 2, 4, 8):
        own = [batches[index % len(batches)] for index in range(factor * base)]
        actions[f"ordinary, {factor * base} batches"] = partial(ordinary, model, own)
        actions[f"mas, {factor * base} batches"] = partial(measured, model, own)
    make, sizes = SUBJECTS[name].wider, {}
    for factor in (1, 2, 4) if make is not None and name == "mlp" else ():
        assert make is not None
        wide = make(factor).eval()
        sizes[factor] = sum(p.numel() for p in wide.parameters())
        actions[f"ordinary, width x{factor}"] = partial(ordinary, wide, batches)
        actions[f"mas, width x{factor}"] = partial(measured, wide, batches)
    measured(model, batches[:1])
    found = in_turn(actions, pairs, f"scaling of {name}")
    return {"batches": num_batches, "base": base, "weights": sizes, "seconds": found}


def layers(rounds: int, num_shapes: int) -> Numbers:
    """Milliseconds of single layers: forward, gradient to the input, weight gradient, importance."""
    shapes = SHAPES[:num_shapes]
    with tqdm(total=len(shapes) * rounds, leave=False) as bar, outer_products.Workspace():
        return {
            "milliseconds": {
                shape: products.milliseconds(products.passes(products.SHAPES[shape]), rounds, bar) for shape in shapes
            }
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", choices=["pass", "first-look", "python", "where", "memory", "scaling", "products"], metavar="PART"
    )
    parser.add_argument("model", nargs="?", default="mlp", choices=list(SUBJECTS), metavar="MODEL")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=ESTIMATORS)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the layers (default all)")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    parts: dict[str, Callable[[], Numbers]] = {
        "pass": lambda: whole_pass(given.model, given.pairs, given.batches, given.estimators),
        "first-look": lambda: first_look(given.model, given.pairs),
        "python": lambda: python_per_layer(given.pairs),
        "where": lambda: where(given.model, given.batches, given.estimators),
        "memory": lambda: memory(given.model, given.batches),
        "scaling": lambda: scaling(given.model, given.pairs, given.batches),
        "products": lambda: layers(given.pairs, given.shapes),
    }
    print(json.dumps({"title": SUBJECTS[given.model].title, **parts[given.part]()}))


if __name__ == "__main__":
    main()
