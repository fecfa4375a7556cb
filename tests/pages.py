"""Draws the pictures of pages in the docs: `python -m tests.pages docs`, with Chromium.

The files are those of the examples in docs/commands.md: a model that was shipped, and what it learned afterwards.
"""

import copy
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import memsyn
from memsyn.report.memory_page import difference_page, memory_page
from memsyn.report.page import write_page
from memsyn.report.parts import Page
from memsyn.report.weights_page import weights_page
from tests import story
from tests.browser import Browser

LOOKS = {"1600": (1600, False), "380": (380, True)}
"""End of a picture's name -> the width in pixels, and whether the page is dark."""


def pages() -> dict[str, Page]:
    """Name of the picture -> page."""
    model = story.trained()
    memory = story.remembered(model)
    january = replace(memory, directions=None, history=memory.history[:1])
    careless, protected = copy.deepcopy(model), copy.deepcopy(model)
    story.learn(careless)
    found = memsyn.compare(careless, memory, [story.requests()], progress=False)
    story.learn(protected, january)
    more = [story.points(story.NEW, 500, seed=6, shift=6.0)[0]]
    answers = memsyn.measure(protected, more, forward=lambda model, x: model.new_answers(x), progress=False)
    february = january.consolidate(protected, answers)
    names = ("old.memsyn.safetensors", "careless.safetensors")
    return {
        "memory": memory_page(memory, names[0]),
        "diff": difference_page(january, february, ("january.safetensors", "february.safetensors")),
        "compare": weights_page(memory, careless.state_dict(), found, names, None, (0.97, 0.05)),
    }


def main(folder: Path) -> None:
    """Write each page's pictures to a folder."""
    with tempfile.TemporaryDirectory() as made:
        browser = Browser(Path(made) / "profile")
        for name, page in pages().items():
            path = Path(made) / f"{name}.html"
            write_page(page, path)
            for end, (width, dark) in LOOKS.items():
                browser.open(path, width=width, dark=dark)
                height = browser.run("document.documentElement.scrollHeight")
                browser.open(path, width=width, height=height, dark=dark)
                browser.screenshot(folder / f"{name}-{end}.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
