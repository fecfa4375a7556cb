"""memsyn: learn something new without forgetting what the model knows (Memory Aware Synapses, ECCV 2018)."""

from memsyn.comparing.compare import compare
from memsyn.comparing.repair import Repaired, repair
from memsyn.comparing.verdict import Comparison, PairedDifference, Verdict
from memsyn.errors import (
    BatchError,
    ForgettingWarning,
    GrownParametersWarning,
    LostParametersWarning,
    MemoryFileError,
    MemsynError,
    MismatchError,
    ModelError,
    MovedStatisticsWarning,
    MovedWeightsWarning,
    NewParametersWarning,
    NotMeasuredWarning,
    NotProtectedWarning,
    OptionError,
    OutputError,
    OutputSideWarning,
    ProcessError,
    ProtectionError,
    RenamedParametersWarning,
    RepeatedDataWarning,
    SamplesInteractError,
    SlowParametersWarning,
    StrengthWarning,
)
from memsyn.live.observer import Observer, Stats
from memsyn.measuring.measure import measure
from memsyn.measuring.objectives import Estimator, Forward
from memsyn.parameters import fingerprint
from memsyn.protecting.penalty import penalty
from memsyn.protecting.protect import protect
from memsyn.protecting.protection import Protection, Report
from memsyn.protecting.statistics import FrozenStatistics, freeze_statistics
from memsyn.protecting.strength import Relative
from memsyn.protecting.tune import Trial, Tuned, tune
from memsyn.values.consolidation import Consolidation
from memsyn.values.factors import FactorSummary, KroneckerFactors
from memsyn.values.importance import Importance, LayerSummary
from memsyn.values.memory import Memory
from memsyn.values.model_merging import merge_models

__all__ = [
    "BatchError",
    "Comparison",
    "Consolidation",
    "Estimator",
    "FactorSummary",
    "ForgettingWarning",
    "Forward",
    "FrozenStatistics",
    "GrownParametersWarning",
    "Importance",
    "KroneckerFactors",
    "LayerSummary",
    "LostParametersWarning",
    "Memory",
    "MemoryFileError",
    "MemsynError",
    "MismatchError",
    "ModelError",
    "MovedStatisticsWarning",
    "MovedWeightsWarning",
    "NewParametersWarning",
    "NotMeasuredWarning",
    "NotProtectedWarning",
    "Observer",
    "OptionError",
    "OutputError",
    "OutputSideWarning",
    "PairedDifference",
    "ProcessError",
    "Protection",
    "ProtectionError",
    "Relative",
    "RenamedParametersWarning",
    "Repaired",
    "RepeatedDataWarning",
    "Report",
    "SamplesInteractError",
    "SlowParametersWarning",
    "Stats",
    "StrengthWarning",
    "Trial",
    "Tuned",
    "Verdict",
    "compare",
    "fingerprint",
    "freeze_statistics",
    "measure",
    "merge_models",
    "penalty",
    "protect",
    "repair",
    "tune",
]
