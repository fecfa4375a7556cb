"""Progress bars: widgets in notebooks, text elsewhere, and no warning of tqdm's anywhere."""

import subprocess
import sys
import textwrap

KERNEL = """
import sys, types

class ZMQInteractiveShell:
    pass

def module(name, **content):
    sys.modules[name] = own = types.ModuleType(name)
    vars(own).update(content)
    return own

module("ipykernel")
module("ipykernel.zmqshell")
module("IPython", get_ipython=ZMQInteractiveShell)
shown = []
module("IPython.display", display=shown.append)
"""
"""What tqdm knows a notebook by."""

WIDGETS = """
class Widget:
    def __init__(self, *given, children=(), **more):
        self.children, self.layout = children, types.SimpleNamespace()
        self.value, self.max = more.get("value"), more.get("max")
    style = types.SimpleNamespace()
    bar_style = ""
    def close(self):
        pass

module("ipywidgets", FloatProgress=Widget, HBox=Widget, HTML=Widget, __version__="8.1.5", IntProgress=Widget)
"""

USE = """
import torch, memsyn
from memsyn.progress import progress_bar
assert not {"tqdm.auto", "tqdm.notebook"} & sys.modules.keys(), "bars must not be imported with memsyn"
importance = memsyn.measure(torch.nn.Linear(2, 1), [torch.ones(4, 2)] * 3)
memsyn.tune(lambda strength: 1.0, start=1.0)
memsyn.measure(torch.nn.Linear(2, 1), [torch.ones(4, 2)], progress=False)
bar = progress_bar([1], "it", total=1, unit="step", shown=False)
print(importance.num_samples, any(kind.__name__ == "tqdm_notebook" for kind in type(bar).__mro__))
"""


def printed(code: str) -> tuple[str, str]:
    """What a process prints, and what it writes to stderr; a warning is an error there."""
    command = [sys.executable, "-W", "error", "-c", f"import sys\n{textwrap.dedent(code)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_in_a_terminal_the_bar_is_text() -> None:
    said, bar = printed(USE)
    assert said == "12 False\n"
    assert "measuring: 100%" in bar
    assert "3/3" in bar
    assert "tuning" in bar


def test_in_a_notebook_the_bar_is_a_widget() -> None:
    said, bar = printed(
        f"{KERNEL}{WIDGETS}{USE}\nprint(len(shown), shown[0].children[1].max, shown[1].children[1].max)"
    )
    assert said == "12 True\n2 3 11\n"
    assert not bar


def test_in_a_notebook_without_widgets_the_bar_is_text_and_nothing_warns() -> None:
    said, bar = printed(f"{KERNEL}sys.modules['ipywidgets'] = None{USE}\nprint(len(shown))")
    assert said == "12 False\n0\n"
    assert "measuring: 100%" in bar
