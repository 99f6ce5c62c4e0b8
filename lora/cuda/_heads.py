"""Which heads the attention kernels have instances for."""

from __future__ import annotations

from lora.backend import Array, bfloat16
from lora.errors import UnsupportedError

WIDTHS = (64, 128, 256)


def check_heads(operation: str, *arrays: Array) -> None:
    """Check that `arrays` [.., E] are what the kernels of `operation` read.

    Raises:
        UnsupportedError: one is not bfloat16, or E is none of `WIDTHS`.
    """
    dtypes, width = {x.dtype for x in arrays}, arrays[0].shape[-1]
    if dtypes != {bfloat16} or width not in WIDTHS:
        raise UnsupportedError(
            f"{operation} on a GPU: expected bfloat16 and heads of {', '.join(map(str, WIDTHS))} dimensions; "
            f"got {', '.join(sorted(map(str, dtypes)))} and {width}"
        )
