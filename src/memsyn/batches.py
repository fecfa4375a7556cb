"""Batches: reading them as model input, moving them, counting and selecting their samples.

Owns everything that looks inside a batch. `measure` turns each batch into a `Batch` once, and passes this on. The
functions below `Batch` work on any nesting of tuples, lists and mappings of tensors.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from memsyn.errors import BatchError

LABEL_KEYS = frozenset({"label", "labels", "label_ids", "start_positions", "end_positions"})


def check_iterable(batches: object) -> None:
    """Refuse an argument that is not an iterable of batches.

    Raises:
        BatchError: it is one batch, or not iterable.
    """
    if isinstance(batches, Tensor):
        raise BatchError(
            f"expected batches, got one tensor of shape {tuple(batches.shape)}. Each row would be read as a batch. "
            "Wrap it in a list: measure(model, [tensor])"
        )
    if isinstance(batches, tuple) and len(batches) == 2 and all(isinstance(part, Tensor) for part in batches):
        first, second = batches
        if first.ndim != second.ndim and first.shape[:1] == second.shape[:1]:
            raise BatchError(
                "expected batches, got what looks like one (input, target) pair. Wrap it in a list: [(input, target)]"
            )
    if isinstance(batches, Mapping):
        raise BatchError("expected batches, got one mapping. Wrap it in a list: measure(model, [mapping])")
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise BatchError(f"expected a DataLoader or any iterable of batches, got a {type(batches).__name__}.")


def model_input(batch: object) -> object:
    """The part of a batch that the model gets: the tensor, the first item of a tuple or list, a mapping without labels.

    Raises:
        BatchError: the batch is of another type, or empty.
    """
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise BatchError("a batch is an empty tuple or list: expected (input, target) or (input,).")
        batch = batch[0]
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in LABEL_KEYS}
    raise BatchError(
        f"a batch must be a tensor, an (input, target) tuple or a mapping of tensors; got a {type(batch).__name__}. "
        "For other batches, pass a function that runs the model: forward=lambda model, batch: ..."
    )


def labels_of(batch: object) -> Tensor | None:
    """The labels of a batch: the second item of a tuple or list, or a mapping's 'labels' or 'label'; None without."""
    if isinstance(batch, Mapping):
        found = batch.get("labels", batch.get("label"))
    else:
        found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    return found if isinstance(found, Tensor) else None


