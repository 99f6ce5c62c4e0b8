"""One class for each thing that a caller can fix, each with the exit code of the command line."""

from __future__ import annotations


class LoraError(Exception):
    """Base of every error that this library raises on purpose."""

    exit_code = 1


class KernelError(LoraError):
    """A CUDA source, and the Python that launches it, do not fit together; a defect of this library."""


class UsageError(LoraError):
    """The call or the command line is not of the documented form."""

    exit_code = 2


class MissingFileError(LoraError):
    """A file or folder that was named does not exist."""

    exit_code = 3


class FileFormatError(LoraError):
    """A file is truncated, corrupt or not of the format that its name says."""

    exit_code = 4


class ValidationError(LoraError):
    """The input was read, and breaks a rule."""

    exit_code = 5


class ShapeError(ValidationError):
    """Arrays do not fit together."""


class ContractError(ValidationError):
    """A model's sizes break, or contradict, a family contract."""


class DataError(ValidationError):
    """Rows of a data file break a rule; the message lists them by line number."""


class AdapterError(ValidationError):
    """An adapter does not fit the model, or its configuration does not say what it must."""


class UnsupportedError(ValidationError):
    """A setting is valid elsewhere, and not built here."""


class DeviceError(ValidationError):
    """Arrays live on different devices, or the device that was asked for is not there."""


class DivergedError(ValidationError):
    """A loss or a gradient is not finite; the message names where it appeared first, and what to lower."""


class LoadError(LoraError):
    """A model could not be loaded."""

    exit_code = 6


class WriteError(LoraError):
    """A file could not be written; the previous one, if any, is unharmed."""

    exit_code = 7


class LoraWarning(UserWarning):
    """Something was done as asked, and is not what one might take it for: the message says in which way."""
