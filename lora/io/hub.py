"""From what a user names, a path or a hub id, to a folder on this machine, or to an APR file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lora.errors import LoadError, MissingFileError, UnsupportedError
from lora.io.apr_folder import Folder, is_apr, open_folder
from lora.io.checkpoint import CONFIG, INDEX, SINGLE, read_index
from lora.io.peft import TENSORS

# weights in other formats, and a repository's pictures and logs, stay where they are
_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(name: str | os.PathLike[str]) -> Folder:
    """Return the folder of the checkpoint or adapter `name`; an id is looked up in the cache, then fetched.

    A name is a path when it is absolute, starts with a dot, exists, has more than one slash or ends in .apr.

    Raises:
        MissingFileError: the path does not exist.
        UnsupportedError: the path is a file of a format that is not read.
        FileFormatError: the path is an APR file that is corrupt, or holds no model and no adapter.
        LoadError: the id is not in the cache, and cannot be fetched.
    """
    if is_path(name):
        require_path(name)
        return open_folder(name)
    return _from_hub(str(name))


def require_path(name: str | os.PathLike[str]) -> None:
    """Refuse a path that is not there. An id is not looked up: cheaper checks come before a download.

    Raises:
        MissingFileError: the path does not exist.
        UnsupportedError: the path is a file of a format that is not read.
    """
    if not is_path(name):
        return
    path = Path(name)
    if not path.exists():
        raise MissingFileError(f"{path}: no such file or folder")
    if not path.is_dir() and not is_apr(path):
        raise UnsupportedError(
            f"{path} is a file; expected an .apr file, or a folder with {CONFIG} and {SINGLE}"
        )


def is_path(name: str | os.PathLike[str]) -> bool:
    """Say whether `name` is a path, and not the id of a checkpoint on the hub."""
    if not isinstance(name, str):
        return True  # a Path has lost the dot that "./x" had
    path = Path(name)
    formed = path.is_absolute() or name.startswith(".") or name.count("/") > 1 or is_apr(name)
    return formed or path.exists()


def _from_hub(name: str) -> Path:
    # here: it costs a tenth of a second, and most runs name a folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not _HUB_ID.fullmatch(name):
        raise MissingFileError(f"{name}: no such file or folder, and no hub id, which is <owner>/<name>")
    try:
        cached = Path(snapshot_download(name, allow_patterns=list(_FILES), local_files_only=True))
        if _is_whole(cached):
            return cached
    except LocalEntryNotFoundError:
        pass  # not cached, or not all of it
    try:
        fetched = Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise LoadError(_advice(name, str(error).strip().partition("\n")[0].rstrip("."))) from error
    if not _is_whole(fetched):
        raise LoadError(_advice(name, "the files in the cache are not all there"))
    return fetched


def _is_whole(folder: Path) -> bool:
    """Say whether all weights lie in `folder`: a cache may hold a part of a snapshot, and not know it."""
    if (folder / INDEX).is_file():
        return all((folder / file).is_file() for file in read_index(folder).values())
    return (folder / SINGLE).is_file() or (folder / TENSORS).is_file()


def _advice(name: str, reason: str) -> str:
    command = " ".join(f"--include '{pattern}'" for pattern in _FILES)
    return (
        f"{name} is no folder here, and could not be fetched from the hub: {reason}. With a network: "
        f"hf download {name} {command}"
    )
