"""Batches: reading them as model input, moving them, counting and selecting their samples.

Owns everything that looks inside a batch. `measure` turns each batch into a `Batch` once, and passes this on. The
functions below `Batch` work on any nesting of tuples, lists and mappings of tensors.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from memsyn.errors import BatchError

BatchSplit = Callable[[Any], Sequence[Any]]
"""batch -> its samples, each as a batch of its own."""

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
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        if not batch:
            raise BatchError("a batch is an empty tuple or list: expected (input, target) or (input,).")
        batch = batch[0]
    if isinstance(batch, (Tensor, PackedSequence)) or _are_tensors(batch) or _are_graphs(batch):
        return batch
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in LABEL_KEYS}
    raise BatchError(
        f"a batch must be a tensor, a list of tensors, an (input, target) tuple or a mapping of tensors; got a "
        f"{type(batch).__name__}. "
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
        num_samples: the size of the first dimension of the first tensor with dimensions; None without such a tensor; 1
            if the batch is whole.
        whole: whether the batch is one sample, whatever the sizes of its tensors.
    """

    inputs: Any
    labels: Tensor | None
    tensors: tuple[Tensor, ...]
    num_samples: int | None
    whole: bool = False

    @classmethod
    def of(cls, inputs: Any, labels: Tensor | None = None, *, whole: bool = False) -> "Batch":
        """Make a batch from inputs and labels, without copying tensors."""
        return cls(inputs, labels, (), None, whole).map(lambda tensor: tensor)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same structure in new containers, with every tensor changed."""
        found: list[Tensor] = []

        def changed(tensor: Tensor) -> Tensor:
            found.append(change(tensor))
            return found[-1]

        inputs = map_tensors(self.inputs, changed)
        labels = None if self.labels is None else changed(self.labels)
        size = 1 if self.whole else next((t.size(0) for t in found if t.ndim), None)
        return Batch(inputs, labels, tuple(found), size, self.whole)

    def as_one_sample(self) -> "Batch":
        """The same batch as one sample, whatever the sizes of its tensors."""
        return Batch(self.inputs, self.labels, self.tensors, 1, whole=True)

    def items(self, count: int) -> "list[Batch] | None":
        """One batch for each of `count` items in the lists of the inputs; None if no list has so many."""
        if not _has_items(self.inputs, count):
            return None
        labels = self.labels if self.labels is not None and len(self.labels) == count else None
        return [
            Batch.of(_item(self.inputs, k, count), None if labels is None else labels[k : k + 1], whole=True)
            for k in range(count)
        ]

    def take(self, start: int, stop: int) -> "Batch":
        """Samples start to stop - 1. A tensor is cut if its first dimension has one entry per sample."""
        if self.whole:
            return self
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
                "be cut into its samples. Give batches of tensors (in tuples, lists or mappings), samples first, or "
                "say how: split=lambda batch: [...], a list of batches of one sample each."
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
    if isinstance(batch, PackedSequence):
        # Its batch sizes stay on the CPU.
        order = [None if part is None else change(part) for part in batch[2:]]
        return PackedSequence(change(batch.data), batch.batch_sizes, *order)
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
    if isinstance(batch, Samples):
        return len(batch)
    # A shortcut for a single tensor, since observers call this for every request.
    found = [batch] if isinstance(batch, Tensor) else tensors(batch)
    return next((tensor.shape[0] for tensor in found if tensor.ndim), None)


def take(batch: Any, start: int, stop: int) -> Any:
    """Samples start to stop - 1 of a batch. A tensor is cut if its first dimension has one entry per sample."""
    if isinstance(batch, Samples):
        return Samples(batch[start:stop], batch.joined)
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


# Batches whose samples are not in the first dimension


@final
class Samples(list[Any]):
    """A batch as the list of its samples, each of which is a batch of its own.

    Attributes:
        joined: the rows in which sequences were packed, and all of these sequences; None for other batches.
    """

    def __init__(self, samples: Iterable[Any], joined: tuple[Any, list[Any]] | None = None) -> None:
        super().__init__(samples)
        self.joined = joined


def in_samples(batch: Any, split: BatchSplit | None, *, has_forward: bool) -> Any:
    """The batch itself if its samples are in the first dimension; else its `Samples`.

    Args:
        batch: as the loader gives it.
        split: the user's function, which is asked instead.
        has_forward: whether the batch is passed to a function of the user's, so that its tuples and lists mean what
            this function takes them for.

    Raises:
        BatchError: `split` does not give a list.
    """
    if split is not None:
        samples = split(batch)
        if not isinstance(samples, (tuple, list)):
            raise BatchError(
                f"split must give a list of batches of one sample each; got a {type(samples).__name__}. For instance: "
                "split=lambda batch: [[image] for image in batch]"
            )
        return Samples(samples)
    sequences = _packed_sequences(batch)
    if sequences is not None:
        return Samples(sequences, (batch, sequences))
    if not has_forward:
        if _are_ragged(batch):
            return Samples((type(batch)([tensor]),) for tensor in batch)
        if isinstance(batch, (tuple, list)) and batch and _are_ragged(batch[0]):
            return Samples(_item(tuple(batch), k, len(batch[0])) for k in range(len(batch[0])))
    parts = _parts_of_samples(batch)
    if not parts:
        return batch
    return Samples(_sample(batch, k, len(parts)) for k in range(len(parts)))


def _are_graphs(part: Any) -> bool:
    """Whether it is a batch of torch_geometric, which joins graphs and takes them apart again."""
    return callable(getattr(part, "to_data_list", None))


def _are_tensors(part: Any) -> bool:
    return type(part) in (list, tuple) and bool(part) and all(isinstance(tensor, Tensor) for tensor in part)


def _are_ragged(part: Any) -> bool:
    """Whether a list of tensors is a list of samples for certain: tensors of one kind, with unlike first dimensions.

    An input and its target have one entry per sample each, so their first dimensions are alike.
    """
    if not _are_tensors(part) or any(tensor.is_nested for tensor in part):
        return False
    kinds, sizes = {(tensor.dtype, tensor.ndim) for tensor in part}, {tensor.shape[:1] for tensor in part}
    return len(kinds) == 1 and len(sizes) > 1


def are_items(batch: Any) -> bool:
    """Whether a batch may be a list of samples: tensors of one kind, of unlike sizes."""
    return (
        _are_tensors(batch)
        and len({(tensor.dtype, tensor.ndim) for tensor in batch}) == 1
        and len({tensor.shape for tensor in batch}) > 1
    )


def _parts_of_samples(part: Any) -> list[Any] | None:
    """The samples of the first packed sequence, nested tensor or batch of graphs in a batch."""
    if isinstance(part, PackedSequence):
        return [pack_sequence([sequence]) for sequence in unpack_sequence(part)]
    if isinstance(part, Tensor):
        return (
            [torch.nested.nested_tensor([row], layout=part.layout) for row in part.unbind()] if part.is_nested else None
        )
    if isinstance(part, Mapping):
        part = list(part.values())
    if isinstance(part, (tuple, list)):
        return next((found for own in part if (found := _parts_of_samples(own))), None)
    return [type(part).from_data_list([graph]) for graph in part.to_data_list()] if _are_graphs(part) else None


def _sample(part: Any, k: int, count: int) -> Any:
    """Sample k of a batch that holds packed sequences, nested tensors or batches of graphs."""
    if isinstance(part, PackedSequence) or (isinstance(part, Tensor) and part.is_nested) or _are_graphs(part):
        samples = _parts_of_samples(part)
        assert samples is not None
        if len(samples) != count:
            raise BatchError(
                f"a batch joins {count} samples in one place and {len(samples)} in another: got {part!r:.80}."
            )
        return samples[k]
    if isinstance(part, Tensor):
        return part[k : k + 1] if part.ndim and len(part) == count else part
    if isinstance(part, Mapping):
        return {key: _sample(value, k, count) for key, value in part.items()}
    if isinstance(part, (tuple, list)):
        return type(part)([_sample(value, k, count) for value in part])
    return part


def _has_items(part: Any, count: int) -> bool:
    if isinstance(part, Mapping):
        return any(_has_items(value, count) for value in part.values())
    if _are_tensors(part) and len(part) == count:
        return True
    return isinstance(part, (tuple, list)) and any(_has_items(value, count) for value in part)


def _item(part: Any, k: int, count: int) -> Any:
    """Item k of `count` in every list of a batch, as a list of one."""
    if isinstance(part, Tensor):
        return part[k : k + 1] if part.ndim and len(part) == count else part
    if isinstance(part, Mapping):
        return {key: _item(value, k, count) for key, value in part.items()}
    if not isinstance(part, (tuple, list)):
        return part
    is_list = len(part) == count and (
        _are_tensors(part) or not any(isinstance(own, (list, tuple, Tensor)) for own in part)
    )
    return type(part)(part[k : k + 1] if is_list else [_item(own, k, count) for own in part])


def _packed_sequences(batch: Any) -> list[dict[str, Any]] | None:
    """The sequences of a padding-free batch, whose rows hold several one after the other; None for other batches.

    Either `position_ids` (rows, tokens) start again in a row, or `cu_seqlens` (or a name that begins so) holds the
    boundaries of a single row. Two sequences, of 3 and 2 tokens:

        input_ids     5 8 2 5 6
        position_ids  0 1 2 0 1
        cu_seqlens    0 3 5
    """
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and not bool((mask != 0).all()):
        return None  # positions start again behind padding
    keys = [key for key in batch if str(key).startswith(("cu_seq", "cu_len"))]
    rows, length = 1, 0
    if keys:
        edges = [[int(edge) for edge in batch[keys[0]]]]
        length = edges[0][-1]
    else:
        positions = batch.get("position_ids")
        if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.is_floating_point():
            return None
        rows, length = positions.shape
        edges = [_edges(row) for row in positions.tolist()]
    if all(len(own) <= 2 for own in edges):
        return None

    def cut(key: str, value: Any, row: int, start: int, stop: int) -> Any:
        if key in keys:
            return torch.tensor([0, stop - start], dtype=value.dtype, device=value.device)
        if key.startswith("max_") and not (isinstance(value, Tensor) and value.ndim):
            return torch.full_like(value, stop - start) if isinstance(value, Tensor) else stop - start
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if value.ndim > 1 and value.shape[:2] == (rows, length):
            return value[row : row + 1, start:stop]
        return value[start:stop] if keys and len(value) == length else value

    return [
        {key: cut(str(key), value, row, start, stop) for key, value in batch.items()}
        for row, own in enumerate(edges)
        for start, stop in pairwise(own)
    ]


def _edges(positions: list[int]) -> list[int]:
    """Where the sequences of a row begin, and its end; only the row's own two ends if it holds one sequence."""
    starts = [k for k, own in enumerate(positions) if k == 0 or own != positions[k - 1] + 1]
    # Positions that jump do not start again.
    if any(positions[k] != positions[0] for k in starts):
        starts = [0]
    return [*starts, len(positions)]
