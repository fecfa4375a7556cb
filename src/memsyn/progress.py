"""Progress bars: a widget in a notebook, text elsewhere.

Owns the choice, which is tqdm's. It is imported with the first bar, so that `import memsyn` does not import widgets.
"""

import warnings
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

Step = TypeVar("Step")


def progress_bar(
    over: Iterable[Step], words: str, *, total: int | None, unit: str, shown: bool, initial: int = 0
) -> "tqdm[Step]":
    """A bar over an iterable. If nothing iterates it, `update` moves it.

    Args:
        over: what is iterated.
        words: what is being done.
        total: the number of steps, if `over` does not know it.
        unit: the name of a step.
        shown: whether it is seen.
        initial: the steps that are done already.
    """
    bar: tqdm[Step] = _bar_class()(over, words, total, unit=unit, initial=initial, disable=not shown)
    return bar


@cache
def _bar_class() -> Any:
    with warnings.catch_warnings():
        # In a notebook without ipywidgets, tqdm warns at its import, and writes text.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    return tqdm
