"""The pages in a real browser, from disk, without a network: drawn, quiet, sortable, with a keyboard too, harmless."""

import re
import zlib

import pytest
import torch
from bench.tests import tiny
from bench.tests.test_results import MATRICES, write

from memsyn import Importance, Memory
from memsyn.report.memory_page import memory_page
from memsyn.report.names import printable, shortened
from memsyn.report.page import write_page
from memsyn_bench.pages.run_page import read_runs, run_page
from memsyn_bench.running.record import RESULTS_FILE
from memsyn_bench.sequences.sequences import SEQUENCES
from tests.browser import CHROMIUM, MISSING, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    '<a href="javascript:alert(3)">x</a>',
    "&lt;b&gt;%{y}$x$",
    "{{ 7 * 7 }}",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A run's page, in which every name is hostile."""
    folder = tmp_path_factory.mktemp("runs")
    matrices = {
        "finetune": MATRICES["finetune"],
        "mas": MATRICES["mas"],
        **dict.fromkeys(HOSTILE, MATRICES["joint"]),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SEQUENCES.entries, "tiny", tiny.SEQUENCE)
        write(folder / "<b>run</b>" / RESULTS_FILE, matrices, names=HOSTILE[:2])
        page = run_page(read_runs([folder / "<b>run</b>"]))
    write_page(page, folder / "report.html")
    return folder / "report.html", page


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """A memory's page with hostile layers and a hostile label."""
    sums = {f"{name}.weight": torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) for name in HOSTILE}
    importance, model = Importance(sums, 3), torch.nn.Module()
    model.named_parameters = lambda: ((name, torch.nn.Parameter(values)) for name, values in sums.items())
    page = memory_page(Memory.empty().consolidate(model, importance, label=HOSTILE[0]), HOSTILE[1])
    path = tmp_path_factory.mktemp("memories") / "memory.html"
    write_page(page, path)
    return path, page


@pytest.fixture(params=["report", "memory"])
def written(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("width", "dark"), [(380, True), (1600, False)])
def test_it_opens_from_disk_draws_every_chart_and_fits(browser, written, width, dark):
    path, page = written
    browser.open(path, width=width, dark=dark)
    drawn = "[...document.querySelectorAll('.plot')].filter((p) => p.querySelector('.main-svg {}'))"
    marks = ":is(.point, .heatmaplayer image, .heatmaplayer path, .js-line)"
    assert browser.run(f"{drawn.format(marks)}.length") == len(page.charts()) > 4
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("Math.max(...[...document.querySelectorAll('.main-svg')].map((s) => s.clientWidth))") <= width
    back, text = ("rgb(20, 22, 26)", "rgb(232, 234, 237)") if dark else ("rgb(255, 255, 255)", "rgb(26, 28, 32)")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == back
    assert browser.run("getComputedStyle(document.querySelector('.xtitle')).fill") == text
    assert browser.problems == []
    assert [url for url in browser.loaded if not url.startswith("data:")] == [path.as_uri()]


def test_hostile_names_are_text(browser, written):
    path, page = written
    browser.open(path)
    for name in HOSTILE:
        assert browser.run(f"document.body.textContent.includes({name!r})"), name
        shown = "[...document.querySelectorAll('.main-svg text')].map((text) => text.textContent)"
        assert shortened(name) in browser.run(shown), name
    harm = "img:not([src^='data:']), [onerror], a:not([href^='#']):not(.modebar-btn), h1 b"
    assert browser.run(f'document.querySelectorAll("{harm}").length') == 0
    assert browser.run("document.scripts.length") == len(page.charts()) + 2
    assert browser.problems == []


def test_no_script_but_its_own_runs(browser, written):
    browser.open(written[0])
    browser.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.harm = 1'; "
        "document.body.append(s); fetch('https://example.com/').catch(() => 0) })()"
    )
    assert browser.run("window.harm") is None
    assert all("Content Security Policy" in problem["entry"]["text"] for problem in browser.problems)
    assert [url for url in browser.loaded if url.startswith("http")] == []


