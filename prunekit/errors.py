"""Exception classes.

PrunekitError
├── ConfigError       invalid config or command line
├── CheckpointError   missing, corrupt or unsupported checkpoint files
├── ShapeError        a pattern does not fit a matrix
├── CapacityError     too little memory or disk
├── NumericsError     NaN, inf, a singular Gram matrix, sparsities outside 0 to 1
├── GateError         a pruned model does not keep the limits of [gates]
├── HubError          the Hugging Face hub cannot be reached or refuses
├── RankError         another rank has failed
└── StoppedError      the run stopped on request and can be resumed
"""

import errno

OUT_OF_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "can't start new thread",
    "MemoryError",
)
"""Texts of errors that have no class of their own: PyTorch's on a CPU, those of the system as
PyTorch repeats them for a file that cannot be mapped, Python's, and those that another process
describes."""


class PrunekitError(Exception):
    """Base class; messages name place, problem, allowed values and remedy."""


class ConfigError(PrunekitError):
    """The config or command line is invalid; nothing was written."""


class CheckpointError(PrunekitError):
    """Files of a checkpoint are missing, corrupt or of an unsupported kind."""


class ShapeError(PrunekitError):
    """The shape of a matrix is not divisible as the pattern requires."""


class CapacityError(PrunekitError):
    """Memory or disk is insufficient; usually raised before weights are read."""


class NumericsError(PrunekitError):
    """NaN, inf, a singular Gram matrix, or sparsities outside 0 to 1."""


class GateError(PrunekitError):
    """A pruned model, which is written, misses limits of the config."""


class HubError(PrunekitError):
    """The Hugging Face hub cannot be reached or refuses an upload."""


class RankError(PrunekitError):
    """Another rank of the run has failed; the message names it."""


class StoppedError(PrunekitError):
    """The run stopped on request and can be resumed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is used up."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
