"""What each of several processes checks about values of which it holds a part; run by tests/test_sharded_values.py.

    torchrun --nproc-per-node=4 tests/sharded_values.py FOLDER

The truth is that of one process: each process also has the whole model and computes with it alone. Checkpoints of the
processes of one run stay in FOLDER for the next run, with another number of processes.
"""

import functools
import os
import re
import resource
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import memsyn
from memsyn.matrices import AS_TABLE
from memsyn.parameters import named_parameters
from memsyn.sharding import exchange
from memsyn.sharding import parts as held_parts
from memsyn.values import factors as factors_module
from memsyn.values.directions import Directions, excerpt


class Net(nn.Module):
    """A table that is the head too, layers whose rows no number of processes divides, a bias, norms, statistics."""

    def __init__(self, rows: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 7)
        self.norm = nn.BatchNorm1d(7)
        self.second = nn.Linear(7, 6, bias=False)
        self.last = nn.Linear(11, rows)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(F.gelu(self.norm(self.first(self.table(x)))))
        out: Tensor = self.last(hidden @ self.table.weight.T)
        return out


def whole_model(rows: int = 5) -> Net:
    model = Net(rows).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for buffer in model.norm.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(7, dtype=torch.float64) + 0.5)
        model.last.weight[0, 0] = -0.0  # whose sign a sum of zeros would lose
    return model


def sharded_model(mesh: DeviceMesh, rows: int = 5) -> Net:
    model = whole_model(rows)
    for layer in (model.first, model.second, model.last):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def data(seed: int, count: int = 12) -> Tensor:
    return torch.randint(11, (count,), generator=torch.Generator().manual_seed(seed))


@functools.cache
def measured(seed: int, rows: int = 5, **options: object) -> memsyn.Importance:
    found = memsyn.measure(whole_model(rows), [data(seed)], progress=False, **options)  # type: ignore[call-overload]
    assert isinstance(found, memsyn.Importance | memsyn.KroneckerFactors)
    return found  # type: ignore[return-value]


def measured_factors(seed: int, **options: object) -> memsyn.KroneckerFactors:
    return measured(seed, estimator="kronecker", **options)  # type: ignore[return-value]


