"""What somebody who reads an observer's stores learns about single requests: the attacks of docs/live.md.

    python benchmarks/privacy_attack.py                      # as an observer writes by default
    python benchmarks/privacy_attack.py --min-samples 1      # every sample at once, as before there was a least number

The attacker has the model, and a copy of every file of every moment. Requests come one by one, and the observer is made
to write after each. Prints Markdown. An error is relative, the smallest of all inputs: 0 is the input itself. The same
is printed for inputs that were never sent; if it is as large, then nothing was read. An AUC of 0.5 is a guess, and 1 is
certain.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor, nn

import memsyn
from memsyn.storage.reading_and_writing import read

WIDTH, UNITS, TOKENS = 32, 64, 400
ALL: Final = {"rate": 1.0, "room": 10**6, "interval": 1e6, "seed": 0, "budget": 100.0}

Sums = dict[str, Tensor]


class Watcher:
    """Keeps all states of all files in a folder, and what an observer holds in memory beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states: dict[tuple[str, str], list[Sums]] = {}

    def look(self, live: Sums | None = None) -> None:
        for path in self.folder.glob("[!.]*"):
            for group, sums in read(path)[1].items():
                self._keep((path.name, group), sums)
                if live is not None:
                    self._keep((path.name, "less the live value"), {k: live[k] - sums[k] for k in sums})

    def _keep(self, key: tuple[str, str], sums: Sums) -> None:
        known = self.states.setdefault(key, [])
        if not known or any(not torch.equal(known[-1][name], own) for name, own in sums.items() if name in known[-1]):
            known.append(sums)

    def clues(self) -> Iterator[Sums]:
        """Each first state, each difference of two successive states, and each of the last states of two files."""
        for states in self.states.values():
            yield states[0]
            yield from (_difference(new, old) for old, new in pairwise(states))
        yield from (_difference(new[-1], old[-1]) for old, new in pairwise(self.states.values()))


def _difference(new: Sums, old: Sums) -> Sums:
    return {name: own - old[name] if name in old else own for name, own in new.items()}


# Reading inputs


def network(*, rare: bool = False) -> nn.Module:
    """Its first layer reads the inputs. With `rare`, a unit of it is active for one request in a hundred."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, UNITS), nn.ReLU() if rare else nn.Tanh(), nn.Linear(UNITS, 5)).double()
    if rare:
        nn.init.constant_(model.get_parameter("0.bias"), -2.4 / 3**0.5)
    return model


def users(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(clues: Iterator[Sums], inputs: Tensor, *, factors: bool) -> float:
    """The smallest relative error of an input, or of its magnitude, that a row of a clue gives."""
    truth, best = inputs if factors else inputs.abs(), float("inf")
    for clue in clues:
        if factors:
            moment = clue["inputs/0.weight"][0]
            weights, biases = moment[:, :-1], moment[:, -1]
        else:
            weights, biases = clue["0.weight"], clue["0.bias"]
        read_off = (weights / biases.unsqueeze(1))[biases != 0]
        if len(read_off):
            errors = (read_off.unsqueeze(1) - truth).norm(dim=2) / truth.norm(dim=1)
            best = min(best, float(errors.min()))
    return best


class Service:
    """One observer after the other on one model, with a clock of its own, and a watcher of its folder."""

    def __init__(self, model: nn.Module, options: dict[str, Any], folder: Path) -> None:
        self.model, self.watcher, self.now, self._options = model, Watcher(folder), 1e9, {**ALL, **options}
        self.begin()

    def begin(self) -> None:
        self.observer = memsyn.Observer(self.model, self.watcher.folder / "traffic.safetensors", **self._options)

    def restart(self) -> None:
        self.observer.close()
        self.begin()

    def request(self, given: Tensor, segment: str | None = None, *, live: bool = False) -> None:
        with patch("time.time", lambda: self.now):
            self.observer.observe(given, segment=segment)
            self.observer.flush()
            self.watcher.look(self.observer.importance().sums if live else None)


def one_by_one(service: Service, inputs: Tensor) -> None:
    for own in inputs.split(1):
        service.request(own)


def by_segment(service: Service, inputs: Tensor) -> None:
    for k, own in enumerate(inputs.split(1)):
        service.request(own, f"tenant-{k % 3}")


def by_version(service: Service, inputs: Tensor) -> None:
    for k, own in enumerate(inputs.split(1)):
        if k in (4, 8, 80):
            with torch.no_grad():
                service.model.get_parameter("2.bias").add_(1e-3)
        service.request(own)


def by_day(service: Service, inputs: Tensor) -> None:
    """A day has few requests or many; late ones make the next bucket begin at any of them."""
    for k, own in enumerate(inputs.split(1)):
        service.now += 86_400 if k % 50 == 0 or k < 10 else 60
        service.request(own)


def restarted(service: Service, inputs: Tensor) -> None:
    for k, own in enumerate(inputs.split(1)):
        if k % 70 == 0:
            service.restart()
        service.request(own)


def against_live(service: Service, inputs: Tensor) -> None:
    for own in inputs.split(1):
        service.request(own, live=True)


def one_is_large(service: Service, inputs: Tensor) -> None:
    inputs[len(inputs) // 2] *= 100
    one_by_one(service, inputs)


Serve = Callable[[Service, Tensor], None]
READING: Final[dict[str, tuple[Serve, dict[str, Any], int, bool]]] = {
    "the store of one sample": (one_by_one, {}, 1, False),
    "two successive stores": (one_by_one, {}, 200, False),
    "two successive stores, half-life of an hour": (by_day, {"half_life": timedelta(hours=1)}, 200, False),
    "days of a sliding window, and expiry": (by_day, {"last": timedelta(days=7)}, 400, False),
    "segments": (by_segment, {}, 240, False),
    "versions of the weights": (by_version, {}, 160, False),
    "restarts": (restarted, {}, 200, False),
    "a unit that is active for one request": (one_by_one, {}, 400, True),
    "a request that is 100 times as large": (one_is_large, {}, 200, False),
    "the store and importance() in process": (against_live, {}, 200, False),
    "factors: the store of one sample": (one_by_one, {"estimator": "inputs"}, 1, False),
    "factors: two successive stores": (one_by_one, {"estimator": "kronecker"}, 200, False),
    "factors: days of a sliding window": (by_day, {"estimator": "inputs", "last": timedelta(days=7)}, 400, False),
    "factors: a request that is 100 times as large": (one_is_large, {"estimator": "inputs"}, 200, False),
}
"""Attack -> how requests come, the observer's options, their number, and whether units are rarely active."""


