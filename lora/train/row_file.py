"""A file that grows by rows, which a reader may follow and no second writer may open."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from lora.errors import LoraWarning, ValidationError, WriteError

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps a second writer out
    fcntl = None


class RowFile:
    """Appends to a file; each method raises WriteError where the disk is full, or else cannot be written."""

    def __init__(self, path: Path, *, anew: bool = True) -> None:
        """Open the file, empty or as it is, and hold it until it is closed or the process ends.

        Raises:
            ValidationError: another run holds it; nothing was changed.
            WriteError: it cannot be written.
        """
        self._path = path
        with self._reported():
            # without a buffer: what failed to be written once is not tried again when the file is closed
            self._file = path.open("a+b" if anew else "r+b", buffering=0)
        _hold(self._file, path)
        if anew:
            self.truncate(0)

    def read(self, most: int) -> bytes:
        """Return the next bytes, at most so many; none at the end of the file."""
        return self._file.read(most)

    def append(self, rows: bytes) -> None:
        """Write `rows` to the operating system."""
        rest = memoryview(rows)
        with self._reported():
            while rest:  # a disk that is nearly full takes a part
                rest = rest[self._file.write(rest) :]

    def truncate(self, size: int) -> None:
        """Drop all but the first `size` bytes."""
        with self._reported():
            self._file.truncate(size)

    def sync(self) -> None:
        """Bring all rows to the disk."""
        with self._reported():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WriteError(f"cannot write {self._path}: {error.strerror or error}") from error


def _hold(file: FileIO, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValidationError(
            f"{path.parent}: another run writes it now ({path.name} is held); wait for its end, or "
            "name another output"
        ) from error
    except OSError as error:
        warnings.warn(
            f"{path}: cannot be held ({error.strerror}): see to it that no second run writes {path.parent}",
            LoraWarning,
            stacklevel=2,
        )
