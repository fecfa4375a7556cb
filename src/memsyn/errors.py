"""The exception tree and the warnings of memsyn.

Owns every error that the package raises on purpose. A message says what was expected, what came, where, and what to do
next. Must not import any other module of the package.
"""


class MemsynError(Exception):
    """Base class of all errors that memsyn raises on purpose."""


class OptionError(MemsynError, ValueError):
    """An argument has a value that is not allowed."""


class ModelError(MemsynError, ValueError):
    """The model cannot be measured or protected as it is."""


class BatchError(MemsynError, ValueError):
    """The batches cannot be read as samples."""


class OutputError(MemsynError, ValueError):
    """The model's output cannot be turned into one finite, differentiable number per sample."""


class SamplesInteractError(ModelError):
    """The output for one sample depends on the other samples of its batch, or on random numbers."""


class MismatchError(MemsynError, ValueError):
    """Two objects that must belong together do not: their parameters, weights or settings differ."""


class ProtectionError(MemsynError, ValueError):
    """The optimizer and the memory do not fit together."""


class ProcessError(MemsynError, RuntimeError):
    """Another process of the group that works together has failed."""


class MemoryFileError(MemsynError, OSError):
    """A file is missing, damaged, not written by memsyn, or of a newer format."""


class MissingFileError(MemoryFileError):
    """The file does not exist."""


class SlowParametersWarning(UserWarning):
    """Some parameters are measured one sample at a time. This is exact, but slow."""


class NewParametersWarning(UserWarning):
    """The model has parameters that are not in the memory. They are not protected."""


class LostParametersWarning(UserWarning):
    """The memory has parameters that are not in the model. There is nothing to protect."""


class MovedWeightsWarning(UserWarning):
    """The model's weights differ from the weights at which the memory was consolidated or the importance measured."""


class MovedStatisticsWarning(MovedWeightsWarning):
    """Running statistics, or other buffers, are no longer those that the memory remembers."""


class RenamedParametersWarning(UserWarning):
    """The memory's parameters have other names in the model, such as a wrapper's prefix. They were found."""


class GrownParametersWarning(UserWarning):
    """A parameter has more rows than the memory knows, as a head with new classes. The new rows are not protected."""


class StrengthWarning(UserWarning):
    """A strength is too large: training will diverge, or the new task cannot be learned."""


class NotMeasuredWarning(UserWarning):
    """A trainer's callback has not measured a training. The trained model and the memory are as they were."""


class RepeatedDataWarning(UserWarning):
    """A trainer's callback trains again on the data that it has measured. The new measurement replaces the last one."""


class OutputSideWarning(UserWarning):
    """Some matrices of a sharded model are projected by their inputs alone. Sums over processes would be large."""


class NotProtectedWarning(UserWarning):
    """Protected weights were moved by something else than a step of the optimizer that is protected."""


class ForgettingWarning(UserWarning):
    """A training was stopped: outputs on the remembered data are predicted to have changed by more than was allowed."""