def reading(attack: str, options: dict[str, Any], most: int | None = None) -> tuple[float, float]:
    """The smallest error of an attack, for inputs that were sent and for as many that were not; `most`: how many."""
    serve, own, count, rare = READING[attack]
    factors, inputs = "estimator" in own, users(count)[:most]
    with tempfile.TemporaryDirectory() as folder:
        service = Service(network(rare=rare), {**own, **options}, Path(folder))
        serve(service, inputs)
        service.observer.close()
        service.watcher.look()
        others = users(len(inputs), 4)
        others *= inputs.norm(dim=1, keepdim=True) / others.norm(dim=1, keepdim=True)
        return tuple(error(service.watcher.clues(), own, factors=factors) for own in (inputs, others))  # type: ignore[return-value]


# Rare tokens


class Tagger(nn.Module):
    """Reads tokens; with `tied`, its output layer is the table."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner = nn.Embedding(TOKENS, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, TOKENS if tied else 4, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.head(self.inner(self.table(ids)).tanh()).mean(1)
        return output


TABLES: Final[dict[str, tuple[bool, dict[str, Any]]]] = {
    "rows of an embedding": (False, {}),
    "rows of a tied embedding and head": (True, {}),
    "counts of an embedding's rows in factors": (False, {"estimator": "kronecker"}),
    "counts of a tied table's rows in factors": (True, {"estimator": "inputs"}),
}
"""Attack -> whether the head is tied, and the observer's options."""


def tokens(attack: str, options: dict[str, Any], count: int = 150) -> float:
    """The AUC of telling tokens that one user wrote from those that nobody wrote."""
    tied, own = TABLES[attack]
    generator = torch.Generator().manual_seed(2)
    common = torch.randint(0, 40, (150, 6), generator=generator)
    secret = torch.arange(40, 190).unsqueeze(1)  # one for each user; nobody writes those from 190 on
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Tagger(tied=tied), {**own, **options}, Path(folder))
        one_by_one(service, torch.cat([common, secret], 1)[:count])
        service.observer.close()
        most, absent = torch.zeros(2, TOKENS, dtype=torch.float64)
        for clue in service.watcher.clues():
            for name, total in clue.items():
                if name.startswith(("table", "inputs/table", "inputs/head")) and len(total) == TOKENS:
                    numbers = total.double().abs().reshape(TOKENS, -1)
                    most = torch.maximum(most, numbers.sum(1) / numbers.mean().clamp(min=1e-30))
                    absent += (numbers == 0).sum(1) * bool(numbers.any())
    # A token may also show by what is withheld of its row.
    return max(auc(score[40 : 40 + count], score[190:]) for score in (most, -most, absent))


