"""All the text that a kernel is compiled from: its file, and what that includes, however deep."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora.errors import KernelError

_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*(?:["<]([^">\n]+)[">]|(\S[^\n]*))', re.MULTILINE)


def reachable(file: Path, folders: Sequence[Path]) -> dict[Path, bytes]:
    """Return the text of `file` and of every file that it includes, by path.

    An #include counts wherever it stands, also where a condition turns it off; one that is found neither
    beside its file nor in `folders` is the compiler's own.

    Raises:
        KernelError: an #include of `file`'s own folder names a macro, so that what it reaches cannot be told.
    """
    found: dict[Path, bytes] = {}
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = path.read_bytes()
        for name, macro in _INCLUDE.findall(found[path]):
            if macro and path.parent == file.parent:
                raise KernelError(
                    f"{path.name}: #include {macro.decode()}: expected a file's name, not a macro"
                )
            places = (folder / name.decode() for folder in (path.parent, *folders))
            waiting.extend([place for place in places if place.is_file()][:1])
    return found
