"""When the kernel in Triton is used, what happens when it fails, and the kernel itself in Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsyn
from memsyn.kernels import fused_products, outer_products
from memsyn.kernels.fused_products import add_fused_products
from memsyn.kernels.outer_products import absolute, add_outer_products

KERNEL = "memsyn.kernels.triton_products"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: pip install triton")


@pytest.fixture(autouse=True)
def _no_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    # It takes tensors on the CPU alone: here they stand for those of a GPU.
    monkeypatch.setattr(outer_products, "takes_products", lambda *factors: False)


class Kernel(ModuleType):
    """A stand-in for the file with the kernel: it counts calls, and adds or raises."""

    def __init__(self, add: Callable[..., None]) -> None:
        super().__init__(KERNEL)
        self.add, self.calls, self.has_all = add, 0, True

    def takes(self, *_: Any) -> bool:
        return self.has_all

    def add_products(self, *given: Any) -> None:
        self.calls += 1
        self.add(*given)


def in_its_place(monkeypatch: pytest.MonkeyPatch, add: Callable[..., None]) -> Kernel:
    """The stand-in, imported in place of the kernel; tensors on the CPU count as those on a GPU."""
    kernel = Kernel(add)
    monkeypatch.setitem(sys.modules, KERNEL, kernel)
    monkeypatch.setattr(fused_products, "DEVICES", {"cuda", "cpu"})
    monkeypatch.setattr(fused_products, "failures", {})
    return kernel


def by_einsum(pairs: Sequence[tuple[Tensor, Tensor]], total: Tensor, magnitude: Any) -> None:
    total += magnitude(sum(torch.einsum("bgtr,bgtc->bgrc", left, right) for left, right in pairs)).sum(0)


def raising(error: Exception) -> Callable[..., None]:
    def add(*_: Any) -> None:
        raise error

    return add


def summed(*, tokens: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """A sum over 5 samples by the function that all rules call."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(5, 2, tokens, 4, generator=generator, dtype=dtype)
    right = torch.randn(5, 2, tokens, 6, generator=generator, dtype=dtype)
    total = torch.zeros(2, 4, 6, dtype=dtype)
    add_outer_products(lambda some: [(left[some], [right[some]])], [total], absolute, num_samples=5)
    return total


def test_tensors_on_cuda_and_no_others_take_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(fused_products.DEVICES) == ["cuda"]
    given: list[Any] = []
    monkeypatch.setitem(sys.modules, KERNEL, Kernel(lambda *own: given.append(own)))
    pairs = [(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 5))]
    for device in ("cpu", "mps", "xpu", "meta"):
        assert not add_fused_products(pairs, SimpleNamespace(device=torch.device(device)), absolute)
    on_cuda = SimpleNamespace(device=torch.device("cuda:1"))
    assert add_fused_products(pairs, on_cuda, absolute)
    assert given == [(pairs, on_cuda, absolute)]


def test_the_kernel_takes_the_place_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    by_tiles, one_token = summed(), summed(tokens=1)
    kernel = in_its_place(monkeypatch, by_einsum)
    torch.testing.assert_close(summed(), by_tiles)
    assert kernel.calls == 1
    torch.testing.assert_close(summed(tokens=1), one_token)
    assert kernel.calls == 1  # one token per sample needs no per-sample product


def test_what_the_kernel_does_not_have_goes_to_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    by_tiles = summed(dtype=torch.float64)
    kernel = in_its_place(monkeypatch, by_einsum)
    kernel.has_all = False
    assert torch.equal(summed(dtype=torch.float64), by_tiles)
    assert (kernel.calls, fused_products.failures) == (0, {})


def test_a_kernel_that_fails_is_replaced_by_tiles_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    by_tiles = summed()
    kernel = in_its_place(monkeypatch, raising(RuntimeError("no ptxas")))
    for _ in range(3):
        assert torch.equal(summed(), by_tiles)
    assert kernel.calls == 1
    assert fused_products.failures == {"torch.float32": "RuntimeError: no ptxas"}


def test_a_kernel_without_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    by_tiles = summed()
    kernel = in_its_place(monkeypatch, raising(torch.OutOfMemoryError("CUDA out of memory")))
    assert torch.equal(summed(), by_tiles)
    kernel.add = by_einsum
    torch.testing.assert_close(summed(), by_tiles)
    assert (kernel.calls, fused_products.failures) == (2, {})


def test_without_triton_tiles_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    by_tiles = summed()
    in_its_place(monkeypatch, by_einsum)
    monkeypatch.delitem(sys.modules, KERNEL)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert torch.equal(summed(), by_tiles)
    assert fused_products.failures["torch.float32"].startswith("ModuleNotFoundError: import of triton")


