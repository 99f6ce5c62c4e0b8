"""What the seed's command line knows and this version has not built: refused by name, never ignored."""

from __future__ import annotations

from lora.errors import UnsupportedError


def refuse_apr(*paths: str | None) -> None:
    """Refuse files of the seed's own format as what a run is written into.

    Raises:
        UnsupportedError: a path ends in .apr.
    """
    for path in paths:
        if path is not None and path.lower().endswith(".apr"):
            raise UnsupportedError(
                f"{path}: a run is written into a folder; name one, and `lora convert` its best/ to {path}"
            )
