"""Writing that leaves the old file or the new one, and never half of either."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from lora.errors import WriteError

_number = itertools.count()
_PARTIAL = re.compile(r"\..+\.\d+-\d+\.partial")


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and rename what was written there to `path` at the end.

    After an error, or a kill at any moment, `path` is what it was before.

    Raises:
        WriteError: the file could not be written.
    """
    temporary = _beside(path)
    with _reported(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all.

    Raises:
        WriteError: the file could not be written.
    """
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replace_folder(folder: Path, *, owns: tuple[str, ...] = ("*",)) -> Iterator[Path]:
    """Give an empty folder beside `folder`, which takes the place of `folder` at the end.

    What was in `folder` under a name that matches no pattern of `owns`, and is not written anew, is kept. The
    swap is two renames: a kill between them leaves the old folder, whole, beside it under a name with a dot.

    Raises:
        WriteError: the folder could not be written, or is the current one, which cannot be swapped.
    """
    folder = folder.resolve()
    temporary, old = _beside(folder), _beside(folder)
    with _reported(folder):
        if folder == Path.cwd():
            raise WriteError(f"{folder} is the current folder and cannot be replaced; name one inside it")
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for path in temporary.iterdir():
                _sync(path)
            _sync_folder(temporary)
            _swap(temporary, folder, old, owns)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove `folder`, if it is there: it is gone at once, and after a kill never there by half.

    Raises:
        WriteError: it cannot be removed.
    """
    if folder.is_dir():
        with _reported(folder):
            old = _beside(folder)
            os.replace(folder, old)
            shutil.rmtree(old)


def remove_partial(folder: Path) -> None:
    """Remove from `folder` what a write was killed over; none may be running there now.

    Raises:
        WriteError: something cannot be removed.
    """
    with _reported(folder):
        for path in folder.iterdir():
            if _PARTIAL.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _swap(new: Path, folder: Path, old: Path, owns: tuple[str, ...]) -> None:
    existed = folder.exists()
    if existed:
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except BaseException:  # Ctrl-C too
        if existed and not folder.exists():
            os.replace(old, folder)
        raise
    if existed:
        for path in old.iterdir():
            foreign = not any(fnmatchcase(path.name, pattern) for pattern in owns)
            if foreign and not (folder / path.name).exists():
                os.replace(path, folder / path.name)
        shutil.rmtree(old)
    _sync_folder(folder.parent)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{next(_number)}.partial")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    # some systems cannot flush a folder; its files are on the disk by then, only their names may not be
    with suppress(OSError):
        _sync(path)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error
