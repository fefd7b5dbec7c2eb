"""Every error that a user can meet, each with a hint (the next command) and an exit code.

RecapError                 1
├── UsageError             2   a wrong command line
│   └── PipeError         15   standard input named no state: in a pipe, the stage before has failed
├── RecipeError            3   a recipe with problems, all of them at once
├── DataError              4   a data file, column or label that does not fit
├── ModelError             5   weights, a model type or a head that does not fit
│   └── ConformanceError   6   an adapter whose table does not describe the model
├── PluginError            7   a plugin that is unknown, broken or claimed twice
├── StateError             8   a state folder that cannot be used
│   ├── StageOrderError    9   a stage that is not the next one
│   ├── StateLockedError  10   another process is writing the state
│   └── CorruptStateError 11   a file that is not what was committed
├── StorageError          12   the disk is full, or the folder cannot be written
├── TrainingError         13   a loss that is not finite
├── SelectionError        14   a ratio that the groups there are cannot meet
├── DeviceMemoryError     16   the accelerator's memory ran out
├── BudgetError           17   a memory budget that no settings fit in
├── ComparisonError       18   a comparison some of whose cells are not done
└── MissingExtraError     19   a package of an extra that is not installed
"""

from recap_cli.printable import printable


class RecapError(Exception):
    """Base of every error that becomes a message instead of a traceback.

    Both texts are made `printable`, because they quote files and plugins, and Python's tracebacks show them too.

    Attributes:
        message: Names the thing and the place.
        hint: The next command or step, if there is one.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        message, hint = printable(message), None if hint is None else printable(hint)
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:  # tracebacks of plain Python show notes; `cli` prints the hint itself
            self.add_note(f"hint: {hint}")


class UsageError(RecapError):
    """A wrong command line."""

    exit_code = 2


class PipeError(UsageError):
    """Standard input ended before it named a state: in a pipe, the stage before has failed."""

    exit_code = 15


class RecipeError(RecapError):
    """A recipe with problems; the message lists all of them."""

    exit_code = 3


class DataError(RecapError):
    """A data file, column or label that does not fit."""

    exit_code = 4


class ModelError(RecapError):
    """Weights, a model type or a head that does not fit."""

    exit_code = 5


class ConformanceError(ModelError):
    """An adapter whose table of names does not describe the model at hand."""

    exit_code = 6


class PluginError(RecapError):
    """A plugin that is unknown, broken, or claimed by two distributions."""

    exit_code = 7


class StateError(RecapError):
    """A state folder that cannot be used."""

    exit_code = 8


class StageOrderError(StateError):
    """A stage that is not the next one."""

    exit_code = 9


class StateLockedError(StateError):
    """Another process is writing the state."""

    exit_code = 10


class CorruptStateError(StateError):
    """A file of the state that is not what was committed."""

    exit_code = 11


class StorageError(RecapError):
    """The disk is full, or a folder cannot be written."""

    exit_code = 12


class TrainingError(RecapError):
    """A loss or a gradient that is not finite."""

    exit_code = 13


class SelectionError(RecapError):
    """A ratio that the groups there are cannot meet; a cut to compensate whose inputs are not finite."""

    exit_code = 14


class DeviceMemoryError(RecapError):
    """The memory of the accelerator ran out; that of the machine is a `StorageError`."""

    exit_code = 16


# Messages of torch for a lack of memory that has no type: of MPS, of the driver, and of cuBLAS and cuDNN.
OUT_OF_MEMORY_MESSAGES = (
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def lacks_device_memory(error: BaseException) -> bool:
    """Whether an exception of torch means that an accelerator ran out of memory. Looks at names and messages, without torch."""
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_MESSAGES)
    )


class BudgetError(RecapError):
    """A memory budget that no settings fit in."""

    exit_code = 17


class ComparisonError(RecapError):
    """A comparison some of whose cells are not done: they failed, or their settings are impossible."""

    exit_code = 18


class MissingExtraError(RecapError):
    """A package of an extra that is not installed; the hint is the command that installs it."""

    exit_code = 19
