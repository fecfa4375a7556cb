"""docs/results/company.md is the page of the lines in docs/company.jsonl, and the experiment does what its arms say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench.tests.test_results import interval

import memsyn

pytest.importorskip("PIL.Image", reason="the drawings are read by pillow")
from benchmarks import company_story as own

DOCS = Path(__file__).parents[2] / "docs"
LINE = own.Line(0, own.CARELESS, 40, ("A", "B"), ("C",), 0.7, 0.2, "broken", 0.6, 0.5, 0.7, 1.0)


@pytest.fixture(scope="module")
def company():
    return own.Company(seed=1, epochs=1)


def test_the_page_is_that_of_the_lines():
    lines = own.read(DOCS / "company.jsonl")
    assert (DOCS / "results" / "company.md").read_text("utf-8") == own.page(lines)
    assert {(line.seed, line.arm) for line in lines} == {(seed, arm) for seed in range(3) for arm in own.ARMS}
    assert {line.epochs for line in lines} == {own.EPOCHS}
    assert len(lines) == 3 * len(own.ARMS)
    before = {line.seed: line.old_before for line in lines}
    assert all(line.old_before == before[line.seed] for line in lines)
    assert len({line.old + line.new for line in lines}) == 3, "a seed has sections of its own"


def test_the_tables_hold_means_intervals_and_paired_differences():
    numbers = {(own.CARELESS, 0): 0.7, (own.CARELESS, 1): 0.8}
    numbers |= {("MAS, old training images", 0): 0.9, ("MAS, old training images", 1): 0.98}
    numbers |= {("MAS, noise", 0): 0.8, ("MAS, noise", 1): 0.9}
    lines = [
        replace(LINE, arm=arm, seed=seed, same=same, verdict="safe" if same > 0.97 else "broken")
        for (arm, seed), same in numbers.items()
    ]
    text = own.page(lines)
    rest = f"{interval(20.0, 20.0)} | {interval(50.0, 50.0)} | {interval(-10.0, -10.0)} | {interval(70.0, 70.0)}"
    assert f"\n| as shipped |  |  | {interval(60.0, 60.0)} |  |  |  |\n" in text
    assert f"\n| careless | {interval(70.0, 80.0)} | {rest} | broken 2 |\n" in text
    assert f"\n| MAS, old training images | {interval(90.0, 98.0)} | {rest} | broken 1, safe 1 |\n" in text
    assert f"\n| MAS, noise | -{interval(10.0, 8.0)} | +0.0 ± 0.0 | +0.0 ± 0.0 | +0.0 ± 0.0 |\n" in text
    assert "| projection, noise |" not in text


def test_old_and_new_classes_requests_and_images_in_use_share_no_drawing(company):
    assert len(company.sections[0]) == 2
    assert len(set(company.sections[0] + company.sections[1])) == 3
    assert company.sections != own.Company(seed=0, epochs=1).sections
    counts = torch.bincount(company.request_labels, minlength=80)
    assert counts.tolist() == [own.REQUESTS] * 80
    assert len(company.in_use) == 80
    sent = company.old.test_images[own.ranks_in_classes(company.old.test_labels, own.seeded(1, 1)) > 0]
    rows = [{tuple(image.flatten().tolist()) for image in images} for images in (sent, company.in_use)]
    assert not rows[0] & rows[1]


def test_the_images_of_a_source_are_what_its_name_says(company):
    sizes = {source: sum(map(len, company.images(source))) for source in own.SOURCES}
    number = own.MEASURED * len(company.old.train_images)
    assert sizes == {
        "old training images": number,
        "images in use": own.MEASURED * 80,
        "public images": number,
        "new images": own.MEASURED * len(company.new.train_images),
        "noise": number,
    }
    noise, seen = (torch.cat(company.images(source)) for source in ("noise", "old training images"))
    assert torch.allclose(noise.mean(), seen.mean(), atol=0.01)
    assert float(noise.min()) < 0 == float(seen.min()), "noise is no drawing"


def test_arms_are_compared_on_the_requests_and_lines_are_not_made_again(tmp_path):
    path = tmp_path / "lines.jsonl"
    arms = (own.STATISTICS, own.HEAD, "projection, new images")
    statistics, head, projected = own.lines(path, 1, 1, arms)
    assert (head.same, head.change, head.old_after) == (1.0, 0.0, head.old_before)
    assert head.verdict == "safe"
    assert statistics.change > 10 * projected.change > 0
    assert [line.arm for line in own.read(path)] == list(arms)
    content = path.read_text()
    assert list(own.lines(path, 1, 1, arms)) == []
    assert path.read_text() == content
    assert json.loads(content.splitlines()[0])["old"] == list(statistics.old)


def test_a_repair_keeps_the_outputs_within_its_bound_on_images_in_use(company, monkeypatch):
    monkeypatch.setattr(own, "MEASURED", 1)  # a third of the images is enough here
    careless, repaired = (own.trained(company, arm) for arm in (own.CARELESS, "careless, then repair to 1%"))
    images = company.images("images in use")
    changes = [
        memsyn.compare(model, company.shipped, images, progress=False).mean_change for model in (careless, repaired)
    ]
    assert changes[0] > 0.05 > 0.011 > changes[1] > 0
