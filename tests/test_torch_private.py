"""Each private name of torch does what we take it for, and nobody else uses one."""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn
from torch.overrides import TorchFunctionMode

import memsyn
from memsyn import torch_private

PACKAGE = Path(memsyn.__file__).parent


class Seen(TorchFunctionMode):
    """The names of the functions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_without_function_modes_hides_operations_until_it_ends() -> None:
    with Seen() as seen:
        with torch_private.without_function_modes():
            torch.ones(2).exp()
        torch.ones(2).sin()
    assert "exp" not in seen.names
    assert "sin" in seen.names


def test_packed_sequences_are_seen_by_those_names() -> None:
    functions: list[object] = []

    class Note(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            functions.append(func)
            return func(*args, **(kwargs or {}))

    with Note():
        rnn.pad_packed_sequence(rnn.pack_padded_sequence(torch.ones(3, 2, 1), torch.tensor([3, 1])))
    assert all(function in functions for function in torch_private.PACKED_SEQUENCES)


def test_version_counts_writes_in_place() -> None:
    tensor = torch.zeros(2)
    before = torch_private.version_of(tensor)
    tensor[0].add_(1)
    assert torch_private.version_of(tensor) == before + 1


def test_views_and_their_bases() -> None:
    base = torch.zeros(2, 3)
    assert torch_private.is_view(base.t())
    assert not torch_private.is_view(base)
    assert torch_private.base_of(base.t()) is base
    assert torch_private.base_of(base) is None


def test_unviewed_is_the_same_memory_and_graph_but_no_view() -> None:
    leaf = torch.ones(2, 3, requires_grad=True)
    view = (2 * leaf).view(6)
    alias = torch_private.unviewed(view)
    assert alias.data_ptr() == view.data_ptr()
    assert not torch_private.is_view(alias)
    caught: list[Tensor] = []
    alias.register_hook(caught.append)
    alias.mul_(3).sum().backward()  # a hook on a view is lost with such a write
    assert torch.equal(caught[0], torch.full((6,), 3.0))
    assert torch.equal(leaf.grad, torch.full((2, 3), 6.0))


def test_one_call_for_a_list_of_tensors() -> None:
    ones, twos = [torch.ones(2), torch.ones(3)], [torch.full((2,), 2.0), torch.full((3,), 2.0)]
    both = {"foreach_add": 3, "foreach_sub": -1, "foreach_mul": 2, "foreach_div": 0.5}
    for name, expected in both.items():
        assert [t.unique().item() for t in getattr(torch_private, name)(ones, twos)] == [expected] * 2
    assert [t.unique().item() for t in torch_private.foreach_sqrt([4 * t for t in ones])] == [2, 2]
    torch_private.foreach_add_(ones, twos)  # 3
    torch_private.foreach_mul_(ones, [2.0, 2.0])  # 6
    torch_private.foreach_addcmul_(ones, twos, twos, [1.0, 1.0])  # 10
    torch_private.foreach_lerp_(ones, twos, [torch.full((2,), 0.5), torch.full((3,), 0.5)])  # 6
    assert [t.unique().item() for t in ones] == [6, 6]
    torch_private.foreach_zero_(ones)
    assert not any(t.any() for t in ones)


def test_want_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert torch_private.is_out_of_memory(caught.value)
    assert torch_private.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) + torch.ones(3)
    assert not torch_private.is_out_of_memory(caught.value)


def test_custom_functions_are_told_from_torchs() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    x = torch.ones(1, requires_grad=True)
    assert torch_private.is_custom_function(Double.apply(x))
    assert not torch_private.is_custom_function(2 * x)
    assert not torch_private.is_custom_function(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_a_compiled_models_original_and_its_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(model)
    assert torch_private.compiled_original(compiled) is model
    assert torch_private.compiled_original(model) is None
    names = [torch_private.uncompiled_name(name) for name, _ in compiled.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]


def test_hooks_are_found_and_removed_by_key() -> None:
    module, called = nn.Linear(1, 1), []
    module.register_forward_pre_hook(lambda *_: called.append("before"))
    module.register_forward_hook(lambda *_: called.append("after"))
    module.register_full_backward_hook(lambda *_: called.append("backward"))
    module.register_full_backward_pre_hook(lambda *_: called.append("backward"))
    module(torch.ones(1, 1))
    assert called == ["before", "after"]
    torch_private.remove_backward_hooks(module)
    for hooks in torch_private.forward_hooks(module):
        assert len(hooks) == 1
        hooks.clear()
    module(torch.ones(1, 1, requires_grad=True)).backward()
    assert called == ["before", "after"]


def test_slots_are_what_a_module_itself_holds() -> None:
    module = nn.BatchNorm1d(2)
    module.inner = nn.Identity()
    slots = {name: owner for owner, name, _ in torch_private.named_slots(module)}
    assert set(slots) == {"inner", "weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    slots["weight"]["weight"] = None
    assert module.weight is None


def test_persistent_buffers_are_those_of_the_module_itself_in_its_state_dict() -> None:
    module = nn.BatchNorm1d(2)
    module.inner = nn.BatchNorm1d(2)
    module.register_buffer("passing", torch.ones(1), persistent=False)
    module.register_buffer("missing", None)
    found = dict(torch_private.persistent_buffers(module))
    assert list(found) == ["running_mean", "running_var", "num_batches_tracked"]
    assert found["running_mean"] is module.running_mean


def test_batch_norm_counts_its_batches_and_not_its_writes() -> None:
    """So the check whether statistics move reads the versions of all buffers, and values now and then."""
    module = nn.BatchNorm1d(2)
    before = {name: torch_private.version_of(buffer) for name, buffer in module.named_buffers()}
    module(torch.ones(3, 2))
    assert torch_private.version_of(module.num_batches_tracked) > before["num_batches_tracked"]
    assert torch_private.version_of(module.running_mean) == before["running_mean"]


def test_own_parameters_are_told_from_parametrized_ones() -> None:
    assert torch_private.has_own_parameter(nn.Embedding(2, 2), "weight")
    assert not torch_private.has_own_parameter(parametrizations.weight_norm(nn.Linear(2, 2)), "weight")


def test_a_dispatch_mode_sees_random_numbers() -> None:
    drawn: list[bool] = []

    class Note(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            drawn.append(torch.Tag.nondeterministic_seeded in func.tags)
            return func(*args, **(kwargs or {}))

    with Note():
        torch.zeros(2)
        torch.rand(2)
    assert drawn[0] is False
    assert any(drawn)


def test_a_backward_pass_on_edges_stays_inside_the_function_mode() -> None:
    """Public, but only as of torch's behaviour: what a checkpoint runs again must be seen."""
    from torch.utils.checkpoint import checkpoint

    from memsyn.engine.passes import run_backward

    weight = torch.ones(3, requires_grad=True)
    with Seen() as seen:
        total = checkpoint(lambda x: torch.tanh(x * weight), torch.ones(3), use_reentrant=False).sum()
        before = len(seen.names)
        run_backward(total, (weight,), retain_graph=False)
    assert "tanh" in seen.names[before:]
    torch.testing.assert_close(weight.grad, 1 - torch.tanh(torch.ones(3)).square())


