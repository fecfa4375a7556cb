"""What `measure` costs beside the passes: the check of the first batch, and Python for each layer and batch.

Prints two Markdown tables. The first has the check of the first batch (with the search for matrices, for Kronecker
factors) over an ordinary forward and backward pass of a batch. The second has what a steady batch costs for each of 64
linear layers of width 4, less what the ordinary pass costs; and the number of calls of Python functions in it.

All is processor time of one process in turn, so that other work on the machine counts less: median (smallest-largest).
GPT-2 and EfficientNet-Lite0 are left out where their packages are not installed.
"""

import argparse
import statistics
import sys
import time

import torch

from layer_calls import batch_times, calls_of_layer, microseconds_of_layer
from models import SUBJECTS
from passes import ordinary


def check_and_batch(name: str, estimator: str) -> tuple[float, float]:
    """Seconds of the check of the first batch, and of an ordinary pass of a batch."""
    torch.manual_seed(0)
    model, batch = SUBJECTS[name].model().eval(), SUBJECTS[name].batch()
    ordinary(model, [batch])  # warm up
    start = time.process_time()
    ordinary(model, [batch, batch])
    plain = (time.process_time() - start) / 2
    # The second batch has the same passes as the first, and no check.
    times = batch_times(model, [batch] * 3, estimator)
    return times[0] - times[1], plain


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(SUBJECTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default 5)")
    parser.add_argument("--estimators", nargs="*", default=["mas"], help="of memsyn.measure (default mas)")
    options = parser.parse_args()
    print("| model | estimator | ordinary pass of a batch, ms | the check, over it |")
    print("|---|---|---:|---:|")
    for name in options.models or SUBJECTS:
        for estimator in options.estimators:
            try:
                check_and_batch(name, estimator)  # warm up
                found = [check_and_batch(name, estimator) for _ in range(options.rounds)]
            except ModuleNotFoundError as error:
                print(f"{SUBJECTS[name].title} is left out: {error}", file=sys.stderr)
                continue
            plain = spread([1000 * own for _, own in found])
            ratios = spread([check / own for check, own in found])
            print(f"| {SUBJECTS[name].title} | {estimator} | {plain} | {ratios} |", flush=True)
    layers = [microseconds_of_layer() for _ in range(options.rounds)]
    print("\n| a layer and batch | |\n|---|---:|")
    print(f"| ordinary pass, us | {spread([own for _, own in layers])} |")
    print(f"| beyond it, us | {spread([beyond for beyond, _ in layers])} |")
    print(f"| calls of Python functions | {calls_of_layer():.0f} |")


if __name__ == "__main__":
    main()
