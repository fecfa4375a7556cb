"""The predicted change of outputs, from a memory alone, against what is measured on unseen inputs of the old tasks.

On each of four sequences a network learns the first two tasks, and a memory is made of their training inputs. Then come
some twenty checkpoints of each, by learning the third task in different ways, and by averaging weights. Each checkpoint
is a line of JSON in `--out`, and what is there is not run again. Last, the page docs/prediction.md gets its tables, and
docs/prediction.png is drawn.

Needs the packages of `memsyn-bench[pretrained]` and peft, and the word lists of `words5`.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast, final

import peft
import torch
from torch import Tensor, nn
from tqdm import tqdm

import memsyn
from memsyn import Memory
from memsyn.comparing.prediction import predict
from memsyn.parameters import layer_of, trainable_parameters
from memsyn.values.directions import STRENGTH
from memsyn_bench.methods.method import FineTuning, Method, TaskTraining, frozen
from memsyn_bench.methods.penalties import MEASURE_BATCH, through_head
from memsyn_bench.methods.references import FrozenBackbone
from memsyn_bench.running.training import generator, task_training, train
from memsyn_bench.sequences.networks import Network
from memsyn_bench.sequences.sequences import default_settings, find_sequence
from memsyn_bench.task import Task
from prediction_page import write_page

DOCS = Path(__file__).parents[1] / "docs"
OLD = 2
"""How many tasks are learned before the memory is looked at."""
NUM_INPUTS = 250
"""How many unseen inputs of each old task are measured on, at most."""
NUM_MEASURED = 1000
"""How many training inputs of each old task are measured, at most."""
NUM_GRADIENTS = 64
FEWER = (8, 16, 32, 64)
STEP = 1e-2
"""The part of the way to a checkpoint, at which its change is taken for linear."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """How a sequence is learned here: passes over an old task, and over a part of the new one."""

    old_epochs: int
    epochs: int
    num_images: int
    last: str
    """A prefix of the parameters of the body's last layer."""


PLANS = {
    "scripts8": Plan(10, 4, 400, "body.layers.12."),
    "permuted-fashion": Plan(2, 1, 9600, "body.2."),
    "words5": Plan(8, 2, 4800, "body.layers.1."),
    "emoji8-pretrained": Plan(6, 4, 128, "body.network._conv_head."),
}


@final
class Remembering(Method):
    """Two tasks are learned one after the other, the first protected by its projection; all that is measured is kept.

    Attributes:
        memory: importance of MAS, and directions of 64 eigenvectors.
        whole: the same with all eigenvectors.
        of_inputs: directions of inputs alone.
        gradients: parameter -> gradients of random sums of outputs, (NUM_GRADIENTS, ...).
    """

    def __init__(self) -> None:
        super().__init__(STRENGTH)
        self.whole, self.of_inputs = Memory.empty(), Memory.empty()
        self.gradients: State = {}

    def end(self, training: TaskTraining) -> None:
        super().end(training)
        images, forward = training.task.train_images, through_head(training)
        chosen = torch.randperm(len(images), generator=training.method_generator)[:NUM_MEASURED]
        batches = images[chosen].split(MEASURE_BATCH)
        found = {
            name: memsyn.measure(training.model, batches, forward=forward, estimator=name, progress=False)
            for name in ("mas", "kronecker", "inputs")
        }
        self.memory = self.memory.consolidate(training.model, found["mas"])
        self.whole = replace(self.memory, directions=self.whole.directions, history=self.whole.history)
        self.memory = self.memory.consolidate(training.model, found["kronecker"])
        self.whole = self.whole.consolidate(training.model, found["kronecker"], rank=None)
        self.of_inputs = self.of_inputs.consolidate(training.model, found["inputs"])
        self.gradients = random_gradients(training, images[chosen], self.gradients)


