"""Files that travel with the library: contracts, kernels, and the demo's base model and data."""

from __future__ import annotations

from pathlib import Path

from lora.errors import MissingFileError

_PACKAGE = Path(__file__).parent
_CHECKOUT = _PACKAGE.parent.parent


def asset(*parts: str) -> Path:
    """Return the path of a packaged file or folder, for example `asset("contracts", "ops", "rope.yaml")`.

    In a checkout (or an editable install of one) the top-level `contracts/` and `kernels/` are read, so that
    an edit is seen at once; an installed wheel carries them inside this package.

    Raises:
        MissingFileError: neither place holds it: the installation is incomplete.
    """
    roots = (_CHECKOUT, _PACKAGE) if (_CHECKOUT / "pyproject.toml").is_file() else (_PACKAGE,)
    for root in roots:
        path = root.joinpath(*parts)
        if path.exists():
            return path
    raise MissingFileError(
        f"packaged file {'/'.join(parts)} not found under {' or '.join(map(str, roots))}; "
        "reinstall lora-numpy, or run from a complete checkout"
    )
