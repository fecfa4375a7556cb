"""The page of results at a glance: its cells against the definitions, what it says of gaps, and how it is written."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from bench.tests import tiny
from bench.tests.commands import call as call_bench
from bench.tests.test_groups import MEANS, write_pair, write_strengths
from bench.tests.test_language import record as language_record
from bench.tests.test_results import AVERAGES, MATRICES, SETTINGS, interval, rows, write

from memsyn import MemsynError
from memsyn_bench.language.page import last_table
from memsyn_bench.losses import similarity_loss
from memsyn_bench.methods.registry import METHODS
from memsyn_bench.pages.results_pages import results_pages, write_results
from memsyn_bench.results.findings import read_findings
from memsyn_bench.running.record import StrengthRecord
from memsyn_bench.sequences.sequences import BUILT_IN_SEQUENCES, SEQUENCES
from memsyn_bench.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"
REMEMBERED = "## What is remembered"


@pytest.fixture(autouse=True)
def _sequences(monkeypatch):
    tiny.register(monkeypatch)


def glance(*paths, place=Path("nowhere/results.md")):
    return results_pages([read_findings(path) for path in paths], place).glance


def shifted(method, by, *, seeds=(0, 1, 2)):
    return {seed: [MATRICES[method][seed][0], [v + by for v in MATRICES[method][seed][1]]] for seed in seeds}


def test_a_row_holds_averages_and_points_forgotten_and_the_best_is_bold(tmp_path):
    text = glance(write(tmp_path / "first.jsonl", MATRICES))
    assert rows(text, heading=REMEMBERED) == {
        "[first](results/first.md)": {
            "Seeds": "3",
            "finetune": f"{interval(*AVERAGES['finetune'])}<br>forgot 38.0",
            "mas": f"**{interval(*AVERAGES['mas'])}**<br>forgot 1.0",
            "joint": f"{interval(*AVERAGES['joint'])}<br>forgot -3.0",
            **dict.fromkeys(("frozen", "l2", "ewc", "si", "lwf", "projected", "best other", "rehearsal"), "–"),
        }
    }


def test_other_numbers_of_seeds_stand_in_the_cell(tmp_path):
    found = {"finetune": MATRICES["finetune"], "mas": MATRICES["mas"], "si": shifted("mas", -1, seeds=(1,))}
    cells = rows(glance(write(tmp_path / "x.jsonl", found)), heading=REMEMBERED)["[x](results/x.md)"]
    assert (cells["Seeds"], cells["si"]) == ("3", "83.0<br>forgot 0.0<br>(1 seed)")
    assert "seed" not in cells["finetune"] + cells["mas"]


def test_methods_without_a_column_compete_for_one(tmp_path):
    found = {"mas": MATRICES["mas"], "rwalk": shifted("mas", 1), "ebll": shifted("mas", -1)}
    found |= {"alone": shifted("mas", 5), "mas-rehearsal": shifted("mas", 9), "mas-test": shifted("mas", 9)}
    cells = rows(glance(write(tmp_path / "x.jsonl", found)), heading=REMEMBERED)["[x](results/x.md)"]
    assert cells["best other"] == f"rwalk<br>**{interval(83.0, 85.0, 87.0)}**<br>forgot 0.0"
    assert cells["mas"] == f"{interval(*AVERAGES['mas'])}<br>forgot 1.0"


def test_what_was_not_run_is_one_line_and_what_cannot_be_run_another(tmp_path, monkeypatch):
    monkeypatch.setitem(SEQUENCES.entries, "tiny", replace(tiny.SEQUENCE, loss=similarity_loss))
    some = ("finetune", "frozen", "l2", "si", "mas", "projected", "rehearsal")
    text = glance(write(tmp_path / "x.jsonl", dict.fromkeys(some, MATRICES["mas"])))
    assert [line for line in text.splitlines() if line.startswith("Not run")] == ["Not run: joint on x."]
    assert "Cannot be run, for want of logits of classes: ewc, lwf on x." in text


def test_rows_whose_strengths_were_not_chosen_are_named(tmp_path):
    paths = [
        write(tmp_path / f"{name}.jsonl", {"mas": MATRICES["mas"]}, replace(SETTINGS, strength=strength))
        for name, strength in (("a", "own"), ("b", 2.0), ("c", "chosen"))
    ]
    assert "Run with each method's own strength or a fixed one, not with chosen ones: a, b." in glance(*paths)


def test_rows_of_precision_come_last_under_their_own_heading(tmp_path):
    paths = [
        write(tmp_path / "facts.jsonl", {"mas": MATRICES["mas"]}, Settings(sequence="facts", size=8)),
        write(tmp_path / "x.jsonl", {"mas": MATRICES["mas"]}),
    ]
    names = list(rows(glance(*paths), heading=REMEMBERED))
    assert names == ["[x](results/x.md)", "*mean average precision:*", "[facts](results/facts.md)"]


def test_bytes_at_the_end_and_needs_are_by_method(tmp_path):
    found = dict.fromkeys(("mas", "si", "joint", "alone", "gone"), MATRICES["mas"])
    stored = rows(glance(write(tmp_path / "x.jsonl", found)), heading="## What is kept between tasks")
    assert stored == {
        "si": {"Old data": "no", "Labels": "yes", "x": "2.5 kB"},
        "mas": {"Old data": "no", "Labels": "no", "x": "2.5 kB"},
        "joint": {"Old data": "yes", "Labels": "yes", "x": "2.5 kB"},
        "gone": {"Old data": "–", "Labels": "–", "x": "2.5 kB"},
    }


def test_what_needs_labels_is_known_of_each_method():
    needing = {"ebll", "joint", "rwalk", "si", *(f"projected-{end}" for end in ("lda", "rehearsal", "lda-rehearsal"))}
    needing |= {"rehearsal", "mas-rehearsal"}
    assert {name for name, entry in METHODS.items() if entry.needs_labels} == needing


def test_a_sequence_says_what_it_shows_and_what_not_with_numbers_that_are_computed(tmp_path, monkeypatch):
    own = replace(tiny.SEQUENCE, shows="how noise is kept.", leaves_open="what pictures do.")
    monkeypatch.setitem(SEQUENCES.entries, "tiny", own)
    found = {**{name: MATRICES[name] for name in ("finetune", "mas", "joint")}, "frozen": shifted("mas", -1)}
    text = glance(write(tmp_path / "x.jsonl", found))
    (line,) = [line for line in text.splitlines() if line.startswith("- [x](results/x.md)")]
    assert "Shows: how noise is kept." in line
    assert f"mas ends {interval(17.0, 15.0, 19.0)} points above finetune." in line
    assert f"Joint training ends {interval(7.0, 4.5, 3.5)} points above the best, mas." in line
    assert "Does not show: what pictures do." in line
    assert "a frozen backbone ends within 3 points (1.0) of the best" in line


def test_the_sentences_of_a_sequence_hold_no_number_and_are_of_it_alone(monkeypatch):
    monkeypatch.undo()  # the sequences as they are
    said = [text for own in BUILT_IN_SEQUENCES.values() for text in (own.shows, own.leaves_open) if text]
    assert len(said) == len(set(said)) >= 20
    assert [text for text in said if re.search(r"\d", text)] == []
    assert [text for text in said if not re.fullmatch(r"[a-z].*\.", text)] == []
    longest = max(len(sentence.split()) for text in said for sentence in text.split(". "))
    assert longest <= 40


def test_hindsight_is_held_against_the_protocol_on_the_same_seeds(tmp_path):
    matrices = {seed: [[80.0], [64.5 + seed, 74.5 + seed]] for seed in (0, 1, 2)}  # 69.5, 70.5, 71.5
    found = {"mas": matrices, "si": {seed: [[80.0], [90.0, 90.0]] for seed in (0, 1, 2)}}
    settings = Settings(sequence="tiny", size=8, strength="chosen")
    choice = StrengthRecord("mas", 0.5, (0.5, 1.0), (60.0, 50.0), settings.fingerprint)
    chosen = write(tmp_path / "chosen.jsonl", found, settings, choices=[choice])
    text = glance(*write_strengths(tmp_path, MEANS), chosen)
    heading = "## MAS at its best strength in hindsight"
    assert rows(text, heading=heading)["[tiny](results/strengths-of-mas-on-tiny.md)"] == {
        "Seeds": "2", "Chosen": "0.5", "Ends at (%)": interval(69.5, 70.5), "In hindsight": "1",
        "Would end at (%)": interval(75.0, 76.0), "Gain (points)": "+5.5 ± 0.0", "Best method (%)": "90.0 ± 0.0 si",
    }  # fmt: skip
    assert "Hindsight looks at test data" in text[text.index(heading) :]


def test_the_protocols_own_choice_may_be_the_best_in_hindsight(tmp_path):
    settings = Settings(sequence="tiny", size=8, strength="chosen")
    choice = StrengthRecord("mas", 0.5, (0.5, 1.0), (60.0, 50.0), settings.fingerprint)
    chosen = write(tmp_path / "chosen.jsonl", {"mas": MATRICES["mas"]}, settings, choices=[choice])
    cells = rows(glance(*write_strengths(tmp_path, MEANS), chosen), heading="## MAS at its best")
    (row,) = cells.values()
    assert (row["In hindsight"], row["Gain (points)"]) == ("0.5", "+0.0 ± 0.0")


def test_strengths_without_a_run_that_chose_say_so_by_dashes(tmp_path):
    (row,) = rows(glance(*write_strengths(tmp_path, MEANS)), heading="## MAS at its best").values()
    assert (row["Chosen"], row["Ends at (%)"], row["Gain (points)"]) == ("–", "–", "–")
    assert (row["In hindsight"], row["Would end at (%)"]) == ("1", interval(75.0, 76.0))


def test_groups_have_a_section_and_a_page(tmp_path):
    text = glance(write_pair(tmp_path, "pair-food-animals", ["a", "b"]))
    section = text[text.index("## Pairs of tasks") :]
    assert "[Pairs from the network of emoji8, 32x32](results/pairs-of-emoji8.md)" in section
    assert f"finetune drops {interval(30.0, 40.0)} points on the first task" in section


def test_published_numbers_are_taken_in_to_their_first_heading(tmp_path):
    path = write(tmp_path / "x.jsonl", MATRICES)
    heading = "## Held against published numbers"
    assert heading not in glance(path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "published.md").write_text(
        "# Title\n\nSee [x](x.md) and [y](https://y.z).\n\n## More\n\nm\n"
    )
    text = glance(path, place=tmp_path / "results.md")
    section = text[text.index(heading) :].split("\n## ")[0]
    assert "See [x](results/x.md) and [y](https://y.z)." in section
    assert "(results/published.md)" in section
    assert "More\n" not in section
    assert "Title" not in section


def test_the_language_models_table_is_of_the_longest_row_of_domains(tmp_path):
    records = [
        language_record("before", {"abc": 5.0, "own": 4.0}, "1101", domains=()),
        language_record("finetune", {"abc": 3.0, "own": 2.0}, "0011", domains=("abc",)),
        language_record("finetune", {"abc": 3.0, "own": 2.0}, "0010", domains=("abc", "own")),
        language_record("mas", {"abc": 4.0, "own": 1.5}, "1101", domains=("abc", "own"), strength=0.5),
    ]
    path = tmp_path / "language" / "results.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in records))
    found = rows(f"{last_table(path)}\n")
    assert found["before"]["Right (%)"] == "75.0"
    assert found["mas, lr 0.0005, strength 0.5"] == {
        "Seeds": "1", "Learned (%)": "125", "Right (%)": "75.0", "Lost (points)": "0.0", "Kept (MB)": "2"
    }  # fmt: skip
    assert found["finetune, lr 0.0001"]["Lost (points)"] == "75.0"
    run = write(tmp_path / "x.jsonl", MATRICES)
    text = glance(run, place=tmp_path / "results.md")
    assert last_table(path) in text
    assert "[language.md](language.md)" in text
    assert "language.md" not in glance(run)


def test_each_row_can_be_run_again_by_a_line_of_its_page(tmp_path):
    pages = results_pages([read_findings(write(tmp_path / "x.jsonl", MATRICES))], tmp_path / "results.md")
    for method in MATRICES:
        assert f"    memsyn-bench run tiny --methods {method} --seeds 3 --epochs 2 --out runs/x\n" in pages.details["x"]
    assert "the same digits" in pages.details["x"]
    assert "memsyn-bench run tiny --methods mas --seeds 3 --epochs 2 --out runs/x" in pages.glance


# --- what is written


def call(*arguments, code=0):
    return call_bench("results", *arguments, code=code)


def test_the_command_prints_the_glance_or_writes_it_and_a_folder_of_pages(tmp_path):
    paths = [*write_strengths(tmp_path / "in", MEANS), write(tmp_path / "in" / "x.jsonl", MATRICES)]
    out = tmp_path / "pages" / "found.md"
    assert "cannot be written" in call(*paths, "-o", out, code=1).stderr
    out.parent.mkdir()
    assert call(*paths, "-o", out).output == f"Wrote {out} and 2 pages to {out.with_suffix('')} from 5 files.\n"
    assert call(*paths).output == out.read_text().replace("(found/", "(in/")
    folder = out.with_suffix("")
    pages = {"x.md", "strengths-of-mas-on-tiny.md"}
    assert {path.name for path in folder.iterdir()} == pages | {"sensitivity-tiny.png"}
    for name in pages:
        assert f"(found/{name})" in out.read_text()
        assert "(../found.md)" in (folder / name).read_text()
    assert (
        "![Strengths of mas: tiny, 8x8](sensitivity-tiny.png)" in (folder / "strengths-of-mas-on-tiny.md").read_text()
    )
    assert (folder / "sensitivity-tiny.png").read_bytes().startswith(b"\x89PNG")


def test_pages_that_would_share_a_name_are_numbered_and_the_hand_written_one_stays(tmp_path):
    paths = [write(tmp_path / folder / f"{name}.jsonl", MATRICES) for folder in "ab" for name in ("x", "published")]
    paths += write_strengths(tmp_path / "c", MEANS) + write_strengths(tmp_path / "d", MEANS, epochs=3)
    hand_written = tmp_path / "found" / "published.md"
    hand_written.parent.mkdir()
    hand_written.write_text("mine")
    write_results(paths, tmp_path / "found.md")
    strengths = ("strengths-of-mas-on-tiny", "sensitivity-tiny")
    assert {path.name for path in hand_written.parent.iterdir()} == {
        "x.md", "x-2.md", "published.md", "published-2.md", "published-3.md",
        *(f"{strengths[0]}{number}.md" for number in ("", "-2")),
        *(f"{strengths[1]}{number}.png" for number in ("", "-2")),
    }  # fmt: skip
    assert hand_written.read_text() == "mine"


def test_odd_names_of_runs_are_links_that_work(tmp_path):
    text = glance(write(tmp_path / "my run (1).jsonl", MATRICES))
    assert "[my run (1)](results/my%20run%20%281%29.md)" in text


def test_a_page_does_not_take_the_place_of_a_file_it_is_made_from(tmp_path):
    path, inside = (write(tmp_path / name, MATRICES) for name in ("first.md", "page/x.md"))
    before = [path.read_bytes(), inside.read_bytes()]
    with pytest.raises(MemsynError, match=r"first\.md is one of the files to read: it stays\. Use another -o\."):
        write_results([path], path)
    with pytest.raises(MemsynError, match=r"x\.md is one of the files to read: it stays\. Use another -o\."):
        write_results([inside], tmp_path / "page.md")
    assert [path.read_bytes(), inside.read_bytes()] == before


def test_a_page_must_be_markdown(tmp_path):
    path = write(tmp_path / "x.jsonl", MATRICES)
    with pytest.raises(MemsynError, match=r"results: the page must end in \.md.* Use another -o\."):
        write_results([path], tmp_path / "results")


def test_an_unfinished_run_has_a_page_but_no_row(tmp_path):
    text = glance(write(tmp_path / "x.jsonl", {"mas": {0: [[80.0]]}}, SETTINGS, num_tasks=2))
    assert "[x](results/x.md) (nothing has finished yet)" in text
    assert "| [x]" not in text


# --- the project's own


def test_the_committed_pages_are_what_the_command_makes_of_the_committed_files(tmp_path, monkeypatch):
    monkeypatch.undo()  # the sequences as they are
    copied = tmp_path / "results", tmp_path / "language"
    for folder in copied:
        folder.mkdir()
    hand_written = {"published.md", "company.md"}  # or by another command
    for path in [DOCS / "results" / name for name in hand_written] + [DOCS / "language" / "results.jsonl"]:
        if path.exists():
            (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "results.md"
    call(*sorted((DOCS / "results").glob("*.jsonl")), "-o", out)
    assert out.read_text(encoding="utf-8") == (DOCS / "results.md").read_text(encoding="utf-8")
    made = {path.name: path for path in (tmp_path / "results").iterdir()}
    committed = {path.name: path for path in (DOCS / "results").iterdir() if path.suffix in (".md", ".png")}
    assert made.keys() == committed.keys()
    for name, path in made.items():
        if path.suffix == ".md":
            assert path.read_text(encoding="utf-8") == committed[name].read_text(encoding="utf-8"), name


def test_the_page_at_a_glance_is_short_and_each_row_says_what_it_means():
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    lines = [line for line in text.splitlines() if line.startswith("- [") and "Shows:" in line]
    names = [name for name in rows(text, heading=REMEMBERED) if name.startswith("[")]
    assert [line.removeprefix("- ").split(" ")[0].rstrip(":") for line in lines] == names
    assert all("Does not show:" in line for line in lines)


def test_every_link_of_the_pages_leads_to_a_file():
    for page in [DOCS / "results.md", *(DOCS / "results").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page.name, link)