@final
@dataclass(frozen=True, eq=False)
class Batch:
    """A batch in the form that is measured. Make it with `Batch.of`.

    Attributes:
        inputs: the input of the forward pass.
        labels: one label per sample, if the estimator needs labels.
        tensors: the tensors in the inputs and the labels, in order.
        num_samples: the size of the first dimension of the first tensor with dimensions; None without such a tensor.
    """

    inputs: Any
    labels: Tensor | None
    tensors: tuple[Tensor, ...]
    num_samples: int | None

    @classmethod
    def of(cls, inputs: Any, labels: Tensor | None = None) -> "Batch":
        """Make a batch from inputs and labels, without copying tensors."""
        return cls(inputs, labels, (), None).map(lambda tensor: tensor)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same structure in new containers, with every tensor changed."""
        found: list[Tensor] = []

        def changed(tensor: Tensor) -> Tensor:
            found.append(change(tensor))
            return found[-1]

        inputs = map_tensors(self.inputs, changed)
        labels = None if self.labels is None else changed(self.labels)
        return Batch(inputs, labels, tuple(found), next((t.shape[0] for t in found if t.ndim), None))

    def take(self, start: int, stop: int) -> "Batch":
        """Samples start to stop - 1. A tensor is cut if its first dimension has one entry per sample."""
        total = self.num_samples
        # A trap: a tensor that belongs to no sample, but has as many rows as there are samples, is cut too.
        return self.map(lambda t: t[start:stop] if t.ndim and t.shape[0] == total else t)

    def one_by_one(self) -> Iterator["Batch"]:
        """One batch per sample.

        Raises:
            BatchError: the batch holds no tensor to cut.
        """
        if self.num_samples is None:
            raise BatchError(
                f"some parameters need one sample at a time, but a {type(self.inputs).__name__} without tensors cannot "
                "be cut into its samples. Give batches of tensors (in tuples, lists or mappings), samples first."
            )
        return (self.take(k, k + 1) for k in range(self.num_samples))

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`, with detached tensors. Tensors that were made in inference mode are copied."""

        def move(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            # Autograd refuses tensors that were made in inference mode. A clone is an ordinary tensor.
            return tensor.clone().to(device) if tensor.is_inference() else tensor.to(device, non_blocking=True)

        return self.map(move)

    def copied(self) -> "Batch":
        """The batch with copies of its tensors."""
        return self.map(torch.clone)


def call(model: nn.Module, inputs: object) -> object:
    """Run the model: a mapping as keyword arguments, a tensor as the only argument."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def map_tensors(
    batch: Any, change: Callable[[Tensor], Tensor], change_other: Callable[[Any], Any] = lambda part: part
) -> Any:
    """The same structure with every tensor changed. `change_other` changes the other leaves; the default keeps them."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        changed = {key: map_tensors(value, change, change_other) for key, value in batch.items()}
        return changed if isinstance(batch, dict) else type(batch)(changed)  # type: ignore[call-arg]
    if isinstance(batch, (tuple, list)):
        parts = [map_tensors(value, change, change_other) for value in batch]
        if isinstance(batch, list):
            return parts
        return tuple(parts) if type(batch) is tuple else type(batch)(*parts)  # else a named tuple
    return change_other(batch)


def tensors(batch: Any) -> list[Tensor]:
    """The tensors in a batch, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, note)
    return found


def num_samples(batch: Any) -> int | None:
    """The size of the first dimension of the first tensor with dimensions; None if the batch holds no such tensor."""
    # A shortcut for a single tensor, since observers call this for every request.
    found = [batch] if isinstance(batch, Tensor) else tensors(batch)
    return next((tensor.shape[0] for tensor in found if tensor.ndim), None)


def take(batch: Any, start: int, stop: int) -> Any:
    """Samples start to stop - 1 of a batch. A tensor is cut if its first dimension has one entry per sample."""
    total = num_samples(batch)
    return map_tensors(batch, lambda t: t[start:stop] if t.ndim and t.shape[0] == total else t)


def picked(batch: Any, rows: Sequence[int]) -> Any:
    """Copy some samples of a batch, as detached tensors. Arrays are copied whole.

    Raises:
        BatchError: the batch holds an object that cannot be copied. The caller or the model may change it later.
    """
    total = num_samples(batch)

    def pick(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor[list(rows)] if tensor.ndim and len(tensor) == total and len(rows) != total else tensor.clone()

    def own(part: Any) -> Any:
        if isinstance(part, np.ndarray) and not part.dtype.hasobject:
            return part.copy()
        if not isinstance(part, (str, int, float, complex, np.generic, type(None))):
            raise BatchError(
                f"a batch holds a {type(part).__name__}, which memsyn cannot copy: expected tensors, arrays, numbers "
                "and text, in tuples, lists and mappings. Leave it out of the batch."
            )
        return part

    return map_tensors(batch, pick, own)


def kind(batch: Any) -> Hashable:
    """A key that is equal for batches that can be joined: structure, dtypes, shapes of a sample, all other leaves.

    Tensors without one entry per sample are equal only if they are the same object.
    """
    total = num_samples(batch)

    def of(part: Any) -> Hashable:
        if isinstance(part, Tensor):
            by_sample = part.ndim > 0 and len(part) == total
            return (part.dtype, part.layout, part.device, part.shape[1:]) if by_sample else id(part)
        if isinstance(part, Mapping):
            return type(part), tuple((key, of(value)) for key, value in part.items())
        if isinstance(part, (tuple, list)):
            return type(part), tuple(map(of, part))
        return part if isinstance(part, (str, int, float, bool, type(None))) else id(part)

    return of(batch)


def joined(batches: Sequence[Any]) -> Any:
    """Join batches of one kind into one batch, along the samples."""
    size = num_samples(batches[0])
    columns = zip(*map(tensors, batches), strict=True)
    wholes = iter([torch.cat(parts) if parts[0].ndim and len(parts[0]) == size else parts[0] for parts in columns])
    return map_tensors(batches[0], lambda _: next(wholes)) if len(batches) > 1 else batches[0]


def first_samples(batches: Iterator[Any], limit: int | None) -> Iterator[Any]:
    """The batches up to `limit` samples; the last batch is cut.

    Raises:
        BatchError: the samples of a batch cannot be counted.
    """
    if limit is None:
        yield from batches
        return
    for batch in batches:
        size = num_samples(batch)
        if size is None:
            raise BatchError(
                "max_samples needs batches made of tensors, to count the samples. Leave it out, or give tensors."
            )
        yield batch if size <= limit else take(batch, 0, limit)
        limit -= size
        if limit <= 0:
            return