def cut(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors by the names of parameters, as sharded `measure` returns them."""
    parameters = named_parameters(model)
    return {n: held_parts.from_part(held_parts.cut_like(t, parameters[n]), parameters[n]) for n, t in tensors.items()}


def cut_importance(whole: memsyn.Importance, model: nn.Module) -> memsyn.Importance:
    return replace(whole, sums=cut(whole.sums, model))


def cut_factors(whole: memsyn.KroneckerFactors, mesh: DeviceMesh) -> memsyn.KroneckerFactors:
    """Factors as sharded `measure` returns them: (G, n, n) and (G, n, c) by Shard(1), counts and diagonals by Shard(0).

    On a mesh of copies and parts, the first dimension holds copies.
    """

    def own(name: str, total: Tensor) -> Tensor:
        dim = None if not total.ndim or "_trace/" in name else 1 if total.ndim == 3 else 0
        places = [*[Replicate()] * (mesh.ndim - 1), Shard(dim or 0)]
        return total if dim is None else distribute_tensor(total, mesh, places, src_data_rank=None)

    return replace(whole, sums={name: own(name, total) for name, total in whole.sums.items()})


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, exactly: bool = True) -> None:
    """Tensors of which this process may hold parts, and whole ones."""
    assert list(found) == list(expected)
    for name, whole in expected.items():
        part, own = held_parts.local_part(found[name]), held_parts.cut_like(whole, found[name])
        assert found[name].shape == whole.shape
        assert part.shape == own.shape, name
        if exactly:
            assert torch.equal(part, own), name
        else:
            assert torch.allclose(part, own, rtol=1e-9, atol=1e-12), name


def check_same_memory(found: memsyn.Memory, expected: memsyn.Memory, *, exactly: bool = True) -> None:
    check_same(found.anchor, expected.anchor)
    check_same(found.importance, expected.importance, exactly=exactly)
    check_same(found.statistics, expected.statistics)
    assert found.counts == expected.counts
    assert [replace(own, when="") for own in found.history] == [replace(own, when="") for own in expected.history]


def check_equal_everywhere(tensors: list[Tensor]) -> None:
    """Whole tensors are bit for bit the same in all processes."""
    for tensor in tensors:
        assert not held_parts.is_sharded(tensor)
        everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, tensor.contiguous())
        assert all(
            torch.equal(other.view(torch.uint8), tensor.view(torch.uint8)) for other in everyone if tensor.numel()
        )


def check_boxes(mesh: DeviceMesh) -> None:
    """Whatever the placement, the first process gets the numbers in order, and each process cuts what it holds."""
    meshes = [(mesh, [place]) for place in (Shard(0), Shard(1), Shard(2), Replicate())]
    if mesh.size() == 4:
        grid = init_device_mesh("cpu", (2, 2))
        pairs = [[Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(1), Replicate()], [Shard(2), Shard(1)]]
        meshes += [(grid, pair) for pair in pairs]
    for shape in [(1, 7, 7), (3, 5, 6), (2, 9, 1), (10, 1, 3), (0, 3, 2)]:
        whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
        for own, places in meshes:
            tensor = distribute_tensor(whole, own, places)
            assert torch.equal(held_parts.cut_like(whole, tensor), tensor.to_local())
            cut_again = held_parts.cut_whole(whole, tensor)
            assert torch.equal(held_parts.local_part(cut_again), tensor.to_local())
            if len(own.mesh.shape) == 1 and places == [Shard(0)]:
                assert torch.equal(whole[held_parts.rows_held(tensor)], tensor.to_local())
            elif Shard(1) in places:
                with pytest.raises(memsyn.ModelError, match="cut along another dimension than 0"):
                    held_parts.rows_held(tensor)
            for size in (4, 20, 10**6):
                pieces = list(exchange.pieces_on_first(tensor, size))
                assert exchange.is_first(tensor) or not pieces
                assert all(0 < len(piece) <= size for piece in pieces)
                if exchange.is_first(tensor):
                    assert torch.equal(torch.cat([*pieces, torch.empty(0)]), whole.flatten())
            at = torch.arange(min(whole.numel(), 9)) * 7 % max(1, whole.numel())
            assert torch.equal(exchange.values_at(tensor, at), whole.flatten()[at])
            for rank in range(mesh.size()):
                found = exchange.whole_on(tensor, rank)
                assert (found is not None and torch.equal(found, whole)) if rank == dist.get_rank() else found is None


def check_tensor_parallel() -> None:
    """`fully_shard` over tensor parallelism: parts that are cut twice along one dimension, or along two."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 7))
    expected = memsyn.fingerprint(model)
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    parallelize_module(model, grid["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=grid["data"])
    assert {len(p.placements) for p in model.parameters() if held_parts.is_sharded(p)} == {2}
    assert memsyn.fingerprint(model) == expected
    for name, p in model.named_parameters():
        assert torch.equal(held_parts.cut_like(whole[name], p), held_parts.local_part(p))
        assert torch.equal(excerpt(p), excerpt(whole[name]))


def check_importance(mesh: DeviceMesh) -> None:
    model, one, other = sharded_model(mesh), measured(1), measured(2)
    cut_one, cut_other = cut_importance(one, model), cut_importance(other, model)
    assert cut_one.sums.keys() == named_parameters(model).keys()
    whole = one + other
    for pair in ((cut_one, cut_other), (cut_one, other), (one, cut_other)):  # a whole one comes from a file
        both = pair[0] + pair[1]
        assert all(map(held_parts.is_sharded, both.sums.values()))
        check_same(both.sums, whole.sums)
        check_same(both.mean(), whole.mean())
        assert both.num_samples == 24
    check_same(cut_one.only({"last.bias"}).sums, one.only({"last.bias"}).sums)
    check_same(cut_one.renamed({"last.bias": "b"}).sums, one.renamed({"last.bias": "b"}).sums)
    for mine, expected in zip(cut_one.summary(), one.summary(), strict=True):
        assert (mine.layer, mine.num_weights) == (expected.layer, expected.num_weights)
        for name in ("share", "mean", "max", "concentration"):
            assert getattr(mine, name) == pytest.approx(getattr(expected, name), rel=1e-12)
    held = sum(held_parts.local_part(total).numel() for total in cut_one.sums.values()) * 8
    assert repr(cut_one).startswith(repr(one).rpartition(",")[0])
    said = f"{held} B" if held < 1000 else f"{held / 1000:.1f} kB"
    assert repr(cut_one).endswith(f", {said} in this process)")
    assert "all processes must call it together" in cut_one._repr_html_()
    known = replace(cut_one, fingerprint=memsyn.fingerprint(whole_model()))
    assert known.matches(model)
    across = {name: distribute_tensor(total, mesh, [Replicate()]) for name, total in one.sums.items()}
    with pytest.raises(memsyn.ModelError, match="Save it, and load it with like=model"):
        cut_one + replace(one, sums=across)


def check_fingerprints(mesh: DeviceMesh) -> None:
    whole, model = whole_model(), sharded_model(mesh)
    assert memsyn.fingerprint(model) == memsyn.fingerprint(whole)
    with torch.no_grad():
        for p in model.parameters():
            part = held_parts.local_part(p)
            if dist.get_rank() == mesh.size() - 1 and part.numel():
                part.view(-1)[-1:].add_(1e-9)
    changed = memsyn.fingerprint(model)
    assert changed != memsyn.fingerprint(whole)
    check_equal_everywhere([torch.tensor(list(changed.encode()), dtype=torch.uint8)])
    held = DTensor.from_local(torch.ones(9), mesh, [Partial()])
    with pytest.raises(memsyn.ModelError, match="expected one whose values are cut or repeated"):
        memsyn.fingerprint({"a": held})
    alone = init_device_mesh("cpu", (mesh.size(), 1), mesh_dim_names=("a", "b"))["b"]
    mixed = {"a": distribute_tensor(torch.ones(9), mesh, [Shard(0)])}
    mixed["b"] = held_parts.sharded_from(
        torch.ones(3), [3], distribute_tensor(torch.ones(3), alone, [Shard(0)]), [Shard(0)]
    )
    with pytest.raises(memsyn.ModelError, match="cut between different processes"):
        memsyn.fingerprint(mixed)
    with pytest.raises(memsyn.ModelError, match="cut between different processes"):
        memsyn.Memory(mixed, mixed).save("never.safetensors")


def consolidated(model: nn.Module, *importances: memsyn.Importance, **options: object) -> memsyn.Memory:
    memory = memsyn.Memory.empty()
    for importance in importances:
        memory = memory.consolidate(model, importance, **options)  # type: ignore[arg-type]
    return memory


def check_consolidation(mesh: DeviceMesh) -> None:
    """All rules, whole and cut importances mixed, chosen parameters, more rows, other names, merged memories."""
    whole, model, one, other = whole_model(), sharded_model(mesh), measured(1), measured(2)
    cuts = cut_importance(one, model), cut_importance(other, model)
    for rule, decay in (("sum", None), ("mean", None), ("ema", 0.25), ("max", None)):
        expected = consolidated(whole, one, other, rule=rule, decay=decay)
        for pair in (cuts, (one, other), (cuts[0], other)):
            found = consolidated(model, *pair, rule=rule, decay=decay)
            assert all(map(held_parts.is_sharded, [*found.anchor.values(), *found.importance.values()]))
            check_same_memory(found, expected)
    expected, found = consolidated(whole, one), consolidated(model, cuts[0])
    assert "in this process" in repr(found)
    assert found.matches(model)
    part = next(iter(model.parameters()))
    for mine, theirs in zip(found.anchor.values(), model.parameters(), strict=True):
        assert mine.to_local().data_ptr() != theirs.to_local().data_ptr() or not mine.to_local().numel()
    # A whole memory, as a file gives it, takes in a cut importance, and the other way round.
    check_same_memory(expected.consolidate(model, cuts[1]), expected.consolidate(whole, other))
    check_same_memory(found.consolidate(model, other), expected.consolidate(whole, other))
    chosen = {"only": ["first.*", "last.*"], "exclude": "last.bias"}
    check_same_memory(found.select(**chosen), expected.select(**chosen))
    check_same_memory(
        consolidated(model, cuts[0], **chosen),
        consolidated(whole, one, **chosen),  # type: ignore[arg-type]
    )
    merged = consolidated(model, cuts[0]).merge(consolidated(model, cuts[1]))
    check_same_memory(merged, consolidated(whole, one).merge(consolidated(whole, other)))
    for mine, theirs in zip(merged.summary(), consolidated(whole, one).merge(expected).summary(), strict=True):
        assert mine.layer == theirs.layer
    with pytest.raises(memsyn.MismatchError, match="is cut between processes, and the model's parameter is not"):
        found.consolidate(whole, other)
    with torch.no_grad():
        if part.to_local().numel() and dist.get_rank() == 0:
            part.to_local().view(-1)[0] += 1.0
    assert not found.matches(model)
    with pytest.raises(memsyn.MismatchError, match="the anchors of 1 of 8 parameters differ"):
        found.merge(consolidated(model, cuts[1]))
    with pytest.warns(memsyn.MovedWeightsWarning, match="other weights than the model has now"):
        consolidated(model, replace(cuts[0], fingerprint=memsyn.fingerprint(whole)))


def check_grown_rows(mesh: DeviceMesh) -> None:
    """A head with more rows is cut at other places than the memory."""
    whole, model, one = whole_model(), sharded_model(mesh), measured(1)
    old = consolidated(whole, one)
    cut_old = consolidated(model, cut_importance(one, model))
    wide_whole, wide, new = whole_model(9), sharded_model(mesh, 9), measured(2, 9)
    for memory in (old, cut_old):
        for importance in (new, new.only({"table.weight"})):
            cut_new = cut_importance(importance, wide)
            found, expected = memory.consolidate(wide, cut_new), old.consolidate(wide_whole, importance)
            assert found.importance["last.weight"].shape == (9, 11)
            check_same_memory(found, expected)


def check_names(mesh: DeviceMesh) -> None:
    """A memory under other names finds the parameters of a sharded model."""
    one, model = measured(1), sharded_model(mesh)
    old = consolidated(whole_model(), one)
    named = old.renamed({name: f"net.{name}" for name in old.names})
    with pytest.warns(memsyn.RenamedParametersWarning, match="8 of 8"):
        found = named.consolidate(model, cut_importance(one, model))
    check_same(found.importance, consolidated(whole_model(), one, one).importance)


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """This process writes no more than so many bytes of a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check_files(mesh: DeviceMesh, folder: Path) -> None:
    """The bytes are those of one process, and errors of the first process end all."""
    rank, whole, model, one = dist.get_rank(), whole_model(), sharded_model(mesh), measured(1)
    memory = consolidated(model, cut_importance(one, model)).consolidate(model, cut_factors(measured_factors(2), mesh))
    alone = consolidated(whole, one)
    alone = replace(alone, history=memory.history, directions=memory.directions)
    halves = {name: total.bfloat16() for name, total in one.sums.items()}
    small = replace(one, sums=halves)
    for number, (mine, expected) in enumerate(
        [
            (memory, alone),
            (cut_importance(one, model), one),
            (cut_importance(small, model), small),
            (cut_factors(measured_factors(1), mesh), measured_factors(1)),
        ]
    ):
        path = folder / f"{number}-{mesh.size()}.safetensors"
        mine.save(path)
        expected.save(folder / f"{number}-{rank}-alone.safetensors")
        dist.barrier()
        assert path.read_bytes() == (folder / f"{number}-{rank}-alone.safetensors").read_bytes()
    importance = cut_importance(one, model)
    with pytest.raises(memsyn.MemoryFileError, match="could not be written"):
        importance.save(folder / "no" / "folder.safetensors")
    before = path.read_bytes()
    large = {"w": distribute_tensor(torch.ones(1_500_000), mesh, [Shard(0)])}
    with at_most(3_000_000), pytest.raises(memsyn.MemoryFileError, match="File too large"):
        memsyn.Importance(large, 1).save(path)
    for wrong, says in ((float("nan"), "NaN or infinite"), (-1.0, "negative")):
        bad = distribute_tensor(torch.tensor([1.0] * 1_500_000 + [wrong] + [1.0] * 1_000_000), mesh, [Shard(0)])
        with pytest.raises(memsyn.MemoryFileError, match=f"a: .*w holds {says}|w holds {says}"):
            memsyn.Importance({"a": large["w"], "w": bad, "z": large["w"]}, 1).save(path)
    assert path.read_bytes() == before
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
    dist.barrier()
    memsyn.Importance(large, 1).save(path)  # and the processes still understand one another
    assert memsyn.Importance.load(path).sums["w"].shape == (1_500_000,)


def check_loading(mesh: DeviceMesh, folder: Path) -> None:
    """A file is cut for the model while it is read; a memory of other weights is told of in all processes."""
    rank, whole, model, one = dist.get_rank(), whole_model(), sharded_model(mesh), measured(1)
    factors = measured_factors(1)
    alone = consolidated(whole, one).consolidate(whole, factors)
    paths = [folder / f"load-{number}-{rank}.safetensors" for number in range(3)]
    for value, path in zip((alone, one, factors), paths, strict=True):
        value.save(path)
    found = memsyn.Memory.load(paths[0], like=model)
    assert all(map(held_parts.is_sharded, [*found.anchor.values(), *found.importance.values()]))
    check_same_memory(found, alone)
    assert found.directions is not None
    assert found.matches(model)
    importance = memsyn.Importance.load(paths[1], like=model)
    assert all(map(held_parts.is_sharded, importance.sums.values()))
    check_same(importance.sums, one.sums)
    loaded, expected = memsyn.KroneckerFactors.load(paths[2], like=model), cut_factors(factors, mesh)
    for name, total in expected.sums.items():
        assert held_parts.is_sharded(loaded.sums[name]) == held_parts.is_sharded(total), name
        assert torch.equal(held_parts.local_part(loaded.sums[name]), held_parts.local_part(total))
    assert "first.weight" in factors.matrices
    assert "table.weight" + AS_TABLE in factors.matrices
    assert not any(map(held_parts.is_sharded, memsyn.Importance.load(paths[1], like=whole).sums.values()))
    if rank == 1:
        paths[0].rename(folder / "away")
    error, says = (memsyn.MemoryFileError, "exist") if rank == 1 else (memsyn.ProcessError, "failed in another process")
    with pytest.raises(error, match=says):
        memsyn.Memory.load(paths[0], like=model)
    if rank == 1:
        (folder / "away").rename(paths[0])
    damaged = bytearray(paths[0].read_bytes())
    damaged[-1] ^= 1
    paths[0].write_bytes(damaged)
    with pytest.raises(memsyn.MemoryFileError, match="checksum"):
        memsyn.Memory.load(paths[0], like=model)
    with torch.no_grad():
        part = held_parts.local_part(model.second.weight)
        if rank == 1 and part.numel():
            part[0, 0] += 1.0
    alone.save(paths[0])
    with pytest.warns(memsyn.MovedWeightsWarning, match=r"1 of 8 parameters \(the first is second.weight\)"):
        memsyn.Memory.load(paths[0], like=model)
    wide = sharded_model(mesh, 9)
    with pytest.warns(memsyn.MovedWeightsWarning, match="parameters"):
        grown = memsyn.Memory.load(paths[0], like=wide)
    assert not held_parts.is_sharded(grown.importance["last.weight"])  # the model's rows are cut at other places
    check_same(
        grown.consolidate(wide, measured(2, 9)).importance, alone.consolidate(whole_model(9), measured(2, 9)).importance
    )


def check_same_directions(found: Directions, expected: Directions) -> None:
    """What a projection does is the same: eigenvectors of equal eigenvalues may differ."""
    assert found.layers.keys() == expected.layers.keys()
    assert (found.free, found.rank, found.mass) == (expected.free, expected.rank, expected.mass)
    assert found.squared_outputs == pytest.approx(expected.squared_outputs, rel=1e-12)
    for key, mine in found.layers.items():
        theirs = expected.layers[key]
        assert mine.matrix == theirs.matrix
        assert mine.counts == theirs.counts
        assert mine.scales == pytest.approx(theirs.scales, rel=1e-9)
        for one, other in ((mine.inputs, theirs.inputs), (mine.outputs, theirs.outputs)):
            assert one is not None
            assert other is not None
            assert torch.allclose(one.values, other.values, rtol=1e-6, atol=1e-9)
            assert torch.allclose(one.dense(), other.dense(), rtol=1e-6, atol=1e-9)
    for name, own in found.diagonal.items():
        assert torch.allclose(own.squares, expected.diagonal[name].squares, rtol=1e-9)
        assert own.scale == pytest.approx(expected.diagonal[name].scale, rel=1e-9)
    assert found.excerpts.keys() == expected.excerpts.keys()
    for name, values in found.excerpts.items():
        assert torch.equal(values.view(torch.uint8), expected.excerpts[name].view(torch.uint8))


def numbers_of(directions: Directions) -> list[Tensor]:
    plain = [own.scales for own in directions.layers.values()]
    others = [(own.scale, own.mass) for own in directions.diagonal.values()]
    return [*directions.tensors(), torch.tensor([*plain, *others], dtype=torch.float64)]


def check_factors(mesh: DeviceMesh) -> None:
    """Sums, normalisations, and directions that are the same in all processes, each of which did its share."""
    whole, model = whole_model(), sharded_model(mesh)
    for options in ({}, {"rank": 1}):  # rank 1: sketches of what is wider than 4
        one, other = measured_factors(1, **options), measured_factors(2, **options)
        cuts = cut_factors(one, mesh), cut_factors(other, mesh)
        assert any("_sketch/" in name for name in one.sums) == bool(options)
        for pair in (cuts, (cuts[0], other), (one, cuts[1])):
            check_same((pair[0] + pair[1]).sums, (one + other).sums)
        assert "in this process" in repr(cuts[0])
        if not options:
            check_same({"A": cuts[0].inputs("first.weight")}, {"A": one.inputs("first.weight")})
            check_same({"S": cuts[0].outputs("first.weight")}, {"S": one.outputs("first.weight")})
        for mine, theirs in zip(cuts[0].summary(), one.summary(), strict=True):
            assert mine.layer == theirs.layer
            for name, value in list(vars(theirs).items())[1:]:
                assert getattr(mine, name) == pytest.approx(value, rel=1e-6, abs=1e-9), name
        assert cuts[0].lost("first.weight", 1) == pytest.approx(one.lost("first.weight", 1), rel=1e-6, abs=1e-9)
        for rule, rank in (("sum", 64), ("mean", 2), ("ema", 64))[: 1 if options else 3]:
            expected, found = memsyn.Memory.empty(), memsyn.Memory.empty()
            for mine, theirs in zip(cuts, (one, other), strict=True):
                found = found.consolidate(model, mine, rule=rule, rank=rank)
                expected = expected.consolidate(whole, theirs, rule=rule, rank=rank)
            assert found.directions is not None
            assert expected.directions is not None
            assert found.matches(model)
            check_equal_everywhere(numbers_of(found.directions))
            check_same_directions(found.directions, expected.directions)
            assert found.history[-1].fingerprint == expected.history[-1].fingerprint
            moved, moved_whole = sharded_model(mesh), whole_model()
            with torch.no_grad():
                for p in [*moved.parameters(), *moved_whole.parameters()]:
                    p.mul_(1.1)
            change = found.predicted_change(moved, model)
            assert change == pytest.approx(expected.predicted_change(moved_whole, whole), rel=1e-6)
            assert found.directions.moved(dict(model.named_parameters())) == []
            differs = found.directions.moved(dict(moved.named_parameters()))
            assert differs == expected.directions.moved(dict(moved_whole.named_parameters()))
            assert len(differs) > 5


def check_division_of_work(mesh: DeviceMesh) -> None:
    """Each process computes its share of the eigenvectors, and holds one whole second moment at a time."""
    factors, computed, alive = cut_factors(measured_factors(1), mesh), [], [0]
    refs: list[weakref.ref[Tensor]] = []
    real_spectrum, real_whole = factors_module.spectrum_of, exchange.whole_on

    def spectrum_of(moment: Tensor, rank: int | None) -> object:
        computed.append(tuple(moment.shape))
        return real_spectrum(moment, rank)

    def whole_on(tensor: Tensor, rank: int) -> Tensor | None:
        found = real_whole(tensor, rank)
        if found is not None:
            refs.append(weakref.ref(found))
            alive[0] = max(alive[0], sum(own() is not None for own in refs))
        return found

    with (
        mock.patch.object(factors_module, "spectrum_of", spectrum_of),
        mock.patch.object(exchange, "whole_on", whole_on),
    ):
        memsyn.Memory.empty().consolidate(sharded_model(mesh), factors)
    num_jobs = sum(name.startswith(("inputs/", "outputs/")) for name in factors.sums)
    share = num_jobs // mesh.size() + (dist.get_rank() < num_jobs % mesh.size())
    assert len(computed) == share
    assert alive[0] == 1

    def broken(moment: Tensor, rank: int | None) -> object:
        if dist.get_rank() == mesh.size() - 1:
            raise ArithmeticError("no eigenvalues")
        return real_spectrum(moment, rank)

    error, says = (
        (ArithmeticError, "no") if dist.get_rank() == mesh.size() - 1 else (memsyn.ProcessError, "process . failed")
    )
    with mock.patch.object(factors_module, "spectrum_of", broken), pytest.raises(error, match=says):
        memsyn.Memory.empty().consolidate(sharded_model(mesh), factors)
    dist.barrier()


def check_copies() -> None:
    """A mesh of copies and parts (hybrid sharding)."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    check_importance_on(grid)
    one, whole = measured_factors(1), whole_model()
    found = memsyn.Memory.empty().consolidate(sharded_model(grid), cut_factors(one, grid))
    expected = memsyn.Memory.empty().consolidate(whole, one)
    assert found.directions is not None
    assert expected.directions is not None
    check_equal_everywhere(numbers_of(found.directions))
    check_same_directions(found.directions, expected.directions)


def adapted(model: Net) -> nn.Module:
    """A model with adapters of PEFT, which change its weights."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(3)
    found = inject_adapter_in_model(LoraConfig(r=2, target_modules=["first", "second", "last"]), model).double()
    with torch.no_grad():
        for name, p in found.named_parameters():
            if "lora_B" in name:
                p.normal_()
    return found


def check_adapters(mesh: DeviceMesh) -> None:
    """A memory of the base model goes to the weights in effect, which each process computes for its part."""
    whole, model = adapted(whole_model()), adapted(whole_model())
    for layer in (model.first, model.second, model.last):
        fully_shard(layer, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh)
    found, expected = (
        memsyn.Memory.empty().consolidate(own, measured(1)).consolidate(own, measured_factors(2))
        for own in (model, whole)
    )
    check_same_memory(found, expected)
    assert not torch.equal(expected.anchor["first.weight"], whole_model().first.weight)
    assert found.directions is not None
    assert expected.directions is not None
    check_same_directions(found.directions, expected.directions)
    assert found.matches(model)


def check_importance_on(grid: DeviceMesh) -> None:
    model, one = sharded_model(grid), measured(1)
    found = consolidated(model, cut_importance(one, model))
    check_same_memory(found, consolidated(whole_model(), one))
    assert found.matches(model)
    for mine, theirs in zip(found.summary(), consolidated(whole_model(), one).summary(), strict=True):
        assert mine.share == pytest.approx(theirs.share, rel=1e-12)


def expected_after(stage: int) -> memsyn.Memory:
    """The memory of one process after some stages, each of which takes in an importance and factors."""
    memory, whole = memsyn.Memory.empty(), whole_model()
    for seed in range(stage):
        memory = memory.consolidate(whole, measured(seed)).consolidate(whole, measured_factors(seed))
    return memory


def check_checkpoints(mesh: DeviceMesh, folder: Path) -> None:
    """What other numbers of processes have saved goes on, and is saved for the next run."""
    stage, model = 1 + len(list(folder.glob("checkpoint-*"))), sharded_model(mesh)
    dist.barrier()
    last = folder / f"checkpoint-{stage - 1}"
    memory = memsyn.Memory.empty()
    if last.exists():
        memory = memsyn.Memory.from_checkpoint(last, key="memory", like=model)
        assert all(map(held_parts.is_sharded, [*memory.anchor.values(), *memory.importance.values()]))
        check_same_memory(memory, expected_after(stage - 1), exactly=False)
        check_same_memory(memsyn.Memory.from_checkpoint(last, key="memory"), expected_after(stage - 1), exactly=False)
        found = memsyn.Importance.from_checkpoint(last, key="importance", like=model)
        check_same(found.sums, measured(stage - 2).sums)
        factors = memsyn.KroneckerFactors.from_checkpoint(last, key="factors", like=model)
        check_same(factors.sums, measured_factors(stage - 2).sums)
        file = memsyn.Memory.load(folder / f"memory-{stage - 1}.safetensors", like=model)
        check_same(file.importance, sharding_gathered(memory.importance))
    importance, factors = cut_importance(measured(stage - 1), model), cut_factors(measured_factors(stage - 1), mesh)
    memory = memory.consolidate(model, importance).consolidate(model, factors)
    check_same_memory(memory, expected_after(stage), exactly=False)
    state = {"model": model.state_dict(), "memory": memory.state_dict()}
    state |= {"importance": importance.state_dict(), "factors": factors.state_dict()}
    dcp.save(state, checkpoint_id=folder / f"checkpoint-{stage}")
    memory.save(folder / f"memory-{stage}.safetensors")
    dist.barrier()


def sharding_gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: exchange.gathered(tensor) for name, tensor in tensors.items()}


def status(of: str) -> int:
    """A number of bytes that Linux knows of this process."""
    found = re.search(rf"{of}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1000 * int(found[1])


def peak(of: Callable[[], object]) -> int:
    """By how many bytes the memory of this process grew at most during a call."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak of before is forgotten
    of()
    return status("VmHWM") - before


def check_memory(mesh: DeviceMesh, folder: Path) -> None:
    """Of 200 MB, no process holds more than its part and some pieces while they are hashed or written."""
    empty = distribute_tensor(torch.empty(0, 1000), mesh, [Shard(0)])
    tensor = held_parts.empty_cut([50_000, 1000], torch.float32, empty)
    tensor.to_local().fill_(1.0)
    value = memsyn.Importance({"weight": tensor}, 1)
    value.save(folder / "warm.safetensors")
    path = folder / "large.safetensors"
    grown = {
        "hash": peak(lambda: memsyn.fingerprint({"weight": tensor})),
        "save": peak(lambda: value.save(path)),
    }
    dist.barrier()
    assert path.stat().st_size > 200_000_000
    assert all(value < 40_000_000 for value in grown.values()), grown
    model = nn.Linear(1000, 50_000, bias=False, device="meta")
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    with torch.no_grad():
        held_parts.local_part(model.weight).fill_(0.5)
    before = status("RssAnon")
    found = memsyn.Importance.load(path, like=model)
    held, part = status("RssAnon") - before, held_parts.local_part(found.sums["weight"]).numel() * 4
    assert part <= 104_000_000
    assert held < part + 20_000_000, (held, part)
    assert peak(lambda: exchange.gathered(tensor)) > 150_000_000  # what a gathered tensor would have shown
    print(f"process {dist.get_rank()} of {mesh.size()}: {grown} beside a part of {part}", file=sys.stderr)


def main() -> None:
    dist.init_process_group("gloo")
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", category=memsyn.SlowParametersWarning)
    torch.set_num_threads(1)
    folder, mesh = Path(sys.argv[1]), init_device_mesh("cpu", (dist.get_world_size(),))
    check_boxes(mesh)
    check_importance(mesh)
    check_fingerprints(mesh)
    check_consolidation(mesh)
    check_grown_rows(mesh)
    check_names(mesh)
    check_factors(mesh)
    check_division_of_work(mesh)
    check_files(mesh, folder)
    check_loading(mesh, folder)
    check_checkpoints(mesh, folder)
    if mesh.size() == 2:
        check_memory(mesh, folder)
    if mesh.size() == 3:
        check_adapters(mesh)
    if mesh.size() == 4:
        check_tensor_parallel()
        check_copies()
    dist.barrier()
    dist.destroy_process_group()
    print(
        f"process {dist.get_rank() if dist.is_initialized() else os.environ['RANK']} is done",
        file=sys.stderr,
        flush=True,
    )
    os._exit(0)  # all is checked: threads of torch were once seen to abort the interpreter's own way out


if __name__ == "__main__":
    main()
