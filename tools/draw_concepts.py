"""Draw the pictures of `docs/concepts`: each from numbers that are computed here, in about a minute on one core.

    python tools/draw_concepts.py

The data are letters of the pack of the benchmark (Greek, then Cyrillic, at 16x16), and the networks are small.
Owns no text of a page.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor, nn

import memsyn
from memsyn_bench.data.scripts import load_scripts8

FOLDER = Path(__file__).parent.parent / "docs" / "concepts"
BLUE, RED, GREEN, GREY = "#303f9f", "#d84315", "#2e7d32", "#757575"

Letters = tuple[Tensor, Tensor, Tensor, Tensor]
"""Training pictures (n, 1, 16, 16) and labels, test pictures and labels."""


class Reader(nn.Module):
    """Two convolutions and a hidden layer, with a head for each alphabet."""

    def __init__(self, sizes: list[int], *, normalised: bool = False) -> None:
        super().__init__()
        norms = [nn.BatchNorm2d(width) if normalised else nn.Identity() for width in (16, 32)]
        first = [nn.Conv2d(1, 16, 5, stride=2, padding=2), norms[0], nn.ReLU()]
        second = [nn.Conv2d(16, 32, 3, stride=2, padding=1), norms[1], nn.ReLU()]
        self.body = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(512, 64), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(64, size) for size in sizes)

    def forward(self, pictures: Tensor, task: int) -> Tensor:
        logits: Tensor = self.heads[task](self.body(pictures))
        return logits


def alphabets() -> list[Letters]:
    """Greek and Cyrillic."""

    def small(pictures: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(pictures.mean(1, keepdim=True), pictures.shape[-1] // 16)

    tasks = {task.name: task for task in load_scripts8(32)}
    chosen = [tasks[name] for name in ("Greek", "Cyrillic")]
    return [(small(t.train_images), t.train_labels, small(t.test_images), t.test_labels) for t in chosen]


def learn(model: Reader, letters: Letters, task: int, *, epochs: int = 8, protect: Any = None) -> None:
    """Train with Adam; `protect(optimizer)` returns a handle."""
    generator = torch.Generator().manual_seed(task)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    handle = protect(optimizer) if protect else None
    for _ in range(epochs):
        for batch in torch.randperm(len(letters[0]), generator=generator).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(letters[0][batch], task), letters[1][batch]).backward()
            optimizer.step()
    if handle is not None:
        handle.remove()


def _protection(model: Reader, memory: memsyn.Memory, strength: float | memsyn.Relative) -> Any:
    return lambda optimizer: memsyn.protect(optimizer, model, memory, strength=strength)


@torch.no_grad()
def accuracy(model: Reader, letters: Letters, task: int) -> float:
    """In percent, on the test pictures of fonts that were not trained on."""
    return 100 * float((model.eval()(letters[2], task).argmax(1) == letters[3]).float().mean())


def measured(model: Reader, letters: Letters, estimator: str, task: int = 0) -> memsyn.Memory:
    """A memory of the training pictures of one alphabet, without their labels."""
    found = memsyn.measure(
        model,
        letters[0].split(100),
        estimator=estimator,
        forward=lambda model, batch: model(batch, task),
        progress=False,
    )
    return memsyn.Memory.empty().consolidate(model, found)


def axes(width: float = 6.4, height: float = 3.2, columns: int = 1) -> tuple[Any, Any]:
    figure, found = pyplot.subplots(1, columns, figsize=(width, height), constrained_layout=True)
    for own in [found] if columns == 1 else found:
        own.spines[["top", "right"]].set_visible(False)
    return figure, found


def save(figure: Any, name: str) -> None:
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def draw_importance(memory: memsyn.Memory) -> None:
    """Which share of all importance the most important weights hold."""
    figure, own = axes()
    omega = torch.cat([values.flatten() for values in memory.importance.values()]).sort(descending=True).values
    shares = omega.cumsum(0) / omega.sum()
    weights = torch.arange(1, len(omega) + 1) / len(omega)
    own.plot(100 * weights, 100 * shares, color=BLUE)
    tenth = 100 * float(shares[len(omega) // 10])
    own.plot([10], [tenth], "o", color=RED)
    own.annotate(f"10% of the weights: {tenth:.0f}% of the importance", (10, tenth), (16, tenth - 8), color=RED)
    own.set(xlabel="weights, most important first (%)", ylabel="share of the importance (%)", ylim=(0, 102))
    save(figure, "importance")


def draw_exact(model: Reader, letters: Letters) -> None:
    """Signed gradients of one weight for 64 samples: what cancels before the absolute value, and what does not."""
    weight = model.get_parameter("body.7.weight")
    gradients = []
    for picture in letters[0][torch.randperm(len(letters[0]), generator=torch.Generator().manual_seed(0))[:64]]:
        (own,) = torch.autograd.grad(model(picture[None], 0).square().sum(), [weight])
        gradients.append(own)
    stacked = torch.stack(gradients).flatten(1)
    exact, batched = stacked.abs().mean(0), stacked.mean(0).abs()
    ratio = torch.where(exact > exact.quantile(0.9), batched / exact, torch.inf)
    place = int(ratio.argmin())
    signed = stacked[:, place].sort().values
    figure, own = axes()
    own.bar(range(64), signed, color=[RED if value < 0 else BLUE for value in signed.tolist()], width=1)
    for value, colour, said in (
        (float(exact[place]), GREEN, "mean of the absolute values (exact)"),
        (float(batched[place]), GREY, "absolute value of the mean (batched)"),
    ):
        own.axhline(value, color=colour, linestyle="--")
        own.annotate(f"{said}: {value:.3g}", (0, value), (0, 4), textcoords="offset points", color=colour)
    own.set(xlabel="64 samples, in order of the gradient", ylabel="gradient of one weight")
    save(figure, "exact")


def draw_anchor() -> None:
    """Loss of the new task, (theta - 1)^2, with the penalty lambda Omega theta^2: where each weight comes to rest."""
    figure, own = axes()
    theta = torch.linspace(-0.6, 1.6, 200)
    for product, colour in ((0.0, GREY), (0.3, BLUE), (3.0, RED)):
        own.plot(theta, (theta - 1).square() + product * theta.square(), color=colour, label=f"λΩ = {product:g}")
        rest = 1 / (1 + product)
        own.plot([rest], [(rest - 1) ** 2 + product * rest**2], "o", color=colour)
    own.axvline(0, color="#bbb", linestyle=":")
    own.annotate("anchor θ*", (0, 2.8), (4, 0), textcoords="offset points")
    own.set(xlabel="weight θ", ylabel="new loss + penalty", ylim=(-0.1, 3))
    own.legend(frameon=False)
    save(figure, "anchor")


def draw_projection(model: Reader, letters: list[Letters], memory: memsyn.Memory) -> dict[float, tuple[float, float]]:
    """The damping of a step, and accuracies over the strength."""
    figure, (left, right) = axes(8.4, 3.2, 2)
    a = torch.logspace(-3, 2, 200)
    for s, colour in ((0.0, BLUE), (1.0, GREEN), (10.0, RED)):
        left.semilogx(a, 100 / (1 + 10 * a * (0.9 * s + 0.1)), color=colour, label=f"s = {s:g}")
    left.set(xlabel="eigenvalue a of the inputs", ylabel="share of the step that stays (%)", title="strength c = 10")
    left.legend(frameon=False)
    found = {}
    strengths = [0.0, 0.1, 1.0, 10.0, 100.0, 1000.0]
    for strength in strengths:
        found[strength] = _second_alphabet(model, letters, memory, strength)
    ticks = range(len(strengths))
    right.plot(ticks, [old for old, _ in found.values()], "o-", color=BLUE, label="first alphabet")
    right.plot(ticks, [new for _, new in found.values()], "o-", color=RED, label="second alphabet")
    right.set(xlabel="strength c", ylabel="accuracy (%)", xticks=ticks, xticklabels=[f"{s:g}" for s in strengths])
    right.legend(frameon=False)
    save(figure, "projection")
    return found


def _second_alphabet(
    model: Reader, letters: list[Letters], memory: memsyn.Memory, strength: float | memsyn.Relative
) -> tuple[float, float]:
    """Accuracies of the first and the second alphabet after the second was learned."""
    learner = copy.deepcopy(model)
    learn(learner, letters[1], 1, protect=_protection(learner, memory, strength))
    return accuracy(learner, letters[0], 0), accuracy(learner, letters[1], 1)


def draw_strength(model: Reader, letters: list[Letters]) -> None:
    """The first alphabet's accuracy over lambda and over `Relative`, for one network and one with outputs times 5."""
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in scaled.heads[0].parameters():
            parameter.mul_(5)
    figure, (left, right) = axes(8.4, 3.2, 2)
    numbers, relatives = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2], [1e-3, 1e-2, 1e-1, 1.0, 10.0]
    for own, colour, said in ((model, BLUE, "network"), (scaled, RED, "outputs times 5")):
        memory = measured(own, letters[0], "mas")
        raw = [_second_alphabet(own, letters, memory, value)[0] for value in numbers]
        relative = [_second_alphabet(own, letters, memory, memsyn.Relative(value))[0] for value in relatives]
        for value, kept in zip(relatives, relative, strict=True):
            print(f"strength, {said}: Relative({value:g}) keeps {kept:.1f}%")
        left.semilogx(numbers, raw, "o-", color=colour, label=said)
        right.semilogx(relatives, relative, "o-", color=colour, label=said)
    left.set(xlabel="λ", ylabel="first alphabet afterwards (%)")
    right.set(xlabel="memsyn.Relative(...)")
    left.legend(frameon=False)
    save(figure, "strength")


