"""Errors a user can fix: one line that names the thing, its value and what to do; `code` is the exit status."""


class FmError(Exception):
    """Any error whose message alone is enough; the command line prints it without a traceback."""

    code = 1


class ConfigError(FmError):
    """An invalid option, mesh or work directory."""

    code = 2


class DataError(FmError):
    """Missing, damaged or unusable data."""

    code = 3


class CheckpointError(FmError):
    """A checkpoint or weights file that is missing, damaged or has the wrong shapes."""

    code = 4


class ResourceError(FmError):
    """No space, memory or device left."""

    code = 5


class NumericError(FmError):
    """Loss or gradients stayed non-finite for longer than the run allows."""

    code = 6


class Preempted(FmError):
    """The run was asked to stop and has saved; start it again with the same command."""

    code = 75