def random_gradients(training: TaskTraining, images: Tensor, old: State) -> State:
    """sum_k J_k^T v_k / sqrt(n) over each of NUM_GRADIENTS parts of n images, with random signs v, added to the old.

    For a change D of all weights, E (g D)^2 = E ||J D||^2, with what layers and positions do together.
    """
    parameters = trainable_parameters(training.model.eval())
    found = {name: old.get(name, torch.zeros(NUM_GRADIENTS, *p.shape)) for name, p in parameters.items()}
    for row, part in enumerate(images.tensor_split(NUM_GRADIENTS)):
        values = training.model(part, training.index)
        signs = torch.randint(2, values.shape, generator=training.method_generator) * 2 - 1
        own = torch.autograd.grad(
            (values * signs).sum() / len(part) ** 0.5, list(parameters.values()), allow_unused=True
        )
        for name, gradient in zip(parameters, own, strict=True):
            if gradient is not None:
                found[name][row] += gradient
    return found


@final
class Guarded(Method):
    """A memory is protected by `memsyn.protect`."""

    def __init__(self, memory: Memory, strength: float, form: str) -> None:
        super().__init__(strength)
        self.memory, self.options = memory, {"form": form}


@final
class LastLayer(Method):
    """Of the body only the last layer learns."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix, self._open = prefix, ExitStack()

    def begin(self, training: TaskTraining) -> None:
        for name, module in training.model.named_modules():
            if name.startswith("body.") and not list(module.children()) and not f"{name}.".startswith(self._prefix):
                self._open.enter_context(frozen(module))
        for name, parameter in training.model.named_parameters():
            if name.startswith("body.") and not name.startswith(self._prefix) and parameter.requires_grad:
                parameter.requires_grad_(False)
                self._open.callback(parameter.requires_grad_, True)

    def end(self, training: TaskTraining) -> None:
        self._open.close()


@final
class Sequence:
    """A network that has learned two tasks, its memory, and unseen inputs of both tasks."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed, self.plan = name, seed, PLANS[name]
        self.sequence, self.settings = find_sequence(name), default_settings(name)
        self.tasks = self.sequence.tasks(self.settings.size)
        torch.manual_seed(seed)
        self.model = self.sequence.network(self.tasks, generator(seed, 0))
        self.method = Remembering()
        settings = replace(self.settings, epochs=self.plan.old_epochs)
        for index in range(OLD):
            training = self._training(self.model, self.tasks[index], index, settings)
            train(training, self.method, lambda: None)
            self.method.end(training)
        self.model.eval()
        self.old = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.outputs = outputs(self, self.old)
        self.before = measured(self, self.old)["accuracy"]

    def _training(self, model: Network, task: Task, index: int, settings: Any) -> TaskTraining:
        return task_training(
            model,
            task,
            index,
            settings=settings,
            augment=self.sequence.augment,
            seed=self.seed,
            loss=self.sequence.loss,
        )

    def learned(
        self,
        method: Method,
        *,
        lr: float = 1.0,
        longer: int = 1,
        index: int = OLD,
        adapted: Callable[[Network], Network] | None = None,
    ) -> State:
        """The weights after a new task was learned by a method, at the learning rate times `lr`."""
        model = copy.deepcopy(self.model)
        settings = replace(self.settings, epochs=self.plan.epochs * longer, lr=self.settings.lr * lr)
        if adapted is not None:
            settings = replace(settings, warmup=0)
        own = self.tasks[index]
        chosen = torch.randperm(len(own.train_labels), generator=generator(self.seed, 900))[: self.plan.num_images]
        task = replace(own, train_images=own.train_images[chosen], train_labels=own.train_labels[chosen])
        training = self._training(model if adapted is None else adapted(model), task, index, settings)
        train(training, method, lambda: None)
        method.end(training)
        merged = training.model.merge_and_unload() if isinstance(training.model, peft.PeftModel) else model
        return {key: value.detach().clone() for key, value in merged.state_dict().items()}


def lora(rank: int) -> Callable[[Network], Network]:
    """The model with adapters of a rank beside its frozen weights: those of linear layers and convolutions."""

    def adapted(model: Network) -> Network:
        # torch's attention reads the weight of out_proj itself, so that an adapter beside it would not run.
        names = [
            name
            for name, module in model.named_modules()
            if (isinstance(module, nn.Linear) and not name.endswith("out_proj")) or type(module) is nn.Conv2d
        ]
        torch.manual_seed(rank)
        options = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
        return cast(Network, peft.get_peft_model(model, options))

    return adapted


