"""What sharded models move between processes: derived by benchmarks/scaling.py, and counted."""

import math

import pytest
import torch
from benchmarks import scaling

from tests.test_sharded_measuring import torchrun


def test_what_is_derived_is_what_two_processes_count() -> None:
    done = torchrun(2, "../benchmarks/scaling.py")
    assert done.returncode == 0, done.stderr[-6000:]
    kept = [row for row in scaling.read_rows() if row.processes == 2]
    assert scaling.counted_table(kept) in done.stdout, done.stdout


@pytest.mark.parametrize("number", [2, 4])
def test_each_byte_that_was_counted_was_derived(number: int) -> None:
    rows = [row for row in scaling.read_rows() if row.processes == number]
    assert len(rows) == 21
    derived = [row for row in rows if row.derived is not None]
    assert {row.kind for row in rows if row.derived is None} == {"agreements"}
    assert [row.counted for row in derived] == [row.derived for row in derived]
    assert sum(row.counted > 0 for row in derived) == 14


def test_the_page_shows_these_numbers() -> None:
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert scaling.written(page) == page


@pytest.mark.parametrize("llama", [*scaling.LLAMAS, scaling.SMALL_LLAMA], ids=lambda llama: llama.name)
def test_a_llama_on_paper_has_the_weights_of_transformers(llama: scaling.Llama) -> None:
    with torch.device("meta"):
        model = llama.built()
    assert sorted(tuple(p.shape) for p in model.parameters()) == sorted(llama.everything())
    assert llama.num_weights() == sum(math.prod(p.shape) for p in model.parameters())
