"""The benchmark behind `memsyn-bench`: methods against forgetting, compared on sequences of tasks.

These names are public, and so are the command and the fields of `results.jsonl`: see docs/benchmark.md. All else is
private. The benchmark imports memsyn; nothing in memsyn may import the benchmark.
"""

from memsyn_bench.losses import Loss, cross_entropy, similarity_loss
from memsyn_bench.methods.method import Method, TaskTraining
from memsyn_bench.methods.registry import MethodEntry, register_method
from memsyn_bench.running.record import Results, TaskRecord
from memsyn_bench.running.runner import run
from memsyn_bench.sequences.networks import MultiHead, OneHead, SharedHead, SmallConvNet, draw_weights
from memsyn_bench.sequences.sequences import TaskSequence, default_settings, register_sequence
from memsyn_bench.settings import Settings
from memsyn_bench.task import Task

__all__ = [
    "Loss",
    "Method",
    "MethodEntry",
    "MultiHead",
    "OneHead",
    "Results",
    "Settings",
    "SharedHead",
    "SmallConvNet",
    "Task",
    "TaskRecord",
    "TaskSequence",
    "TaskTraining",
    "cross_entropy",
    "default_settings",
    "draw_weights",
    "register_method",
    "register_sequence",
    "run",
    "similarity_loss",
]
