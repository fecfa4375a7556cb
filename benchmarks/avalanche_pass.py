"""The pass of Avalanche's `MASPlugin`, timed beside the ordinary pass, in the interpreter that Avalanche lives in.

`measure.py --avalanche PYTHON` runs it with a folder that holds `subject.pt` (weights and batches); it leaves
`importance.safetensors`, of the first batch, there and prints one line of JSON. Needs torch, safetensors and
avalanche-lib (0.6.0 was looked at), and for some networks their packages; not memsyn.

Everything is to Avalanche's favour: its loader gets whole batches ready-made; token outputs are flattened to the
matrix it expects. As it does everywhere, it calls `train()`: dropout is on, BatchNorm uses the batch's statistics.
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from models import SUBJECTS
from passes import Values, ordinary, peak_bytes, seconds


class ReadyBatches(Dataset[Any]):
    """A dataset that hands out its batches whole, with a label and a task for each sample that nothing looks at."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches = batches
        self.size = len(batches[0])
        self.zeros = torch.zeros(self.size, dtype=torch.int64)

    def __len__(self) -> int:
        return self.size * len(self.batches)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """One batch: the loader's indices are in order."""
        return self.batches[indices[0] // self.size], self.zeros, self.zeros

    def __getitem__(self, index: int) -> Tensor:
        return self.batches[index // self.size][index % self.size]

    @staticmethod
    def collate_fn(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return batch


def importance(model: nn.Module, batches: Sequence[Tensor]) -> Values:
    """What the plugin does after an experience: keep the weights, and compute their importance."""
    plugin = import_module("avalanche.training.plugins").MASPlugin()
    plugin.after_training_exp(
        SimpleNamespace(
            model=model,
            experience=SimpleNamespace(dataset=ReadyBatches(batches)),
            train_mb_size=len(batches[0]),
            device=batches[0].device,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            clock=SimpleNamespace(train_exp_counter=0),
        )
    )
    return {name: values.data for name, values in plugin.importance.items()}


def ordinary_in_eval(model: nn.Module, batches: Sequence[Tensor]) -> Values:
    """The ordinary pass as it is elsewhere: the plugin leaves the model in train mode."""
    model.eval()
    return ordinary(model, batches)


def flat_outputs(model: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """A forward hook: one row a sample."""
    return output.flatten(1)


def main() -> None:
    """Measure, and print the ratios of a batch's cost, or the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(SUBJECTS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", action="store_true", help="measure peak memory, not time")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of solvers that are not installed
    torch.backends.cudnn.allow_tf32 = False
    model = SUBJECTS[options.name].model().to(options.device)
    model.register_forward_hook(flat_outputs)
    saved = torch.load(options.folder / "subject.pt", weights_only=True, map_location=options.device)
    model.load_state_dict(saved["weights"])
    batches = saved["batches"]
    found: dict[str, object] = {"avalanche": version("avalanche-lib"), "torch": torch.__version__}
    if options.peak:
        found["peak"] = peak_bytes(importance, model, batches)
    else:
        values = importance(model, batches[:1])  # before statistics move
        save_file({name: v.cpu().contiguous() for name, v in values.items()}, options.folder / "importance.safetensors")
        ordinary_in_eval(model, batches[:1])  # warm up
        pairs = [
            (seconds(ordinary_in_eval, model, batches), seconds(importance, model, batches))
            for _ in range(options.rounds)
        ]
        found["ratios"] = [cost / plain for plain, cost in pairs]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
