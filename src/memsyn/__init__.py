"""memsyn: learn something new without forgetting what the model knows (Memory Aware Synapses, ECCV 2018)."""

from memsyn.errors import (
    BatchError,
    LostParametersWarning,
    MemoryFileError,
    MemsynError,
    MismatchError,
    ModelError,
    MovedWeightsWarning,
    NewParametersWarning,
    OptionError,
    OutputError,
    ProcessError,
    ProtectionError,
    SamplesInteractError,
    SlowParametersWarning,
    StrengthWarning,
)
from memsyn.history import Consolidation
from memsyn.importance import Importance, LayerSummary
from memsyn.measure import measure
from memsyn.memory import Memory
from memsyn.objectives import Estimator
from memsyn.observe import Observer, Stats
from memsyn.penalty import penalty
from memsyn.protect import Protection, Report, protect
from memsyn.strength import Relative
from memsyn.tune import Trial, Tuned, tune

__all__ = [
    "BatchError",
    "Consolidation",
    "Estimator",
    "Importance",
    "LayerSummary",
    "LostParametersWarning",
    "Memory",
    "MemoryFileError",
    "MemsynError",
    "MismatchError",
    "ModelError",
    "MovedWeightsWarning",
    "NewParametersWarning",
    "Observer",
    "OptionError",
    "OutputError",
    "ProcessError",
    "Protection",
    "ProtectionError",
    "Relative",
    "Report",
    "SamplesInteractError",
    "SlowParametersWarning",
    "Stats",
    "StrengthWarning",
    "Trial",
    "Tuned",
    "measure",
    "penalty",
    "protect",
    "tune",
]
