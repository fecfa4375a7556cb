"""The fingerprint of named tensors: what it must tell apart, and what it must not."""

import hashlib

import pytest
import torch
from torch import Tensor

from memsyn.parameters import fingerprint

ONE = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.ones(())}


def test_it_is_the_hash_of_name_dtype_shape_and_bytes() -> None:
    content = b'["w", "torch.float32", [2]]' + b"\x00\x00\x80\x3f" + b"\x00\x00\x00\x40"
    assert fingerprint({"w": torch.tensor([1.0, 2.0])}) == "sha256:" + hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        {**ONE, "layer.bias": torch.tensor(1.0000001)},
        {**ONE, "layer.bias": torch.ones(1)},
        {**ONE, "layer.bias": torch.ones((), dtype=torch.float64)},
        {**ONE, "layer.weight": torch.arange(6.0).reshape(3, 2)},
        {**ONE, "layer.weight": torch.arange(6.0).reshape(3, 2).T},
        {"layer.weight": ONE["layer.weight"], "other.bias": ONE["layer.bias"]},
        {"layer.weight": ONE["layer.weight"]},
        {**ONE, "empty": torch.zeros(0)},
        {},
    ],
)
def test_any_difference_shows(other: dict[str, Tensor]) -> None:
    assert fingerprint(other) != fingerprint(ONE)


def test_order_strides_and_gradients_do_not_show() -> None:
    strided = torch.nn.Parameter(ONE["layer.weight"].T.contiguous().T)
    assert not strided.is_contiguous()
    assert fingerprint({"layer.bias": ONE["layer.bias"], "layer.weight": strided}) == fingerprint(ONE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_it_takes_any_dtype(dtype: torch.dtype) -> None:
    zeros = torch.zeros(3, dtype=dtype)
    changed = zeros.clone()
    changed[1] = 1
    assert fingerprint({"w": zeros}) == fingerprint({"w": zeros.clone()}) != fingerprint({"w": changed})
