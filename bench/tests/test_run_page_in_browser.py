"""The page of a run in a real browser: what every page must do, and its sorted tables and its legend."""

import pytest
from bench.tests import tiny
from bench.tests.test_results import MATRICES, write
from tests.browser import CHROMIUM, MISSING, Browser
from tests.test_page import (  # noqa: F401
    HOSTILE,
    test_charts_are_printed_at_the_width_of_a_sheet,
    test_every_chart_has_a_title_and_a_text_alternative,
    test_hostile_names_are_text,
    test_it_opens_from_disk_draws_every_chart_and_fits,
    test_no_script_but_its_own_runs,
    test_nothing_in_it_points_elsewhere,
    test_what_is_read_aloud_has_words_of_its_own,
)

from memsyn.report.page import write_page
from memsyn_bench.pages.run_page import read_runs, run_page
from memsyn_bench.running.record import RESULTS_FILE
from memsyn_bench.sequences.sequences import SEQUENCES

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)


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


@pytest.fixture
def written(report):
    return report


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