def private_names(path: Path) -> list[str]:
    """Uses of names with an underscore that the file's package does not define, and torch's private modules."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    own |= {"_replace"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if node.attr not in own and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                found.append(f"{path.name}:{node.lineno} {node.attr}")
        elif isinstance(node, ast.Attribute) and node.attr in ("__code__", "__globals__", "aten"):
            found.append(f"{path.name}:{node.lineno} {node.attr}")
        elif isinstance(node, ast.ImportFrom) and any(
            part.startswith("_") and part != "__future__" for part in (node.module or "").split(".")
        ):
            found.append(f"{path.name}:{node.lineno} {node.module}")
    return found


LIGHTNING = {"_combined_loader", "_on_before_batch_transfer", "_batches_that_stepped"}
"""How training reads its batches, and the step of its logs; Lightning has no public way."""


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_only_torch_private_uses_private_names(path: Path) -> None:
    if path.name != "torch_private.py":
        allowed = LIGHTNING if path.name == "lightning.py" else set()
        assert [name for name in private_names(path) if name.split()[-1] not in allowed] == []


def test_a_step_is_that_of_its_class_whatever_torch_put_around_it() -> None:
    class Inherits(torch.optim.SGD):
        pass

    class Overrides(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    own = vars(Overrides)["step"]
    for kind in (Inherits, Overrides, torch.optim.SGD, Inherits):  # torch wraps the step of a class with its first one
        kind([nn.Parameter(torch.ones(1))], lr=0.1)
        assert torch_private.own_step(Inherits) is torch_private.own_step(torch.optim.SGD)
        assert torch_private.own_step(Overrides) is own
    assert torch_private.own_step(torch.optim.Adam) is not torch_private.own_step(torch.optim.SGD)


def test_the_steps_of_an_optimizer_that_are_in_progress_are_counted() -> None:
    class Outer(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    def closure() -> None:
        seen.append((torch_private.num_steps_in_progress(outer), torch_private.num_steps_in_progress(other)))

    seen: list[tuple[int, int]] = []
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    outer = Outer([nn.Parameter(torch.ones(1))], lr=0.1)
    outer.step(closure)
    other.step(closure)
    closure()
    assert seen == [(2, 0), (0, 1), (0, 0)]


def test_the_submodules_of_a_module_are_those_it_reads() -> None:
    shared = torch.nn.Linear(1, 1)
    model = torch.nn.Sequential(shared, shared)
    children = torch_private.modules_of(model)
    assert list(children) == ["0", "1"]
    children["1"] = torch.nn.Identity()
    assert isinstance(model[1], torch.nn.Identity)
    assert model[0] is shared