def test_a_measurement_goes_on_when_the_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), [torch.randn(4, 7, 6)]
    expected = memsyn.measure(model, batches, progress=False).mean()
    kernel = in_its_place(monkeypatch, raising(ValueError("out of resource: shared memory")))
    found = memsyn.measure(model, batches, progress=False).mean()
    assert kernel.calls > 0
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_measuring_on_a_cpu_does_not_import_triton() -> None:
    code = (
        "import sys, torch, memsyn\n"
        "memsyn.measure(torch.nn.Linear(3, 2), [torch.randn(4, 5, 3)], progress=False)\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'triton'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@needs_triton
def test_the_kernel_computes_what_is_defined_in_tritons_interpreter(tmp_path: Path) -> None:
    """In a process of its own: triton reads TRITON_INTERPRET once, and other tests may have imported it before."""
    file = Path(__file__).with_name("triton_interpreted.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(file),
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "-p",
        "no:xdist",
    ]
    settings = os.environ | {
        "TRITON_INTERPRET": "1",
        "MEMSYN_NATIVE": "off",
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        command, cwd=file.parents[1], env=settings, capture_output=True, text=True, check=False, timeout=300
    )
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stdout
    assert last.startswith("11 passed in "), last


SIGNATURES: dict[str, Callable[[str], Any]] = {
    "contiguous": lambda name: "constexpr" if name in ("left_row", "right_column") else "i32",
    "other strides, large ones": lambda name: "i64" if "_" in name and name[0] in "lr" else "i32",
    "all sizes are 1": lambda name: "constexpr",
}
"""How triton takes the integers of a launch: a 1 becomes a constant of the program."""


@needs_triton
@pytest.mark.parametrize(
    ("integers", "dtype", "num_blocks"),
    [
        ("contiguous", "fp32", 5),
        ("contiguous", "bf16", 5),
        ("other strides, large ones", "fp32", 2),
        ("all sizes are 1", "fp16", 2),
    ],
)
def test_the_kernel_compiles_for_gpus(
    integers: str, dtype: str, num_blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code of an A100 and an H100, by the assembler that triton brings. The interpreter allows more."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiler, targets = import_module("triton.compiler"), import_module("triton.backends.compiler")
    products = import_module(KERNEL)
    kernel = products.products_kernel
    for number, (rows, columns, warps, stages) in enumerate(products.BLOCKS[:num_blocks]):
        blocks = {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "BLOCK_TOKENS": products.TOKENS}
        constants = {"KIND": list(products.FUNCTIONS.values())[number % 3], "WIDEN": False} | blocks
        signature = dict.fromkeys(constants, "constexpr")
        signature |= {"left": f"*{dtype}", "right": f"*{dtype}", "out": "*fp32"}
        for name in (name for name in kernel.arg_names if name not in signature):
            signature[name] = SIGNATURES[integers](name)
            if signature[name] == "constexpr":
                constants[name] = 1
        capability = (80, 90)[number % 2]
        source = compiler.ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants)
        target = targets.GPUTarget("cuda", capability, 32)
        compiled = compiler.compile(
            source, target=target, options={"num_warps": warps, "num_stages": stages, **products.OPTIONS}
        )
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        assert compiled.asm["cubin"][:4] == b"\x7fELF"


@needs_triton
def test_the_autotuner_gets_every_block_size_and_knows_its_keys() -> None:
    products = import_module(KERNEL)
    tuned = products._tuned()
    assert tuned is products._tuned()  # what it has timed is kept
    sizes = {
        (own.kwargs["BLOCK_ROWS"], own.kwargs["BLOCK_COLUMNS"], own.num_warps, own.num_stages) for own in tuned.configs
    }
    assert sizes == set(products.BLOCKS)
    assert {own.kwargs["BLOCK_TOKENS"] for own in tuned.configs} == {products.TOKENS}
    assert set(tuned.keys) <= set(tuned.arg_names)


@needs_triton
def test_on_a_gpu_the_tuned_kernel_is_launched_with_enough_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    products = import_module(KERNEL)
    launches: list[Any] = []

    class Tuned:
        def __getitem__(self, grid: Callable[[dict[str, int]], tuple[int]]) -> Callable[..., None]:
            blocks = {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 128}
            return lambda *given, **options: launches.append((grid(blocks), given, options))

    class OnGpu(SimpleNamespace):
        is_cuda = True

        def __len__(self) -> int:
            return int(self.shape[0])

    monkeypatch.setattr(products, "_tuned", Tuned)
    left, out = OnGpu(), OnGpu(shape=(7, 2, 130, 300))
    products._launch(left, left, out, (1, 2, 3), "abs")
    options = {"KIND": "abs", "WIDEN": False, "enable_fp_fusion": True}
    assert launches == [((7 * 2 * 3 * 3,), (left, left, out, 1, 2, 3), options)]