def auc(members: Tensor, others: Tensor) -> float:
    """The probability that a member's score is above that of another; ties count half."""
    above = members.unsqueeze(1) - others
    return float((above > 0).double().mean() + (above == 0).double().mean() / 2)


# Membership


SIZES: Final = (1, 4, 16, 64, 256)


def membership(size: int, options: dict[str, Any], trials: int = 24) -> float:
    """The AUC of telling members of a store of `size` samples from others, by their own importance."""
    model, scores = network(), ([], [])  # type: tuple[nn.Module, tuple[list[float], list[float]]]
    usual = memsyn.measure(model, [users(512, 3)], progress=False).mean()
    for trial in range(trials):
        inputs = users(2 * size, 100 + trial)
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "traffic.safetensors"
            with memsyn.Observer(model, store, **{**ALL, **options}) as observer:
                observer.observe(inputs[:size])
                observer.flush()
            held = memsyn.Importance.load(store).mean() if store.exists() else usual
        for k in range(min(size, 4)):
            for own, candidate in zip(scores, (inputs[k], inputs[size + k]), strict=True):
                alone = memsyn.measure(model, [candidate.unsqueeze(0)], progress=False).mean()
                own.append(sum(_agreement(alone[name], held[name], usual[name]) for name in usual))
    return auc(*(torch.tensor(own) for own in scores))


def membership_in_factors(size: int, options: dict[str, Any], trials: int = 24) -> float:
    """The same for factors: x^T A^-1 x is smaller for members, and without limit outside of what few samples span."""
    model, scores = network(), ([], [])  # type: tuple[nn.Module, tuple[list[float], list[float]]]
    for trial in range(trials):
        inputs = users(2 * size, 100 + trial)
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "traffic.safetensors"
            with memsyn.Observer(model, store, **{**ALL, "estimator": "inputs", **options}) as observer:
                observer.observe(inputs[:size])
                observer.flush()
            moment = memsyn.KroneckerFactors.load(store).inputs("0.weight")[0] if store.exists() else None
        for own, some in zip(scores, inputs.split(size), strict=True):
            x = torch.cat([some[:4], torch.ones(len(some[:4]), 1).double()], 1)
            if moment is None:
                own += [0.0] * len(x)
                continue
            kept = moment.diagonal() > 0  # some inputs may be withheld
            inverse = torch.linalg.inv(moment[kept][:, kept] + 1e-9 * torch.eye(int(kept.sum())))
            own += (-(x[:, kept] @ inverse) * x[:, kept]).sum(1).tolist()
    return auc(*(torch.tensor(own) for own in scores))


def _agreement(alone: Tensor, held: Tensor, usual: Tensor) -> float:
    """How far both differ from the usual in the same weights."""
    used = (usual > 0) & (held > 0)
    return float(((alone / usual - 1) * (held / usual - 1))[used].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--min-samples", type=int, help="as `Observer` takes it")
    given = parser.parse_args()
    logging.getLogger("memsyn").setLevel(logging.ERROR)  # of samples that are withheld
    options = {} if given.min_samples is None else {"min_samples": given.min_samples}
    began = time.monotonic()
    print("| inputs are read from | error | never sent |\n|---|---:|---:|")
    for attack in READING:
        cells = ["no store" if found == float("inf") else f"{found:.2g}" for found in reading(attack, options)]
        print(f"| {attack} | {' | '.join(cells)} |", flush=True)
    print("\n| a token of one user is told by | AUC |\n|---|---:|")
    for attack in TABLES:
        print(f"| {attack} | {tokens(attack, options):.3f} |")
    print("\n| a member is told from a store of | AUC, importance | AUC, factors |\n|---|---:|---:|")
    for size in SIZES:
        found = [attack(size, options) for attack in (membership, membership_in_factors)]
        print(f"| {size} samples | {found[0]:.3f} | {found[1]:.3f} |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