def mixed(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> State:
    """(1 - share) first + share second."""
    return {
        key: torch.lerp(value, second[key], share) if value.is_floating_point() else value
        for key, value in first.items()
    }


def checkpoints(own: Sequence) -> dict[str, tuple[str, Callable[[], State]]]:
    """Name -> kind, and what makes the weights."""
    plan, memory = own.plan, own.method.memory
    anchored = Memory(memory.anchor, {name: torch.ones_like(value) for name, value in memory.anchor.items()})
    penalised = replace(memory, directions=None, history=memory.history[:1])

    @cache
    def tuned(lr: float, index: int = OLD) -> State:
        return own.learned(FineTuning(), lr=lr, index=index)

    def guarded(memory: Memory, strength: float, form: str) -> Callable[[], State]:
        return partial(own.learned, Guarded(memory, strength, form))

    found: dict[str, tuple[str, Callable[[], State]]] = {}
    for lr in (0.03, 0.1, 0.3, 1.0):
        found[f"fine-tuned, lr x {lr:g}"] = "fine-tuning", partial(tuned, lr)
    found["fine-tuned, lr x 1, longer"] = "fine-tuning", partial(own.learned, FineTuning(), longer=3)
    for form, strength in [("proximal", 1e-3), ("proximal", 1e-2), ("proximal", 1e-1), ("gradient", 1e-2)]:
        found[f"{form}, {strength:g}"] = "penalty", guarded(penalised, strength, form)
    for strength in (1.0, 10.0, 100.0):
        found[f"projected, {strength:g}"] = "projection", guarded(memory, strength, "projected")
    for strength in (1.0, 10.0):
        found[f"projected by inputs, {strength:g}"] = (
            "projection",
            guarded(own.method.of_inputs, strength, "projected"),
        )
    for strength in (1e-3, 1e-1):
        found[f"L2, {strength:g}"] = "penalty", guarded(anchored, strength, "proximal")
    found["heads alone"] = "frozen body", partial(own.learned, FrozenBackbone())
    found["last layer and heads"] = "frozen body", partial(own.learned, LastLayer(plan.last))
    # PEFT has no adapters for EfficientNet's own class of convolutions.
    for rank, lr in () if own.name == "emoji8-pretrained" else ((2, 1.0), (2, 3.0), (16, 1.0), (16, 3.0)):
        found[f"LoRA, rank {rank}, lr x {lr:g}"] = "LoRA", partial(own.learned, FineTuning(), lr=lr, adapted=lora(rank))

    def on_the_way(share: float) -> State:
        return mixed(own.old, tuned(1.0), share)

    for share in (0.1, 0.3, 0.6):
        found[f"{share:g} of the way to fine-tuned"] = "average", partial(on_the_way, share)
    found["average of two fine-tuned"] = "average", lambda: mixed(tuned(0.3), tuned(0.3, OLD + 1), 0.5)
    return found


def with_state(own: Sequence, state: State) -> nn.Module:
    model = copy.deepcopy(own.model)
    model.load_state_dict(state)
    return model.eval()


def through(index: int, model: nn.Module, images: Tensor) -> Tensor:
    """The outputs of the head of a task."""
    found: Tensor = model(images, index)
    return found


@torch.no_grad()
def outputs(own: Sequence, state: State) -> list[Tensor]:
    """The outputs on the unseen inputs of each old task, through its head."""
    model = with_state(own, state)
    found = []
    for index in range(OLD):
        parts = own.tasks[index].test_images[:: stride(own.tasks[index])].split(100)
        found.append(torch.cat([through(index, model, images) for images in parts]).double())
    return found


def stride(task: Task) -> int:
    """Every how many unseen inputs one is taken: classes lie one after the other."""
    return math.ceil(len(task.test_labels) / NUM_INPUTS)


def relative_change(old: list[Tensor], new: list[Tensor], scale: float = 1.0) -> float:
    """sqrt(E ||y' - y||^2 / E ||y||^2) / scale, the mean over tasks of each expectation."""
    moved = sum(float((b - a).square().sum(1).mean()) for a, b in zip(old, new, strict=True))
    length = sum(float(a.square().sum(1).mean()) for a in old)
    return math.sqrt(moved / length) / scale


def measured(own: Sequence, state: State) -> dict[str, Any]:
    """What is measured on the unseen inputs of the old tasks: means over the tasks."""
    old, new = own.outputs, outputs(own, state)
    rights = []
    for index, values in enumerate(new):
        labels = own.tasks[index].test_labels[:: stride(own.tasks[index])]
        rights.append(float((values.argmax(1) == labels).double().mean()))
    found = []
    for index in range(OLD):
        inputs = own.tasks[index].test_images[:: stride(own.tasks[index])].split(100)
        forward = partial(through, index)
        found.append(
            memsyn.compare(with_state(own, state), own.old, inputs, kind="classes", forward=forward, progress=False)
        )
    return {
        "change": relative_change(old, new),
        "mean_change": sum(one.mean_change for one in found) / OLD,
        "disagreement": 1 - sum(one.agreement for one in found) / OLD,
        "divergence": sum(one.mean_divergence or 0.0 for one in found) / OLD,
        "accuracy": sum(rights) / OLD,
        "linear_change": relative_change(old, outputs(own, mixed(own.old, state, STEP)), STEP),
    }


def by_layer(own: Sequence, state: State, layers: list[str]) -> dict[str, float]:
    """Layer -> the change when this layer alone has its new weights."""
    found = {}
    for layer in layers:
        alone = {key: state[key] if layer_of(key) == layer else value for key, value in own.old.items()}
        found[layer] = relative_change(own.outputs, outputs(own, alone))
    return found


NUM_LAYERS = 8
"""How many layers are measured alone: those whose predicted change is largest."""


def line_of(own: Sequence, name: str, kind: str, state: State) -> dict[str, Any]:
    """All that is known of a checkpoint."""
    memory = own.method.memory
    assert memory.directions is not None
    prediction, whole = predict(memory, state), predict(own.method.whole, state)
    changes = {key: state[key] - value for key, value in memory.anchor.items()}
    bound = sum(float((memory.importance[key] * change.abs()).sum()) for key, change in changes.items())
    products = torch.zeros(NUM_GRADIENTS)
    for key, change in changes.items():
        products += own.method.gradients[key].flatten(1) @ change.flatten()
    scale = OLD * NUM_GRADIENTS * (memory.directions.squared_outputs or math.nan)
    by_gradients = {str(num): float(products.reshape(num, -1).sum(1).norm()) / math.sqrt(scale) for num in FEWER}
    facts = measured(own, state)
    facts["lost_accuracy"] = own.before - facts.pop("accuracy")
    layers = prediction.layers
    largest = sorted((layer for layer in layers if layers[layer]), key=lambda layer: -layers[layer])[:NUM_LAYERS]
    return {
        "sequence": own.name,
        "seed": own.seed,
        "checkpoint": name,
        "kind": kind,
        "predicted": prediction.change,
        "predicted_whole": whole.change,
        "by_gradients": by_gradients,
        "squared_outputs": memory.directions.squared_outputs,
        "bound": bound,
        "distance": math.sqrt(sum(float(change.double().square().sum()) for change in changes.values())),
        "measured": facts,
        "layers": {layer: [layers[layer], alone] for layer, alone in by_layer(own, state, largest).items()},
    }


def rounded(value: Any) -> Any:
    """Numbers with five digits that count."""
    if isinstance(value, dict):
        return {key: rounded(own) for key, own in value.items()}
    if isinstance(value, list):
        return [rounded(own) for own in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def add_lines(out: Path, name: str, seed: int) -> None:
    """Run the checkpoints of a sequence that the file does not hold."""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {line["checkpoint"] for line in lines if (line["sequence"], line["seed"]) == (name, seed)}
    own = Sequence(name, seed)
    for checkpoint, (kind, make) in tqdm(checkpoints(own).items(), desc=name):
        if checkpoint not in done:
            line = line_of(own, checkpoint, kind, make())
            with out.open("a") as file:
                file.write(json.dumps(rounded(line)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequences", nargs="*", default=list(PLANS), help=f"of {', '.join(PLANS)}; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DOCS / "prediction.jsonl")
    options = parser.parse_args()
    for name in options.sequences:
        add_lines(options.out, name, options.seed)
    write_page(options.out, DOCS)


if __name__ == "__main__":
    main()
