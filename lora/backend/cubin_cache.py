"""Compiled kernels, kept between runs in $XDG_CACHE_HOME/lora-numpy (~/.cache/lora-numpy).

An entry is found by a hash of everything that decides the machine code: all source text that the kernel
reaches, the instance, the options, the compiler's release and the architecture. An edit of any of them gives
another entry: nothing is ever stale. (CuPy's own cache leaves out the text of included files.) A cubin
is stored under the hash of its bytes, so that processes which compile at once cannot mix each other's files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

from lora.assets import asset
from lora.backend import nvrtc
from lora.backend.sources import reachable
from lora.errors import LoraWarning, WriteError


class Cubin(NamedTuple):
    """A compiled kernel on the disk."""

    path: Path
    symbol: str


def cached_cubin(file: str, name: str, arch: str) -> Cubin:
    """Return the instance `name` of `file` for `arch`, compiled unless that was done before.

    Raises:
        KernelError: the source does not compile.
        DeviceError: it has to be compiled, and the compiler is not installed or does not know `arch`.
        WriteError: the cache's folder cannot be written.
    """
    folder = cache_folder()
    entry = folder / f"{cache_key(file, name, arch)}.json"
    return _read(entry) or _compile(entry, file, name, arch)


def cache_folder() -> Path:
    """Return where the cubins lie."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG specification has a relative path ignored
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lora-numpy" / "cubins"


def cache_key(file: str, name: str, arch: str) -> str:
    """Return the hash, in hex, of all that decides the machine code of `name`."""
    digest = hashlib.sha256()
    parts = [name, arch, repr(nvrtc.version()), *nvrtc.OPTIONS]
    texts = reachable(asset("kernels", file), nvrtc.include_folders())
    contents = sorted((path.name.encode(), text) for path, text in texts.items())
    for part in (*(part.encode() for part in parts), *(piece for pair in contents for piece in pair)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _read(entry: Path) -> Cubin | None:
    """Return what `entry` leads to; None where there is nothing, or where it is damaged, which is said."""
    if not entry.is_file():
        return None
    try:
        stored = json.loads(entry.read_bytes())
        path = entry.with_name(f"{stored['sha256']}.cubin")
        if hashlib.sha256(path.read_bytes()).hexdigest() == stored["sha256"]:
            return Cubin(path, stored["symbol"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    warnings.warn(
        f"{entry}: a damaged entry of the kernel cache is compiled again", LoraWarning, stacklevel=2
    )
    return None


def _compile(entry: Path, file: str, name: str, arch: str) -> Cubin:
    compiled = nvrtc.compile_cubin(file, [name], arch)
    sha256, symbol = hashlib.sha256(compiled.cubin).hexdigest(), compiled.lowered[name]
    path = entry.with_name(f"{sha256}.cubin")
    # the cubin first: an entry never leads to a file that is not there yet
    _write(path, compiled.cubin)
    _write(entry, json.dumps({"kernel": name, "file": file, "symbol": symbol, "sha256": sha256}).encode())
    return Cubin(path, symbol)


def _write(path: Path, content: bytes) -> None:
    """Write `content` under another name and rename it, so that no reader ever sees half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".partial-", delete=False) as temporary:
            temporary.write(content)
        os.replace(temporary.name, path)
    except OSError as error:
        raise WriteError(
            f"cannot write the kernel cache {path.parent}: {error.strerror or error}; "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from error
