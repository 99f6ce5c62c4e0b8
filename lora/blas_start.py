"""How NumPy's OpenBLAS starts: it reads its environment once, when NumPy is first imported."""

from __future__ import annotations

import os
import sys

NAME = "OPENBLAS_THREAD_TIMEOUT"
# log2 of the processor ticks for which a thread that has done its part of a product spins before it sleeps:
# a tenth of a millisecond bridges the gap to the next product. By default it is 2^26, and the spinning thread
# shares its core with all element-wise work
TICKS = "18"

_state = {"is_ours": False}


def prepare() -> None:
    """Set the environment that OpenBLAS will read: never over the user's own, and not once it is loaded."""
    if "numpy" not in sys.modules and NAME not in os.environ:
        os.environ[NAME], _state["is_ours"] = TICKS, True


def restore() -> None:
    """Leave the environment of child processes as the user set it, once NumPy is loaded."""
    if _state["is_ours"]:
        os.environ.pop(NAME, None)
        _state["is_ours"] = False