def draw_consolidation() -> None:
    """One weight's importance over six tasks, by each rule."""
    figure, own = axes()
    new, model = [1.0, 0.2, 2.0, 0.1, 0.1, 1.5], nn.Linear(1, 1, bias=False)
    own.bar(range(1, 7), new, color="#ddd", label="measured on the task")
    for rule, colour in (("sum", RED), ("mean", BLUE), ("ema", GREEN), ("max", GREY)):
        memory, line = memsyn.Memory.empty(), []
        for value in new:
            sums = {"weight": torch.full((1, 1), 100 * value)}
            memory = memory.consolidate(model, memsyn.Importance(sums, 100), rule=rule)
            line.append(float(memory.importance["weight"]))
        own.plot(range(1, 7), line, "o-", color=colour, label=rule)
    own.set(xlabel="task", ylabel="importance of one weight")
    own.legend(frameon=False, ncols=2)
    save(figure, "consolidation")


def draw_batchnorm(letters: list[Letters]) -> None:
    """Old outputs while new pictures pass through BatchNorm in train mode; no weight ever moves."""
    torch.manual_seed(0)
    model = Reader([len(letters[0][1].unique())], normalised=True)
    learn(model.train(), letters[0], 0)
    old = copy.deepcopy(model).eval()
    changes, accuracies = [0.0], [accuracy(model, letters[0], 0)]
    with torch.no_grad():
        before = old(letters[0][2], 0)
        for batch in [*letters[1][0].split(32)[:20]] * 2:
            model.train()(1 - 0.5 * batch, 0)  # another camera: inverted, with less contrast
            after = model.eval()(letters[0][2], 0)
            changes.append(100 * float(((after - before).norm(dim=1) / before.norm(dim=1)).mean()))
            accuracies.append(accuracy(model, letters[0], 0))
    print(f"batchnorm: outputs change by {changes[-1]:.1f}%, accuracy {accuracies[0]:.1f}% -> {accuracies[-1]:.1f}%")
    figure, own = axes()
    own.plot(changes, color=RED, label="change of old outputs")
    own.plot(accuracies, color=BLUE, label="old accuracy")
    own.axhline(accuracies[0], color=BLUE, linestyle=":", label="old accuracy, statistics frozen")
    own.set(xlabel="batches of new pictures in train mode", ylabel="%", ylim=(0, None))
    own.legend(frameon=False)
    save(figure, "batchnorm")