COLUMN = "[...document.querySelector('table').tBodies[0].rows].map((row) => row.cells[1].textContent.trim())"
SORTED = "document.querySelectorAll('thead')[0].rows[0].cells[1].getAttribute('aria-sort')"


def test_a_column_is_sorted_by_click_and_by_keyboard(browser, report):
    browser.open(report[0])
    assert browser.run(SORTED) is None
    browser.run("document.querySelectorAll('thead button')[1].click()")
    assert browser.run(COLUMN) == [f"{n} ± {h}" for n, h in [("89.0", "1.2")] * 5 + [("84.0", "5.0"), ("67.0", "5.0")]]
    assert browser.run(SORTED) == "descending"
    browser.run("scrollTo(0, 0); document.activeElement.blur()")
    for _ in range(60):
        browser.press("Tab", 9)
        if browser.run("document.activeElement === document.querySelectorAll('thead button')[1]"):
            break
    else:
        pytest.fail("the button is not reached by the tab key")
    browser.press("Enter", 13, "\r")
    assert browser.run(SORTED) == "ascending"
    assert browser.run(COLUMN)[:2] == ["67.0 ± 5.0", "84.0 ± 5.0"]
    browser.run("document.querySelectorAll('thead button')[0].click()")
    names = browser.run(COLUMN.replace("cells[1]", "cells[0]"))
    assert names.index("finetune") < names.index("mas")
    assert browser.run(SORTED) is None


def test_a_third_click_brings_the_first_order_back(browser, report):
    browser.open(report[0])
    names, order = COLUMN.replace("cells[1]", "cells[0]"), SORTED.replace("cells[1]", "cells[0]")
    before, orders = browser.run(names), []
    for _ in range(3):
        browser.run("document.querySelectorAll('thead button')[0].click()")
        orders.append((browser.run(order), browser.run(names) == before))
    assert orders == [("ascending", False), ("descending", False), (None, True)]


def test_names_with_numbers_are_sorted_by_these(browser, report):
    browser.open(report[0])
    body, name = "document.querySelector('table').tBodies[0]", "row.cells[0].textContent"
    browser.run(f"[...{body}.rows].forEach((row, place) => {{ {name} = 'layer ' + (20 - 3 * place); }})")
    browser.run("document.querySelectorAll('thead button')[0].click()")
    names = browser.run(f"[...{body}.rows].map((row) => {name})")
    assert names == [f"layer {number}" for number in (2, 5, 8, 11, 14, 17, 20)]


def test_tables_of_sections_show_every_row_and_those_of_charts_scroll(browser, report):
    browser.open(report[0])
    browser.run(
        "document.querySelectorAll('details').forEach((one) => { one.open = true; });"
        "document.querySelectorAll('tbody').forEach((body) => { for (let n = 0; n < 60; n++) "
        "body.append(body.rows[0].cloneNode(true)); })"
    )
    hidden = "[...document.querySelectorAll('.scroll')].map((s) => [!!s.closest('details'), s.scrollHeight - {}])"
    found = browser.run(hidden.format("s.clientHeight"))
    assert len([least for inside, least in found if not inside]) > 1
    assert all((least > 100) if inside else (least <= 1) for inside, least in found)


def test_the_legend_hides_a_method_in_all_its_panels(browser, report):
    browser.open(report[0])
    shown = "document.querySelectorAll('.group')[0].querySelectorAll('.scatterlayer .trace').length"
    before = browser.run(shown)
    pressed = "document.querySelectorAll('.group .legend')[0].querySelectorAll('[aria-pressed={}]').length"
    on, off = browser.run(pressed.format("true")), browser.run(pressed.format("false"))
    assert (on, on + off) == (3, len(HOSTILE) + 2)  # mas, finetune and the best of seven
    assert before == 2 * on
    browser.run("document.querySelector('.group .legend [aria-pressed=false]').click()")
    assert browser.run(shown) == before + 2
    assert browser.run(pressed.format("true")) == on + 1
    browser.open(report[0])
    browser.run("document.querySelector('.group .legend button').click()")
    assert browser.run(shown) == before - 2  # one in each task's panel
    assert browser.run("document.querySelector('.group .legend button').getAttribute('aria-pressed')") == "false"
    browser.run("document.querySelector('.group .legend button').click()")
    assert browser.run(shown) == before


