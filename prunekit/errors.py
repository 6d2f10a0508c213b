"""What can go wrong, as one tree.

PrunekitError
├── ConfigError       what the user wrote cannot be meant
├── CheckpointError   the files of a model are not what they should be
├── ShapeError        a pattern does not fit a matrix
├── CapacityError     too little memory or disk
├── NumericsError     NaN, inf, a matrix that no damping saves, shares that leave 0 to 1
├── RankError         another process of the run has died
└── StoppedError      the run was asked to stop, and did where it can be taken up again
"""


class PrunekitError(Exception):
    """Anything prunekit refuses; the message says where, what, what is allowed and what to do."""


class ConfigError(PrunekitError):
    """What the user wrote cannot be meant; nothing was written."""


class CheckpointError(PrunekitError):
    """A checkpoint on disk is not what it should be."""


class ShapeError(PrunekitError):
    """A pattern does not fit a matrix."""


class CapacityError(PrunekitError):
    """Memory or disk would not suffice; found before weights are read."""


class NumericsError(PrunekitError):
    """NaN, inf, a Gram matrix that no damping saves, or an allocation that leaves 0 to 1."""


class RankError(PrunekitError):
    """Another process that shares the run has died; the message names it."""


class StoppedError(PrunekitError):
    """The run was asked to stop, and did where it can be taken up again."""