def draw_one_head(letters: list[Letters]) -> None:
    """How the old letters are answered after new ones were learned: with one head, protected or not, and with two."""
    num_old, num_new = (len(own[1].unique()) for own in letters)
    shared = [letters[0], (letters[1][0], letters[1][1] + num_old, letters[1][2], letters[1][3] + num_old)]
    rows = []
    for said, heads, strength in (
        ("one head, unprotected", [num_old + num_new], 0.0),
        ("one head, protected", [num_old + num_new], 10.0),
        ("a head for each, unprotected", [num_old, num_new], 0.0),
        ("a head for each, protected", [num_old, num_new], 10.0),
    ):
        torch.manual_seed(0)
        model = Reader(heads)
        learn(model, letters[0], 0)
        memory = measured(model, letters[0], "kronecker")
        own = shared[1] if len(heads) == 1 else letters[1]
        learner = copy.deepcopy(model)
        learn(learner, own, len(heads) - 1, protect=_protection(learner, memory, strength))
        with torch.no_grad():
            logits = learner(letters[0][2], 0)
            answers = logits.argmax(1)
        right = 100 * float((answers == letters[0][3]).float().mean())
        stolen = 100 * float((answers >= num_old).float().mean())
        rows.append((said, right, 100 - right - stolen, stolen))
        among_old = 100 * float((logits[:, :num_old].argmax(1) == letters[0][3]).float().mean())
        print(f"one-head, {said}: {right:.1f}% right, {stolen:.1f}% new; {among_old:.1f}% right among old letters")
    figure, axis = axes(7.2, 2.6)
    _stacked_bars(axis, rows)
    save(figure, "one-head")


def _stacked_bars(axis: Axes, rows: list[tuple[str, float, float, float]]) -> None:
    names, *parts = zip(*reversed(rows), strict=True)
    left = [0.0] * len(rows)
    colours, words = (BLUE, "#bbb", RED), ("right", "another old letter", "a new letter")
    for values, colour, said in zip(parts, colours, words, strict=True):
        axis.barh(names, values, left=left, color=colour, label=said)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axis.set(xlabel="answers to pictures of old letters (%)", xlim=(0, 100))
    axis.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))


def main() -> None:
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "memsyn", "svg.fonttype": "none", "font.family": "sans-serif"})
    warnings.simplefilter("ignore", memsyn.NewParametersWarning)
    warnings.simplefilter("ignore", memsyn.StrengthWarning)
    FOLDER.mkdir(exist_ok=True)
    letters = alphabets()
    torch.manual_seed(0)
    model = Reader([len(own[1].unique()) for own in letters])
    learn(model, letters[0], 0)
    print(f"first alphabet: {accuracy(model, letters[0], 0):.1f}% of {len(letters[0][2])} test pictures")
    draw_importance(measured(model, letters[0], "mas"))
    draw_exact(model, letters[0])
    draw_anchor()
    for strength, (old, new) in draw_projection(model, letters, measured(model, letters[0], "kronecker")).items():
        print(f"projection, strength {strength:g}: {old:.1f}% and {new:.1f}%")
    draw_strength(model, letters)
    draw_consolidation()
    draw_batchnorm(letters)
    draw_one_head(letters)


if __name__ == "__main__":
    main()
