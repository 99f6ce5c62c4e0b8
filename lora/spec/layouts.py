"""Two layouts of one model's tensor names: the text model alone, or inside a multimodal checkpoint.

Canonical names are the text layout's. Only what stands inside the decoder moves; heads keep their name.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from lora.contracts import family_contract, family_names
from lora.errors import UsageError

_CANONICAL = "model."


@cache
def _prefixes() -> dict[str, str]:
    """Return what stands for `model.` in each layout, the most specific first."""
    found = {k: v for name in family_names() for k, v in family_contract(name).layouts.items()}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def stored_name(name: str, layout: str) -> str:
    """Return the name in a checkpoint of `layout` for the canonical `name`.

    Raises:
        UsageError: there is no such layout.
    """
    if layout not in _prefixes():
        raise UsageError(f"layout must be one of {', '.join(sorted(_prefixes()))}; got {layout!r}")
    return _prefixes()[layout] + name.removeprefix(_CANONICAL) if name.startswith(_CANONICAL) else name


def canonical_name(stored: str, layout: str) -> str:
    """Return the canonical name for `stored`, a name in a checkpoint of `layout`; a foreign name stays."""
    prefix = _prefixes()[layout]
    if stored.startswith(prefix):
        return _CANONICAL + stored.removeprefix(prefix)
    # a name of the other layout must not pass for the canonical name that it looks like
    return f"{stored} (in layout {layout})" if stored.startswith(_CANONICAL) else stored


def is_skipped(stored: str, family: str) -> bool:
    """Say whether the tensor `stored` of a checkpoint of `family` belongs to a part that is not run here."""
    return stored.startswith(family_contract(family).skipped)


def layout_of(names: Iterable[str]) -> str:
    """Return the layout that `names` are written in: the most specific one whose prefix occurs, else text."""
    names = tuple(names)
    return next((k for k, prefix in _prefixes().items() if any(n.startswith(prefix) for n in names)), "text")
