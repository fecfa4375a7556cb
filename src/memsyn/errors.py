"""The exception tree and the warnings of memsyn.

Owns every error the package raises on purpose. Each message says what was expected, what came, where, and
what to do next. Must not import anything else of the package.
"""


class MemsynError(Exception):
    """Root of all errors raised on purpose by memsyn."""


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
    """Two things that should hold the same parameters do not."""


class ProtectionError(MemsynError, ValueError):
    """The optimizer and the memory do not fit together."""


class ProcessError(MemsynError, RuntimeError):
    """Another process of those that measure together has failed."""


class MemoryFileError(MemsynError, OSError):
    """A file is missing, damaged, not written by memsyn, or of a newer format."""


class MissingFileError(MemoryFileError):
    """There is no file."""


class SlowParametersWarning(UserWarning):
    """Some parameters are measured one sample at a time: exact, but slow."""


class NewParametersWarning(UserWarning):
    """The model has parameters that the memory does not know: they are free to change."""


class LostParametersWarning(UserWarning):
    """The memory has parameters that the model no longer has: there is nothing to protect."""


class MovedWeightsWarning(UserWarning):
    """The model's weights are not those the memory was consolidated at, or the importance measured at."""


class StrengthWarning(UserWarning):
    """A strength is too large: training will diverge, or the new task cannot be learned."""