def test_charts_follow_the_light_and_print_dark_on_white(browser, memory):
    browser.open(memory[0], dark=True)
    ink = "getComputedStyle(document.querySelector('.xtitle')).fill"
    browser.dark(False)
    browser.wait(f"{ink} === 'rgb(26, 28, 32)'")
    browser.dark(True)
    browser.wait(f"{ink} === 'rgb(232, 234, 237)'")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(ink) == "rgb(26, 28, 32)"
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run(ink) == "rgb(232, 234, 237)"
    assert browser.problems == []


SHEET = 741
"""Pixels of a sheet between its margins, the widest in use."""


@pytest.mark.parametrize("width", [1600, 950])
def test_charts_are_printed_at_the_width_of_a_sheet(browser, written, width, tmp_path):
    browser.open(written[0], width=width)
    widths = (
        "[...document.querySelectorAll('.main-svg:first-child')].map((s) => [!!s.closest('.panels'), s.clientWidth])"
    )
    before = browser.run(widths)
    browser.run(f"addEventListener('beforeprint', () => {{ window.printed = {widths}; }})")
    browser.pdf(tmp_path / "page.pdf")
    printed = browser.run("window.printed")
    assert len(printed) == len(written[1].charts())
    assert all((300 <= wide <= SHEET / 2) if panel else (600 <= wide <= SHEET) for panel, wide in printed)
    assert browser.run(widths) == before
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", (tmp_path / "page.pdf").read_bytes(), re.DOTALL)
    drawn = b"".join(zlib.decompress(one) for one in streams if one.startswith(b"x"))
    scales = {float(one) for one, _ in re.findall(rb"([\d.]+) 0 0 ([\d.]+) [-\d.]+ [-\d.]+ cm", drawn)}
    assert scales - {1.0} == {300 / 96}  # dots of a pixel: less where a page is shrunk to the sheet
    browser.run("dispatchEvent(new Event('beforeprint'))")
    browser.send("Emulation.setEmulatedMedia", media="print")
    browser.send("Emulation.setDeviceMetricsOverride", width=SHEET, height=9000, deviceScaleFactor=1, mobile=False)
    assert browser.run("document.documentElement.scrollWidth") <= SHEET
    right = "Math.max(...[...document.querySelectorAll('main *')].map((one) => one.getBoundingClientRect().right))"
    assert browser.run(right) <= SHEET
    browser.send("Emulation.setEmulatedMedia", media="")


def test_what_is_read_aloud_has_words_of_its_own(browser, written):
    browser.open(written[0])
    spoken = browser.run("[...document.querySelectorAll('[role=img]')].map((one) => one.ariaLabel)")
    assert spoken == [
        f"{printable(one.title)}. Its numbers are in the table that follows." for one in written[1].charts()
    ]
    regions = browser.run("[...document.querySelectorAll('.scroll')].map((one) => one.ariaLabel)")
    assert "Table" not in regions
    assert written[1].sections[0].heading in regions or "importance" in regions[0]


def test_every_chart_has_a_title_and_a_text_alternative(browser, written):
    browser.open(written[0])
    figures = "[...document.querySelectorAll('figure')]"
    titled = f"{figures}.filter((f) => f.querySelector('h3, h4').textContent.trim() && f.querySelector('[role=img]')"
    assert browser.run(f"{titled}.ariaLabel && f.querySelector('details td')).length") == len(written[1].charts())
    named = "[...document.querySelectorAll('button')].every((b) => b.textContent.trim() || b.ariaLabel)"
    assert browser.run(named)


def test_nothing_in_it_points_elsewhere(written):
    path, _ = written
    text = path.read_text()
    assert path.stat().st_size < 6_000_000
    assert "<link" not in text
    assert ' src="http' not in text
