"""The pages in a real browser, from disk, without a network: drawn, quiet, readable, harmless.

Each test with the fixture `written` holds for every page: the benchmark runs them on the pages of runs too.
"""

import re
import zlib

import pytest
import torch

from memsyn import Importance, Memory
from memsyn.report.memory_page import memory_page
from memsyn.report.names import shortened
from memsyn.report.page import write_page
from memsyn.values.display import printable
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
def memory(tmp_path_factory):
    """A memory's page with hostile layers and a hostile label."""
    sums = {f"{name}.weight": torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) for name in HOSTILE}
    importance, model = Importance(sums, 3), torch.nn.Module()
    model.named_parameters = lambda: ((name, torch.nn.Parameter(values)) for name, values in sums.items())
    page = memory_page(Memory.empty().consolidate(model, importance, label=HOSTILE[0]), HOSTILE[1])
    path = tmp_path_factory.mktemp("memories") / "memory.html"
    write_page(page, path)
    return path, page


@pytest.fixture
def written(memory):
    return memory


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
